"""PSNR and SSIM against scikit-image and their formulas."""

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from vqpipe.errors import DataError, NumericError
from vqpipe.metrics import resumable
from vqpipe.metrics.distortion import SMALLEST_SIDES, Distortion
from vqpipe.weights import LpipsNet, load_lpips

FULL = np.array([0.299, 0.587, 0.114])


def pair(n: int = 5, height: int = 40, width: int = 56, noise: float = 20.0) -> tuple[Tensor, Tensor]:
    """Smooth random images and noisy copies, each noisier than the one before."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 7, generator=random) * 255
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    scale = noise * torch.arange(1, n + 1).view(-1, 1, 1, 1) / n
    noisy = smooth + scale * torch.randn(smooth.shape, generator=random)
    return smooth.round().to(torch.uint8), noisy.round().clamp(0, 255).to(torch.uint8)


def channels_last(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def measured(a: Tensor, b: Tensor) -> dict[str, float]:
    meter = Distortion()
    meter.update(a, b)
    return meter.compute()


def test_psnr_and_both_ssims_agree_with_scikit_image() -> None:
    a, b = pair()
    images = [(channels_last(x), channels_last(y)) for x, y in zip(a, b, strict=True)]
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = {
        "psnr": np.mean([peak_signal_noise_ratio(x, y) for x, y in images]),
        "ssim": np.mean([structural_similarity(x, y, channel_axis=-1, **gaussian) for x, y in images]),
        "ssim_uniform7": np.mean([structural_similarity(x, y, channel_axis=-1) for x, y in images]),
        "ssim_range2": np.mean([structural_similarity(x, y, channel_axis=-1, data_range=510) for x, y in images]),
        "ssim_y": np.mean([structural_similarity(x @ FULL, y @ FULL, data_range=255, **gaussian) for x, y in images]),
        "psnr_y_full": np.mean([peak_signal_noise_ratio(x @ FULL, y @ FULL, data_range=255) for x, y in images]),
    }
    result = measured(a, b)
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_psnr_y_is_the_formula_on_studio_luma_with_a_peak_of_one() -> None:
    a, b = pair()

    def luma(image: Tensor) -> np.ndarray:
        red, green, blue = image.numpy().astype(np.float64) / 255
        return (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255

    errors = [np.mean((luma(x) - luma(y)) ** 2) for x, y in zip(a, b, strict=True)]
    assert measured(a, b)["psnr_y"] == pytest.approx(np.mean([-10 * np.log10(error) for error in errors]), abs=1e-6)


def test_keys_that_end_in_float_use_values_before_rounding() -> None:
    a, b = pair()
    levels = (b + 0.49 * torch.rand(b.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    keys = ("psnr_of_mean_mse_float", "psnr_y_float", "ssim_float")
    meter = Distortion(keys=keys)
    meter.update(a, b, levels)
    images = [
        (channels_last(x).astype(np.float64), channels_last(y).astype(np.float64))
        for x, y in zip(a, levels, strict=True)
    ]
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    studio = np.array([65.481, 128.553, 24.966]) / 255
    expected = {
        "psnr_of_mean_mse_float": 10 * np.log10(255**2 / np.mean([(x - y) ** 2 for x, y in images])),
        "psnr_y_float": np.mean([peak_signal_noise_ratio(x @ studio, y @ studio, data_range=255) for x, y in images]),
        "ssim_float": np.mean(
            [structural_similarity(x, y, channel_axis=-1, data_range=255, **gaussian) for x, y in images]
        ),
    }
    assert meter.compute() == pytest.approx(expected, abs=1e-5)
    rounded = Distortion(keys=keys)
    rounded.update(a, b)
    assert abs(rounded.compute()["psnr_y_float"] - expected["psnr_y_float"]) > 1e-3


def test_psnr_of_mean_mse_averages_errors_not_decibels() -> None:
    a, b = pair()
    mse = np.mean((a.numpy().astype(np.float64) - b.numpy()) ** 2)
    result = measured(a, b)
    assert result["psnr_of_mean_mse"] == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-8)
    assert result["psnr_of_mean_mse"] < result["psnr"]


def test_equal_images_are_counted_and_excluded_from_psnr() -> None:
    a, b = pair(n=4)
    b[1], b[3] = a[1], a[3]
    b[3, 0, 0, 0] ^= 1  # differs in the last bit of one value
    meter = Distortion()
    meter.update(a, b)
    others = torch.tensor([0, 2, 3])
    assert meter.num_identical == 1
    assert meter.compute()["psnr"] == pytest.approx(measured(a[others], b[others])["psnr"], abs=1e-8)
    assert measured(a, a) == {"ssim": 1.0, "ssim_y": 1.0, "ssim_uniform7": 1.0, "ssim_range2": 1.0}


def test_the_means_do_not_depend_on_batches() -> None:
    a, b = pair(n=7)
    meter = Distortion()
    for part in ([4, 0], [6], [1, 2, 3, 5]):
        meter.update(a[part], b[part])
    assert meter.compute() == measured(a, b)


def test_merged_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(n=6)
    mine, theirs = Distortion(), Distortion()
    mine.update(a[:1], b[:1])
    theirs.update(a[1:], b[1:])
    expected = measured(a, b)
    parts = {name: getattr(theirs, name) for name in theirs.state_names}
    names = iter(mine.state_names)
    monkeypatch.setattr(resumable, "gather_objects", lambda own: [own, parts[next(names)]])
    merged = mine.merged()
    assert merged.means() == expected
    assert merged.num_images == 6


def test_perceptual_networks_get_minus_one_to_one_and_nan_raises() -> None:
    class MeanDifference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert -1 <= float(a.min()) < -0.5
            assert 0.5 < float(a.max()) <= 1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    a, b = pair()
    meter = Distortion({"lpips_alex": MeanDifference()})
    meter.update(a, b, b.float() * 0.99)  # the values before rounding are not measured
    difference = np.abs(a.numpy().astype(np.float64) - b.numpy()).mean() / 127.5
    assert meter.compute()["lpips_alex"] == pytest.approx(difference, rel=1e-5)

    class Broken(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.full((len(a), 1, 1, 1), float("nan"))

    with pytest.raises(NumericError, match="lpips_vgg"):
        Distortion({"lpips_vgg": Broken()}).update(a, b)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), "uint8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 8, dtype=torch.uint8), "should both be"),
    ],
)
def test_wrong_type_shape_or_size_raises(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Distortion().update(a, b)


def test_small_images_are_left_out_of_the_metrics_that_they_are_too_small_for() -> None:
    a, b = pair()
    large = measured(a, b)
    meter = Distortion()
    meter.update(a, b, keys=list("abcde"))
    for name, side in (("ten", 10), ("six", 6), ("one", 1)):
        meter.update(a[:1, :, :side, :40], b[:1, :, :side, :40], keys=[name])
    means = meter.compute()
    assert {name: means[name] for name in ("ssim", "ssim_y")} == {name: large[name] for name in ("ssim", "ssim_y")}
    assert means["ssim_uniform7"] != large["ssim_uniform7"]  # has the image of 10 rows
    assert means["psnr"] != large["psnr"]
    table = meter.not_measured()
    assert {name: left["count"] for name, left in table.items()} == {
        "ssim": 3,
        "ssim_y": 3,
        "ssim_uniform7": 2,
        "ssim_range2": 2,
    }
    assert table["ssim_range2"]["images"] == [
        {"key": "six", "reason": "40 x 6 pixels, and ssim_range2 needs sides of at least 7"},
        {"key": "one", "reason": "40 x 1 pixels, and ssim_range2 needs sides of at least 7"},
    ]
    again = Distortion()
    again.load_state(json.loads(json.dumps(meter.state())))
    assert (again.compute(), again.not_measured()) == (means, table)


def test_only_the_first_small_images_are_listed() -> None:
    a, b = pair(n=30, height=8)
    meter = Distortion(keys=("ssim",))
    for first in (0, 18):
        meter.update(a[first:], b[first:], keys=[str(i) for i in range(first, 30)])
    assert meter.not_measured()["ssim"]["count"] == 42
    assert [image["key"] for image in meter.not_measured()["ssim"]["images"]] == [str(i) for i in range(20)]
    assert "ssim" not in meter.compute()


@pytest.mark.parametrize(("net", "kind"), [("alex", "alexnet"), ("vgg", "vgg16"), ("squeeze", "squeezenet1_1")])
def test_lpips_is_measured_from_its_smallest_side_on(
    net: LpipsNet, kind: str, tmp_path: Path, uninitialized: Callable[[], AbstractContextManager[None]]
) -> None:
    import torchvision

    name = f"lpips_{net}"

    file = tmp_path / "backbone.pth"
    with torch.device("meta"):
        network = getattr(torchvision.models, kind)(weights=None)
    weights = {key: 0.1 * torch.randn(value.shape) for key, value in network.state_dict().items() if "features" in key}
    torch.save(weights, file)
    with uninitialized():
        lpips = load_lpips(net, file)
    least = SMALLEST_SIDES[name]
    a, b = pair(n=1, height=least, width=40)
    meter = Distortion({name: lpips}, keys=())
    meter.update(a, b)
    meter.update(a[:, :, 1:], b[:, :, 1:])
    assert name in meter.compute()
    assert meter.too_small == {name: 1}
    with pytest.raises(RuntimeError):
        lpips(a[:, :, 1:].float(), b[:, :, 1:].float())


@pytest.mark.parametrize(("net", "model"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_equals_the_package_on_the_same_random_backbone(
    net: LpipsNet, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    torch.manual_seed(0)
    file = tmp_path / "backbone.pth"
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)  # of classifiers, which are not used
    network = getattr(torchvision.models, model)(weights=None)
    torch.save({key: value for key, value in network.state_dict().items() if "features" in key}, file)
    a, b = pair(n=2, height=64, width=72)
    meter = Distortion({net: load_lpips(net, file)}, keys=())
    meter.update(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's remarks on the arguments that lpips still passes
        import lpips

        package = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    features = torch.load(file, weights_only=True)
    for name, parameter in package.net.named_parameters():
        parameter.data.copy_(features[f"features.{name.split('.', 1)[1]}"])
    with torch.no_grad():
        expected = package(a / 255, b / 255, normalize=True).mean()
    assert meter.compute() == {net: pytest.approx(float(expected), rel=1e-4)}
    assert float(expected) > 1e-4
