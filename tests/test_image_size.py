import numpy as np
import pytest
import torch

from vqpipe.errors import ConfigError
from vqpipe.image_size import fixed_size, in_pixels, normal_size, pair_of, parse_size


def test_sizes_are_parsed_as_width_x_height() -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size("2560x1440") == (1440, 2560)
    assert parse_size("native") is None
    assert in_pixels(64, 64) == "64 x 64 pixels"
    assert in_pixels(*fixed_size("100x64")) == "64 x 100 pixels (height x width)"
    for text in ("", "x", "256x", "0", "-1", "1e3", "2560x1440x3", "2560 x 1440", "Native", "²", "9999999"):
        with pytest.raises(ConfigError, match="is not an image size"):
            parse_size(text)


def test_sizes_have_one_form_in_settings() -> None:
    assert [normal_size(size) for size in (256, "256", "256X256", "640x480", "native")] == [
        *(256, 256, 256),
        *("640x480", "native"),
    ]
    assert fixed_size("640x480") == (480, 640)
    with pytest.raises(ConfigError, match="native sizes have no size in common"):
        fixed_size("native")


def test_sizes_in_python_are_height_and_width_of_whole_numbers_of_any_library() -> None:
    for size in ((48, 64), [48, 64], np.array([48, 64]), torch.Size([48, 64]), torch.tensor([48, 64]), "64x48"):
        assert pair_of(size) == (48, 64)  # type: ignore[arg-type]
    for side in (48, np.int64(48), np.uint8(48), torch.tensor(48)):
        pair = pair_of(side)  # type: ignore[arg-type]
        assert pair == (48, 48)
        assert {type(number) for number in pair} == {int}  # fit for JSON
    for wrong in (48.0, (48.0, 64.0), (48, 64, 3), [(48, 64), (48, 64)], None):
        with pytest.raises(ConfigError, match="is not an image size"):
            pair_of(wrong)  # type: ignore[arg-type]
