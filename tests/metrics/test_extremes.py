"""The worst and the best, beside sorting everything."""

from typing import Any

import pytest

from vqpipe.metrics import extremes
from vqpipe.metrics.extremes import Extremes

SCORES = [3.0, 1.0, float("inf"), 1.0, 2.0, 5.0, float("inf"), 0.5]


def streamed(order: list[int], k: int = 3) -> Extremes[str]:
    kept: Extremes[str] = Extremes(k)
    for place in order:
        kept.update([SCORES[place]], [place], lambda _, place=place: f"image {place}")
    return kept


@pytest.mark.parametrize("order", [list(range(8)), list(range(7, -1, -1)), [3, 6, 1, 0, 7, 2, 5, 4]])
def test_it_is_sorting_everything_whatever_the_order(order: list[int]) -> None:
    kept = streamed(order)
    assert [row[1:] for row in kept.lowest] == [(7, "image 7"), (1, "image 1"), (3, "image 3")]
    assert [row[1:] for row in kept.highest] == [(2, "image 2"), (6, "image 6"), (5, "image 5")]


def test_ranks_leave_only_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = streamed([0, 1, 2, 3]), streamed([4, 5, 6, 7])
    other: Any = ([row[:2] for row in theirs.lowest], [row[:2] for row in theirs.highest])
    monkeypatch.setattr(extremes, "gather_objects", lambda value: [value, other])
    mine.choose()
    assert [row[1] for row in mine.lowest] == [1, 3]
    assert [row[1] for row in mine.highest] == [2]


def test_none_asked_is_none_kept() -> None:
    kept = streamed(list(range(8)), k=0)
    assert kept.lowest == kept.highest == []
