"""Formats, pixel types and metadata of encoded images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vqpipe.data import decoding
from vqpipe.data.decoding import BadImage, decode, decoded_size, image_extension
from vqpipe.data.sources import FORMATS

NOISE = Image.merge("RGB", [Image.effect_noise((64, 64), 60 + i) for i in range(3)])


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def psd(image: Image.Image) -> bytes:
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, image.height, image.width, 8, 3)
    return header + bytes(12) + bytes(2) + b"".join(band.tobytes() for band in image.split())


def sun(image: Image.Image) -> bytes:
    return struct.pack(">8I", 0x59A66A95, *image.size, 24, 0, 3, 0, 0) + image.tobytes()


def dcx(image: Image.Image) -> bytes:
    return struct.pack("<III", 0x3ADE68B1, 12, 0) + encode(image, "PCX")


def cur(image: Image.Image) -> bytes:
    dib = bytearray(encode(image, "DIB"))
    dib[8:12] = struct.pack("<i", 2 * image.height)  # the mask follows the picture
    return struct.pack("<HHH", 0, 2, 1) + bytes([*image.size, 0, 0]) + struct.pack("<HHII", 0, 0, len(dib), 22) + dib


def xpm(image: Image.Image) -> bytes:
    """Black and white."""
    pixels = np.asarray(image.convert("L")) > 127
    rows = ",\n".join('"' + "".join("ab"[int(each)] for each in row) + '"' for row in pixels)
    head = f'"{image.width} {image.height} 2 1",\n"a c #000000",\n"b c #ffffff",\n'
    return f"/* XPM */\nstatic char * x[] = {{\n{head}{rows}\n}};\n".encode()


LOSSLESS = {
    **{kind: encode(NOISE, kind) for kind in ("PNG", "BMP", "TIFF", "PPM", "QOI", "DDS", "SGI", "DIB", "PCX", "TGA")},
    **{kind: encode(NOISE, kind, lossless=True) for kind in ("WEBP", "JPEG2000")},
    "TGA, RLE": encode(NOISE, "TGA", compression="tga_rle"),
    "PPM, text": b"P3 1 2 255 1 2 3 4 5 6",
    "PSD": psd(NOISE),
    "SUN": sun(NOISE),
    "DCX": dcx(NOISE),
    "CUR": cur(NOISE),
    "ICO": encode(NOISE, "ICO", sizes=[(64, 64)]),
}
BLACK_AND_WHITE = {
    **{kind: encode(NOISE.convert("1"), kind) for kind in ("XBM", "MSP")},
    "XPM": xpm(NOISE),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_are_decoded_to_their_pixels(name: str) -> None:
    expected = np.array([[[1, 2, 3]], [[4, 5, 6]]]) if name == "PPM, text" else np.asarray(NOISE)
    assert np.array_equal(np.asarray(decode(LOSSLESS[name])), expected)


def test_the_decoded_size_is_known_without_decoding_common_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = NOISE.resize((40, 24))
    turned = [Image.Exif() for _ in range(9)]
    for orientation, exif in enumerate(turned):
        exif[0x0112] = orientation
    oriented = {
        f"{kind} {number}": encode(wide, kind, exif=exif)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
        for number, exif in enumerate(turned)
    }
    for data in (LOSSLESS | BLACK_AND_WHITE | oriented).values():
        assert decoded_size(data) == decode(data).size[::-1]
    assert decoded_size(oriented["JPEG 6"]) == decoded_size(oriented["PNG 8"]) == (40, 24)
    for data, reason in ((b"", "empty"), (b"x", "not-an-image"), (encode(NOISE, "BMP")[:500], "truncated")):
        with pytest.raises(BadImage) as raised:
            decoded_size(data)
        assert raised.value.reason == reason
    with pytest.raises(BadImage, match="64 x 64 pixels, limit 4000"):
        decoded_size(LOSSLESS["PNG"], 4000)
    monkeypatch.setattr(decoding, "decode", None)
    assert [decoded_size(encode(wide, kind)) for kind in ("JPEG", "PNG", "WEBP")] == [(24, 40)] * 3


@pytest.mark.parametrize("name", BLACK_AND_WHITE)
def test_formats_of_two_colors_are_decoded_to_their_pixels(name: str) -> None:
    source = np.asarray(NOISE.convert("1").convert("RGB")) if name != "XPM" else None
    levels = np.asarray(decode(BLACK_AND_WHITE[name]))
    expected = np.where(np.asarray(NOISE.convert("L")) > 127, 255, 0)[..., None] if source is None else source
    if name == "XBM":  # a set bit is black
        expected = expected if np.array_equal(levels, expected) else 255 - expected
    assert np.array_equal(levels, np.broadcast_to(expected, levels.shape))


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "GIF", "ICNS", "BLP"])
def test_lossy_formats_are_decoded_close_to_their_pixels(kind: str) -> None:
    if kind not in FORMATS:
        pytest.skip(f"this Pillow is built without {kind}")
    smooth = NOISE.resize((4, 4)).resize((64, 64), Image.Resampling.BILINEAR)
    stored = smooth.convert("P", dither=Image.Dither.NONE) if kind == "BLP" else smooth
    image = decode(encode(stored, kind)).resize((64, 64))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(stored.convert("RGB"))).mean() < 8


@pytest.mark.parametrize(
    ("name", "extension"),
    [("JPEG2000", "jp2"), ("TIFF", "tif"), ("TGA", "tga"), ("WEBP", "webp"), ("SUN", "ras"), ("CUR", "cur")],
)
def test_extension_is_that_of_the_format(name: str, extension: str) -> None:
    assert image_extension(LOSSLESS[name]) == extension


def test_every_extension_is_registered_for_its_format() -> None:
    known = Image.registered_extensions()
    for name in FORMATS:
        assert known.get("." + decoding.EXTENSIONS.get(name, name.lower()), name) == name


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="EPS"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(64), id="HDF5"),
        pytest.param(b"SIMPLE  =                    T" + b" " * 50, id="FITS"),
    ],
)
def test_some_formats_are_not_read(data: bytes) -> None:
    with pytest.raises(BadImage, match="of no format that is read, or damaged") as caught:
        decode(data)
    assert caught.value.reason == "not-an-image"


def test_damaged_starts_are_not_taken_for_another_format() -> None:
    random = np.random.default_rng(0)
    signed = ("PNG", "BMP", "TIFF", "PPM", "QOI", "DDS", "SGI", "WEBP", "JPEG2000", "PSD", "SUN", "DCX", "ICO")
    files = {name: LOSSLESS[name] for name in signed} | {"JPEG": encode(NOISE, "JPEG"), "GIF": encode(NOISE, "GIF")}
    for name, data in files.items():
        for length in (1, 2, 4, 8, 16, 64, 600):
            for patch in (bytes(length), b"\xff" * length, b"\n" * length, random.bytes(length)):
                damaged = patch + data[length:]
                try:
                    decode(damaged)
                except BadImage:
                    continue
                assert image_extension(damaged) == image_extension(data), (name, length, patch[:8])


def test_random_bytes_are_not_an_image() -> None:
    random = np.random.default_rng(1)
    for _ in range(2000):
        with pytest.raises(BadImage) as caught:
            decode(random.bytes(int(random.integers(1, 400))))
        assert caught.value.reason == "not-an-image"


# PNG text


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunks(data: bytes, *chunks: bytes, after: bool = False) -> bytes:
    """A PNG with chunks after its header, or after its pixels."""
    at = len(data) - 12 if after else 33
    return data[:at] + b"".join(chunks) + data[at:]


SQUEEZED = zlib.compress(b"x y z " * 300_000)
"""1.8 MB."""


def text_chunks(kind: str) -> list[bytes]:
    match kind:
        case "zTXt":
            return [png_chunk(b"zTXt", b"workflow\0\0" + SQUEEZED)]
        case "iTXt":
            return [png_chunk(b"iTXt", b"workflow\0\x01\0\0\0" + SQUEEZED)]
        case "iCCP":
            return [png_chunk(b"iCCP", b"profile\0\0" + SQUEEZED)]
        case "bomb":
            return [png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 1))]
    short = zlib.compress(bytes(2**20 - 1))
    return [png_chunk(b"zTXt", b"%d\0\0" % i + short) for i in range(70)]  # more than Pillow's 64 MiB together


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "memory", "bomb"])
def test_png_with_much_compressed_text_is_decoded(kind: str, after: bool) -> None:
    data = with_chunks(LOSSLESS["PNG"], *text_chunks(kind), after=after)
    with pytest.raises(ValueError, match="MAX_TEXT"):
        Image.open(io.BytesIO(data)).load()
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert np.array_equal(np.asarray(decode(data)), np.asarray(NOISE))
    assert image_extension(data) == "png"
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def orientation_block() -> bytes:
    block = Image.Exif()
    block[0x0112] = 6
    return block.tobytes()


@pytest.mark.parametrize("where", ["eXIf", "raw profile", "XMP"])
def test_orientation_is_found_beside_much_text(where: str) -> None:
    wide = NOISE.crop((0, 0, 64, 32))
    raw = orientation_block()
    hexed = f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    chunk = {
        "eXIf": png_chunk(b"eXIf", raw.removeprefix(b"Exif\0\0")),
        "raw profile": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexed)),
        "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }[where]
    plain, large = (with_chunks(encode(wide, "PNG"), chunk, *more) for more in ([], text_chunks("zTXt")))
    upright = wide.transpose(Image.Transpose.ROTATE_270)
    assert decode(plain).tobytes() == decode(large).tobytes() == upright.tobytes()


def test_truncated_png_with_much_text_is_truncated() -> None:
    data = with_chunks(LOSSLESS["PNG"], *text_chunks("zTXt"))
    with pytest.raises(BadImage) as caught:
        decode(data[:-3000])
    assert caught.value.reason == "truncated"


# PNG transparency


def png(samples: np.ndarray, depth: int, color_type: int, *chunks: bytes) -> bytes:
    """A PNG of int[H, W, C] samples of `depth` bits."""
    height, width, _ = samples.shape
    bits = (samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, *chunks, png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")],
    )


def by_definition(samples: np.ndarray, depth: int, color: tuple[int, ...]) -> np.ndarray:
    """uint8[H, W, 3]: samples scaled to 8 bits, white where they equal the low bits of `color`."""
    largest = 2**depth - 1
    clear = (samples == np.array(color) % 2**depth).all(axis=-1, keepdims=True)
    scaled = samples >> 8 if samples.shape[-1] == 3 and depth == 16 else np.round(samples * 255 / largest)
    return np.broadcast_to(np.where(clear, 255, scaled), (*samples.shape[:2], 3)).astype(np.uint8)


@pytest.mark.parametrize("high", [0, 0x100], ids=["", "with unused high bits"])
@pytest.mark.parametrize(
    ("depth", "channels"),
    [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3)],
)
def test_png_color_of_trns_is_white(depth: int, channels: int, high: int) -> None:
    random = np.random.default_rng(depth)
    samples = random.integers(0, 2**depth, (9, 13, channels))
    samples[::3, ::2] = samples[4, 5]  # the transparent color
    samples[1, 1], samples[1, 2] = samples[4, 5] ^ 1, samples[4, 5]  # differs in its lowest bit
    color = tuple(int(sample) for sample in samples[4, 5])
    stored = color if depth == 16 else tuple(sample | high for sample in color)
    trns = png_chunk(b"tRNS", struct.pack(f">{channels}H", *stored))
    data = png(samples, depth, 2 if channels == 3 else 0, trns)
    assert np.array_equal(np.asarray(decode(data)), by_definition(samples, depth, color))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_palette_with_alpha_is_composited_on_white(depth: int) -> None:
    random = np.random.default_rng(depth)
    size = 2**depth
    palette = random.integers(0, 256, (size, 3))
    alpha = random.integers(0, 256, size - size // 4)  # the other entries are opaque
    samples = random.integers(0, size, (9, 13, 1))
    chunks = (png_chunk(b"PLTE", bytes(palette.ravel().tolist())), png_chunk(b"tRNS", bytes(alpha.tolist())))
    image = np.asarray(decode(png(samples, depth, 3, *chunks))).astype(int)
    weights = np.append(alpha, np.full(size // 4, 255))[samples] / 255
    exact = palette[samples[..., 0]] * weights + 255 * (1 - weights)
    assert np.abs(image - exact).max() <= 1


# TIFF of more than 8 bits


def tiff(
    samples: np.ndarray, bits: int, *, photometric: int, sample_format: int = 1, extra: int | None = None
) -> bytes:
    """A TIFF of [H, W, C] samples, uncompressed and little-endian."""
    height, width, channels = samples.shape
    data = np.ascontiguousarray(samples.astype(samples.dtype.newbyteorder("<"))).tobytes()
    tags: list[tuple[int, int, list[int]]] = [
        *((256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * channels), (259, 3, [1]), (262, 3, [photometric])),
        *((273, 4, [0]), (277, 3, [channels]), (278, 3, [height]), (279, 4, [len(data)])),
        *([(338, 3, [extra])] if extra is not None else []),
        (339, 3, [sample_format] * channels),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    entries, blob = b"", b""
    for tag, kind, values in tags:
        packed = b"".join(struct.pack("<H" if kind == 3 else "<I", value) for value in values)
        if tag == 273:
            packed = b"OFFS"
        if len(packed) > 4:
            packed, blob = struct.pack("<I", start + len(blob)), blob + packed
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    entries = entries.replace(b"OFFS", struct.pack("<I", start + len(blob)))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + blob + data


def ramp(channels: int = 1) -> np.ndarray:
    return np.arange(0, 65536, 4369, dtype=np.uint16).reshape(4, 4, 1).repeat(channels, axis=2)  # 17 x 257


def test_tiff_of_16_bits_is_scaled_as_png_is() -> None:
    levels = np.arange(0, 256, 17).reshape(4, 4, 1).repeat(3, axis=2)
    assert np.array_equal(decode(tiff(ramp(), 16, photometric=1)), levels)
    assert np.array_equal(decode(tiff(ramp(), 16, photometric=0)), 255 - levels)
    assert np.array_equal(decode(tiff(ramp(3), 16, photometric=2)), levels)
    rgba = ramp(4)
    rgba[..., 3] = 65535
    rgba[0, 0, 3] = 0
    composited = levels.copy()
    composited[0, 0] = 255
    assert np.array_equal(decode(tiff(rgba, 16, photometric=2, extra=2)), composited)


def test_tiff_of_12_bits_is_scaled_by_its_own_range() -> None:
    packed = np.frombuffer(bytes.fromhex("fff000800001"), np.uint8).reshape(1, -1)  # 4095, 0, 2048, 1
    data = tiff(packed[..., None], 12, photometric=1).replace(
        struct.pack("<HHIHH", 256, 3, 1, 6, 0), struct.pack("<HHIHH", 256, 3, 1, 4, 0)
    )
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 0, 128, 0]


def test_float_tiff_within_0_and_1_is_scaled() -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4, 1)
    levels = np.arange(0, 256, 17).reshape(4, 4, 1).repeat(3, axis=2)
    assert np.array_equal(decode(tiff(values, 32, photometric=1, sample_format=3)), levels)
    assert np.array_equal(decode(tiff(values, 32, photometric=0, sample_format=3)), 255 - levels)


@pytest.mark.parametrize(
    ("values", "sample_format", "reason", "words"),
    [
        (np.full((4, 4, 1), 1.25, np.float32), 3, "float", "float pixels of 1.25 to 1.25"),
        (np.full((4, 4, 1), -0.5, np.float32), 3, "float", "float pixels of -0.5 to -0.5"),
        (np.full((4, 4, 1), np.nan, np.float32), 3, "float", "nan"),
        (np.full((4, 4, 1), 7, np.uint32), 1, "mode", "mode I"),
        (np.full((4, 4, 1), 7, np.int32), 2, "mode", "mode I"),
    ],
)
def test_tiff_without_a_defined_range_is_refused(
    values: np.ndarray, sample_format: int, reason: str, words: str
) -> None:
    with pytest.raises(BadImage, match=words) as caught:
        decode(tiff(values, 32, photometric=1, sample_format=sample_format))
    assert caught.value.reason == reason


def test_tiff_of_a_kind_that_pillow_does_not_read_is_not_an_image() -> None:
    with pytest.raises(BadImage, match="of no format that is read, or damaged"):
        decode(tiff(np.zeros((4, 4, 3), np.float32), 32, photometric=2, sample_format=3))


def test_pgm_of_16_bits_is_scaled() -> None:
    data = b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 32768)
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 128]
