"""How an image becomes the pixels that are measured: the rules of crop and size that evaluation protocols name.

| rule | what is done | whose |
|---|---|---|
| adm | `transforms.center_crop`: box halving, then antialiased bicubic; squares only | ADM, LlamaGen |
| linear | resize until both sides cover, bilinear without antialiasing; centre crop | VQGAN-LC (albumentations) |
| cover | resize until both sides cover, antialiased bicubic in one step; centre crop | MGVQ (`eval_aug.py`, Pillow) |
| native | the image as it is, at its own size | |

H x W pixels of the result, h x w of the image.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqpipe.data.transforms import center_crop, pixels
from vqpipe.errors import ConfigError

Rule = Literal["adm", "linear", "cover", "native"]
STRIP = 16
"""An image whose resized side would be longer than this many times the crop's is resized only where it is kept."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """One rule at one size: an RGB image -> uint8[3, H, W]. A plain value, so it pickles to loader processes.

    "adm" is defined for squares alone, so a rectangle is refused; "cover" is its nearest kin. Smaller images are
    enlarged by every rule but "native".

    Raises:
        ConfigError: no such rule; a size missing, not above 0, given with "native", or not square with "adm".
    """

    rule: Rule
    size: tuple[int, int] | None = None
    """(height, width) in pixels; None with "native"."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(f"framing rule {self.rule!r} is not a choice", f"Use {', '.join(get_args(Rule))}")
        if (self.size is None) != (self.rule == "native"):
            if self.size is None:
                raise ConfigError(f"framing {self.rule!r} needs a size", "Give one, or take the rule native")
            raise ConfigError(
                "framing 'native' keeps every image's own size", "Leave the size out, or say native there"
            )
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"{self.size[1]}x{self.size[0]} is no size in pixels")
        if self.rule == "adm" and self.size is not None and self.size[0] != self.size[1]:
            raise ConfigError(
                f"ADM's crop is square, {self.size[1]}x{self.size[0]} is not", "Take the rule cover for rectangles"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        if self.size is None:
            return pixels(image)
        if self.rule == "adm":
            return center_crop(image, self.size[0])
        return linear(image, self.size) if self.rule == "linear" else cover(image, self.size)


def parse_size(text: str) -> tuple[int, int] | None:
    """ "256" -> (256, 256); "2560x1440", width x height as screens are named, -> (1440, 2560); "native" -> None.

    Raises:
        ConfigError: anything else.
    """
    if text == "native":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 10**6 for side in sides):
        raise ConfigError(f"{text!r} is no image size", "Write 256, 2560x1440 (width x height), or native")
    return int(sides[-1]), int(sides[0])


def covering(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(height, width, upper, left): the size at which the image just covers H x W, and where the centre crop lies.

    A half pixel of the longer side goes to the even number (Python's `round`, in both released codes), an odd margin
    has its smaller half above and to the left.
    """
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale))
    return height, width, (height - size[0]) // 2, (width - size[1]) // 2


def cover(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8[3, H, W]: MGVQ's evaluation crop. One antialiased bicubic resize by Pillow, and the centre."""
    height, width, upper, left = covering(image, size)
    if height > STRIP * size[0] or width > STRIP * size[1]:  # a 1 x 5000 strip would become gigabytes
        across, down = image.width / width, image.height / height
        box = (left * across, upper * down, (left + size[1]) * across, (upper + size[0]) * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return pixels(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return pixels(image.crop((left, upper, left + size[1], upper + size[0])))


def linear(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8[3, H, W]: VQGAN-LC's evaluation crop. Two neighbours a side are mixed however far the image is reduced, so
    it aliases: torch's `interpolate(mode="bilinear", align_corners=False, antialias=False)`, rounded, and the centre.

    OpenCV, which albumentations calls, mixes bytes with weights of 11 bits and may so differ by one level.
    """
    height, width, upper, left = covering(image, size)
    array = np.asarray(image)
    top, bottom, down = neighbours(image.height, height, upper, size[0])
    first, second, across = neighbours(image.width, width, left, size[1])
    above, below = (mix(array[i][:, first], array[i][:, second], across[:, None]) for i in (top, bottom))
    mixed = mix(above, below, down[:, None, None])
    return torch.from_numpy(np.floor(mixed + 0.5).astype(np.uint8)).permute(2, 0, 1).contiguous()


def neighbours(length: int, resized: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the pixels [start, start + count) of a side of `length` resized to `resized`: the two source pixels of each,
    int64[count], and how much of the second, float32[count] in [0, 1)."""
    place = (np.arange(start, start + count, dtype=np.float64) + 0.5) * (length / resized) - 0.5
    place = np.clip(place, 0, length - 1)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, length - 1), (place - first).astype(np.float32)


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """float32: (1 - share) x first + share x second."""
    return first * (np.float32(1.0) - share) + second * share
