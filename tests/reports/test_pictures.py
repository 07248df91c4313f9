"""Pictures, decoded again: what stands where."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe.errors import DataError
from vqpipe.reports import pictures


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_grid_holds_every_pair_unchanged_and_white_where_there_is_none() -> None:
    originals, again = torch.randint(0, 255, (2, 5, 3, 64, 80), dtype=torch.uint8)
    grid = pixels(pictures.reconstruction_grid(originals, again, columns=2))
    height, width = 64 + 2 * pictures.GAP, 2 * 80 + 3 * pictures.GAP
    assert grid.shape == (3 * height, 2 * width, 3)
    left, top = width + pictures.GAP, height + pictures.GAP  # the pair in row 1, column 1: the fourth
    assert np.array_equal(grid[top : top + 64, left : left + 80], originals[3].permute(1, 2, 0))
    assert np.array_equal(grid[top : top + 64, left + 80 + pictures.GAP :][:, :80], again[3].permute(1, 2, 0))
    assert (grid[2 * height :, width:] == 255).all()


def test_small_images_are_enlarged_without_new_colours() -> None:
    image = torch.randint(0, 255, (3, 16, 24), dtype=torch.uint8)
    large = pictures.enlarge(image, smallest_side=64)
    assert large.shape == (3, 64, 96)
    assert torch.equal(large[:, 2::4, 2::4], image)


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(DataError):
        pictures.reconstruction_grid(torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0, 3, 8, 8).byte())


def test_the_error_is_dark_where_there_is_none_and_brightest_at_the_peak() -> None:
    original = torch.zeros(3, 4, 4, dtype=torch.uint8)
    worse = original.clone()
    worse[:, 1, 1], worse[:, 2, 2] = pictures.ERROR_PEAK // 2, pictures.ERROR_PEAK
    png = Image.open(io.BytesIO(pictures.error_picture(original, worse)))
    light = np.asarray(png.convert("RGB")).astype(int).sum(-1)
    assert png.mode == "P"
    assert light[2, 2] == light.max() > light[1, 1] > light[0, 0] == light.min()


def test_a_codebook_map_shows_each_code_once_in_order() -> None:
    counts = torch.zeros(2, 10, dtype=torch.int64)
    counts[0, [0, 4]] = torch.tensor([5, 100])
    counts[1] = 1
    zoom = 64
    sheet = pixels(pictures.codebook_map(counts))[zoom // 2 :: zoom, zoom // 2 :: zoom]  # 10 codes: a 4 x 4 square
    assert sheet.shape == (4, 4 + 1 + 4, 4)
    first, second = sheet[:, :4].reshape(16, 4), sheet[:, 5:].reshape(16, 4)
    dark = (first[:10, :3] == pictures.UNUSED).all(1)
    assert np.flatnonzero(~dark).tolist() == [0, 4]
    assert first[4, :3].astype(int).sum() > first[0, :3].astype(int).sum()
    assert not (second[:10, :3] == pictures.UNUSED).all(1).any()
    assert (first[10:, 3] == 0).all()
    assert (first[:10, 3] == 255).all()


def test_the_middle_of_a_large_picture_is_cut_unscaled() -> None:
    image = torch.randint(0, 255, (3, 30, 50), dtype=torch.uint8)
    png = pictures.to_png(image)
    assert pictures.png_size(png) == (50, 30)
    assert torch.equal(pictures.from_png(pictures.cut_middle(png, 20)), image[:, 5:25, 15:35])
    assert torch.equal(pictures.from_png(pictures.cut_middle(png, 100)), image)
