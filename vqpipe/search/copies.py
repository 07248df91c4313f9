"""Which rows of a matrix are equal, without comparing all pairs."""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = 2**20  # the int64 copy of a block stays at 8 MB


def row_hashes(rows: Tensor) -> Tensor:
    """A 64-bit hash of each row: float32[R, D] -> int64[R], equal for equal rows (-0 equals 0)."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device) * 2 + 1
    blocks = rows.split(max(1, BLOCK_ELEMENTS // rows.shape[1]))
    return torch.cat([_hash(block, odd) for block in blocks])


def first_copies(rows: Tensor) -> Tensor | None:
    """For each row of float32[R, D] the lowest index of an equal row, as int64[R]; None when all rows differ.

    Sorting the hashes finds the suspects; values are compared only among them.
    """
    ordered, order = row_hashes(rows).sort()
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return None
    suspects = order[F.pad(same, (0, 1)) | F.pad(same, (1, 0))]
    _, group = torch.unique(rows[suspects] + 0.0, dim=0, return_inverse=True)
    lowest = torch.full_like(group, len(rows)).scatter_reduce_(0, group, suspects, "amin")
    first = torch.arange(len(rows), device=rows.device)
    first[suspects] = lowest[group]
    return first


def _hash(rows: Tensor, odd: Tensor) -> Tensor:
    bits = (rows + 0.0).view(torch.int32).long()  # adding 0 makes -0 and 0 the same bits
    return bits @ odd if rows.device.type == "cpu" else (bits * odd).sum(dim=1)  # CUDA has no integer matmul
