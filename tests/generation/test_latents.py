"""Encoding of images to latents, their ids, and guidance of networks on latents."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqpipe.config import from_table
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import open_images
from vqpipe.data.latents import LatentStatistics, open_latents
from vqpipe.errors import ArtifactError, ConfigError, DataError, NumericError
from vqpipe.generation import SamplingConfig, SitConfig, Space, build_generator
from vqpipe.generation.generate import SamplePlan
from vqpipe.generation.image_generator import ImageGenerator
from vqpipe.generation.latents import GuidedNetwork, encode_latents, quantize_latents
from vqpipe.models import AutoencoderConfig, build_autoencoder
from vqpipe.quantizers import TokenLayout
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
def test_stored_latents_have_the_ids_of_their_images(
    quantizer: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    images, opened = open_images([str(tmp_path / "images")]), tokenizer(quantizer)
    artifact = encode_latents(tmp_path / "latents", images, opened, image_size=16, flip=True)
    assert encode_latents(tmp_path / "latents", images, opened, image_size=16, flip=True).digest == artifact.digest
    with pytest.raises(ArtifactError, match=r"flip was true, now false\. .* or leave out --images to use them as they"):
        encode_latents(tmp_path / "latents", images, opened, image_size=16, flip=False)
    pixels = next(iter(OrderedBatches(images, image_size=16, batch_size=3))).images
    latents = open_latents(tmp_path / "latents")
    assert latents.shape == (opened.autoencoder.quantizer.latent_dim, 8, 8)
    for rows, encoded in (([0, 2, 4], pixels), ([1, 3, 5], pixels.flip(-1))):
        ids = quantize_latents(latents.take(rows), latents.statistics, opened)
        assert (ids == opened.encode(encoded)).float().mean() > 0.98  # rounding to float16 changes a few ids
    with pytest.raises(DataError, match="is not divisible into cells of 2"):
        encode_latents(tmp_path / "other", images, opened, image_size=15, flip=True)


def test_latents_of_any_size_are_denormalised_and_quantized() -> None:
    opened = tokenizer()
    statistics = LatentStatistics((0.5, -1.0, 0.0, 2.0), (0.1, 0.2, 0.3, 0.4))
    normal = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = quantize_latents(normal, statistics, opened)
    mean, std = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.std))
    codes = opened.autoencoder.quantizer.lookup(torch.arange(64)[None], opened.layout(16, 16))
    table = codes.flatten(2)[0].T
    vectors = (normal * std + mean).movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(vectors.double(), table.double()).argmin(dim=1).view(2, 35)
    assert torch.equal(ids, nearest)


def test_ids_of_a_latent_generator_are_those_that_its_samples_are_decoded_from() -> None:
    opened, statistics = tokenizer(), LatentStatistics((0.0,) * 4, (0.01,) * 4)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampled: Any = SimpleNamespace(sample=lambda labels, sampling, rngs: latents)
    images = ImageGenerator(sampled, opened, 16, (), SamplingConfig(), statistics)
    labels = torch.zeros(2, dtype=torch.int64)
    ids = images.sample_ids(labels, images.sampling, [])
    assert torch.equal(ids, quantize_latents(latents, statistics, opened))
    assert len(ids.unique()) > 10
    assert torch.equal(images.sample(labels, images.sampling, []), opened.decode(ids, (16, 16)))


def test_no_latents_have_no_ids() -> None:
    ids = quantize_latents(torch.empty(0, 4, 8, 8), LatentStatistics.identity(4), tokenizer())
    assert (ids.shape, ids.dtype) == ((0, 64), torch.int64)


def test_invalid_latents_are_refused() -> None:
    opened, statistics = tokenizer(), LatentStatistics.identity(4)
    with pytest.raises(NumericError, match="the generator sampled NaN or infinity"):
        quantize_latents(torch.full((1, 4, 2, 2), float("inf")), statistics, opened)
    with pytest.raises(DataError, match="latents of 3 channels, the statistics are of 4"):
        quantize_latents(torch.zeros(1, 3, 2, 2), statistics, opened)


class CountingNetwork:
    """Predicts 3, for the null class 1, and the class as its variance channels; records its batch sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        self.sizes.append(len(x))
        value = torch.where(classes == 10, 1.0, 3.0)[:, None, None, None]
        return torch.cat([value.expand_as(x), classes[:, None, None, None].expand_as(x).float()], dim=1)


