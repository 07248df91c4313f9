import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms

from vqpipe.config import from_table, to_request
from vqpipe.data import decoding, transforms
from vqpipe.data.batches import OrderedBatches, TrainingStream
from vqpipe.data.decoding import TURNS, BadImage, decode
from vqpipe.data.images import open_images
from vqpipe.data.photos import HELDOUT, load
from vqpipe.data.transforms import (
    DataConfig,
    Framing,
    center_crop,
    crop_to_multiples,
    fast_crop,
    pixels,
    random_crop,
    ten_crops,
    to_float,
    to_uint8,
    training_crop,
)
from vqpipe.errors import ConfigError


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def solid(mode: str, color: object, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def palette(transparent: int | None = None) -> bytes:
    image = solid("P", 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encode(image, "PNG", **({} if transparent is None else {"transparency": transparent}))


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 8), value, np.uint16))


def png(width: int, height: int, bit_depth: int, colour_type: int, pixels: bytes) -> bytes:
    """A PNG built from chunks, for modes that Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    stride = len(pixels) // height
    rows = b"".join(b"\0" + pixels[y * stride : (y + 1) * stride] for y in range(height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode(solid("RGB", (1, 2, 3))), (1, 2, 3), id="rgb"),
        pytest.param(encode(solid("L", 77)), (77, 77, 77), id="gray"),
        pytest.param(encode(solid("1", 1)), (255, 255, 255), id="one bit"),
        pytest.param(encode(solid("RGBA", (255, 0, 0, 0))), (255, 255, 255), id="transparent red is white"),
        pytest.param(encode(solid("RGBA", (255, 0, 0, 128))), (255, 127, 127), id="half red over white"),
        pytest.param(encode(solid("LA", (0, 51))), (204, 204, 204), id="gray with alpha"),
        pytest.param(palette(), (200, 100, 50), id="palette"),
        pytest.param(palette(transparent=1), (255, 255, 255), id="transparent palette entry"),
        pytest.param(encode(solid("RGB", (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255), id="transparent color"),
        pytest.param(encode(solid("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), id="cmyk"),
        pytest.param(encode(grey16(32768)), (128, 128, 128), id="16 bit: half is half"),
        pytest.param(encode(grey16(65535)), (255, 255, 255), id="16 bit: full is full"),
        pytest.param(encode(grey16(257 * 9 + 128)), (9, 9, 9), id="16 bit: rounded down"),
        pytest.param(encode(grey16(257 * 9 + 129)), (10, 10, 10), id="16 bit: rounded up"),
        pytest.param(encode(grey16(1000), "TIFF"), (4, 4, 4), id="16 bit tiff"),
        pytest.param(png(8, 6, 16, 2, b"\x80\x00\x40\x00\xff\xff" * 48), (128, 64, 255), id="16 bit color"),
        pytest.param(
            encode(solid("RGB", (9, 8, 7)), "GIF", save_all=True, append_images=[solid("RGB", "blue")]),
            (9, 8, 7),
            id="first frame",
        ),
        pytest.param(encode(solid("RGB", (40, 90, 200)), "WEBP", lossless=True), (40, 90, 200), id="webp"),
        pytest.param(encode(solid("RGB", (40, 90, 200)), "BMP"), (40, 90, 200), id="bmp"),
    ],
)
def test_every_pillow_mode_is_converted(data: bytes, expected: tuple[int, int, int]) -> None:
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert set(image.getdata() if not hasattr(image, "get_flattened_data") else image.get_flattened_data()) == {
        expected
    }


def test_inverted_cmyk_jpeg_is_decoded() -> None:
    red = np.asarray(decode(encode(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=100)))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"<html><body>404</body></html>", "not-an-image", id="web page"),
        pytest.param(encode(solid("F", 1.5), "TIFF"), "float", id="float tiff"),
        pytest.param(encode(solid("I", 70000), "TIFF"), "mode", id="32-bit integers"),
        pytest.param(encode(solid("RGB", "red", (64, 64)), "JPEG")[:-2], "truncated", id="jpeg without its end"),
        pytest.param(encode(solid("RGB", "red", (64, 64)), "JPEG")[:300], "truncated", id="half a jpeg header"),
        pytest.param(encode(Image.effect_noise((64, 64), 90))[:2000], "truncated", id="half a png"),
        pytest.param(png(20000, 20000, 1, 0, b"\0" * 20000), "too-large", id="bomb"),
    ],
)
def test_bad_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))


def test_the_pixel_limit_is_checked_in_the_header() -> None:
    data = encode(solid("RGB", "red", (100, 100)))
    assert decode(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(BadImage, match="100 x 100"):
        decode(data[:60], max_pixels=9_999)  # only the header


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    corners = Image.new("RGB", (32, 16), "black")
    corners.paste((255, 255, 255), (0, 0, 8, 8))  # white in the upright image's upper left
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = corners.transpose(TURNS[inverse]) if inverse in TURNS else corners
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(stored, kind, exif=exif))
    assert image.size == (32, 16)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(corners)).mean() < 8  # JPEG and WebP are lossy


@pytest.mark.skipif(decoding.simplejpeg is None, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "411", "440", "progressive"])
def test_simplejpeg_decodes_pillows_pixels(subsampling: str) -> None:
    noise = Image.effect_noise((83, 61), 80)
    image = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    if subsampling == "progressive":
        data = encode(image, "JPEG", progressive=True)
    else:
        data = decoding.simplejpeg.encode_jpeg(np.asarray(image).copy(), 85, colorsubsampling=subsampling)
    fast = decoding.fast_jpeg(data, Image.open(io.BytesIO(data)))
    assert fast is not None
    assert np.array_equal(np.asarray(fast), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.skipif(decoding.simplejpeg is None, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("size", [(83, 61), (16, 16), (1, 1), (300, 7)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        pytest.param("RGB", {"quality": 75}, id="baseline"),
        pytest.param("RGB", {"quality": 95, "subsampling": 0}, id="444"),
        pytest.param("RGB", {"progressive": True}, id="progressive"),
        pytest.param("RGB", {"restart_marker_blocks": 2}, id="restart markers"),
        pytest.param("RGB", {"keep_rgb": True}, id="stored as RGB"),
        pytest.param("RGB", {"exif": exif(6)}, id="turned"),
        pytest.param("RGB", {"exif": exif(2), "progressive": True}, id="mirrored"),
        pytest.param("L", {}, id="gray"),
        pytest.param("L", {"progressive": True, "exif": exif(8)}, id="gray, turned"),
        pytest.param("CMYK", {}, id="CMYK"),
    ],
)
def test_decoding_does_not_depend_on_simplejpeg(
    mode: str, options: dict, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.effect_noise(size, 80)
    bands = [noise, noise.transpose(TURNS[3]), noise.transpose(TURNS[2]), noise.transpose(TURNS[4])]
    data = encode(Image.merge(mode, bands[: len(mode)]), "JPEG", **options)
    fast = decode(data)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    plain = decode(data)
    assert fast.mode == plain.mode == "RGB"
    assert fast.size == plain.size
    assert np.array_equal(np.asarray(fast), np.asarray(plain))


@pytest.mark.skipif(decoding.simplejpeg is None, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_have_the_same_result_with_simplejpeg(progressive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((64, 48), 80)
    data = encode(Image.merge("RGB", (noise, noise, noise)), "JPEG", progressive=progressive)
    random = np.random.default_rng(0)

    def judge(damaged: bytes) -> str | bytes:
        try:
            return decode(damaged).tobytes()
        except BadImage as error:
            return error.reason

    cases = [data[:-2], data[: len(data) // 2], data + b"more", data[:-200] + data[-2:]]
    for _ in range(40):
        at = int(random.integers(20, len(data) - 2))
        cases.append(data[:at] + bytes([random.integers(256)]) + data[at + 1 :])
    fast = [judge(case) for case in cases]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert fast == [judge(case) for case in cases]


def test_pixels_are_planes_of_the_image() -> None:
    image = Image.merge("RGB", [Image.effect_noise((7, 5), 80) for _ in range(3)])
    assert np.array_equal(transforms.pixels(image).numpy(), np.asarray(image).transpose(2, 0, 1))


def adm_reference(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's rule: the number of halvings, then one scale, then the center."""
    short = min(image.size)
    halvings = 0
    while short >= 2 * size:
        short, halvings = short // 2, halvings + 1
    for _ in range(halvings):
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    array = np.asarray(
        image.resize((round(image.size[0] * factor), round(image.size[1] * factor)), Image.Resampling.BICUBIC)
    )
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize(
    "size", [(64, 64), (100, 64), (333, 500), (63, 200), (127, 129), (128, 300), (40, 50), (1024, 700)]
)
def test_center_crop_equals_adms(size: tuple[int, int]) -> None:
    noise = Image.effect_noise(size, 90)
    image = Image.merge("RGB", (noise, noise.rotate(180), noise))
    crop = center_crop(image, 64)
    assert (crop.dtype, crop.shape) == (torch.uint8, (3, 64, 64))
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), adm_reference(image, 64))


