"""Crops, and the only conversions between RGB images, uint8 pixels and floats.

    encoded bytes --decode--> RGB image --center_crop | random_crop--> uint8[3, S, S] <--to_uint8 | to_float--> [-1, 1]
    encoded JPEG --fast_crop--> uint8[3, S, S]

B images, H x W pixels, S the side of a square crop. Every crop is a pure function of the image and a generator.

Crops of evaluation protocols (`Framing`):

| rule | crop | used by |
|---|---|---|
| adm | `center_crop`: box halving, then antialiased bicubic; squares only | ADM, LlamaGen |
| linear | resize until both sides cover, bilinear without antialiasing; center crop | VQGAN-LC (albumentations) |
| cover | resize until both sides cover, antialiased bicubic in one step; center crop | MGVQ (`eval_aug.py`, Pillow) |
| native | the image at its own size | |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqpipe.config import added, check_choices, resumable
from vqpipe.data.decoding import MAX_PIXELS, Color, decode, decode_reduced, jpeg_header
from vqpipe.errors import ConfigError

STRIP = 16
"""If a resized side is more than this many times the crop size, only the kept part is resized."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section [data]: how training images are cropped and read."""

    image_size: int = 256
    """Side of the square crops, in pixels."""

    crop: Literal["random", "center"] = "random"
    """A random square, or ADM's center crop (for training without augmentation)."""

    max_scale: float = 1.0
    """The short side is resized to image_size times a factor drawn from [1, max_scale] before a random crop."""

    resize: Literal["exact", "fast"] = added("exact")
    """How random crops are resized. exact: from the whole image, by Pillow's bicubic filter. fast: a JPEG in color is
    decoded at 1/2, 1/4 or 1/8 of its size where that is large enough, its crop begins and ends at whole pixels of the
    decoded image, and torch's bicubic filter resizes it; other images as with exact."""

    flip: bool = True
    """Flip a crop horizontally with probability 1/2. (VQGAN-LC's released code crops at random and does not flip.)"""

    max_skipped: float = 0.01
    """Share of undecodable images, 0..1, above which the run stops; each one is replaced by another and counted."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected by their header, without decoding."""

    set_weights: tuple[float, ...] = added(())
    """With several --images: one weight for each, in order. A training image is of a set with probability weight / sum;
    0 leaves a set out. Empty: sets are joined, so each is drawn from in proportion to its number of images."""

    num_workers: int = resumable(default=-1)
    """Processes that decode, per rank; 0: decode in the main process; -1: one per available core, at most 16."""

    worker_timeout: float = resumable(default=300.0)
    """Seconds to wait for a batch before the run stops with an error; 0: no limit."""

    def __post_init__(self) -> None:
        check_choices(self, "data")
        if self.image_size < 1:
            raise ConfigError(f"data.image_size = {self.image_size} is not a size in pixels")
        if not 1.0 <= self.max_scale < math.inf:
            raise ConfigError(
                f"data.max_scale = {self.max_scale} should be a finite number of at least 1",
                "1 makes a crop as wide as the short side",
            )
        if not 0.0 <= self.max_skipped <= 1.0:
            raise ConfigError(f"data.max_skipped = {self.max_skipped} is not a share", "Give a number from 0 to 1")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ConfigError(f"data.max_pixels = {self.max_pixels} is outside 1..{MAX_PIXELS}", "Pillow's own limit")
        if self.set_weights and not (
            all(0 <= weight < math.inf for weight in self.set_weights) and 0 < sum(self.set_weights) < math.inf
        ):
            raise ConfigError(
                f"data.set_weights = {list(self.set_weights)} are not weights of image sets",
                "Give each --images a number of at least 0, with a positive sum",
            )
        if self.num_workers < -1 or self.worker_timeout < 0:
            raise ConfigError("data.num_workers is at least -1 and data.worker_timeout at least 0")


def pixels(image: Image.Image) -> Tensor:
    """uint8[3, H, W] of an RGB image."""
    planes = np.empty((3, image.height, image.width), np.uint8)
    for plane, band in zip(planes, "RGB", strict=True):  # Pillow unpacks bands three times as fast as torch permutes
        plane[:] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(plane.shape)
    return torch.from_numpy(planes)


