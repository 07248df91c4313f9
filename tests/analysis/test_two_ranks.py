"""Two ranks give the results of one process."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vqpipe.analysis import ANALYSES, build
from vqpipe.distributed import rank, world_size
from vqpipe.metrics.usage import CodeUsage
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.quantizers import MultiGroupConfig, VqConfig
from vqpipe.reports import page
from vqpipe.tokenizer import Tokenizer


def look() -> dict[str, Any]:
    """All results for twelve images, one at a time on each rank; on rank 0 the page too."""
    torch.manual_seed(0)
    groups = MultiGroupConfig(num_groups=2, group=VqConfig(codebook_size=60, code_dim=3))
    model = build_autoencoder(
        VqganConfig(quantizer=groups, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=16)
    )
    model.quantizer.standardize_codebook()
    tokenizer = Tokenizer(model)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    usage, analyses = CodeUsage(60, 2), build(list(ANALYSES), tokenizer)
    for place in range(rank(), len(images), world_size()):
        own = images[place : place + 1]
        ids = tokenizer.encode(own)
        usage.update(ids, start=place)
        for analysis in analyses:
            analysis.update(own, tokenizer.decode(ids, (16, 16)), ids, [f"image-{place}"])
    found: dict[str, Any] = {"usage": usage.compute(images[:, 0].numel())[1:]}
    found |= {analysis.name: analysis.result() for analysis in analyses}
    if rank() == 0:
        parts = {analysis.name: analysis.sections(found[analysis.name]) for analysis in analyses}
        assert len(parts.pop("embedding")) == 1  # t-SNE magnifies every rounding
        sections = [section for part in parts.values() for section in part]
        found["page"] = page.render(page.ReportPage("two ranks", "", sections))
    return json.loads(json.dumps(found))


@pytest.mark.slow
def test_two_ranks_give_the_results_of_one_process(on_two_ranks: Callable[..., list[Any]]) -> None:
    first, second = on_two_ranks(look)
    alone = look()
    for name, value in alone["usage"][0].items():
        if name.startswith("joint"):  # a sum in another order
            assert first["usage"][0][name] == pytest.approx(value)
            first["usage"][0][name] = value
    assert first.keys() == alone.keys()
    assert [name for name in alone if first[name] != alone[name]] == []
    assert [name for name in ANALYSES if second[name] != first[name]] == []