def test_a_strip_is_cropped_without_resizing_all_of_it() -> None:
    strip = Image.effect_noise((2000, 1), 90).convert("RGB")
    crop = center_crop(strip, 64)  # resized as a whole: 64 x 128,000
    assert (crop.permute(1, 2, 0).numpy().astype(int) - adm_reference(strip, 64)).__abs__().max() <= 1
    assert random_crop(strip, 64, np.random.default_rng(0).random(3), max_scale=2.0).shape == (3, 64, 64)


def test_random_crop_is_a_window_of_the_resized_image() -> None:
    image = Image.effect_noise((90, 60), 90).convert("RGB")
    whole = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
    lefts = set()
    for seed in range(40):
        crop = random_crop(image, 32, np.random.default_rng(seed).random(3)).permute(1, 2, 0).numpy().astype(int)
        errors = [np.abs(crop - whole[:, x : x + 32]).max() for x in range(17)]
        assert min(errors) <= 1
        lefts.add(int(np.argmin(errors)))
    assert {0, 16} < lefts  # both borders can be reached
    assert len(lefts) > 10


def trained_on(data: bytes, config: DataConfig, seed: int) -> torch.Tensor:
    crop = np.empty((3, config.image_size, config.image_size), np.uint8)
    training_crop(data, config, np.random.default_rng(seed).random(4).tolist(), crop)
    return torch.from_numpy(crop)


