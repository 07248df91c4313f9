"""Exact nearest-code search that never holds an N x K matrix.

Every public VQGAN writes all N x K distances to memory (26 GB for 65,536 latents and 100,000 codes). Here the distances
of a tile are made, compared and forgotten, so the extra memory is O(N + K) beside two small tiles:

- CPU: faiss's exhaustive search, whose kernels keep the running minimum in registers.
- CUDA and others: torch tiles of 1024 x 8192 distances.

N vectors, K codes, D dimensions.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, get_args

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.search.copies import first_copies

Metric = Literal["l2", "cosine"]

MIN_CHUNK = 512  # vectors that are worth a thread of their own
TILE_VECTORS, TILE_CODES = 1024, 8192
LARGEST = 1e15  # the squares of larger numbers, summed over a whole codebook, may leave float32
FAR_SHARE = 0.99  # of the codes' root mean square: a common mean this large costs float32 digits worth saving


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor, metric: Metric = "l2") -> Tensor:
    """The id of each vector's nearest code, exactly: every code is compared, in float32 whatever the autocast.

    Of codes equally near, the lowest id wins. Distances are float32, so codes that differ by less than its rounding of
    |vector - code|^2 + |vector|^2 may win over each other.

    Args:
        vectors: float[N, D], any floating type; N may be 0.
        codes: float[K, D] on the same device, K >= 1.
        metric: "l2", or "cosine": l2 between vectors scaled to unit length. A zero vector has no direction: it is
            equally near to every code, so it gets id 0.

    Returns:
        int64[N] on the vectors' device.

    Raises:
        NumericError: a NaN, an infinity or a number too large to square; under "cosine" also a code that is zero.
        DataError: shapes that do not fit each other.
        ConfigError: another metric.
    """
    if metric not in get_args(Metric):
        raise ConfigError(f"unknown metric {metric!r}", 'Use "l2" or "cosine"')
    _check_shapes(vectors, codes)
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, codes = vectors.float(), codes.float()
        _check_finite("vectors", vectors)
        _check_finite("codes", codes)
        if len(vectors) == 0:
            return torch.empty(0, dtype=torch.int64, device=vectors.device)
        without_direction = None
        if metric == "cosine":
            without_direction = ~vectors.any(dim=1)
            vectors, codes = F.normalize(vectors, dim=1, eps=0.0).nan_to_num_(), _unit_codes(codes)
        offset = _far_offset(codes)
        if offset is not None:
            vectors, codes = vectors - offset, codes - offset
        search = _nearest_faiss if vectors.device.type == "cpu" else _nearest_tiles
        ids = search(vectors.contiguous(), codes.contiguous())
        first = first_copies(codes)  # kernels round equal distances differently at different places of a tile
        if first is not None:
            ids = first[ids]
        return ids if without_direction is None else ids.masked_fill_(without_direction, 0)


def _nearest_faiss(vectors: Tensor, codes: Tensor) -> Tensor:
    """faiss's exhaustive search; float32[N, D], float32[K, D] on the CPU -> int64[N].

    Each thread searches its own share of the vectors. faiss's threads would wait for each other after every small
    tile, spinning: on a machine that others use too, that costs up to nine times the CPU time. And on one thread a
    distance is the same bits whatever else is in the batch, so ids depend on neither batch nor threads.
    """
    # Below this product of N and D faiss leaves its fused kernels for a scalar loop, 20 times slower; tiles of 1024
    # vectors rather than 4096 stay in cache. Both settings are global to the process; every call writes the same
    # values, so threads cannot disagree about them.
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.cvar.distance_compute_blas_query_bs = TILE_VECTORS
    queries, database = vectors.numpy(), codes.numpy()

    def search(begin: int) -> np.ndarray:
        before = faiss.omp_get_max_threads()  # of this thread alone
        faiss.omp_set_num_threads(1)
        _, ids = faiss.knn(queries[begin : begin + chunk], database, 1)
        faiss.omp_set_num_threads(before)
        return ids[:, 0]

    chunk = max(MIN_CHUNK, -(-len(queries) // torch.get_num_threads()))
    if len(queries) <= chunk:
        return torch.from_numpy(search(0))
    begins = range(0, len(queries), chunk)
    with ThreadPoolExecutor(len(begins)) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(search, begins))))


def _nearest_tiles(
    vectors: Tensor, codes: Tensor, tile_vectors: int = TILE_VECTORS, tile_codes: int = TILE_CODES
) -> Tensor:
    """A running minimum over tiles of distances; float32[N, D], float32[K, D] on one device -> int64[N].

    |vector|^2 is the same for every code and left out: fewer digits are lost.
    """
    norms = codes.square().sum(dim=1)
    ids = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    with _full_float32_matmul():
        for begin in range(0, len(vectors), tile_vectors):
            rows = vectors[begin : begin + tile_vectors]
            best = torch.full((len(rows),), float("inf"), device=rows.device)
            best_id = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            for first in range(0, len(codes), tile_codes):
                tile = codes[first : first + tile_codes]
                distances = torch.addmm(norms[first : first + tile_codes], rows, tile.T, alpha=-2)
                tile_id = distances.argmin(dim=1)  # the first of equal minima
                tile_best = distances.gather(1, tile_id[:, None])[:, 0]
                closer = tile_best < best  # strictly: an earlier tile keeps a tie
                best = torch.where(closer, tile_best, best)
                best_id = torch.where(closer, tile_id + first, best_id)
            ids[begin : begin + tile_vectors] = best_id
    return ids


@contextmanager
def _full_float32_matmul() -> Iterator[None]:
    """No TF32 inside: it picks another code in 0.7 % of cases at D = 8, K = 100,000."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _far_offset(codes: Tensor) -> Tensor | None:
    """A vector to subtract from both sides where the codes lie far from the origin for their spread, else None.

    |v|^2 + |c|^2 - 2 v.c loses the digits that |c|^2 fills. The offset is rounded to a power of two of the spread's
    size, so that subtracting it rounds nothing and exact ties stay ties.
    """
    mean = codes.mean(dim=0)
    if mean.norm() * len(codes) ** 0.5 <= FAR_SHARE * codes.norm():
        return None
    spread = (codes - mean).abs().amax()
    if spread == 0:
        return None
    step = torch.exp2(torch.floor(torch.log2(spread)))
    return torch.round(mean / step) * step


