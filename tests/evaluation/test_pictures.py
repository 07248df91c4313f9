"""The selection of a report's pictures, against sorting the whole set."""

from typing import Any

import pytest
import torch

from vqpipe.evaluation import pictures
from vqpipe.evaluation.pictures import SelectedPictures
from vqpipe.metrics.resumable import pack, unpack
from vqpipe.reports.pictures import from_png, prefix_pictures

PSNR = [3.0, 1.0, float("inf"), 1.0, 2.0, 5.0, float("inf"), 0.5]
IMAGES = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 2, 2)


def selected(order: list[int], k: int = 3, num_spread: int = 0) -> SelectedPictures:
    selection = SelectedPictures(8, num_spread, k)
    for i in order:
        selection.update([f"image {i}"], [i], IMAGES[i : i + 1], IMAGES[i : i + 1], [PSNR[i]])
    return selection


def names(rows: list[Any]) -> list[tuple[int, str]]:
    return [(position, picture.name) for _, position, picture in rows]


@pytest.mark.parametrize("order", [list(range(8)), list(range(7, -1, -1)), [3, 6, 1, 0, 7, 2, 5, 4]])
def test_extremes_equal_sorting_all_images_in_any_order(order: list[int]) -> None:
    selection = selected(order)
    assert names(selection.extremes["worst"]) == [(7, "image 7"), (1, "image 1"), (3, "image 3")]
    assert names(selection.extremes["best"]) == [(2, "image 2"), (6, "image 6"), (5, "image 5")]


def test_extremes_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = selected([0, 1, 2, 3]), selected([4, 5, 6, 7])
    monkeypatch.setattr(pictures, "gather_objects", lambda own: [own, (second.spread, second.extremes)])
    whole = [("worst", 7), ("worst", 1), ("worst", 3), ("best", 2), ("best", 6), ("best", 5)]
    assert [(each.why, each.name) for each in first.selected()] == [(why, f"image {i}") for why, i in whole]


def test_pictures_are_spread_evenly_and_infinite_psnr_is_left_out() -> None:
    shown = selected(list(range(8)), k=0, num_spread=4).selected()
    assert [(each.name, each.psnr) for each in shown] == [
        ("image 0", 3.0),
        ("image 2", None),
        ("image 4", 2.0),
        ("image 6", None),
    ]


@pytest.mark.parametrize(
    ("groups", "shown"), [(1, []), (2, [1]), (6, [1, 2, 3, 4, 5]), (8, [1, 2, 3, 5, 6]), (64, [1, 13, 26, 38, 51])]
)
def test_pictures_of_the_first_groups_are_few_and_resumed(groups: int, shown: list[int]) -> None:
    selection = SelectedPictures(8, 8, 0)
    prefixes = {k: torch.full((8, 3, 2, 2), k / 64) for k in range(1, groups)}
    selection.update([f"image {i}" for i in range(8)], range(8), IMAGES, IMAGES, PSNR, prefixes)
    found = [[k for k, _ in each.prefixes] for each in selection.selected()]
    assert found == [shown, [], [], shown, [], [], shown, []]
    pixels = [int(from_png(png).unique()) for _, png in selection.spread[0].prefixes]
    assert pixels == [round((k / 64 + 1) * 127.5) for k in shown]
    resumed = SelectedPictures(8, 8, 0)
    resumed.load_state(unpack(*pack(selection.state())[:2]))
    assert prefix_pictures(resumed.selected()) == prefix_pictures(selection.selected())


def test_no_extremes_are_kept_if_none_are_wanted() -> None:
    selection = selected(list(range(8)), k=0)
    assert selection.extremes == {"worst": [], "best": []}
