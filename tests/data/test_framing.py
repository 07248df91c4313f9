"""Each rule beside what the released codes call, or an independent way to the same pixels."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vqpipe.data.transforms import Framing, center_crop, parse_size, pixels
from vqpipe.errors import ConfigError

SIZES = [(97, 64), (64, 97), (33, 20), (32, 32), (31, 40), (150, 301), (64, 48)]


def drawn(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("target", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_is_interpolation_without_antialiasing(size: tuple[int, int], target: tuple[int, int]) -> None:
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
def test_cover_is_one_bicubic_resize_and_the_centre(size: tuple[int, int], target: tuple[int, int]) -> None:
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


def test_an_image_of_the_size_stays_as_it_is_under_every_rule() -> None:
    image = drawn(32, 32)
    for rule in ("adm", "linear", "cover"):
        assert torch.equal(Framing(rule=rule, size=(32, 32))(image), pixels(image))  # type: ignore[arg-type]
    odd = drawn(33, 20)
    assert torch.equal(Framing(rule="native")(odd), pixels(odd))
    assert torch.equal(Framing(rule="adm", size=(16, 16))(odd), center_crop(odd, 16))


def test_a_frame_goes_to_other_processes() -> None:
    frame = Framing(rule="cover", size=(24, 40))
    assert pickle.loads(pickle.dumps(frame)) == frame


@pytest.mark.parametrize(
    ("rule", "size", "said"),
    [
        ("adm", (24, 40), "ADM's crop is square, 40x24 is not. Take the rule cover"),
        ("adm", None, "needs a size"),
        ("native", (24, 40), "native. keeps every image's own size"),
        ("cover", (0, 40), "40x0 is no size"),
        ("nearest", (24, 40), "'nearest' is not a choice. Use adm, linear, cover, native"),
    ],
)
def test_frames_that_make_no_sense(rule: str, size: tuple[int, int] | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Framing(rule=rule, size=size)  # type: ignore[arg-type]


def test_sizes_are_written_as_screens_are_named() -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size("2560x1440") == (1440, 2560)
    assert parse_size("native") is None
    for text in ("", "x", "256x", "0", "-1", "1e3", "2560x1440x3", "2560 x 1440", "Native", "²", "9999999"):
        with pytest.raises(ConfigError, match="is no image size"):
            parse_size(text)
