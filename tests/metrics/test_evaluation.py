"""The content of metrics.json: the contract's keys, each protocol's own numbers, a reason for each missing one."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError, DataError, NumericError, WeightsError
from vqpipe.evaluation.extractors import PooledMaps
from vqpipe.evaluation.measurement import EvaluationMetrics
from vqpipe.metrics import EvalConfig, set_metrics
from vqpipe.metrics.distortion import COMMON, Distortion
from vqpipe.metrics.feature_networks import FeatureNetworks, find_networks
from vqpipe.metrics.frechet import Moments, frechet_distance
from vqpipe.metrics.inception import clean_resize_all
from vqpipe.metrics.protocols import PROTOCOLS

CONTRACT_NUMBERS = {
    *("num_images", "image_size", "psnr", "psnr_of_mean_mse", "psnr_y", "ssim", "ssim_uniform7"),
    *("lpips_alex", "lpips_vgg", "rfid", "utilization", "utilization_per_group", "perplexity_per_group"),
    "bits_per_pixel",
}
CONFIG = EvalConfig(image_size=16, fid_min_images=4, prefixes=False)
ALL = replace(CONFIG, protocol=tuple(PROTOCOLS))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,048 features a distance takes seconds."""
    monkeypatch.setattr(set_metrics, "SIZES", {"pool": 48, "spatial": 48, "logits": 48})