def center_crop(image: Image.Image, size: int) -> Tensor:
    """uint8[3, size, size]: ADM's center crop, which ImageNet evaluation uses (guided-diffusion, `center_crop_arr`).

    Halves by box averaging while the short side is at least twice `size`, resizes the short side to `size` by bicubic
    interpolation with antialiasing, and crops the center. Smaller images are enlarged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return resize_and_crop(image, (width, height), ((width - size) // 2, (height - size) // 2), (size, size))


def ten_crops(images: Tensor, size: int) -> list[Tensor]:
    """Ten crops uint8[B, 3, size, size] of uint8[B, 3, H, W]: the center, the corners (top left, top right, bottom
    left, bottom right), and the same five of the horizontal flips.

    They are those of torchvision's `TenCrop`, which has the center after the corners.
    """
    from torchvision.transforms.functional import ten_crop

    crops = ten_crop(images, [size, size])
    return [crops[i] for i in (4, 0, 1, 2, 3, 9, 5, 6, 7, 8)]


def random_crop(image: Image.Image, size: int, drawn: Sequence[float], max_scale: float = 1.0) -> Tensor:
    """uint8[3, size, size]: a random square, after resizing the short side to size x [1, max_scale], antialiased.

    `drawn`: three numbers in [0, 1), of the scale, x and y.
    """
    return pixels(resize_part(image, *random_window(image.size, size, drawn, max_scale), (size, size)))


def random_window(
    image_size: tuple[int, int], size: int, drawn: Sequence[float], max_scale: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to which `random_crop` resizes an image, and the corner of the crop; sizes are (width, height), the
    corner is (x, y)."""
    scale, across, down = drawn
    short = round(size * (1.0 + scale * (max_scale - 1.0)))
    factor = short / min(image_size)
    width, height = max(short, round(image_size[0] * factor)), max(short, round(image_size[1] * factor))
    return (width, height), (int(across * (width - size + 1)), int(down * (height - size + 1)))


def fast_crop(
    data: bytes,
    size: int,
    drawn: Sequence[float],
    max_scale: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    color: Color = "ignore",
) -> np.ndarray | None:
    """uint8[3, size, size]: `random_crop` of an encoded JPEG, from no more of its pixels than the crop needs; None for
    what `random_crop` has to do.

    The image is decoded at 1, 1/2, 1/4 or 1/8 of its size, the least that covers the size to which `random_crop`
    resizes. The sides of the crop are moved to the nearest whole pixels there, by up to half a pixel; what lies between
    is resized by the antialiased bicubic filter of torch, whose pixels are within two levels of Pillow's.

    None: not a JPEG in color, or a damaged one (`jpeg_header`); the image would have to be enlarged.
    """
    header = jpeg_header(data, max_pixels, color)
    if header is None:
        return None
    target, corner = random_window((header.width, header.height), size, drawn, max_scale)
    if min(target) > min(header.width, header.height):
        return None
    reduction = next(
        r for r in (8, 4, 2, 1) if r == 1 or (r * target[0] <= header.width and r * target[1] <= header.height)
    )
    rgb = decode_reduced(data, header, reduction)
    if rgb is None:
        return None
    left, right = nearest_pixels(corner[0], size, header.width / reduction / target[0], rgb.shape[1])
    upper, lower = nearest_pixels(corner[1], size, header.height / reduction / target[1], rgb.shape[0])
    part = rgb[upper:lower, left:right].transpose(2, 0, 1)
    if part.shape[1:] == (size, size):
        return part
    return F.interpolate(torch.from_numpy(part)[None], (size, size), mode="bicubic", antialias=True)[0].numpy()


def nearest_pixels(start: int, size: int, scale: float, length: int) -> tuple[int, int]:
    """The pixels [first, stop) of a side of `length` nearest to [start, start + size) x scale."""
    return round(start * scale), min(round((start + size) * scale), length)


def crop_to_multiples(image: Image.Image, factor: int) -> Tensor:
    """uint8[3, H, W]: the center of an image, of the largest sides that are multiples of `factor`."""
    width, height = image.width // factor * factor, image.height // factor * factor
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    return pixels(image.crop((left, upper, left + width, upper + height)))


def resize_and_crop(
    image: Image.Image, target: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """uint8[3, H, W]: the image resized to `target` by antialiased bicubic interpolation, and cropped to `size` at
    `corner`. All are (x, y)."""
    if target[0] > STRIP * size[0] or target[1] > STRIP * size[1]:  # a 1 x 5000 strip would be resized to gigabytes
        return pixels(resize_part(image, target, corner, size))
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    if target != size:
        image = image.crop((*corner, corner[0] + size[0], corner[1] + size[1]))
    return pixels(image)


def resize_part(
    image: Image.Image, target: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> Image.Image:
    """`resize_and_crop` without computing the rest of the resized image.

    Pillow resizes rows and columns one after the other, rounds and clips between, and chooses the order by the sizes.
    So the pixels may differ from those of the whole image: in crops of photographs by up to 3 levels, in extreme strips
    of noise by up to 22.
    """
    (width, height), (left, upper) = target, corner
    across, down = image.width / width, image.height / height
    right, lower = min((left + size[0]) * across, image.width), min((upper + size[1]) * down, image.height)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left * across, upper * down, right, lower))


