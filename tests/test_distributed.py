"""Errors of one rank reach every rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vqpipe.distributed import process_group, rank, sharing_errors
from vqpipe.errors import ConfigError, DataError, VqpipeError

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


def test_number_of_processes_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is set .*unset WORLD_SIZE"), process_group(torch.device("cpu")):
        pass


def test_error_of_the_lowest_failing_rank_is_raised_on_every_rank(on_two_ranks: Callable[..., list[Any]]) -> None:
    of_rank = [["DataError", f"rank {number} cannot read its images. Check them.", 90 + number] for number in (0, 1)]
    assert on_two_ranks(all_raised) == [[None, of_rank[0], of_rank[1], of_rank[0]]] * 2