class Pooled(nn.Module):
    """Stands in for Inception: 48 pooled pixels in each output. Remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor, outputs: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        self.seen.append(images)
        small = nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        return dict.fromkeys(outputs, small)


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    originals, reconstructions = torch.randint(0, 256, (2, n, 3, 16, 16), generator=random, dtype=torch.uint8)
    return originals, reconstructions, torch.randint(0, 32, (n, 2 * 2 * 2), generator=random)


def evaluation_metrics(
    inception: nn.Module | None = None, config: EvalConfig = CONFIG, extractors: dict[str, nn.Module] | None = None
) -> EvaluationMetrics:
    absent = {} if inception else {"rfid": "no weights"}
    networks = FeatureNetworks({}, inception, {}, absent, extractors or {})
    return EvaluationMetrics(config, networks, codebook_size=32, num_groups=2, device=CPU)


def test_every_number_of_the_contract_is_present_or_has_a_reason() -> None:
    networks = find_networks(None)
    measured = EvaluationMetrics(CONFIG, networks, codebook_size=32, num_groups=2, device=CPU)
    measured.update(*batch(3), positions=range(3))
    metrics = measured.compute()[0]
    assert set(metrics["not_computed"]) == {"lpips_alex", "lpips_vgg", "rfid"}
    assert CONTRACT_NUMBERS - set(metrics) == {"lpips_alex", "lpips_vgg"}
    assert set(COMMON) <= set(metrics)
    assert metrics["rfid"] == {}
    assert "weights-inception-2015-12-05-6726825d.pth" in metrics["not_computed"]["rfid"]
    assert metrics["bits_per_pixel"] == pytest.approx(8 * 5 / 256)


def test_rfid_is_zero_for_the_same_images_and_absent_for_too_few() -> None:
    originals, reconstructions, ids = batch(6)
    same, other, few = evaluation_metrics(Pooled()), evaluation_metrics(Pooled()), evaluation_metrics(Pooled())
    same.update(originals, originals, ids)
    other.update(originals, reconstructions, ids)
    few.update(originals[:3], reconstructions[:3], ids[:3])
    assert same.compute()[0]["rfid"]["adm"] < 1e-3 < other.compute()[0]["rfid"]["adm"]
    assert few.compute()[0]["rfid"] == {}
    assert few.compute()[0]["not_computed"]["rfid"].startswith("3 images are fewer than the 4")


def test_psnr_of_equal_images_is_missing_with_a_reason() -> None:
    originals, _, ids = batch(3)
    measured = evaluation_metrics()
    measured.update(originals, originals, ids)
    metrics = measured.compute()[0]
    assert metrics["ssim"] == 1.0
    assert metrics["num_identical"] == 3
    assert "infinite" in metrics["not_computed"]["psnr"]
    assert "psnr" not in metrics["protocols"]["adm"]


def test_each_protocol_has_its_own_rounding_formulas_and_resize() -> None:
    originals, reconstructions, ids = batch(6)
    floats = (reconstructions.float() + 0.7).clamp(0, 255) / 127.5 - 1
    raw = torch.rand(6, 3, 299, 299, generator=torch.Generator().manual_seed(9)) * 255
    network = Pooled()
    measured = evaluation_metrics(network, ALL)
    assert measured.needs_raw
    with pytest.raises(DataError, match="cleanfid-rawval compares with raw images"):
        measured.update(originals, floats, ids)
    measured = evaluation_metrics(network, ALL)
    network.seen.clear()
    measured.update(originals, floats, ids, raw=raw)
    levels = ((floats + 1) * 127.5).clamp(0, 255)
    rounded, truncated = levels.round().to(torch.uint8), levels.to(torch.uint8)
    expected = [rounded, originals, truncated, originals, truncated, raw]
    clean = [False, False, True, True, True, False]
    for seen, images, resized in zip(network.seen, expected, clean, strict=True):
        assert torch.equal(seen, clean_resize_all(images) if resized else images)

    metrics = measured.compute()[0]
    keys = {"adm": ("psnr", "ssim"), "cleanfid-matched": ("psnr_of_mean_mse_float", "ssim_uniform7")}
    keys["cleanfid-rawval"] = ("psnr_y_float", "ssim_float")
    for name, (psnr, ssim) in keys.items():
        alone = Distortion(keys=(psnr, ssim))
        alone.update(originals, rounded if name == "adm" else truncated, levels)
        own = metrics["protocols"][name]
        assert {psnr: own["psnr"], ssim: own["ssim"]} == alone.compute()
        assert own["conventions"]["psnr"].startswith(f"{psnr}: ")
    assert metrics["protocol"] == "adm"
    assert metrics["psnr"] == metrics["protocols"]["adm"]["psnr"]
    assert metrics["rfid"] == {name: own["rfid"] for name, own in metrics["protocols"].items()}
    assert len(set(metrics["rfid"].values())) == 3


def test_protocol_with_another_crop_is_measured_on_that_crop() -> None:
    originals, reconstructions, ids = batch(6)
    others = batch(6, seed=1)[:2]
    both = evaluation_metrics(Pooled(), replace(CONFIG, protocol=("adm", "cleanfid-matched")))
    both.update(originals, reconstructions, ids, others={"cleanfid-matched": others})
    alone = evaluation_metrics(Pooled(), replace(CONFIG, protocol="cleanfid-matched"))
    alone.update(*others, ids)
    metrics = both.compute()[0]
    assert metrics["protocols"]["cleanfid-matched"] == alone.compute()[0]["protocols"]["cleanfid-matched"]
    assert metrics["reference"] != metrics["protocols"]["cleanfid-matched"]["reference_digest"]


def test_further_metrics_of_inception_have_a_number_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "KID_SUBSET_SIZE", 5)
    originals, reconstructions, ids = batch(12)
    reconstructions[4:] = originals[4:5]  # precise, and far from most originals
    config = replace(CONFIG, metrics=("kid", "prc", "sfid", "is"))
    measured = evaluation_metrics(Pooled(), config)
    measured.update(originals[:7], reconstructions[:7], ids[:7])
    measured.update(originals[7:], reconstructions[7:], ids[7:])
    own = measured.compute()[0]["protocols"]["adm"]
    samples, references = (Pooled()(images)["pool"] for images in (reconstructions, originals))
    assert own["kid"]["mean"] != 0
    assert own["prc"] == set_metrics.precision_recall(samples, references)
    assert own["prc"]["precision"] != own["prc"]["recall"]
    assert own["sfid"] == pytest.approx(own["rfid"], rel=1e-6)  # the stand-in has one output
    for name, features in (("inception_score", samples), ("inception_score_of_originals", references)):
        assert own[name] == pytest.approx(set_metrics.inception_score(features))

    cramped = evaluation_metrics(Pooled(), replace(config, feature_memory=1e-6))
    cramped.update(originals, reconstructions, ids)
    metrics = cramped.compute()[0]
    assert set(metrics["not_computed"]) >= {"kid", "prc", "is"}
    assert "eval.feature_memory" in metrics["not_computed"]["kid"]
    assert "sfid" in metrics["protocols"]["adm"]

    without = evaluation_metrics(None, config)
    without.update(originals, reconstructions, ids)
    assert {name: without.compute()[0]["not_computed"][name] for name in config.metrics} == dict.fromkeys(
        config.metrics, "no weights"
    )


def test_distance_over_another_network_has_its_name() -> None:
    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean((2, 3))

    originals, reconstructions, ids = batch(8)
    config = replace(CONFIG, fid_min_images=2049)
    measured = evaluation_metrics(None, config, {"mine": Means()})
    measured.update(originals[:3], reconstructions[:3], ids[:3])
    measured.update(originals[3:], reconstructions[3:], ids[3:])
    sides = [Moments(3), Moments(3)]
    for side, images in zip(sides, (originals, reconstructions), strict=True):
        side.update(images.float().mean((2, 3)))
    metrics = measured.compute()[0]
    assert metrics["frechet"] == {"mine": pytest.approx(frechet_distance(*sides), rel=1e-9)}
    assert metrics["rfid"] == {}

    few = evaluation_metrics(None, config, {"mine": Means()})
    few.update(originals[:3], reconstructions[:3], ids[:3])
    assert few.compute()[0]["not_computed"]["frechet mine"].startswith("3 images are fewer than the 4")
    with pytest.raises(ConfigError, match="one vector per image"):
        evaluation_metrics(None, config, {"maps": nn.Identity()})


def test_feature_maps_are_pooled_after_the_networks_own_preprocessing() -> None:
    seen: list[Any] = []

    def prepare(image: Any) -> Tensor:
        seen.append(image.size)
        return torch.full((3, 4, 4), image.getpixel((1, 0))[2], dtype=torch.uint8)

    images = torch.zeros(2, 3, 8, 10, dtype=torch.uint8)
    images[1, 2, 0, 1] = 200
    features = PooledMaps(nn.Identity(), prepare)(images)
    assert seen == [(10, 8), (10, 8)]
    assert torch.equal(features, torch.tensor([[0.0] * 3, [200.0] * 3]))


def test_k_curve_starts_at_the_first_group_and_ends_at_the_main_numbers() -> None:
    originals, reconstructions, ids = batch(6)
    first = (originals.int() // 2 + reconstructions.int() // 2).to(torch.uint8)
    both = evaluation_metrics(Pooled(), replace(CONFIG, prefixes=True))
    both.update(originals[:2], reconstructions[:2], ids[:2], {1: first[:2]})
    both.update(originals[2:], reconstructions[2:], ids[2:], {1: first[2:]})
    alone = evaluation_metrics(Pooled())
    alone.update(originals, first, ids)
    metrics, single = both.compute()[0], alone.compute()[0]
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
    measured = EvaluationMetrics(EvalConfig(image_size=16), networks, None, num_groups=0, device=CPU)
    measured.update(originals, reconstructions, None)
    metrics, counts = measured.compute()
    missing = {"utilization", "utilization_per_group", "perplexity_per_group", "bits_per_pixel"}
    reasons = {name: metrics["not_computed"][name] for name in missing}
    assert reasons == dict.fromkeys(missing, "continuous latents: no ids")
    assert CONTRACT_NUMBERS - set(metrics) == missing | {"lpips_alex", "lpips_vgg"}
    assert counts.shape == (0, 0)


def test_digest_of_the_originals_is_the_same_in_any_batches() -> None:
    originals, reconstructions, ids = batch(5)
    whole, parts, fewer = evaluation_metrics(), evaluation_metrics(), evaluation_metrics()
    whole.update(originals, reconstructions, ids)
    parts.update(originals[3:], originals[3:], ids[3:])
    parts.update(originals[:3], originals[:3], ids[:3])
    fewer.update(originals.flip(-1), reconstructions, ids)
    reference = whole.compute()[0]["reference"]
    assert parts.compute()[0]["reference"] == reference != fewer.compute()[0]["reference"]


def test_sizes_add_up_and_mixed_sizes_are_noted() -> None:
    measured = evaluation_metrics()
    originals, reconstructions, ids = batch(2)
    measured.update(originals, reconstructions, ids)
    measured.update(originals[..., :12], reconstructions[..., :12], ids[:, :6])
    metrics = measured.compute()[0]
    assert metrics["bits_per_pixel"] == pytest.approx(5 * (2 * 8 + 2 * 6) / (2 * 256 + 2 * 192))
    assert metrics["num_tokens_per_image"] == 7
    assert "mixed_sizes" in metrics


def test_nan_wrong_shapes_and_no_images_raise() -> None:
    originals, _, ids = batch(2)
    floats = originals / 127.5 - 1
    with pytest.raises(NumericError, match="NaN"):
        evaluation_metrics().update(originals, floats.masked_fill(floats > 0.9, float("nan")), ids)
    with pytest.raises(DataError, match="should both be"):
        evaluation_metrics().update(originals, floats[..., :8], ids)
    with pytest.raises(DataError, match="no images"):
        evaluation_metrics().compute()[0]
    with pytest.raises(ConfigError, match="names one twice"):
        replace(CONFIG, protocol=("adm", "adm"))


def test_damaged_weights_raise_instead_of_giving_a_reason(tmp_path: Path) -> None:
    assert "rfid" in find_networks(tmp_path).absent
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")
    with pytest.raises(WeightsError, match="alexnet"):
        find_networks(tmp_path)
    with pytest.raises(WeightsError, match="not a folder"):
        find_networks(tmp_path / "nowhere")
