"""From images to latents with a tokenizer's encoder, and from latents back to images by way of ids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe import artifacts
from vqpipe.config import from_table
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import open_images
from vqpipe.data.latents import LatentStatistics, open_latents, write_latents
from vqpipe.errors import DataError, NumericError
from vqpipe.generation.latents import to_images
from vqpipe.models import AutoencoderConfig, build_autoencoder
from vqpipe.tokenizer import Tokenizer

TINY = {
    "kind": "vqgan",
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "z_channels": 8,
}


def tokenizer(quantizer: dict[str, object] | None = None) -> Tokenizer:
    torch.manual_seed(0)
    table = TINY | {"quantizer": quantizer or {"kind": "vq", "codebook_size": 64, "code_dim": 4}}
    return Tokenizer(build_autoencoder(from_table(AutoencoderConfig, table, "model")), image_size=16)


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "vq", "codebook_size": 64, "code_dim": 4},
        {"kind": "multi_group", "num_groups": 2, "group": {"kind": "vq", "codebook_size": 16, "code_dim": 2}},
    ],
)
def test_stored_latents_decode_to_the_tokenizers_own_images(
    quantizer: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    images, opened = open_images([str(tmp_path / "images")]), tokenizer(quantizer)
    draft = artifacts.start(tmp_path / "latents", "latents", {}, {"images": images})
    assert isinstance(draft, artifacts.Draft)
    with draft:
        facts = write_latents(draft, images, opened, image_size=16, flip=True)
        draft.publish(facts)
    pixels = next(iter(OrderedBatches(images, image_size=16, batch_size=3))).images
    latents = open_latents(tmp_path / "latents")
    assert latents.shape == (opened.autoencoder.quantizer.latent_dim, 8, 8)
    assert latents.num_classes is None
    for rows, view in (([0, 2, 4], pixels), ([1, 3, 5], pixels.flip(-1))):
        made, ids = to_images(latents.take(rows), latents.statistics, opened)
        truth = opened.encode(view)
        assert (ids == truth).float().mean() > 0.98  # float16 moves a latent across a border now and then
        assert torch.equal(made, opened.decode(ids, (16, 16)))
    with pytest.raises(DataError, match="does not divide into cells of 2"):
        write_latents(draft, images, opened, image_size=15)


def test_the_ids_are_those_of_the_denormalised_latents_at_any_size() -> None:
    opened = tokenizer()
    statistics = LatentStatistics((0.5, -1.0, 0.0, 2.0), (0.1, 0.2, 0.3, 0.4))
    normal = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    made, ids = to_images(normal, statistics, opened)
    mean, std = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.std))
    codes = opened.autoencoder.quantizer.lookup(torch.arange(64)[None], opened.layout(16, 16))
    table = codes.flatten(2)[0].T
    vectors = (normal * std + mean).movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(vectors.double(), table.double()).argmin(dim=1).view(2, 35)
    assert torch.equal(ids, nearest)
    assert made.shape == (2, 3, 10, 14)
    assert made.dtype == torch.uint8


def test_refuses_what_a_generator_should_not_give() -> None:
    opened, statistics = tokenizer(), LatentStatistics.identity(4)
    with pytest.raises(NumericError, match="the generator drew NaN or infinity"):
        to_images(torch.full((1, 4, 2, 2), float("inf")), statistics, opened)
    with pytest.raises(DataError, match="latents of 3 channels, the tokenizer has 4"):
        to_images(torch.zeros(1, 3, 2, 2), LatentStatistics.identity(3), opened)