def test_training_crop_follows_its_config() -> None:
    image = Image.effect_noise((90, 60), 90).convert("RGB")

    def crops(**settings: object) -> list[torch.Tensor]:
        config = DataConfig(image_size=32, **settings)
        return [trained_on(encode(image), config, seed) for seed in range(20)]

    center = center_crop(image, 32)
    assert all(torch.equal(crop, center) for crop in crops(crop="center", flip=False))
    mirrored = [torch.equal(crop, center.flip(-1)) for crop in crops(crop="center", flip=True)]
    assert 3 < sum(mirrored) < 17
    assert all(torch.equal(a, b) for a, b in zip(crops(max_scale=1.5), crops(max_scale=1.5), strict=True))
    for settings in ({"crop": "center"}, {"resize": "exact"}, {"resize": "fast"}):
        assert trained_on(encode(image, "JPEG"), DataConfig(image_size=32, max_pixels=90 * 60, **settings), 0).any()
        with pytest.raises(BadImage, match="90 x 60 pixels, limit 5399"):
            trained_on(encode(image, "JPEG"), DataConfig(image_size=32, max_pixels=90 * 60 - 1, **settings), 0)


def test_native_images_are_cropped_at_the_center() -> None:
    image = Image.effect_noise((21, 15), 90).convert("RGB")
    assert torch.equal(crop_to_multiples(image, 8), pixels(image)[:, 3:11, 2:18])


def photograph(width: int, height: int, **options: object) -> bytes:
    """A photograph as a JPEG, resized from one with more pixels or not many fewer."""
    return encode(load(HELDOUT[1]).resize((width, height), Image.Resampling.LANCZOS), "JPEG", quality=92, **options)


def differences(first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    """The mean and the largest difference in gray levels."""
    levels = np.abs(first.astype(int) - second.astype(int))
    return float(levels.mean()), int(levels.max())


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_exact_training_crops_are_pillows(resize: str) -> None:
    config = DataConfig(image_size=48, max_scale=1.7, resize=resize)  # type: ignore[arg-type]
    for seed in range(6):
        data = photograph(150, 100)
        if resize == "fast":  # what it leaves to Pillow
            data = encode(Image.open(io.BytesIO(data)), "PNG")
        image = Image.open(io.BytesIO(data)).convert("RGB")
        flip, scale, across, down = np.random.default_rng(seed).random(4)
        flipped = flip < 0.5
        short = round(48 * (1 + scale * 0.7))
        width = round(150 * (short / 100))
        left, upper, x, y = int(across * (width - 47)), int(down * (short - 47)), 150 / width, 100 / short
        sides = (left * x, upper * y, min((left + 48) * x, 150), min((upper + 48) * y, 100))
        expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC, box=sides))
        expected = expected[:, ::-1] if flipped else expected
        np.testing.assert_array_equal(array(trained_on(data, config, seed)), expected)


