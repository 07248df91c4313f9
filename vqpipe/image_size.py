"""Sizes of images, as options, settings and arguments write them."""

from operator import index
from typing import Any

from vqpipe.errors import ConfigError

Size = int | str | tuple[int, int]
"""(H, W) in pixels, the side of a square, or "WIDTHxHEIGHT" as facts of artifacts have it. Whole numbers may be those
of NumPy, and pairs may be lists."""


def pair_of(image_size: Size) -> tuple[int, int]:
    """(H, W) of a size.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(image_size, str):
        return fixed_size(image_size)
    if not is_size(image_size):
        raise ConfigError(f"{image_size!r} is not an image size", "Pass (height, width), or the side of a square")
    sides: Any = (image_size, image_size) if is_whole(image_size) else image_size
    height, width = map(index, sides)
    return height, width


def is_size(value: Any) -> bool:
    """Whether a value has the form of one size, as opposed to a list of sizes."""
    if isinstance(value, str) or is_whole(value):
        return True
    return hasattr(value, "__len__") and len(value) == 2 and all(map(is_whole, value))


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, also one of NumPy."""
    try:
        index(value)
    except TypeError:
        return False
    return True


def in_pixels(height: int, width: int) -> str:
    """`64 x 64 pixels`, `64 x 96 pixels (height x width)`: options of commands are width x height."""
    return f"{height} x {width} pixels" + (" (height x width)" if height != width else "")


def parse_size(image_size: int | str) -> tuple[int, int] | None:
    """(height, width) of an image size: "256", or 256, -> (256, 256); "2560x1440" (width x height) -> (1440, 2560);
    "native" -> None.

    Raises:
        ConfigError: anything else.
    """
    text = str(image_size)
    if text == "native":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 10**6 for side in sides):
        raise ConfigError(f"{text!r} is not an image size", "Write 256, 2560x1440 (width x height), or native")
    return int(sides[-1]), int(sides[0])


def fixed_size(image_size: int | str) -> tuple[int, int]:
    """`parse_size` of a size that is not native.

    Raises:
        ConfigError: "native", or no size.
    """
    size = parse_size(image_size)
    if size is None:
        raise ConfigError("images of native sizes have no size in common", "Write 256, or 2560x1440 (width x height)")
    return size


def normal_size(image_size: int | str) -> int | str:
    """An image size as settings and manifests write it: a number for a square, "WIDTHxHEIGHT", or "native".

    Raises:
        ConfigError: it is none of these.
    """
    size = parse_size(image_size)
    if size is None:
        return "native"
    height, width = size
    return height if height == width else f"{width}x{height}"
