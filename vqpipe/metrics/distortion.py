"""PSNR and SSIM in the conventions of published tokenizers, and LPIPS.

The conventions differ by several dB on the same reconstructions, so each has a key of its own in `CONVENTIONS`. Unless
its key ends in float, a convention is measured on 8-bit reconstructions.

Shapes: B images, C = 3 channels, H x W pixels.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqpipe.errors import DataError, NumericError
from vqpipe.metrics.resumable import Resumable

CONVENTIONS = {
    "psnr": "RGB, uint8, mean over images",
    "psnr_of_mean_mse": "RGB, uint8, of the mean error over all images: 10 log10(255^2 / mean MSE); lower",
    "psnr_of_mean_mse_float": "RGB, not rounded, of the mean error over all images (MGVQ's evaluation)",
    "psnr_y": "BT.601 studio luma, of 219 levels, against a peak of 255 (pyiqa, ycbcr); higher",
    "psnr_y_float": "BT.601 studio luma of values not rounded, against a peak of 255 (VQGAN-LC's evaluation)",
    "psnr_y_full": "full-range luma (pyiqa's default color space, yiq)",
    "ssim": "Gaussian window 11, sigma 1.5, population covariance, RGB, uint8 (Wang et al. 2004)",
    "ssim_float": "Gaussian window 11, sigma 1.5, RGB, not rounded (piq, as VQGAN-LC's evaluation)",
    "ssim_y": "Gaussian window 11, sigma 1.5, full-range luma (pyiqa's default)",
    "ssim_uniform7": "uniform window 7, sample covariance, RGB, uint8 (scikit-image's default, as MGVQ's evaluation)",
    "ssim_range2": "as ssim_uniform7 with twice the true data range (LlamaGen's evaluation); higher",
    "lpips_alex": "lpips v0.1, AlexNet, on [-1, 1]",
    "lpips_vgg": "lpips v0.1, VGG16, on [-1, 1]",
    "perceptual_alex": "LPIPS v0.1's formula and heads on an AlexNet with the weights given: not the published LPIPS",
    "perceptual_vgg": "LPIPS v0.1's formula and heads on a VGG16 with the weights given: not the published LPIPS",
    "perceptual_squeeze": "LPIPS v0.1's formula and heads on a SqueezeNet with the weights given: not published LPIPS",
}
"""Key -> definition. LPIPS and perceptual distances are measured only where weights are given."""
COMMON = (
    *("psnr", "psnr_of_mean_mse", "psnr_y", "psnr_y_full"),
    *("ssim", "ssim_y", "ssim_uniform7", "ssim_range2"),
)
"""The conventions on 8-bit pixels, the default."""
STUDIO = (65.481 / 255, 128.553 / 255, 24.966 / 255)
"""BT.601 studio-range luma of RGB in [0, 255], without its offset of 16, which cancels in differences."""
FULL = (0.299, 0.587, 0.114)
"""BT.601 luma over the full range."""
LPIPS_SIDES = {"alex": 31, "vgg": 16, "squeeze": 17}
SMALLEST_SIDES = {
    **dict.fromkeys(("ssim", "ssim_float", "ssim_y"), 11),
    **dict.fromkeys(("ssim_uniform7", "ssim_range2"), 7),
    **{f"{kind}_{net}": side for kind in ("lpips", "perceptual") for net, side in LPIPS_SIDES.items()},
}
"""Key -> the smallest side of an image that it is defined for: a window of SSIM, or one value after the poolings of an
LPIPS network. Smaller images are not measured by it."""
MAX_LISTED = 20
"""Images that are listed by key for each metric that does not measure them."""
FIXED_POINT = 2**32
"""Values are summed as integers, in units of 1 / FIXED_POINT."""


class Distortion(Resumable):
    """Distortion between originals and reconstructions, as means over images.

    Per-image values are summed as fixed-point integers (steps of 2^-32), so the means do not depend on the division
    into batches and ranks.

    Args:
        perceptual: LPIPS networks by key ("lpips_alex", "perceptual_squeeze"), from two float[B, 3, H, W] in [-1, 1].
        keys: the conventions to measure, keys of `CONVENTIONS`.
    """

    state_names: ClassVar[tuple[str, ...]] = ("sums", "counts", "num_images", "num_identical", "too_small", "listed")

    def __init__(self, perceptual: Mapping[str, nn.Module] | None = None, keys: Collection[str] = COMMON) -> None:
        self.perceptual = dict(perceptual or {})
        self.keys = frozenset(keys)
        self.sums: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.num_images = 0
        self.num_identical = 0
        self.too_small: dict[str, int] = {}
        """Key of a metric -> number of images that are smaller than its smallest side."""
        self.listed: list[list[str]] = []
        """[metric, key of the image, reason] of the first MAX_LISTED of these for each metric."""

    def update(
        self,
        originals: Tensor,
        reconstructions: Tensor,
        levels: Tensor | None = None,
        keys: Sequence[str] | None = None,
    ) -> Tensor:
        """Accumulate two uint8[B, 3, H, W] tensors; return the PSNR of each image, float64[B] (inf for equal images).

        `levels` are the reconstructions before rounding, float[B, 3, H, W] in [0, 255], for metrics that end in float.
        `keys` name the images, for the list of those that are too small for a metric.

        Raises:
            DataError: not uint8, or shapes differ.
            NumericError: an LPIPS network returned NaN.
        """
        check_images(originals, reconstructions)
        exact = reconstructions if levels is None else levels
        mse = mean_squared_error(originals, reconstructions)
        self._add("mse", mse)
        self._psnr(originals, reconstructions, exact, mse)
        fitting = {name for name in sorted(self.keys) if name.startswith("ssim") and self._fits(name, originals, keys)}
        self._ssim(originals, reconstructions, exact, fitting)
        for name, network in self.perceptual.items():
            if not self._fits(name, originals, keys):
                continue
            with torch.inference_mode():
                distance = network(originals.float() / 127.5 - 1.0, reconstructions.float() / 127.5 - 1.0)
            self._add(name, distance.flatten().double())
        self.num_images += len(originals)
        self.num_identical += int((mse == 0).sum())
        return psnr_of(mse)

    def _psnr(self, originals: Tensor, reconstructions: Tensor, exact: Tensor, mse: Tensor) -> None:
        if "psnr" in self.keys:
            self._add("psnr", psnr_of(mse))
        if "psnr_of_mean_mse_float" in self.keys:
            self._add("mse_float", mean_squared_error(originals, exact))
        lumas = {
            "psnr_y": (reconstructions, STUDIO),
            "psnr_y_float": (exact, STUDIO),
            "psnr_y_full": (reconstructions, FULL),
        }
        for name in sorted(lumas.keys() & self.keys):
            pixels, weights = lumas[name]
            self._add(name, psnr_of(mean_squared_error(luma(originals, weights), luma(pixels, weights))))

    def _fits(self, name: str, images: Tensor, keys: Sequence[str] | None) -> bool:
        """Whether the images are large enough for a metric; if not, they are counted."""
        height, width = images.shape[-2:]
        if min(height, width) >= (least := SMALLEST_SIDES.get(name, 1)):
            return True
        before = self.too_small.get(name, 0)
        self.too_small[name] = before + len(images)
        reason = f"{width} x {height} pixels, and {name} needs sides of at least {least}"
        self.listed += [[name, key, reason] for key in (keys or ())[: max(MAX_LISTED - before, 0)]]
        return False

    def _ssim(self, originals: Tensor, reconstructions: Tensor, exact: Tensor, keys: Collection[str]) -> None:
        if "ssim" in keys:
            self._add("ssim", ssim_gaussian(originals, reconstructions))
        if "ssim_float" in keys:
            self._add("ssim_float", ssim_gaussian(originals, exact))
        if "ssim_y" in keys:
            self._add("ssim_y", ssim_gaussian(luma(originals, FULL)[:, None], luma(reconstructions, FULL)[:, None]))
        if {"ssim_uniform7", "ssim_range2"} & set(keys):
            uniform, doubled = ssim_uniform7(originals, reconstructions, data_ranges=(255.0, 510.0))
            for name, values in (("ssim_uniform7", uniform), ("ssim_range2", doubled)):
                if name in keys:
                    self._add(name, values)

    def not_measured(self) -> dict[str, Any]:
        """Metric -> count and the first images, of those that are too small for it."""
        table: dict[str, Any] = {name: {"count": count, "images": []} for name, count in sorted(self.too_small.items())}
        for name, key, reason in self.listed:
            if len(table[name]["images"]) < MAX_LISTED:
                table[name]["images"].append({"key": key, "reason": reason})
        return table

    def compute(self) -> dict[str, float]:
        """The means over all ranks, by key."""
        return self.merged().means()

    def means(self) -> dict[str, float]:
        """The means of this rank, by key. A PSNR is the mean over the images for which it is finite; a key without any
        such image is absent."""
        means = {name: self.sums[name] / FIXED_POINT / count for name, count in self.counts.items() if count}
        for error, name in (("mse", "psnr_of_mean_mse"), ("mse_float", "psnr_of_mean_mse_float")):
            mse = means.pop(error, 0.0)
            if mse > 0 and name in self.keys:
                means[name] = 10 * math.log10(255.0**2 / mse)
        return means

    def _add(self, name: str, values: Tensor) -> None:
        if bool(torch.isnan(values).any()):
            raise NumericError(f"{name} is NaN for some images", "Check the weights it was computed with")
        finite = values[torch.isfinite(values)]
        self.sums[name] = self.sums.get(name, 0) + int((finite * FIXED_POINT).round().long().sum())
        self.counts[name] = self.counts.get(name, 0) + len(finite)


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Per image: two [B, ...] tensors -> float64[B], in squared units of the input."""
    return (a.float() - b.float()).square().flatten(1).mean(1, dtype=torch.float64)