@pytest.mark.parametrize(
    ("width", "height", "mean", "largest"),
    [
        pytest.param(192, 192, 0.01, 2, id="whole, resized to 2/3"),
        pytest.param(128, 128, 0.0, 0, id="whole, not resized"),
        pytest.param(256, 256, 2.5, 60, id="half, not resized"),
        pytest.param(384, 384, 2.0, 45, id="half, resized to 2/3"),
        pytest.param(640, 512, 2.5, 60, id="quarter, not resized"),
        pytest.param(500, 375, 4.0, 100, id="half, of odd sides: 187.5 rows become 188"),
    ],
)
def test_fast_crops_are_those_of_exact_resampling_within_bounds(
    width: int, height: int, mean: float, largest: int
) -> None:
    """The same window: it begins at a whole pixel, and ends within half of one."""
    data, drawn = photograph(width, height), np.zeros(3)
    crop = fast_crop(data, 128, drawn)
    assert crop is not None
    found = differences(crop, random_crop(decode(data), 128, drawn).numpy())
    assert found[0] <= mean
    assert found[1] <= largest


def test_fast_crops_move_by_at_most_half_a_pixel() -> None:
    data = photograph(500, 375)
    image = decode(data)
    for seed in range(12):
        drawn = np.random.default_rng(seed).random(3)
        crop = fast_crop(data, 256, drawn, max_scale=1.3)
        assert crop is not None
        (width, height), (left, upper) = transforms.random_window(image.size, 256, drawn, 1.3)
        sides = [left * 500 / width, upper * 375 / height, (left + 256) * 500 / width, (upper + 256) * 375 / height]
        snapped = tuple(map(round, sides))
        part = image.resize((256, 256), Image.Resampling.BICUBIC, box=snapped)
        inside = np.s_[2:-2, 2:-2]  # Pillow's filter reads pixels around the crop
        mean, largest = differences(crop.transpose(1, 2, 0)[inside], np.asarray(part)[inside])
        assert mean < 0.01
        assert largest <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_crops_are_upright(orientation: int) -> None:
    data, drawn = photograph(320, 256, exif=exif(orientation)), np.array([0.0, 0.5, 0.5])
    crop = fast_crop(data, 64, drawn)
    assert crop is not None
    assert differences(crop, random_crop(decode(data), 64, drawn).numpy())[0] < 4


