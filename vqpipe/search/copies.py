"""Equal rows of a matrix, found by hashing.

Shapes: R rows, D dimensions.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 2**20
"""Numbers hashed at a time: the copy of a block takes 8 MB."""
SPREAD = np.uint32(0x3C6EF362)
"""Twice 2**32 / golden ratio (multiplicative hashing, Knuth, volume 3); the factor 2 drops the sign bit."""
TABLE_BITS = 18
"""Bits of the hash of a row's first number."""


def row_hashes(rows: Tensor) -> Tensor:
    """A 64-bit hash of each row: float32[R, D] -> int64[R], equal for equal rows (-0 equals 0)."""
    width = rows.shape[1]
    odd = _odd(width).to(rows.device)
    blocks = rows.split(max(1, BLOCK_ELEMENTS // width))
    return torch.cat([_hash(block, odd) for block in blocks])


def first_copies(rows: Tensor) -> Tensor | None:
    """For each row of float32[R, D] the lowest index of an equal row, int64[R]; None if all rows differ.

    Only the values of rows with equal hashes are compared.
    """
    hashes = row_hashes(rows)
    if rows.device.type == "cpu" and not _any_equal(hashes.numpy()):
        return None
    ordered, order = hashes.sort()
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return None
    suspects = order[F.pad(same, (0, 1)) | F.pad(same, (1, 0))]
    _, group = torch.unique(rows[suspects] + 0.0, dim=0, return_inverse=True)
    lowest = torch.full_like(group, len(rows)).scatter_reduce_(0, group, suspects, "amin")
    first = torch.arange(len(rows), device=rows.device)
    first[suspects] = lowest[group]
    return first


def lowest_of_equals(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Replace each id of a row, int64[N], by the lowest index of an equal row of float32[R, D].

    In NumPy, whose single thread finishes before PyTorch's threads have started.
    """
    few = len(ids) < len(rows)
    suspects = begin_like(ids, rows) if few else np.arange(len(rows))
    some = (rows[suspects] if few else rows) + np.float32(0.0)  # -0 becomes 0
    words = some.view(np.int64 if some.shape[1] % 2 == 0 else np.int32)
    if not _any_equal(words @ _odd(words.shape[1]).numpy()):  # a simpler hash than `row_hashes`: equal rows agree
        return ids
    first = first_copies(torch.from_numpy(some))
    if first is None:
        return ids
    lowest = np.arange(len(rows))
    lowest[suspects] = suspects[first.numpy()]
    return lowest[ids]


def begin_like(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices of the rows of float32[R, D] whose first number has the hash of the first number of a row in `ids`."""
    start = rows.view(np.uint32)[:, 0] * SPREAD
    start >>= np.uint32(32 - TABLE_BITS)
    named = np.zeros(2**TABLE_BITS, dtype=bool)
    named[start[ids]] = True
    return np.flatnonzero(named.take(start))


@cache
def _odd(width: int) -> Tensor:
    """`width` fixed odd factors: int64[width]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (width,), generator=generator) * 2 + 1


def _any_equal(hashes: np.ndarray) -> bool:
    """Whether any two of int64[R] are equal. (PyTorch, which also returns indices, sorts three times as slowly.)"""
    ordered = np.sort(hashes)
    return bool((ordered[1:] == ordered[:-1]).any())


def _words(rows: Tensor) -> Tensor:
    """The bits of float32[R, D], -0 as 0, as int64[R, D / 2] where D is even, else as int64[R, D].

    The last bits of many numbers are zeros, such as those of whole numbers, and remain so in a product. So the first
    bits of each word are added to the last ones: another word for another word.
    """
    bits = (rows + 0.0).contiguous()
    words = bits.view(torch.int64) if rows.shape[1] % 2 == 0 else bits.view(torch.int32).long()
    for shift in (32, 16):
        words = words ^ (words >> shift & (1 << 64 - shift) - 1)  # without copies of the sign bit
    return words


def _hash(rows: Tensor, odd: Tensor) -> Tensor:
    words = _words(rows)
    odd = odd[: words.shape[1]]
    return words @ odd if rows.device.type == "cpu" else (words * odd).sum(dim=1)  # CUDA has no integer matmul
