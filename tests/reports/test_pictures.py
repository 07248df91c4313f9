"""PNG files are decoded again to check where each pixel went."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe.errors import DataError
from vqpipe.reports import page, pictures
from vqpipe.reports.pictures import ImagePair


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def pair(name: str, psnr: float | None, why: Any = "spread", height: int = 8, width: int = 12) -> ImagePair:
    original = torch.full((3, height, width), 100, dtype=torch.uint8)
    original[:, height // 2, width // 2] = 200
    return ImagePair(name, pictures.to_png(original), pictures.to_png(original + 10), psnr, why)


def test_a_grid_holds_every_pair_unchanged_on_white() -> None:
    originals, reconstructions = torch.randint(0, 255, (2, 2, 3, 64, 80), dtype=torch.uint8)
    grid = pixels(pictures.reconstruction_grid(originals, reconstructions))
    height, width = 64 + 2 * pictures.GAP, 2 * 80 + 3 * pictures.GAP
    assert grid.shape == (height, 2 * width, 3)
    left, top = width + pictures.GAP, pictures.GAP  # the second pair
    assert np.array_equal(grid[top : top + 64, left : left + 80], originals[1].permute(1, 2, 0))
    right = grid[top : top + 64, left + 80 + pictures.GAP :][:, :80]
    assert np.array_equal(right, reconstructions[1].permute(1, 2, 0))
    assert (grid[:top] == 255).all()


def test_the_end_of_a_sheet_that_is_not_full_is_transparent() -> None:
    images = torch.randint(0, 255, (5, 3, 16, 24), dtype=torch.uint8)
    height, width = 16 + pictures.GAP, 24 + pictures.GAP
    sheet = pixels(pictures.contact_sheet(images, 3))
    assert sheet.shape == (2 * height + pictures.GAP, 3 * width + pictures.GAP, 4)
    empty = np.zeros(sheet.shape[:2], dtype=bool)
    empty[height + pictures.GAP :, 2 * width + pictures.GAP :] = True
    assert np.array_equal(sheet[..., 3] == 0, empty)
    last = sheet[height + pictures.GAP :, width + pictures.GAP :][:16, :24, :3]
    assert np.array_equal(last, images[4].permute(1, 2, 0))
    assert pixels(pictures.contact_sheet(images[:3], 3)).shape[2] == 3


def test_small_images_are_enlarged_without_interpolation() -> None:
    image = torch.randint(0, 255, (3, 16, 24), dtype=torch.uint8)
    large = pictures.enlarge(image, min_side=64)
    assert large.shape == (3, 64, 96)
    assert torch.equal(large[:, 2::4, 2::4], image)


def test_an_empty_grid_is_an_error() -> None:
    with pytest.raises(DataError):
        pictures.reconstruction_grid(torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0, 3, 8, 8).byte())


def test_the_error_map_goes_from_black_to_the_brightest_at_the_peak() -> None:
    original = torch.zeros(3, 4, 4, dtype=torch.uint8)
    worse = original.clone()
    worse[:, 1, 1], worse[:, 2, 2] = pictures.ERROR_PEAK // 2, pictures.ERROR_PEAK
    png = Image.open(io.BytesIO(pictures.error_map(original, worse)))
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


def test_the_center_of_a_large_image_is_cropped_unscaled() -> None:
    image = torch.randint(0, 255, (3, 30, 50), dtype=torch.uint8)
    png = pictures.to_png(image)
    assert page.png_size(png) == (50, 30)
    assert torch.equal(pictures.from_png(pictures.crop_center(png, 20)), image[:, 5:25, 15:35])
    assert torch.equal(pictures.from_png(pictures.crop_center(png, 100)), image)


def test_galleries_show_the_worst_lowest_first_and_the_best_highest_first() -> None:
    pairs = [pair("a", 20.0), pair("b", 9.5, "worst"), pair("c", 8.25, "worst"), pair("d", None, "best")]
    sections: list[Any] = pictures.galleries([*pairs, pair("e", 31.0, "best"), pair("f", 33.0, "best")])
    assert {section.title: [each.name for each in section.pictures] for section in sections} == {
        "Originals and reconstructions": ["a"],
        "The worst images": ["c", "b"],
        "The best images": ["d", "f", "e"],
    }
    assert [each.note for each in sections[2].pictures] == ["", "33.0 dB", "31.0 dB"]


def test_a_gallery_holds_the_exact_pixels_and_their_error() -> None:
    (found,) = pictures.error_pictures([pair("a", 20.0)])
    reconstruction, error = found.versions
    assert (reconstruction.label, error.label) == ("reconstruction", "error")
    assert (pixels(reconstruction.png).astype(int) - pixels(found.original) == 10).all()
    assert len(np.unique(pixels(error.png))) == 1  # 10 everywhere
    assert found.size == (12, 8)


def test_pictures_over_the_budget_are_omitted_and_counted() -> None:
    pairs = [pair(str(i), 20.0) for i in range(4)]
    (section,) = pictures.galleries(pairs)
    whole: Any = section
    assert "too large" not in whole.caption
    size = sum(len(png) for each in whole.pictures for png in (each.original, *(v.png for v in each.versions)))
    budget = pictures.PictureBudget(size * 3 // 4)
    assert [each.name for each in pictures.error_pictures(pairs, budget)] == ["0", "1", "2"]
    assert budget.note().startswith("1 more would make this file too large")


def test_a_large_picture_is_shown_by_its_center_at_full_resolution() -> None:
    (found,) = pictures.error_pictures([pair("large", 20.0, height=16, width=1500)])
    assert found.size == (1024, 16)
    assert found.note == "20.0 dB, center 1024 x 16 of 1500 x 16 pixels; numbers of the whole"
    assert (pixels(found.original)[8, 512] == 200).all()


def test_shared_pictures_are_the_originals_that_every_report_shows() -> None:
    first, second = [pair("a", 20.0), pair("b", 21.0, width=14)], [pair("b", 22.0, width=14), pair("c", 23.0, width=16)]
    (found,) = pictures.shared_pictures({"lc": first, "fc": second}, pictures.PictureBudget())
    assert found.name == "b"
    assert [(version.label, version.note) for version in found.versions] == [("lc", "21.0 dB"), ("fc", "22.0 dB")]
