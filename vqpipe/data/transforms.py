"""Decoding, cropping, and the only conversions between encoded bytes, uint8 pixels and floats.

    encoded bytes --decode--> RGB image --center_crop | random_crop--> uint8[3, S, S] <--to_uint8 | to_float--> [-1, 1]

B images, H x W pixels, S the side of a square crop. Every crop is a pure function of the image and a generator.

Crops of evaluation protocols (`Framing`):

| rule | crop | used by |
|---|---|---|
| adm | `center_crop`: box halving, then antialiased bicubic; squares only | ADM, LlamaGen |
| linear | resize until both sides cover, bilinear without antialiasing; center crop | VQGAN-LC (albumentations) |
| cover | resize until both sides cover, antialiased bicubic in one step; center crop | MGVQ (`eval_aug.py`, Pillow) |
| native | the image at its own size | |
"""

import io
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from vqpipe.config import added, resumable
from vqpipe.data.sources import FORMATS
from vqpipe.errors import ConfigError, DataError

try:
    import simplejpeg
except ImportError:  # the extra `fast`; Pillow decodes the same pixels, more slowly
    simplejpeg = None

Result = TypeVar("Result")

Color = Literal["ignore", "srgb"]
"""What becomes of embedded ICC profiles."""
MAX_PIXELS = 178_956_970
"""The limit of Pillow itself."""

STRIP = 16
"""If a resized side is more than this many times the crop size, only the kept part is resized."""

UNSIGNED_FORMATS = tuple(name for name in ("CUR", "DIB", "PCX", "GBR", "IM", "TGA") if name in FORMATS)
"""The FORMATS whose first bytes prove little. They are tried where no other format of Pillow recognizes its signature,
and accepted if the whole image can be decoded; otherwise the file is "not-an-image"."""
SIGNED_FORMATS = tuple(name for name in FORMATS if name not in UNSIGNED_FORMATS)
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "TIFF": "tif",
    "JPEG2000": "jp2",
    "SUN": "ras",
    "PIXAR": "pxr",
    "FTEX": "ftu",
}
"""The file extensions of formats, where they are not the lower-case name."""
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))
"""Those that exchange height and width."""
SIZED_BY_HEADER = ("JPEG", "MPO", "PNG", "WEBP")
"""Formats whose header has the size of the decoded image."""
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""What a PNG with an EXIF orientation contains. It may follow the pixels, so that Pillow decodes these to find it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section [data]: how training images are cropped and read."""

    image_size: int = 256
    """Side of the square crops, in pixels."""

    crop: Literal["random", "center"] = "random"
    """A random square, or ADM's center crop (for training without augmentation)."""

    max_scale: float = 1.0
    """The short side is resized to image_size times a factor drawn from [1, max_scale] before a random crop."""

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
        if self.image_size < 1:
            raise ConfigError(f"data.image_size = {self.image_size} is not a size in pixels")
        if self.crop not in ("random", "center"):
            raise ConfigError(f"data.crop = {self.crop!r} is not a choice", "Use random or center")
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


class BadImage(DataError):
    """An image that cannot be used; `reason` is a short word for counts."""

    def __init__(self, reason: str, what: str = "") -> None:
        super().__init__(what or f"unusable image ({reason})")
        self.reason = reason
        self.args = (reason, what)  # the arguments of unpickling