@pytest.mark.skipif(decoding.simplejpeg is None, reason="the extra `fast` is not installed")
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"keep_rgb": True}], ids=str)
@pytest.mark.parametrize("size", [(301, 97), (500, 375), (129, 128), (64, 64)], ids=str)
def test_fast_crops_do_not_depend_on_simplejpeg(
    size: tuple[int, int], options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, drawn = photograph(*size, **options), np.array([0.3, 0.6, 0.9])
    fast = [fast_crop(data, side, drawn, 1.2) for side in (8, 13, 24, 40)]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    for side, crop in zip((8, 13, 24, 40), fast, strict=True):
        assert crop is not None
        plain = fast_crop(data, side, drawn, 1.2)
        assert plain is not None
        np.testing.assert_array_equal(crop, plain)


def test_fast_training_crops_by_the_drawn_numbers_and_the_scale() -> None:
    data = photograph(240, 160)
    config = DataConfig(image_size=32, max_scale=2.0, resize="fast", flip=False)
    crop = fast_crop(data, 32, np.random.default_rng(3).random(4)[1:], max_scale=2.0)
    np.testing.assert_array_equal(trained_on(data, config, 3).numpy(), crop)


def test_fast_training_leaves_other_images_and_enlarging_to_the_exact_crop() -> None:
    photo = load(HELDOUT[1]).resize((120, 80))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    others = [
        encode(photo.convert(mode), kind)
        for mode, kind in (
            ("L", "JPEG"),
            ("CMYK", "JPEG"),
            ("RGB", "PNG"),
            ("RGBA", "PNG"),
            ("P", "PNG"),
            ("RGB", "WEBP"),
        )
    ]
    others += [encode(grey16(40_000)), photograph(50, 30)]  # the last one is enlarged
    for data in others:
        crops = [trained_on(data, DataConfig(image_size=32, resize=resize), 3) for resize in ("exact", "fast")]  # type: ignore[arg-type]
        assert torch.equal(*crops)
    drawn = np.zeros(3)
    assert fast_crop(photograph(120, 80), 32, drawn) is not None
    assert fast_crop(photograph(120, 80), 32, drawn, max_pixels=120 * 80 - 1) is None
    assert fast_crop(photograph(120, 80, icc_profile=profile), 32, drawn, color="ignore") is not None
    assert fast_crop(photograph(120, 80, icc_profile=profile), 32, drawn, color="srgb") is None


def test_damaged_images_are_refused_by_the_fast_crop_as_by_the_exact_one() -> None:
    data, random = photograph(120, 80), np.random.default_rng(0)
    cases = [data[:-2], data[: len(data) // 2], data + b"more", data[:30], data[:2], b"", b"\xff\xd8\xff"]
    for _ in range(60):
        at = int(random.integers(2, len(data) - 2))
        cases.append(data[:at] + bytes([random.integers(256)]) + data[at + 1 :])

    def judge(data: bytes, resize: str) -> str:
        try:
            trained_on(data, DataConfig(image_size=32, resize=resize), 0)  # type: ignore[arg-type]
        except BadImage as error:
            return error.reason
        return ""

    found = [judge(case, "fast") for case in cases]
    assert found == [judge(case, "exact") for case in cases]
    assert {"", "truncated", "empty"} <= set(found)


def test_the_resize_of_earlier_configs_is_exact() -> None:
    assert "resize" not in to_request(DataConfig())
    assert to_request(DataConfig(resize="fast"))["resize"] == "fast"


def test_uint8_survives_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert (floats.dtype, floats.min().item(), floats.max().item()) == (torch.float32, -1.0, 1.0)
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))
    almost = to_float(levels)[1:] - 0.2 / 127.5  # truncating would lose a level
    assert torch.equal(to_uint8(almost), levels[1:])


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 0},
        {"crop": "left"},
        {"max_scale": 0.5},
        {"max_skipped": 2.0},
        {"max_pixels": 10**10},
        {"resize": ""},
    ],
)
def test_invalid_data_configs_are_an_error(settings: dict) -> None:
    with pytest.raises(ConfigError):
        from_table(DataConfig, settings, "data")


SIZES = [(97, 64), (64, 97), (33, 20), (32, 32), (31, 40), (150, 301), (64, 48)]


def drawn(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("target", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_equals_torch_interpolate_without_antialiasing(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = drawn(*size)
    scale = max(target[0] / image.height, target[1] / image.width)
    resized = (max(target[0], round(image.height * scale)), max(target[1], round(image.width * scale)))
    whole = F.interpolate(pixels(image).double()[None], resized, mode="bilinear", align_corners=False, antialias=False)[
        0
    ]
    upper, left = (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2
    expected = whole[:, upper : upper + target[0], left : left + target[1]]
    framed = Framing(rule="linear", size=target)(image)
    assert framed.shape == (3, *target)
    assert (framed - expected).abs().max() < 0.501  # the nearest level


def test_linear_aliases_and_cover_does_not() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0], [255]], np.uint8), (100, 200))).convert("RGB")
    kept = Framing(rule="linear", size=(40, 40))(stripes)  # the middle row of every five
    assert kept[0, :, 0].tolist() == [0, 255] * 20
    averaged = Framing(rule="cover", size=(40, 40))(stripes).float()
    assert (averaged - 127.5).abs().max() < 30


