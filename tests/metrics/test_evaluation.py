"""The whole of metrics.json: the contract's keys, and a reason for every number that is absent."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vqpipe.errors import WeightsError
from vqpipe.metrics.evaluation import EvalConfig, Evaluation, FeatureNetworks, comparable, find_networks

CONTRACT_NUMBERS = {
    *("num_images", "image_size", "psnr", "psnr_of_mean_mse", "psnr_y", "ssim", "ssim_uniform7"),
    *("lpips_alex", "lpips_vgg", "rfid", "utilization", "utilization_per_group", "perplexity_per_group"),
    "bits_per_pixel",
}
CONFIG = EvalConfig(image_size=16, fid_min_images=4, prefixes=False)


class Pooled(nn.Module):
    """Stands in for Inception: pooled pixels as 2,048 features."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pad(nn.functional.avg_pool2d(images.float(), 4).flatten(1), (0, 2000))


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    originals, reconstructions = torch.randint(0, 256, (2, n, 3, 16, 16), generator=random, dtype=torch.uint8)
    return originals, reconstructions, torch.randint(0, 32, (n, 2 * 2 * 2), generator=random)


def evaluation(inception: nn.Module | None = None, config: EvalConfig = CONFIG) -> Evaluation:
    networks = FeatureNetworks({}, inception, {}, {} if inception else {"rfid": "no weights"})
    return Evaluation(config, networks, codebook_size=32, num_groups=2, device=torch.device("cpu"))


def test_every_number_of_the_contract_is_there_or_has_its_reason() -> None:
    networks = find_networks(None)
    measured = Evaluation(CONFIG, networks, codebook_size=32, num_groups=2, device=torch.device("cpu"))
    measured.update(*batch(3))
    metrics = measured.result()
    assert set(metrics["not_computed"]) == {"lpips_alex", "lpips_vgg", "rfid"}
    assert CONTRACT_NUMBERS - set(metrics) == {"lpips_alex", "lpips_vgg"}
    assert metrics["rfid"] == {}
    assert "weights-inception-2015-12-05-6726825d.pth" in metrics["not_computed"]["rfid"]
    assert metrics["bits_per_pixel"] == pytest.approx(8 * 5 / 256)


def test_rfid_is_zero_for_the_same_images_and_absent_for_too_few() -> None:
    originals, reconstructions, ids = batch(6)
    same, other, few = evaluation(Pooled()), evaluation(Pooled()), evaluation(Pooled())
    same.update(originals, originals, ids)
    other.update(originals, reconstructions, ids)
    few.update(originals[:3], reconstructions[:3], ids[:3])
    assert same.result()["rfid"]["adm"] < 1e-3 < other.result()["rfid"]["adm"]
    assert few.result()["rfid"] == {}
    assert few.result()["not_computed"]["rfid"].startswith("3 images are fewer than the 4")


def test_identity_leaves_psnr_out_with_its_reason() -> None:
    originals, _, ids = batch(3)
    measured = evaluation()
    measured.update(originals, originals, ids)
    metrics = measured.result()
    assert metrics["ssim"] == 1.0
    assert metrics["num_identical"] == 3
    assert "infinite" in metrics["not_computed"]["psnr"]


def test_the_k_curve_ends_at_the_main_numbers_and_starts_at_those_of_the_first_group_alone() -> None:
    originals, reconstructions, ids = batch(6)
    first = (originals.int() // 2 + reconstructions.int() // 2).to(torch.uint8)
    both = evaluation(Pooled(), replace(CONFIG, prefixes=True))
    both.update(originals[:2], reconstructions[:2], ids[:2], {1: first[:2]})
    both.update(originals[2:], reconstructions[2:], ids[2:], {1: first[2:]})
    alone = evaluation(Pooled())
    alone.update(originals, first, ids)
    metrics, single = both.result(), alone.result()
    start, end = metrics["prefixes"]
    assert (start.pop("groups"), end.pop("groups")) == (1, 2)
    assert start.pop("bits_per_pixel") == metrics["bits_per_pixel"] / 2
    assert {"psnr", "ssim", "psnr_of_mean_mse", "rfid"} <= end.keys()
    assert end == {key: metrics[key] for key in end}
    assert start == {key: single[key] for key in start}
    assert "prefixes" not in single


def test_continuous_latents_have_reasons_instead_of_codes_and_bits() -> None:
    originals, reconstructions, _ = batch(3)
    networks = FeatureNetworks({}, None, {}, {})
    measured = Evaluation(EvalConfig(image_size=16), networks, None, num_groups=0, device=torch.device("cpu"))
    measured.update(originals, reconstructions, None)
    metrics = measured.result()
    missing = {"utilization", "utilization_per_group", "perplexity_per_group", "bits_per_pixel"}
    assert metrics["not_computed"] == dict.fromkeys(missing, "continuous latents: no ids")
    assert CONTRACT_NUMBERS - set(metrics) == missing | {"lpips_alex", "lpips_vgg"}
    assert measured.counts.shape == (0, 0)


def test_reports_compare_when_they_saw_the_same_pixels_in_whatever_batches() -> None:
    originals, reconstructions, ids = batch(5)
    whole, parts, fewer = evaluation(), evaluation(), evaluation()
    whole.update(originals, reconstructions, ids)
    parts.update(originals[3:], originals[3:], ids[3:])
    parts.update(originals[:3], originals[:3], ids[:3])
    fewer.update(originals.flip(-1), reconstructions, ids)
    assert comparable(whole.result(), parts.result()) is None
    assert comparable(whole.result(), fewer.result()) == "reference"


def test_weights_that_are_there_but_damaged_are_an_error_not_a_reason(tmp_path: Path) -> None:
    assert "rfid" in find_networks(tmp_path).absent
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")
    with pytest.raises(WeightsError, match="alexnet"):
        find_networks(tmp_path)
    with pytest.raises(WeightsError, match="not a folder"):
        find_networks(tmp_path / "nowhere")
