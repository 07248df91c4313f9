"""Validation: numbers against an independent formula, and the best weights through resumes and kills."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vqpipe.data.images import ImageSet, open_images
from vqpipe.distributed import rank
from vqpipe.errors import ArtifactError, DataError
from vqpipe.models import Autoencoder, DcaeConfig, VqganConfig, build_autoencoder
from vqpipe.quantizers import LcConfig
from vqpipe.training.networks import batch_norms
from vqpipe.training.validation import BestWeights, Validation

SIZE = 16


@pytest.fixture
def network(tiny_config: Callable[[], VqganConfig]) -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(tiny_config())


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    folder = tmp_path / "held-out"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return open_images([str(folder)])


def validation(images: ImageSet, batch_size: int = 3, limit: int = 100) -> Validation:
    return Validation(
        images,
        image_size=SIZE,
        batch_size=batch_size,
        limit=limit,
        perceptual={"lpips_vgg": MeanDifference()},
        num_workers=0,
        device=torch.device("cpu"),
    )


class MeanDifference(torch.nn.Module):
    """In place of LPIPS."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_numbers_equal_an_independent_formula(network: Autoencoder, images: ImageSet) -> None:
    row, code_counts = validation(images, limit=5).measure(network.train())
    network.eval()
    decibels, distances, chosen = [], [], []
    for place in range(5):
        pixels = np.array(Image.open(io.BytesIO(images.read(place))))
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            output = network(batch)
        rounded = np.clip(np.round((output.images[0].permute(1, 2, 0).double().numpy() + 1) * 127.5), 0, 255)
        difference = pixels.astype(float) - rounded
        decibels.append(10 * np.log10(255**2 / np.mean(difference**2)))
        distances.append(np.mean(np.abs(difference)) / 127.5)
        chosen += output.quantized.ids.flatten().tolist()
    counts = np.bincount(chosen, minlength=32)
    shares = counts[counts > 0] / counts.sum()
    assert row["valid/images"] == 5
    assert row["valid/psnr"] == pytest.approx(np.mean(decibels), abs=1e-3)
    assert row["valid/lpips_vgg"] == pytest.approx(np.mean(distances), abs=1e-4)
    assert row["valid/utilization"] == (counts > 0).mean()
    assert row["valid/perplexity"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    assert code_counts.tolist() == [counts.tolist()]


def test_batch_size_does_not_change_the_numbers_and_validation_does_not_change_the_network(
    network: Autoencoder, images: ImageSet
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rows = [validation(images, batch_size).measure(network)[0] for batch_size in (1, 3, 7)]
    assert rows[0]["valid/images"] == 7
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_unreadable_images_are_left_out_and_no_readable_image_is_an_error(network: Autoencoder, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the validation images can be read"):
        validation(open_images([str(folder)])).measure(network)
    Image.new("RGB", (SIZE, SIZE), (200, 10, 10)).save(folder / "b.png")
    assert validation(open_images([str(folder)])).measure(network)[0]["valid/images"] == 1


class Numbered(torch.nn.Module):
    """A network whose weights hold its step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(step))


def kept_steps(best: BestWeights, values: dict[int, float]) -> list[int]:
    """The steps whose weights were kept."""
    return [step for step, value in values.items() if best.keep_if_best(Numbered(step), step, {best.measure: value})]


def kept_step(path: Path) -> int:
    return int(load_file(path)["step"])


@pytest.mark.parametrize(("higher", "expected"), [(True, [1, 2, 5]), (False, [1, 3, 4])])
def test_best_weights_are_kept_through_a_resume(tmp_path: Path, higher: bool, expected: list[int]) -> None:
    path = tmp_path / "best.safetensors"
    best = BestWeights(path, "valid/psnr", higher_is_better=higher)
    first, second = {1: 20.0, 2: 21.5, 3: 19.0}, {4: 18.0, 5: 22.0}
    taken = kept_steps(best, first)
    resumed = BestWeights(path, "valid/psnr", higher_is_better=higher)
    assert (resumed.step, resumed.value) == (best.step, best.value) == (taken[-1], first[taken[-1]])
    assert kept_steps(resumed, first) == []  # a resumed run computes them again
    taken += kept_steps(resumed, second)
    assert taken == expected
    assert kept_step(path) == resumed.step == expected[-1]
    renamed = BestWeights(path, "valid/perceptual_mine", higher_is_better=higher)
    assert (renamed.step, renamed.value) == (resumed.step, resumed.value)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ArtifactError, match=r"best\.safetensors is damaged .*Delete it"):
        BestWeights(path, "valid/psnr", higher_is_better=higher)


def test_nan_is_never_the_best_and_infinite_psnr_is(tmp_path: Path) -> None:
    best = BestWeights(tmp_path / "best.safetensors", "valid/psnr", higher_is_better=True)
    assert kept_steps(best, {1: float("nan"), 2: 10.0, 3: float("nan")}) == [2]
    assert best.keep_if_best(Numbered(4), 4, {})  # not a pixel differs, so there is no PSNR
    assert kept_step(best.path) == 4


@pytest.mark.parametrize(
    ("higher", "best_value", "worse", "far_worse"), [(True, 22.0, 19.1, 18.9), (False, 0.2, 0.29, 0.31)]
)
def test_collapse_is_a_far_worse_validation(
    tmp_path: Path, higher: bool, best_value: float, worse: float, far_worse: float
) -> None:
    best = BestWeights(tmp_path / "best.safetensors", "valid/measure", higher_is_better=higher)
    assert not best.collapsed({best.measure: far_worse})  # there is no best yet
    kept_steps(best, {1: best_value, 2: worse, 3: far_worse})
    assert [best.collapsed({best.measure: value}) for value in (best_value, worse, far_worse)] == [False, False, True]
    assert kept_step(best.path) == 1


def test_kill_while_keeping_new_weights_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = BestWeights(tmp_path / "best.safetensors", "valid/psnr", higher_is_better=True)
    kept_steps(best, {1: 20.0})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        kept_steps(best, {2: 30.0})
    assert BestWeights(best.path, "valid/psnr", higher_is_better=True).step == 1 == kept_step(best.path)


def measured_statistics(folder: Path) -> list[float]:
    """The running mean of a batch norm after a validation; before it, every rank has another."""
    torch.manual_seed(0)
    quantizer = LcConfig(codebook_size=32, feature_dim=8, code_dim=4, codebook_init="uniform")
    depths = {"encoder_depths": (0, 1), "decoder_depths": (0, 1), "attention_from": 2}
    network = build_autoencoder(
        DcaeConfig(quant_conv="full", widths=(8, 8), latent_channels=4, quantizer=quantizer, **depths)
    )
    norm = batch_norms(network)[0]
    norm.running_mean.fill_(1.0 + rank())
    validation(open_images([str(folder)])).measure(network)
    return norm.running_mean.tolist()


@pytest.mark.slow
def test_ranks_measure_with_the_batch_norms_of_rank_0(
    images: ImageSet, on_two_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    first, second = on_two_ranks(measured_statistics, tmp_path / "held-out")
    assert first == second
    assert first[0] == 1.0
