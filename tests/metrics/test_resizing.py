"""The clean resize against clean-fid's own and Pillow's 8-bit one."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqpipe.metrics.inception import clean_resize, clean_resize_all


def noise(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("size", [(256, 256), (500, 375), (64, 400), (299, 299)])
def test_resize_equals_clean_fid(size: tuple[int, int]) -> None:
    cleanfid = pytest.importorskip("cleanfid.resize", reason="clean-fid is not installed")
    image = noise(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about an argument of clean-fid
        expected = cleanfid.build_resizer("clean")(image.permute(1, 2, 0).numpy())
    assert np.array_equal(clean_resize(image).permute(1, 2, 0).numpy(), expected)


def test_resize_is_pillows_bicubic_without_the_last_rounding() -> None:
    image = 64 + noise(90, 120) // 2  # in 8 bits Pillow clips between its two passes, where values overshoot
    eight_bits = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(
        (299, 299), Image.Resampling.BICUBIC
    )
    resized = clean_resize(image)
    difference = resized.permute(1, 2, 0).numpy() - np.asarray(eight_bits)
    assert np.abs(difference).max() < 1.5  # Pillow rounds after each of the two
    assert not torch.equal(resized, resized.round())
    assert float(resized.min()) >= 0
    assert float(resized.max()) <= 255


def test_a_batch_is_resized_one_by_one() -> None:
    images = torch.stack([noise(40, 50), noise(40, 50).flip(1)])
    both = clean_resize_all(images)
    assert both.shape == (2, 3, 299, 299)
    assert torch.equal(both[1], clean_resize(images[1]))