def training_crop(
    data: bytes,
    config: DataConfig,
    drawn: Sequence[float],
    out: np.ndarray,
    color: Color = "ignore",
) -> None:
    """Write the crop and flip of section [data] of an encoded image to `out`, uint8[3, S, S].

    `drawn`: four numbers in [0, 1), of the flip, and those of `random_crop`.

    Raises:
        BadImage: as `decode`.
    """
    flipped = config.flip and drawn[0] < 0.5
    size, crop = config.image_size, None
    if config.crop == "center":
        crop = center_crop(decode(data, config.max_pixels, color), size).numpy()
    else:
        if config.resize == "fast":
            crop = fast_crop(data, size, drawn[1:], config.max_scale, config.max_pixels, color)
        if crop is None:
            crop = random_crop(decode(data, config.max_pixels, color), size, drawn[1:], config.max_scale).numpy()
    out[...] = crop[..., ::-1] if flipped else crop


def to_float(images: Tensor) -> Tensor:
    """uint8[..., 3, H, W] -> float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """float[..., 3, H, W] in [-1, 1] -> uint8, clamped and rounded, never truncated: `to_uint8(to_float(x)) == x`."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


Rule = Literal["adm", "linear", "cover", "native"]


@dataclass(frozen=True, kw_only=True)
class Framing:
    """A crop of an evaluation protocol: an RGB image -> uint8[3, H, W]. Picklable, for loader processes.

    "adm" is defined for squares only; "cover" is the closest rule for rectangles. Every rule but "native" enlarges
    smaller images.

    Raises:
        ConfigError: unknown rule; a size missing, below 1, given with "native", or not square with "adm".
    """

    rule: Rule
    size: tuple[int, int] | None = None
    """(height, width) in pixels; None with "native"."""

    def __post_init__(self) -> None:
        check_choices(self, "framing")
        if self.size is None and self.rule != "native":
            raise ConfigError(f"framing {self.rule!r} needs a size", "Give one, or use the rule native")
        if self.size is not None and self.rule == "native":
            raise ConfigError("framing 'native' keeps every image's own size", "Omit the size, or give native")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"{self.size[1]}x{self.size[0]} is not a size in pixels")
        if self.rule == "adm" and self.size is not None and self.size[0] != self.size[1]:
            raise ConfigError(
                f"ADM's crop is square, {self.size[1]}x{self.size[0]} is not", "Use the rule cover for rectangles"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """uint8[3, H, W]: the crop of an image."""
        if self.size is None:
            return pixels(image)
        if self.rule == "adm":
            return center_crop(image, self.size[0])
        return linear(image, self.size) if self.rule == "linear" else cover(image, self.size)


def covering(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(height, width, upper, left): the smallest size at which the image covers H x W, and the corner of the crop.

    Half pixels are rounded to even (Python's `round`, as in both released codes); of an odd margin the smaller half is
    above and to the left.
    """
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale))
    return height, width, (height - size[0]) // 2, (width - size[1]) // 2


def cover(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8[3, H, W]: MGVQ's evaluation crop. One antialiased bicubic resize by Pillow, then the center."""
    height, width, upper, left = covering(image, size)
    return resize_and_crop(image, (width, height), (left, upper), size[::-1])


def linear(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8[3, H, W]: VQGAN-LC's evaluation crop, bilinear without antialiasing: equal to torch's `interpolate(
    mode="bilinear", align_corners=False, antialias=False)`, rounded, then the center.

    OpenCV, which albumentations calls, interpolates with weights of 11 bits and may differ by one level.
    """
    height, width, upper, left = covering(image, size)
    array = np.asarray(image)
    top, bottom, down = neighbors(image.height, height, upper, size[0])
    first, second, across = neighbors(image.width, width, left, size[1])
    above, below = (mix(array[i][:, first], array[i][:, second], across[:, None]) for i in (top, bottom))
    mixed = mix(above, below, down[:, None, None])
    return torch.from_numpy(np.floor(mixed + 0.5).astype(np.uint8)).permute(2, 0, 1).contiguous()


def neighbors(length: int, resized: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the pixels [start, start + count) of a side resized from `length` to `resized`: the two source pixels
    of each, int64[count], and the weight of the second, float32[count] in [0, 1)."""
    place = (np.arange(start, start + count, dtype=np.float64) + 0.5) * (length / resized) - 0.5
    place = np.clip(place, 0, length - 1)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, length - 1), (place - first).astype(np.float32)


def mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float32: (1 - weight) x first + weight x second."""
    return first * (np.float32(1.0) - weight) + second * weight