def _unit_codes(codes: Tensor) -> Tensor:
    """The codes scaled to unit length."""
    zero = ~codes.any(dim=1)
    if zero.any():
        raise NumericError(
            f"{int(zero.sum())} of {len(codes)} codes are zero (first: {int(zero.nonzero()[0])}) and have no direction",
            "Use the l2 metric, or a codebook without zero codes",
        )
    return F.normalize(codes, dim=1, eps=0.0)


def _check_shapes(vectors: Tensor, codes: Tensor) -> None:
    if vectors.ndim != 2 or codes.ndim != 2 or vectors.shape[1] != codes.shape[1] or vectors.shape[1] == 0:
        raise DataError(
            f"vectors {list(vectors.shape)} and codes {list(codes.shape)} do not fit",
            "Both are [rows, dimensions], with the same number of dimensions",
        )
    if len(codes) == 0:
        raise DataError("an empty codebook has no nearest code", "Give at least one code")
    if vectors.device != codes.device:
        raise DataError(f"vectors are on {vectors.device}, codes on {codes.device}", "Move both to one device")


def _check_finite(name: str, values: Tensor) -> None:
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)  # NaN goes through to both; no mask of the whole tensor is made
    if bool((low >= -LARGEST) & (high <= LARGEST)):
        return
    bad = (~(values.abs() <= LARGEST)).any(dim=1)
    raise NumericError(
        f"{int(bad.sum())} of {len(values)} {name} hold NaN, infinity or numbers beyond {LARGEST:g}"
        f" (first: row {int(bad.nonzero()[0])})",
        "Look at what made them: a diverged training run, or float16 overflow",
    )