def psnr_of(mse: Tensor, peak: float = 255.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error; inf where the error is 0."""
    return 10 * torch.log10(peak**2 / mse)


def luma(images: Tensor, weights: tuple[float, float, float] = STUDIO) -> Tensor:
    """A weighted sum of R, G and B: uint8 or float[B, 3, H, W] in [0, 255] -> float32[B, H, W]."""
    red, green, blue = (images[:, channel] * weight for channel, weight in enumerate(weights))
    return red + green + blue


def ssim_gaussian(a: Tensor, b: Tensor) -> Tensor:
    """SSIM with an 11-wide Gaussian window (sigma 1.5), no downsampling: two [B, C, H, W] tensors -> float64[B].

    Wang et al. 2004, eq. 13, with population covariance and only windows that lie inside the image.
    """
    return ssim(a, b, window=gaussian_window(11, sigma=1.5), covariance_factor=1.0)[0]


def ssim_uniform7(a: Tensor, b: Tensor, data_ranges: tuple[float, ...] = (255.0,)) -> Tensor:
    """SSIM with a 7-wide uniform window and sample covariance, scikit-image's default: -> float64[R, B]."""
    return ssim(a, b, window=[1 / 7] * 7, covariance_factor=49 / 48, data_ranges=data_ranges)


def ssim(
    a: Tensor, b: Tensor, window: list[float], covariance_factor: float, data_ranges: tuple[float, ...] = (255.0,)
) -> Tensor:
    """Mean structural similarity over windows and channels: values in [0, 255], [B, C, H, W] twice -> float64[R, B],
    a row for each of the R data ranges that its constants are taken from."""
    if a.device.type == "cpu" and len(a) > 1:  # one image's maps stay in the cache: twice as fast as all at once
        pairs = zip(a.split(1), b.split(1), strict=True)
        return torch.cat([ssim(one, other, window, covariance_factor, data_ranges) for one, other in pairs], dim=1)
    x, y = a.float() - 127.5, b.float() - 127.5  # the same (co)variances, with less cancellation in float32
    mean_x, mean_y = smooth(x, window), smooth(y, window)
    covariance = covariance_factor * (smooth(x * y, window) - mean_x * mean_y)
    squares = mean_x.square() + mean_y.square()
    variances = covariance_factor * (smooth(x.square_().add_(y.square_()), window) - squares)
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    products, squares = 2 * mean_x * mean_y, mean_x.square() + mean_y.square()
    means = []
    for data_range in data_ranges:
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        similarity = (products + c1) / (squares + c1) * ((2 * covariance + c2) / (variances + c2))
        means.append(similarity.flatten(1).mean(1, dtype=torch.float64))
    return torch.stack(means)


def smooth(images: Tensor, window: list[float]) -> Tensor:
    """Correlate rows and columns with `window` where it fits inside: [..., H, W] -> [..., H - k + 1, W - k + 1].

    Shifted sums: on CPU many times as fast as a one-channel conv2d, and linear in the pixels.
    """
    for dim in (-2, -1):
        length = images.shape[dim] - len(window) + 1
        total = images.narrow(dim, 0, length) * window[0]
        for shift, weight in enumerate(window[1:], start=1):
            total.add_(images.narrow(dim, shift, length), alpha=weight)
        images = total
    return images


def gaussian_window(width: int, sigma: float) -> list[float]:
    """A Gaussian sampled at whole steps around its center, normalized to sum 1."""
    heights = [math.exp(-((i - (width - 1) / 2) ** 2) / (2 * sigma**2)) for i in range(width)]
    return [height / sum(heights) for height in heights]


def check_images(originals: Tensor, reconstructions: Tensor) -> None:
    """Raise a DataError unless both are uint8[B, 3, H, W] of one shape."""
    if originals.dtype != torch.uint8 or reconstructions.dtype != torch.uint8:
        raise DataError(
            f"distortion is measured on uint8 images, got {originals.dtype} and {reconstructions.dtype}",
            "Round with vqpipe.data.transforms.to_uint8",
        )
    if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[1] != 3:
        raise DataError(
            f"originals {list(originals.shape)} and reconstructions {list(reconstructions.shape)} should both be "
            "[B, 3, H, W]"
        )
