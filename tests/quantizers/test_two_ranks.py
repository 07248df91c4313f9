"""Every quantizer has identical bits on two ranks after whiten_init and updates."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqpipe.config import all_subclasses, from_table
from vqpipe.distributed import rank
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.quantizers import Quantizer, QuantizerConfig

SMALL: dict[str, Any] = {"codebook_size": 512, "code_dim": 8, "feature_dim": 12, "codebook_init": "uniform"}
SMALL["replace_every"] = 2  # three updates replace codes once
GROUP = {"kind": "cvq", "codebook_size": 64, "code_dim": 4, "normalize": True}
LC_GROUP = {"kind": "lc", "codebook_size": 64, "code_dim": 4, "feature_dim": 12, "codebook_init": "uniform"}


def examples() -> dict[str, dict[str, Any]]:
    """A small config for every kind, and for multi_group over lc."""
    tables = {}
    for cls in all_subclasses(Quantizer):
        if config := getattr(cls, "config_class", None):
            known = {field.name for field in fields(config)}
            tables[config.kind] = {"kind": config.kind} | {key: SMALL[key] for key in SMALL if key in known}
    tables["multi_group"] |= {"group": GROUP, "masking": "batch"}  # so a rank may have no image of a group
    return tables | {"multi_group over lc": {"kind": "multi_group", "num_groups": 2, "group": LC_GROUP}}


def start_and_update(table: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Whiten on the images of this rank, then update on them three times, with random numbers of this rank."""
    torch.manual_seed(0)
    quantizer = from_table(QuantizerConfig, table)
    model = build_autoencoder(
        VqganConfig(quantizer=quantizer, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=16)
    )
    torch.manual_seed(1 + rank())
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    model.whiten_init(images)
    for _ in range(3):
        latent = model.latent(images).detach()
        model.quantizer.update(latent, model.quantizer(latent).ids)
    return model.state_dict()


def save_states(folder: Path) -> None:
    states = {kind: start_and_update(table) for kind, table in examples().items()}
    tensors = {f"{kind}/{name}": tensor for kind, state in states.items() for name, tensor in state.items()}
    save_file(tensors, folder / f"rank-{rank()}.safetensors")


@pytest.mark.slow
def test_two_ranks_have_the_same_bits(on_two_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    on_two_ranks(save_states, tmp_path)
    first, second = (load_file(tmp_path / f"rank-{number}.safetensors") for number in range(2))
    assert {name.split("/")[0] for name in first} == examples().keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