def guided(network: CountingNetwork, **sampling: object) -> GuidedNetwork:
    classes = torch.tensor([4, 5])
    return GuidedNetwork(network, classes, torch.full_like(classes, 10), SamplingConfig(**sampling))  # type: ignore[arg-type]


def test_guidance_acts_on_all_or_the_first_channels_in_one_batch_of_both() -> None:
    network, x = CountingNetwork(), torch.zeros(2, 8, 2, 2)
    output = guided(network, cfg_scale=4.0)(x, 0.5, 0.5)
    assert network.sizes == [4]
    assert torch.equal(output[:, :8], torch.full_like(x, 1 + 4 * (3 - 1)))
    assert output[:, 8:].amax(dim=(1, 2, 3)).tolist() == [4, 5]  # the conditional variance

    first = guided(CountingNetwork(), cfg_scale=4.0, cfg_channels=3)(x, 0.5, 0.5)
    assert torch.equal(first[:, :3], torch.full_like(x[:, :3], 1 + 4 * (3 - 1)))
    assert torch.equal(first[:, 3:8], torch.full_like(x[:, 3:], 3))  # the conditional prediction
    assert torch.equal(first[:, 8:], output[:, 8:])

    network = CountingNetwork()
    plain = guided(network, cfg_scale=1.0)(x, 0.5, 0.5)
    assert network.sizes == [2]
    assert torch.equal(plain[:, :8], torch.full_like(x, 3))


def test_guidance_of_more_channels_than_the_latent_has_is_refused() -> None:
    space = Space(layout=TokenLayout(((4, 4),), 1), codebook_size=8, latent_dim=2, code_dim=2, num_classes=3)
    sit = build_generator(SitConfig(size="tiny"), space)
    label, rng = torch.zeros(1, dtype=torch.int64), [torch.Generator()]
    sit.check_sampling(label, SamplingConfig(cfg_scale=8.0, cfg_channels=2), rng)
    with pytest.raises(ConfigError, match=r"cfg_channels = 3, the latent has 2 channels"):
        sit.check_sampling(label, SamplingConfig(cfg_scale=8.0, cfg_channels=3), rng)
    with pytest.raises(ConfigError, match=r"generate\.cfg_channels = -1\. It must be at least 0"):
        SamplingConfig(cfg_channels=-1)


def test_guided_channels_are_part_of_a_request_unless_they_are_all() -> None:
    requests = [
        SamplePlan(num_images=1, classes=(), sampling=SamplingConfig(cfg_channels=count)).to_request()["generate"]
        for count in (0, 3)
    ]
    assert "cfg_channels" not in requests[0]
    assert requests[1] == {**requests[0], "cfg_channels": 3}


def test_guidance_is_limited_to_its_interval_and_follows_its_schedule() -> None:
    network, x = CountingNetwork(), torch.zeros(2, 1, 1, 1)
    predict = guided(network, cfg_scale=3.0, cfg_interval=(0.25, 0.75))
    values = [float(predict(x, 0.0, progress)[0, 0]) for progress in (0.0, 0.2, 0.3, 0.7, 0.8, 1.0)]
    assert values == [3, 3, 7, 7, 3, 3]
    assert network.sizes == [2, 2, 4, 4, 2, 2]
    rising = guided(network, cfg_scale=3.0, cfg_schedule="linear")
    assert [float(rising(x, 0.0, progress)[0, 0]) for progress in (0.0, 0.5, 1.0)] == [3, 5, 7]
