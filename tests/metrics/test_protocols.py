"""What protocols fix, and how reconstructions become 8-bit pixels."""

import pytest
import torch

from vqpipe.data.transforms import to_uint8
from vqpipe.errors import DataError, NumericError
from vqpipe.metrics.distortion import CONVENTIONS
from vqpipe.metrics.protocols import PROTOCOLS, gray_levels, stored


def test_every_protocol_lists_its_conventions_and_choices() -> None:
    for name, protocol in PROTOCOLS.items():
        table = protocol.to_table((256, 256))
        assert protocol.name == name
        assert {protocol.psnr, protocol.ssim, protocol.lpips} <= CONVENTIONS.keys()
        assert table.keys() == {"crop", "reference", "rounding", "resize", "extractor", "conventions"}
        assert table["conventions"].keys() == {"psnr", "ssim", "lpips"}
    networks = {name: protocol.lpips for name, protocol in PROTOCOLS.items()}
    assert networks == {"adm": "lpips_alex", "cleanfid-matched": "lpips_vgg", "cleanfid-rawval": "lpips_alex"}


def test_crop_rule_depends_on_the_image_size() -> None:
    rules = {name: protocol.crop_rule((256, 256)) for name, protocol in PROTOCOLS.items()}
    assert rules == {"adm": "adm", "cleanfid-matched": "cover", "cleanfid-rawval": "linear"}
    assert {protocol.crop_rule((1440, 2560)) for protocol in PROTOCOLS.values()} == {"cover"}
    assert {protocol.crop_rule(None) for protocol in PROTOCOLS.values()} == {"native"}
    assert PROTOCOLS["cleanfid-rawval"].to_table(None)["reference"] == "the same crops"


def test_round_equals_to_uint8_and_truncate_is_never_above_it() -> None:
    images = torch.linspace(-1.2, 1.2, 3 * 64).view(1, 3, 8, 8)
    levels = gray_levels(images)
    rounded, truncated = stored(levels, "round"), stored(levels, "truncate")
    assert torch.equal(rounded, to_uint8(images))
    assert torch.equal(truncated, ((images + 1) * 127.5).clamp(0, 255).floor().to(torch.uint8))
    assert set((rounded.int() - truncated.int()).unique().tolist()) == {0, 1}


def test_uint8_images_are_unchanged_by_every_rounding() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(stored(gray_levels(images), "truncate"), images)
    assert torch.equal(stored(gray_levels(images), "round"), images)


def test_nan_and_integers_raise() -> None:
    with pytest.raises(NumericError, match="NaN"):
        gray_levels(torch.tensor([0.0, float("nan")]))
    with pytest.raises(DataError, match="int64"):
        gray_levels(torch.zeros(2, dtype=torch.int64))