def decode(data: bytes, max_pixels: int = MAX_PIXELS, color: Color = "ignore") -> Image.Image:
    """Decode an image to 8-bit RGB, upright by its EXIF orientation. It is of one of FORMATS.

    | stored as | becomes |
    |---|---|
    | gray, 1 bit, YCbCr, HSV, CMYK, YCCK | RGB by Pillow's formulas |
    | alpha, or a transparent palette entry or color | composited on white |
    | 16 bits gray (PNG, TIFF, PGM, JPEG 2000) | round(value / 257), so 65535 is 255; 12-bit TIFF to 4095 is 255 |
    | 16 bits per channel of a color image | the high byte, which is within one level of value / 257 |
    | 32-bit float gray (TIFF, PFM), all values in [0, 1] | round(255 x value) |
    | animation, several pages or sizes | the first page; the largest icon |

    ICC profiles are ignored, or with `color` "srgb" applied: see `to_srgb`.

    Text in a PNG is not limited in size; only EXIF and XMP in text are limited, to Pillow's 1 MiB.

    Raises:
        BadImage: empty; not-an-image; truncated; damaged; too-large (more than `max_pixels` by its header); float
            (values outside [0, 1]: no defined range); mode (32-bit integers, CIELAB).
    """
    if not data:
        raise BadImage("empty", "an image of zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table above covers what Pillow warns of
        try:
            return with_any_text(partial(decode_pixels, max_pixels=max_pixels, color=color), data)
        except (BadImage, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise BadImage("too-large", str(error)) from None
        except Exception as error:  # Pillow's decoders raise nearly anything on invalid bytes
            reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
            raise BadImage(reason, f"{reason} image: {error}") from error


def decode_pixels(data: bytes, max_pixels: int, color: Color) -> Image.Image:
    """`decode`, with Pillow's errors."""
    image = open_image(data, max_pixels)
    profile = image.info.get("icc_profile") if color == "srgb" else None
    return upright(to_srgb(fast_jpeg(data, image) or to_rgb(image, data), profile), image)


def to_srgb(rgb: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an RGB image from its embedded ICC profile to sRGB, by the relative colorimetric intent.

    Nothing changes without a profile, and with one that is damaged, of another color space (gray, CMYK), or sRGB by its
    own description. Transparent pixels are on white before.
    """
    if not profile:
        return rgb
    try:
        embedded = ImageCms.getOpenProfile(io.BytesIO(profile))
        if embedded.profile.xcolor_space.strip() != "RGB" or "sRGB" in ImageCms.getProfileDescription(embedded):
            return rgb
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(rgb, embedded, srgb, renderingIntent=intent, outputMode="RGB") or rgb
    except (ImageCms.PyCMSError, OSError, ValueError):
        return rgb


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image of one of FORMATS. Of SIGNED_FORMATS only the header is read.

    Raises:
        BadImage: not-an-image; too-large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=SIGNED_FORMATS)
    except UnidentifiedImageError:
        image = open_unsigned(data, max_pixels)
    check_pixels(image, max_pixels)
    return image


def open_unsigned(data: bytes, max_pixels: int) -> Image.Image:
    """Open and decode an image of one of UNSIGNED_FORMATS."""
    for name, (_, accept) in Image.OPEN.items():
        if name not in UNSIGNED_FORMATS and accept and accept(data[:16]) is True:
            why = "damaged, or of a kind that Pillow does not read" if name in FORMATS else "a format that is not read"
            raise BadImage("not-an-image", f"begins as {name}: {why}")
    for name in UNSIGNED_FORMATS:
        try:
            image = Image.open(io.BytesIO(data), formats=(name,))
            check_pixels(image, max_pixels)
            image.load()
        except (BadImage, MemoryError):
            raise
        except Exception:  # not of this format
            continue
        return image
    raise BadImage("not-an-image", "no image of a format that is read")


def check_pixels(image: Image.Image, max_pixels: int) -> None:
    """Raise a BadImage for more than `max_pixels`."""
    if image.width * image.height > max_pixels:
        raise BadImage("too-large", f"an image of {image.width} x {image.height} pixels, limit {max_pixels}")


def image_extension(data: bytes) -> str:
    """The file extension for encoded bytes: "jpg", "png", "webp", "tif", "jp2", ..."""
    name = with_any_text(lambda data: open_image(data).format or "", data)
    return EXTENSIONS.get(name, name.lower())


def with_any_text(read: Callable[[bytes], Result], data: bytes) -> Result:
    """`read(data)`; where Pillow refuses a PNG for the size of its text, the same without the text.

    Pillow limits decompressed text to protect memory. Its limits stay in force: the text is not decompressed at all.
    """
    try:
        return read(data)
    except ValueError as error:
        if "MAX_TEXT" not in str(error) or not data.startswith(PNG_SIGNATURE):
            raise
        return read(without_text(data))


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_EXIF_KEYS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keys of texts that may hold the EXIF orientation."""


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG: name, and the positions [start, stop) of the whole chunk, with length and checksum."""
    start = len(PNG_SIGNATURE)
    while start < len(data):
        stop = min(start + 12 + int.from_bytes(data[start : start + 4], "big"), len(data))
        yield data[start + 4 : start + 8], start, stop
        start = stop


def without_text(data: bytes) -> bytes:
    """A PNG without its text and color profile, but for the first text of each of PNG_EXIF_KEYS of up to 1 MiB."""
    parts, kept = [data[: len(PNG_SIGNATURE)]], set[bytes]()
    for name, start, stop in png_chunks(data):
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            key, _, text = data[start + 8 : stop - 4].partition(b"\0")
            if key not in PNG_EXIF_KEYS or key in kept or not is_short(name, text):
                continue
            kept.add(key)
        if name != b"iCCP":
            parts.append(data[start:stop])
    return b"".join(parts)


def is_short(name: bytes, text: bytes) -> bool:
    """Whether the text of a PNG chunk, after the key, has at most Pillow's 1 MiB."""
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    if name == b"tEXt" or (name == b"iTXt" and text[:1] == b"\0"):
        return len(text) <= limit
    compressed = text[1:] if name == b"zTXt" else text[2:].split(b"\0", 2)[-1]
    return inflate(compressed, limit) is not None


def inflate(compressed: bytes, limit: int) -> bytes | None:
    """Decompress at most `limit` bytes with zlib; None if there are more, or they are damaged."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(compressed, limit)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else content


def encode_jpeg(image: Tensor) -> bytes:
    """uint8[3, H, W] as JPEG at quality 95 without chroma subsampling (4:4:4)."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def encode_png(image: Tensor) -> bytes:
    """uint8[3, H, W] as PNG at compression level 1."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


def fast_jpeg(data: bytes, image: Image.Image) -> Image.Image | None:
    """Decode a YCbCr JPEG with simplejpeg, to the same pixels as Pillow; None for other images and damaged ones."""
    if simplejpeg is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[2] != "YCbCr":
            return None
        return Image.fromarray(simplejpeg.decode_jpeg(data))
    except ValueError:  # damaged: Pillow decodes it, or raises
        return None


def to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """Convert any mode of Pillow to RGB by the table in `decode`; `data` are the encoded bytes."""
    image.load()
    mode, transparent = image.mode, image.info.get("transparency")
    if mode == "F":
        return from_float(np.asarray(image), inverted(image))
    if image.format == "PNG" and transparent is not None and mode in ("1", "L", "I", "I;16", "RGB"):
        return white_where_transparent(image, data)
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):  # older Pillow: 16-bit PNG is "I"
        return from_16_bits(np.asarray(image), bits_per_sample(image), inverted(image))
    if mode in ("I", "LAB"):
        raise BadImage("mode", f"pixels of mode {mode} are not supported")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent is not None:
        straight = image.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, mode)).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, straight).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def from_16_bits(values: np.ndarray, bits: int = 16, white_is_zero: bool = False) -> Image.Image:
    """[H, W] gray of `bits` bits as RGB."""
    largest = (1 << bits) - 1
    levels = (values.astype(np.int64) * 255 + largest // 2) // largest
    return Image.fromarray((255 - levels if white_is_zero else levels).astype(np.uint8)).convert("RGB")


def from_float(values: np.ndarray, white_is_zero: bool = False) -> Image.Image:
    """float[H, W] gray as RGB.

    Raises:
        BadImage: NaN, or values outside [0, 1].
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN too
        raise BadImage("float", f"float pixels of {low:.6g} to {high:.6g}: only 0 to 1 is a defined range")
    levels = np.floor(values * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(255 - levels if white_is_zero else levels).convert("RGB")


def inverted(image: Image.Image) -> bool:
    """Whether gray is stored with 0 as white, which Pillow corrects in TIFFs of up to 8 bits only."""
    return image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]


def bits_per_sample(image: Image.Image) -> int:
    """12 for a TIFF of 12 bits, whose values Pillow does not scale; else 16."""
    return 12 if image.format == "TIFF" and image.tag_v2.get(258) == (12,) else 16  # type: ignore[attr-defined]


def white_where_transparent(image: Image.Image, data: bytes) -> Image.Image:
    """A gray or RGB PNG as RGB, with the color of its tRNS chunk replaced by white.

    The color is compared with the samples as they are stored, of which the lowest bits of tRNS count, by the PNG
    specification, section 11.3.2.1. Pillow scales samples of 1 to 4 bits, and drops the low byte of 16-bit RGB.
    """
    depth = data[24]
    start = next(start for name, start, _ in png_chunks(data) if name == b"tRNS") + 8
    count = 3 if image.mode == "RGB" else 1
    color = np.frombuffer(data, ">u2", count, start).astype(np.int64) & ((1 << depth) - 1)
    if count == 3:
        samples = np.asarray(image).astype(np.int64)
        if depth == 16:
            samples = samples << 8 | low_bytes(data)
        rgb = np.array(image)
    else:
        rgb = np.array(from_16_bits(np.asarray(image)) if depth == 16 else image.convert("RGB"))
        samples = np.asarray(image if depth == 16 else image.convert("L")).astype(np.int64)[..., None]
        if depth < 8:
            samples //= 255 // ((1 << depth) - 1)
    rgb[(samples == color).all(axis=-1)] = 255
    return Image.fromarray(rgb)


def low_bytes(data: bytes) -> np.ndarray:
    """uint8[H, W, 3]: the low bytes of a PNG with 16-bit RGB, of which Pillow decodes the high bytes."""
    image: Any = Image.open(io.BytesIO(data), formats=("PNG",))
    # The same bytes as little-endian samples, whose high byte is the second one.
    image.tile = [(*image.tile[0][:3], "RGB;16L")]
    return np.asarray(image)


def upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of `source` to `rgb`."""
    turn = turn_of(source)
    return rgb if turn is None else rgb.transpose(turn)


def turn_of(source: Image.Image) -> Image.Transpose | None:
    """The turn of the EXIF orientation; None for none, or an unreadable EXIF block."""
    try:
        return TURNS.get(source.getexif().get(ORIENTATION, 1))
    except Exception:  # the parser raises nearly anything on broken EXIF
        return None


def decoded_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of `decode(data, max_pixels)`. Of SIZED_BY_HEADER only the header is read: the rest of the image
    may be damaged.

    Raises:
        BadImage: as `decode`.
    """
    with warnings.catch_warnings(), suppress(Exception):  # `decode` raises the reason
        warnings.simplefilter("ignore")
        image = open_image(data, max_pixels)
        if image.format in SIZED_BY_HEADER and not any(key in data for key in PNG_EXIF if image.format == "PNG"):
            turned = image.format != "PNG" and turn_of(image) in QUARTER_TURNS
            return image.size if turned else image.size[::-1]
    image = decode(data, max_pixels)
    return image.height, image.width


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
    height, width = images.shape[-2] - size, images.shape[-1] - size
    corners = [(round(height / 2), round(width / 2)), (0, 0), (0, width), (height, 0), (height, width)]
    return [
        view[..., upper : upper + size, left : left + size]
        for view in (images, images.flip(-1))
        for upper, left in corners
    ]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, max_scale: float = 1.0) -> Tensor:
    """uint8[3, size, size]: a random square, after resizing the short side to size x [1, max_scale], antialiased."""
    scale, across, down = rng.random(3)
    short = round(size * (1.0 + float(scale) * (max_scale - 1.0)))
    factor = short / min(image.size)
    width, height = max(short, round(image.width * factor)), max(short, round(image.height * factor))
    left, upper = int(across * (width - size + 1)), int(down * (height - size + 1))
    return pixels(resize_part(image, (width, height), (left, upper), (size, size)))


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
    """`resize_and_crop` without computing the rest of the resized image; equal to it within one level."""
    (width, height), (left, upper) = target, corner
    across, down = image.width / width, image.height / height
    right, lower = min((left + size[0]) * across, image.width), min((upper + size[1]) * down, image.height)
    return image.resize(size, Image.Resampling.BICUBIC, box=(left * across, upper * down, right, lower))


def training_crop(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """uint8[3, S, S]: the random crop and flip of section [data]."""
    flipped = config.flip and bool(rng.random() < 0.5)
    if config.crop == "center":
        crop = center_crop(image, config.image_size)
    else:
        crop = random_crop(image, config.image_size, rng, config.max_scale)
    return crop.flip(-1) if flipped else crop


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
        if self.rule not in get_args(Rule):
            raise ConfigError(f"framing rule {self.rule!r} is not a choice", f"Use {', '.join(get_args(Rule))}")
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


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of an image size: "256" -> (256, 256); "2560x1440" (width x height) -> (1440, 2560);
    "native" -> None.

    Raises:
        ConfigError: anything else.
    """
    if text == "native":
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 10**6 for side in sides):
        raise ConfigError(f"{text!r} is not an image size", "Write 256, 2560x1440 (width x height), or native")
    return int(sides[-1]), int(sides[0])


def fixed_size(image_size: int | str) -> tuple[int, int]:
    """(height, width) of the side of a square, or of "WIDTHxHEIGHT".

    Raises:
        ConfigError: "native", or no size.
    """
    size = parse_size(str(image_size))
    if size is None:
        raise ConfigError("images of native sizes have no size in common", "Write 256, or 2560x1440 (width x height)")
    return size


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
