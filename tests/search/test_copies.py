"""Equal rows are found by value."""

import numpy as np
import pytest
import torch

from vqpipe.search import copies


def test_first_copies_are_found_by_value() -> None:
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, -0.0], [2.0, 2.0]])
    assert copies.first_copies(rows).tolist() == [0, 0, 2, 0, 2, 5]
    assert copies.first_copies(torch.arange(1000.0)[:, None]) is None


def test_ids_are_replaced_by_the_first_of_equal_rows() -> None:
    rows = np.float32([[5, 1, 2], [0, 1, 3], [-0.0, 1, 3], [5, 1, 2], [5, 1, 4]])
    assert copies.lowest_of_equals(np.array([3, 2, 4, 0]), rows).tolist() == [0, 1, 4, 0]
    one = np.float32([[1], [2], [1], [-0.0], [0]])
    assert copies.lowest_of_equals(np.array([2, 1, 4]), one).tolist() == [0, 1, 3]


def test_hash_collisions_are_resolved_by_value(monkeypatch) -> None:
    monkeypatch.setattr(copies, "row_hashes", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    assert copies.first_copies(torch.tensor([[3.0], [1.0], [3.0], [2.0], [1.0]])).tolist() == [0, 1, 0, 3, 1]


@pytest.mark.parametrize("width", [2, 3, 64])
@pytest.mark.parametrize("values", [2, 256])
def test_whole_numbers_have_as_few_collisions_as_others(width: int, values: int) -> None:
    """Their last bits are zeros, which no product with an odd factor changes."""
    rows = torch.zeros(20_000, width)
    odd = rows[:, 1::2]
    odd[:] = torch.randint(0, values, odd.shape, generator=torch.Generator().manual_seed(0))
    distinct = len(torch.unique(rows, dim=0))
    assert len(copies.row_hashes(rows).unique()) == distinct


def test_hash_depends_only_on_the_row(monkeypatch) -> None:
    rows = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    whole = copies.row_hashes(rows)
    monkeypatch.setattr(copies, "BLOCK_ELEMENTS", 50)
    assert torch.equal(copies.row_hashes(rows), whole)
    assert len(whole.unique()) == 100
