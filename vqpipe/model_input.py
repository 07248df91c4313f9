"""Images as the input of a tokenizer: files and PIL images; their sizes, types and ranges.

Shapes: B images of H x W pixels, h x w positions.
"""

import warnings
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from vqpipe.data.decoding import BadImage, bad_image, decode, to_rgb, upright
from vqpipe.data.transforms import Framing, pixels, to_float
from vqpipe.errors import DataError
from vqpipe.files import nearest_path
from vqpipe.image_size import Size, in_pixels, pair_of

ImageLike = Tensor | Image.Image | str | Path
"""Pixels, a PIL image, or the path of an image file."""

RANGE_TOLERANCE = 1e-3
"""How far outside [-1, 1] float images may be."""
UNSIGNED = "float images without a negative value: if they are in [0, 1], pass 2 * images - 1; [-1, 1] is expected"


def check_tensor_size(images: Tensor, image_size: Size | None) -> None:
    """Raise a DataError for tensors [..., H, W] of another size than `image_size`."""
    if image_size is not None and tuple(images.shape[-2:]) != pair_of(image_size):
        raise DataError(
            f"images of {in_pixels(*images.shape[-2:])}, image_size = {image_size}",
            "Omit image_size, or resize the tensors: only PIL images and files are resized",
        )


def latent_size(height: int, width: int, downsample_factor: int) -> tuple[int, int]:
    """(h, w) of the latent of an image of `height` x `width` pixels.

    Raises:
        DataError: a side is not a multiple of the downsample factor.
    """
    factor = downsample_factor
    if height % factor or width % factor or min(height, width) < factor:
        raise DataError(
            f"an image of {in_pixels(height, width)} is not divisible into cells of {factor}",
            f"Use sides that are multiples of {factor}",
        )
    return height // factor, width // factor


class InputOwner(Protocol):
    """The part of a tokenizer that is used here."""

    device: torch.device
    image_size: int | None
    """The side of the training images; None if unknown."""
    range_checked: bool
    """Whether a batch of float images on a GPU has been checked."""

    @property
    def downsample_factor(self) -> int:
        """Image side / latent side."""


def read_image(image: ImageLike, owner: InputOwner, image_size: Size | None = None) -> Tensor:
    """An image file or PIL image as uint8[3, H, W], resized and cropped to `image_size` unless it is None; a tensor as
    it is.

    A PIL image becomes the same pixels as its file, unless it is a PNG with a transparent color (tRNS) and samples of
    2, 4 or 16 bits, which Pillow does not keep as they are stored: other pixels may be made white.

    Raises:
        DataError: it is absent, damaged or no image; its sides are not multiples of the downsample factor and
            `image_size` is None; a tensor of another size.
    """
    if isinstance(image, Tensor):
        check_tensor_size(image, image_size)
        return image
    if isinstance(image, Image.Image):
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on invalid bytes
            raise bad_image(error) from error
        rgb = upright(to_rgb(image, b""), image)
    elif isinstance(image, str | Path):
        try:
            rgb = decode(Path(image).read_bytes())
        except IsADirectoryError:
            raise DataError(f"{image} is a folder", "Pass its files, or the folder to write_tokens") from None
        except OSError as error:
            raise DataError(f"{image}: {error.strerror or error}", nearest_path(Path(image))) from None
        except BadImage as error:
            raise DataError(f"{image}: {error.what}", "Pass another image") from None
    else:
        raise DataError(f"an image of type {type(image).__name__}", "Pass tensors, PIL images, or paths of files")
    factor = owner.downsample_factor
    if image_size is None and (rgb.height % factor or rgb.width % factor):
        raise DataError(
            f"an image of {in_pixels(rgb.height, rgb.width)} is not divisible into cells of {factor}",
            f"Set image_size, such as image_size={owner.image_size or 256}, to crop it",
        )
    if image_size is None:
        return pixels(rgb)
    height, width = pair_of(image_size)
    return Framing(rule="adm" if height == width else "cover", size=(height, width))(rgb)


def network_input(images: Tensor, owner: InputOwner) -> Tensor:
    """Convert uint8[B, 3, H, W], or float in [-1, 1], to float32 in [-1, 1] on the device of the tokenizer.

    Warns once of float images without a negative value, which look like images in [0, 1]. The range of images on a GPU
    is checked in the first batch only, as the host has to wait for it.

    Raises:
        DataError: a wrong shape, dtype or range.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        one = images.ndim == 3 and len(images) == 3
        hint = "Pass images[None] for a single one" if one else "Pass a batch of RGB images"
        raise DataError(f"images of shape {list(images.shape)}, [B, 3, H, W] is expected", hint)
    height, width = images.shape[-2:]
    latent_size(height, width, owner.downsample_factor)
    if images.dtype == torch.uint8:
        return to_float(images.to(owner.device))
    if not images.is_floating_point():
        raise DataError(f"images of dtype {images.dtype}", "Pass uint8 in [0, 255] or float in [-1, 1]")
    if torch.compiler.is_compiling():
        assert (images.abs() <= 1 + RANGE_TOLERANCE).all(), "float images are not in [-1, 1]"
    elif images.numel() and (images.device.type == "cpu" or not owner.range_checked):
        owner.range_checked |= images.device.type != "cpu"
        check_range(*images.aminmax())
    return images.to(owner.device).float()


def check_range(low: Tensor, high: Tensor) -> None:
    """Check the lowest and the highest value of float images, which should be in [-1, 1].

    Raises:
        DataError: they are not.
    """
    if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise DataError(f"float images in [{low:.3g}, {high:.3g}]", "Pass float in [-1, 1], or uint8 in [0, 255]")
    if low >= 0 and high > low:
        warnings.warn(UNSIGNED, stacklevel=5)  # the caller of `encode`; its no_grad is a frame too
