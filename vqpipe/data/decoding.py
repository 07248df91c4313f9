"""Decoding of images to 8-bit RGB, and encoding.

    encoded bytes --decode--> RGB image, upright --> transforms.py

H x W pixels.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from vqpipe.data.sources import FORMATS
from vqpipe.errors import DataError

try:
    import simplejpeg
except ImportError:  # the extra `fast`; Pillow decodes the same pixels, more slowly
    simplejpeg = None

Result = TypeVar("Result")

Color = Literal["ignore", "srgb"]
"""What becomes of embedded ICC profiles."""
MAX_PIXELS = 178_956_970
"""The limit of Pillow itself."""

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
JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_EXIF_KEYS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keys of texts that may hold the EXIF orientation."""
PNG_EXIF = (b"eXIf", *PNG_EXIF_KEYS)
"""What a PNG with an EXIF orientation contains. It may follow the pixels, so that Pillow decodes these to find it."""


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
            raise bad_image(error) from error


def bad_image(error: Exception) -> BadImage:
    """The BadImage for an error of Pillow's decoders."""
    reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
    return BadImage(reason, f"{reason} image: {error}")


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
    """Open an image of one of FORMATS, of which only the header is read.

    Raises:
        BadImage: not-an-image; too-large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("not-an-image", "of no format that is read, or damaged") from None
    if image.width * image.height > max_pixels:
        raise BadImage("too-large", f"an image of {image.width} x {image.height} pixels, limit {max_pixels}")
    return image


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


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG: name, and the positions [start, stop) of the whole chunk, with length and checksum."""
    start = len(PNG_SIGNATURE)
    while start < len(data):
        stop = min(start + 12 + int.from_bytes(data[start : start + 4], "big"), len(data))
        yield data[start + 4 : start + 8], start, stop
        start = stop


def without_text(data: bytes) -> bytes:
    """A PNG without its color profile and its text, but for the text of PNG_EXIF_KEYS."""
    chunks = (
        data[start:stop]
        for name, start, stop in png_chunks(data)
        if name not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") or data.startswith(PNG_EXIF_KEYS, start + 8)
    )
    return PNG_SIGNATURE + b"".join(chunks)


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


class JpegHeader(NamedTuple):
    """The header of a JPEG that `decode_reduced` takes."""

    height: int
    """Of the upright image, as `width`."""
    width: int
    turn: Image.Transpose | None
    """Turns the stored image upright."""


def jpeg_header(data: bytes, max_pixels: int = MAX_PIXELS, color: Color = "ignore") -> JpegHeader | None:
    """The header of a JPEG of three channels of 8 bits, without decoding; None for other images, damaged ones, those of
    more than `max_pixels`, and those with an ICC profile that `color` applies."""
    if not data.startswith(JPEG_SIGNATURE):
        return None
    with warnings.catch_warnings(), suppress(Exception):  # `decode` raises the reason
        warnings.simplefilter("ignore")
        image = open_image(data, max_pixels)
        if image.mode == "RGB" and not (color == "srgb" and "icc_profile" in image.info):
            turn = turn_of(image)
            return JpegHeader(*(image.size if turn in QUARTER_TURNS else image.size[::-1]), turn)
    return None


def decode_reduced(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray | None:
    """uint8[ceil(H / r), ceil(W / r), 3]: a JPEG decoded upright at 1/r of its size; None if it is damaged.

    The decoder computes blocks of (8 / r)^2 pixels from the lowest frequencies of each block of 8^2, by an inverse DCT
    of that size; r is 1, 2, 4 or 8. With 1 the pixels are those of `decode`.
    """
    height, width = header.height, header.width
    if header.turn in QUARTER_TURNS:
        height, width = width, height
    try:
        if simplejpeg is not None:
            rows, columns = -(-height // reduction), -(-width // reduction)
            rgb = simplejpeg.decode_jpeg(data, min_height=rows, min_width=columns)
        else:
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
            if reduction > 1:
                image.draft("RGB", (max(1, width // reduction), max(1, height // reduction)))
            rgb = np.array(image)
    except (OSError, ValueError):
        return None
    return rgb if header.turn is None else np.array(Image.fromarray(rgb).transpose(header.turn))


def to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """Convert any mode of Pillow to RGB by the table in `decode`; `data` are the encoded bytes, empty if unknown."""
    image.load()
    mode, transparent = image.mode, image.info.get("transparency")
    if mode == "F":
        return from_float(np.asarray(image), inverted(image))
    if data and image.format == "PNG" and transparent is not None and mode in ("1", "L", "I", "I;16", "RGB"):
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
    specification, section 11.3.2.1. Pillow scales samples of 1 to 4 bits, and drops the low byte of 16-bit RGB, whose
    high bytes are compared.
    """
    depth = data[24]
    start = next(start for name, start, _ in png_chunks(data) if name == b"tRNS") + 8
    count = 3 if image.mode == "RGB" else 1
    color = np.frombuffer(data, ">u2", count, start).astype(np.int64) & ((1 << depth) - 1)
    if count == 3:
        rgb = samples = np.array(image)
        color >>= max(0, depth - 8)
    else:
        rgb = np.array(from_16_bits(np.asarray(image)) if depth == 16 else image.convert("RGB"))
        samples = np.asarray(image if depth == 16 else image.convert("L")).astype(np.int64)[..., None]
        if depth < 8:
            samples //= 255 // ((1 << depth) - 1)
    rgb[(samples == color).all(axis=-1)] = 255
    return Image.fromarray(rgb)


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
