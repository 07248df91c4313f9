import pytest

from vqpipe.errors import ConfigError
from vqpipe.image_size import fixed_size, normal_size, parse_size


def test_sizes_are_parsed_as_width_x_height() -> None:
    assert parse_size("256") == (256, 256)
    assert parse_size("2560x1440") == (1440, 2560)
    assert parse_size("native") is None
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
