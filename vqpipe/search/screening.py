"""Exact search on NVIDIA GPUs: bfloat16 screening on the tensor cores, then float32 distances of the candidates.

Two Triton kernels; neither writes distances to memory. `screen` computes products in bfloat16 over tiles of the codes
and lists for each vector the few candidates for its nearest code. `rescore` computes their float32 distances. The
result is that of comparing all float32 distances, with the lowest id among equals.

Proof that no nearest code is missed. With v^, c^ the bfloat16 values and s = |c|^2 / 2 - v.c, which orders codes as the
distance does,

    |s^ - s| <= |v - v^| |c| + |v| |c - c^| + g (|v| + |c|)^2.

The first two terms bound v.c - v^.c^ (Cauchy-Schwarz); the last, with g = (P + 8) 2^-22, bounds every rounding that
sums P products in any order, and that of the float32 distance. With a tile's largest |c| and |c - c^| this bounds each
of its s from below and from above, and a code whose lower bound exceeds another's upper bound is excluded.

A candidate is a whole tile for short vectors, where reading s^ dominates the time, and a single code for long vectors,
where reading a tile again costs more.

Shapes: G groups with separate codes in one launch, N vectors, K codes, D dimensions, P dimensions with padding, T tiles
of codes, S splits: runs of tiles that are processed in parallel if there are too few vectors to fill the GPU.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from vqpipe.search.blocking import CAPACITY, ROWS_AT_ONCE, Blocking
from vqpipe.search.kernels import rescore_kernel, screen_kernel

SLACK_PER_TERM = 2.0**-22
"""Relative error of one addition: four times that of float32, since tensor cores may truncate."""
NORM_MARGIN = 1 + 2.0**-10
"""Factor that makes each rounded norm an upper bound."""
TINY = 2.0**-100
"""Added to every bound: the possible loss by underflow."""


def nearest_screened(vectors: Tensor, codes: Tensor) -> Tensor:
    """The id of each vector's nearest code: float32[G, N, D], float32[G, K, D] on one GPU -> int64[G, N]."""
    groups, count, dim = vectors.shape
    ids = torch.empty(groups, count, dtype=torch.int64, device=vectors.device)
    blocking = Blocking.of(groups, min(count, ROWS_AT_ONCE), codes.shape[1], dim, processors(vectors.device))
    rounded_codes, code_errors, code_norms = rounded(codes, blocking)
    num_tiles = triton.cdiv(codes.shape[1], blocking.tile)
    screened_codes = (
        rounded_codes,
        codes.square().sum(dim=2).div_(2),
        torch.stack([largest_of_tiles(each, blocking.tile) for each in (code_errors, code_norms)], dim=2),
    )
    with torch.cuda.device_of(vectors):  # Triton launches on the current device
        for rows in range(0, count, ROWS_AT_ONCE):
            part = vectors[:, rows : rows + ROWS_AT_ONCE].contiguous()
            screened = screen(part, screened_codes, num_tiles, blocking)
            ids[:, rows : rows + ROWS_AT_ONCE] = rescore(part, codes, screened, num_tiles, blocking)
    return ids


def screen(vectors: Tensor, codes: tuple[Tensor, ...], num_tiles: int, blocking: Blocking) -> tuple[Tensor, ...]:
    """List the candidates for each vector's nearest code.

    Returns:
        An upper bound of the lowest s, float32[G, N, S]; the number of candidates, int32[G, N, S]; the candidates,
        int32[G, N, S, CAPACITY], each the number of a run of `candidate_size` codes; lower bounds of s in them, float32
        likewise.
    """
    rounded_codes, halves, tile_bounds = codes
    groups, count, _ = vectors.shape
    rounded_vectors, errors, norms = rounded(vectors, blocking)
    shape = (groups, count, blocking.splits)
    upper = torch.empty(shape, device=vectors.device)
    counts = torch.empty(shape, dtype=torch.int32, device=vectors.device)
    candidates = torch.empty((*shape, CAPACITY), dtype=torch.int32, device=vectors.device)
    lower = torch.empty((*shape, CAPACITY), device=vectors.device)
    grid = (triton.cdiv(count, blocking.rows), blocking.splits, groups)
    screen_kernel[grid](
        rounded_vectors,
        rounded_codes,
        halves,
        torch.stack([errors, norms], dim=2),
        tile_bounds,
        upper,
        counts,
        candidates,
        lower,
        count,
        halves.shape[1],
        num_tiles,
        triton.cdiv(num_tiles, blocking.splits),
        (blocking.padded + 8) * SLACK_PER_TERM,
        PADDED=blocking.padded,
        CHUNK=blocking.chunk,
        ROWS=blocking.rows,
        TILE=blocking.tile,
        SIZE=blocking.candidate_size,
        SPLITS=blocking.splits,
        CAPACITY=CAPACITY,
        TINY=TINY,
        num_warps=4 if blocking.rows == 64 else 8,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return upper, counts, candidates, lower


def rescore(vectors: Tensor, codes: Tensor, screened: tuple[Tensor, ...], num_tiles: int, blocking: Blocking) -> Tensor:
    """Compare the float32 distances of the candidates: int64[G, N]."""
    groups, count, dim = vectors.shape
    ids = torch.empty(groups, count, dtype=torch.int64, device=vectors.device)
    rescore_kernel[(count, groups)](
        vectors,
        codes,
        *screened,
        ids,
        count,
        codes.shape[1],
        num_tiles,
        triton.cdiv(num_tiles, blocking.splits),
        DIM=dim,
        CHUNK=blocking.chunk,
        TILE=blocking.tile,
        SIZE=blocking.candidate_size,
        SPLITS=blocking.splits,
        CAPACITY=CAPACITY,
        num_warps=1 if dim <= 16 else 4,
        enable_fp_fusion=True,
    )
    return ids


def rounded(rows: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor, Tensor]:
    """float32[G, R, D] -> bfloat16[G, R, P], padded with zeros; |row - rounded row| and |row|, float32[G, R] each."""
    padded = rows.new_zeros((*rows.shape[:2], blocking.padded), dtype=torch.bfloat16)
    padded[:, :, : rows.shape[2]] = rows
    errors = (rows - padded[:, :, : rows.shape[2]].float()).norm(dim=2)
    norms = torch.maximum(rows.norm(dim=2), padded.float().norm(dim=2))
    if not rows.is_cuda:  # Triton's interpreter cannot multiply bfloat16
        padded = padded.float()
    return padded, errors * NORM_MARGIN, norms * NORM_MARGIN


def largest_of_tiles(values: Tensor, tile: int) -> Tensor:
    """Maximum of each tile of non-negative values: float32[G, K] -> float32[G, T]."""
    return F.pad(values, (0, -values.shape[1] % tile)).unflatten(1, (-1, tile)).amax(dim=2)


def processors(device: torch.device) -> int:
    """Number of multiprocessors of the GPU; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
