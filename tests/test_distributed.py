"""Errors of one rank reach every rank."""

from collections.abc import Callable
from typing import Any

from vqpipe.distributed import rank, sharing_errors
from vqpipe.errors import DataError, VqpipeError

FAILING: list[list[int]] = [[], [0], [1], [0, 1]]
"""The ranks that fail, in each of four rounds."""


def raised(failing: list[int]) -> list[object] | None:
    """Type, text and cause of the error that this rank raises if the ranks `failing` have one."""
    try:
        with sharing_errors():
            if rank() in failing:
                error = DataError(f"rank {rank()} cannot read its images", "Check them")
                error.sysexit_code = 90 + rank()
                raise error
    except VqpipeError as error:
        return [type(error).__name__, str(error), error.sysexit_code]
    return None


def all_raised() -> list[list[object] | None]:
    return [raised(failing) for failing in FAILING]


def test_error_of_the_lowest_failing_rank_is_raised_on_every_rank(on_two_ranks: Callable[..., list[Any]]) -> None:
    of_rank = [["DataError", f"rank {number} cannot read its images. Check them.", 90 + number] for number in (0, 1)]
    assert on_two_ranks(all_raised) == [[None, of_rank[0], of_rank[1], of_rank[0]]] * 2
