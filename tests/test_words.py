"""Numbers with their nouns."""

import pytest

from vqpipe.words import counted, in_ranges, percent


@pytest.mark.parametrize(
    ("number", "plural", "text"),
    [
        (0, "images", "0 images"),
        (1, "images", "1 image"),
        (4758, "images", "4,758 images"),
        (1, "codes", "1 code"),
        (1, "classes", "1 class"),
        (1, "held-out images", "1 held-out image"),
        (1, "MB", "1 MB"),
    ],
)
def test_one_is_singular(number: int, plural: str, text: str) -> None:
    assert counted(number, plural) == text


def test_consecutive_numbers_are_a_range() -> None:
    texts = {(): "", (3,): "3", (0, 1): "0-1", (3, 7, *range(20, 30)): "3,7,20-29", (2, 1, 2, 2): "2,1-2,2"}
    assert {numbers: in_ranges(numbers) for numbers in texts} == texts


def test_a_share_is_rounded_neither_up_to_all_nor_down_to_none() -> None:
    shares = ((1.0, 2), (0.999999, 2), (0.999999, 3), (0.0, 1), (0.0004, 1), (0.0006, 1), (0.00004, 2), (1.25, 1))
    texts = ["100 %", "99.99 %", "99.999 %", "0.0 %", "0.04 %", "0.1 %", "0.004 %", "125.0 %"]
    assert [percent(*each) for each in shares] == texts
