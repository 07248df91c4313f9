"""PSNR and SSIM in the conventions that published tokenizers use, and LPIPS, streamed over batches of uint8 images.

The same reconstructions score several dB apart by convention alone, so every convention is a key of its own:

    psnr              RGB, per image, then the mean over images (the common one)
    psnr_of_mean_mse  10 log10(255^2 / mean MSE): as the released MGVQ evaluation computes it; lower
    psnr_y            BT.601 studio luma against a peak of 1: as VQGAN-LC's evaluation (pyiqa, "ycbcr"); higher
    ssim              Gaussian window 11, sigma 1.5, population covariance, RGB (Wang et al. 2004; piq as in VQGAN-LC)
    ssim_uniform7     uniform window 7, sample covariance, RGB (scikit-image's default on uint8, as MGVQ)
    lpips_*           lpips v0.1 on [-1, 1]; only where its weights are given

Letters: B images, C = 3 channels, H x W pixels.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vqpipe.distributed import gather_objects
from vqpipe.errors import DataError, NumericError

LUMA_WEIGHTS = (65.481 / 255, 128.553 / 255, 24.966 / 255)
"""BT.601 studio-range luma of RGB in [0, 255], without its offset of 16, which differences cancel."""
SSIM_SMALLEST_SIDE = 11
FIXED_POINT = 2**32


class Distortion:
    """Distortion between originals and reconstructions; memory does not grow with the number of images.

    Per-image values are summed as fixed-point integers (steps of 2^-32), so the means do not depend on how the images
    were dealt to batches and ranks.

    Args:
        perceptual: LPIPS networks by key ("lpips_alex", "lpips_vgg"); each takes two float[B, 3, H, W] in [-1, 1].
    """

    def __init__(self, perceptual: Mapping[str, nn.Module] | None = None) -> None:
        self.perceptual = dict(perceptual or {})
        self.sums: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.num_images = 0
        self.num_identical = 0

    def update(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Take in uint8[B, 3, H, W] twice, image by image the same; returns each PSNR, float64[B] (inf if equal).

        Raises:
            DataError: not uint8, shapes differ, or sides under 11 pixels.
            NumericError: an LPIPS network returned NaN.
        """
        check_images(originals, reconstructions)
        mse = mean_squared_error(originals, reconstructions)
        psnr = psnr_of(mse, peak=255.0)
        self._add("mse", mse)
        self._add("psnr", psnr)
        self._add("psnr_y", psnr_of(mean_squared_error(luma(originals), luma(reconstructions)), peak=255.0))
        self._add("ssim", ssim_gaussian(originals, reconstructions))
        self._add("ssim_uniform7", ssim_uniform7(originals, reconstructions))
        for name, network in self.perceptual.items():
            with torch.inference_mode():
                distance = network(originals.float() / 127.5 - 1.0, reconstructions.float() / 127.5 - 1.0)
            self._add(name, distance.flatten().double())
        self.num_images += len(originals)
        self.num_identical += int((mse == 0).sum())
        return psnr

    def merged(self) -> "Distortion":
        """The sum over all ranks (a new object; on one process a copy)."""
        whole = Distortion(self.perceptual)
        for part in gather_objects((self.sums, self.counts, self.num_images, self.num_identical)):
            sums, counts, num_images, num_identical = part
            for name in sums:
                whole.sums[name] = whole.sums.get(name, 0) + sums[name]
                whole.counts[name] = whole.counts.get(name, 0) + counts[name]
            whole.num_images += num_images
            whole.num_identical += num_identical
        return whole

    def result(self) -> dict[str, float]:
        """The means, by key. A PSNR is the mean over the images it is finite for, and absent where there is none."""
        means = {name: self.sums[name] / FIXED_POINT / count for name, count in self.counts.items() if count}
        mse = means.pop("mse", 0.0)
        if mse > 0:
            means["psnr_of_mean_mse"] = 10 * math.log10(255.0**2 / mse)
        return means

    def _add(self, name: str, values: Tensor) -> None:
        if bool(torch.isnan(values).any()):
            raise NumericError(f"{name} is NaN for some images", "Check the weights it was computed with")
        finite = values[torch.isfinite(values)]
        self.sums[name] = self.sums.get(name, 0) + int((finite * FIXED_POINT).round().long().sum())
        self.counts[name] = self.counts.get(name, 0) + len(finite)


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Per image: [B, ...] twice -> float64[B], in squared units of the input."""
    return (a.float() - b.float()).square().flatten(1).mean(1, dtype=torch.float64)


def psnr_of(mse: Tensor, peak: float) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error; inf where the error is 0."""
    return 10 * torch.log10(peak**2 / mse)


def luma(images: Tensor) -> Tensor:
    """BT.601 studio luma less its offset: uint8[B, 3, H, W] -> float32[B, H, W], a span of 219 grey levels."""
    red, green, blue = (images[:, channel] * weight for channel, weight in enumerate(LUMA_WEIGHTS))
    return red + green + blue


def ssim_gaussian(a: Tensor, b: Tensor) -> Tensor:
    """SSIM with an 11-wide Gaussian window (sigma 1.5), no downsampling: uint8[B, 3, H, W] twice -> float64[B].

    Wang et al. 2004, eq. 13, with population covariance and only windows that lie inside the image.
    """
    return ssim(a, b, window=gaussian_window(11, sigma=1.5), covariance_factor=1.0)


def ssim_uniform7(a: Tensor, b: Tensor) -> Tensor:
    """SSIM with a 7-wide uniform window and sample covariance, scikit-image's default: -> float64[B]."""
    return ssim(a, b, window=[1 / 7] * 7, covariance_factor=49 / 48)


def ssim(a: Tensor, b: Tensor, window: list[float], covariance_factor: float) -> Tensor:
    """Mean structural similarity over windows and channels, data range 255: uint8[B, C, H, W] twice -> float64[B]."""
    if a.device.type == "cpu" and len(a) > 1:  # one image's maps stay in the cache: twice as fast as all at once
        pairs = zip(a.split(1), b.split(1), strict=True)
        return torch.cat([ssim(one, other, window, covariance_factor) for one, other in pairs])
    x, y = a.float() - 127.5, b.float() - 127.5  # (co)variances do not move, and float32 cancels fewer digits
    mean_x, mean_y = smooth(x, window), smooth(y, window)
    covariance = covariance_factor * (smooth(x * y, window) - mean_x * mean_y)
    squares = mean_x.square() + mean_y.square()
    variances = covariance_factor * (smooth(x.square_().add_(y.square_()), window) - squares)
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(1, dtype=torch.float64)


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
    """A Gaussian sampled at whole steps around its centre, normalised to sum 1."""
    heights = [math.exp(-((i - (width - 1) / 2) ** 2) / (2 * sigma**2)) for i in range(width)]
    return [height / sum(heights) for height in heights]


def check_images(originals: Tensor, reconstructions: Tensor) -> None:
    """Both uint8[B, 3, H, W] of one shape, or a DataError."""
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
    if min(originals.shape[-2:]) < SSIM_SMALLEST_SIDE:
        raise DataError(
            f"SSIM needs sides of at least {SSIM_SMALLEST_SIDE} pixels, got {list(originals.shape[-2:])}",
            "Use a larger --image-size",
        )