@pytest.mark.parametrize(("size", "target"), [((97, 64), (32, 32)), ((64, 97), (24, 40)), ((301, 150), (144, 256))])
def test_cover_equals_one_bicubic_resize_and_center_crop(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = drawn(*size)
    if image.width / image.height > target[1] / target[0]:
        whole = image.resize((round(image.width * target[0] / image.height), target[0]), Image.Resampling.BICUBIC)
    else:
        whole = image.resize((target[1], round(image.height * target[1] / image.width)), Image.Resampling.BICUBIC)
    upper, left = int(whole.height / 2 - target[0] / 2), int(whole.width / 2 - target[1] / 2)
    expected = np.asarray(whole)[upper : upper + target[0], left : left + target[1]]
    assert np.array_equal(array(Framing(rule="cover", size=target)(image)), expected)


def test_a_long_strip_is_resized_only_where_it_is_kept() -> None:
    strip = drawn(400, 2)
    whole = strip.resize((6400, 32), Image.Resampling.BICUBIC).crop((3184, 0, 3216, 32))
    framed = array(Framing(rule="cover", size=(32, 32))(strip)).astype(int)
    assert np.abs(framed - np.asarray(whole)).max() <= 1
    assert Framing(rule="linear", size=(32, 32))(drawn(5000, 1)).shape == (3, 32, 32)


def test_an_image_of_the_target_size_is_unchanged() -> None:
    image = drawn(32, 32)
    for rule in ("adm", "linear", "cover"):
        assert torch.equal(Framing(rule=rule, size=(32, 32))(image), pixels(image))  # type: ignore[arg-type]
    odd = drawn(33, 20)
    assert torch.equal(Framing(rule="native")(odd), pixels(odd))
    assert torch.equal(Framing(rule="adm", size=(16, 16))(odd), center_crop(odd, 16))


def test_framings_can_be_pickled() -> None:
    frame = Framing(rule="cover", size=(24, 40))
    assert pickle.loads(pickle.dumps(frame)) == frame


@pytest.mark.parametrize(
    ("rule", "size", "message"),
    [
        ("adm", (24, 40), "ADM's crop is square, 40x24 is not. Use the rule cover"),
        ("adm", None, "needs a size"),
        ("native", (24, 40), "native. keeps every image's own size"),
        ("cover", (0, 40), "40x0 is not a size"),
        ("nearest", (24, 40), "'nearest' is not a choice. Use one of adm, linear, cover, native"),
    ],
)
def test_invalid_framings_are_an_error(rule: str, size: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Framing(rule=rule, size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height", "size"), [(35, 35, 32), (281, 281, 256), (422, 422, 384), (41, 37, 30)])
def test_ten_crops_equal_those_of_torchvision(width: int, height: int, size: int) -> None:
    from torchvision.transforms import TenCrop

    pixel_values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    images = torch.from_numpy(pixel_values).permute(2, 0, 1)[None]
    expected = [np.asarray(crop) for crop in TenCrop(size)(Image.fromarray(pixel_values))]
    found = ten_crops(images, size)
    for crop, place in zip(found, (4, 0, 1, 2, 3, 9, 5, 6, 7, 8), strict=True):
        np.testing.assert_array_equal(crop[0].permute(1, 2, 0).numpy(), expected[place])


def wide_gamut(profile: bytes, form: str = "PNG") -> bytes:
    """A green that sRGB does not reach, with a profile."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (60, 200, 90)).save(file, form, icc_profile=profile, quality=100)
    return file.getvalue()


def swapped_profile() -> bytes:
    """A profile of sRGB whose red and green primaries are exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_icc_profiles_are_applied_on_request(form: str) -> None:
    data = wide_gamut(swapped_profile(), form)
    red, green, blue = decode(data).getpixel((4, 4))
    converted = decode(data, color="srgb").getpixel((4, 4))
    assert np.abs(np.subtract(converted, (green, red, blue))).max() <= 2


def test_profiles_of_srgb_of_other_color_spaces_and_damaged_ones_change_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, srgb[:200], b"no profile"):
        data = wide_gamut(profile)
        assert decode(data, color="srgb").tobytes() == decode(data).tobytes()


def test_color_is_part_of_an_image_set(tmp_path: Path) -> None:
    for name, form in (("wide.png", "PNG"), ("wide.jpg", "JPEG")):
        (tmp_path / name).write_bytes(wide_gamut(swapped_profile(), form))
    plain, converted = open_images([tmp_path]), open_images([tmp_path], color="srgb")
    assert plain.digest != converted.digest
    assert (plain.facts, converted.facts) == ({}, {"color": "srgb"})
    for images, color in ((plain, (60, 200, 90)), (converted, (200, 60, 90))):
        batches = [next(iter(OrderedBatches(images, image_size=8, batch_size=2)))]
        for settings in ({"crop": "center"}, {"resize": "exact"}, {"resize": "fast"}):
            config = DataConfig(image_size=8, num_workers=0, **settings)
            batches.append(next(TrainingStream(images, config, seed=0, batch_size=2).from_sample(0)))
        for batch in batches:
            assert (batch.images - torch.tensor(color)[:, None, None]).abs().max() <= 3
