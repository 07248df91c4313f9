"""Which rows of a matrix are equal, without comparing all pairs."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 2**20  # the copy of a block that is hashed stays at 8 MB


def row_hashes(rows: Tensor) -> Tensor:
    """A 64-bit hash of each row: float32[R, D] -> int64[R], equal for equal rows (-0 equals 0)."""
    width = rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (width,), generator=generator).to(rows.device) * 2 + 1
    blocks = rows.split(max(1, BLOCK_ELEMENTS // width))
    return torch.cat([_hash(block, odd) for block in blocks])


def first_copies(rows: Tensor) -> Tensor | None:
    """For each row of float32[R, D] the lowest index of an equal row, as int64[R]; None when all rows differ.

    Sorting the hashes finds the suspects; values are compared only among them.
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


def _any_equal(hashes: np.ndarray) -> bool:
    """Whether two of int64[R] are equal: numpy sorts three times as fast as torch, which sorts the places too."""
    ordered = np.sort(hashes)
    return bool((ordered[1:] == ordered[:-1]).any())


def _hash(rows: Tensor, odd: Tensor) -> Tensor:
    bits = (rows + 0.0).contiguous()  # adding 0 makes -0 and 0 the same bits
    words = bits.view(torch.int64) if rows.shape[1] % 2 == 0 else bits.view(torch.int32).long()
    odd = odd[: words.shape[1]]
    return words @ odd if rows.device.type == "cpu" else (words * odd).sum(dim=1)  # CUDA has no integer matmul
