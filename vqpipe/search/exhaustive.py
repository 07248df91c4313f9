"""Exact search over tiles of float32 distances: faiss on the CPU, PyTorch on other devices.

Shapes: N vectors, K codes, D dimensions.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from torch import Tensor

from vqpipe.search.copies import first_copies, lowest_of_equals

FUSED_DIMENSIONS = 32 if "AVX512" in faiss.get_compile_options() else 16
"""Up to here faiss uses fused kernels, without tiles of distances in memory: fewer with AVX2 than with AVX-512."""
FAISS_VECTORS = 384
"""Longer vectors per matrix product; a multiple of the block size of its kernels."""
FUSED_BYTES = 768 * 1024
"""Bytes of codes searched at a time: they stay in the L2 cache of a core for the next vectors."""
FUSED_CODES = 64
"""A part is an odd multiple of it; a multiple of the block size of every fused kernel."""
SHARE = 3
"""Products per task: if one thread is delayed, others take the remaining tasks."""
TILE_VECTORS, TILE_CODES = 1024, 8192
"""Sides of a tile of distances of `nearest_tiles`."""


def nearest_faiss(vectors: Tensor, codes: Tensor) -> Tensor:
    """faiss's exhaustive search: float32[N, D], float32[K, D] on the CPU -> int64[N].

    Short vectors are distributed by faiss's own threads (`nearest_fused`). Longer ones are searched by matrix products
    tile by tile, and faiss's threads would wait for each other, spinning, after every tile: on a shared machine that
    takes up to nine times the CPU time. So each thread of a pool searches its own share of the vectors.

    The ids do not depend on the number of threads: shares are whole tiles, so every matrix product has the same shape.
    In another batch rounding may differ, where two codes are equally near in float32.
    """
    # Below this product of N and D faiss uses a scalar loop, 20 times slower than its fused kernels. Both settings are
    # global to the process; every call writes the same values, so threads cannot conflict.
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.cvar.distance_compute_blas_query_bs = FAISS_VECTORS
    database = codes.numpy()

    def search(share: Tensor) -> np.ndarray:
        with faiss_threads(1):
            _, ids = faiss.knn(share.numpy(), database, 1)
        return ids[:, 0]

    threads = torch.get_num_threads()
    if vectors.shape[1] <= FUSED_DIMENSIONS:
        with faiss_threads(threads):  # one in a DataLoader worker, where more would deadlock
            ids = nearest_fused(vectors.numpy(), database)
    else:
        shares = vectors.split(FAISS_VECTORS * min(SHARE, -(-len(vectors) // (FAISS_VECTORS * threads))))
        with ThreadPoolExecutor(threads) as pool:
            ids = np.concatenate(list(pool.map(search, shares)))
    # The id of a vector that is not finite is -1. Of equal codes any may win: rounding depends on the place in a tile.
    return torch.from_numpy(lowest_of_equals(np.maximum(ids, 0, out=ids), database))


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """Set the number of faiss's threads for calls from this thread. (Its OpenMP may differ from PyTorch's.)"""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest_fused(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """faiss's fused kernels over parts of the codes: float32[N, D], float32[K, D] -> int64[N].

    For every few vectors a kernel reads all its codes, as D rows with one dimension each. If the number of codes is a
    multiple of 1024, the rows collide in the L1 cache, which for D > 8 takes up to 1.6 times as long.
    """
    aligned = len(codes) % 1024 == 0 and codes.shape[1] > 8
    parts = max(2 if aligned else 1, -(-codes.nbytes // FUSED_BYTES))
    size = -(-len(codes) // (parts * FUSED_CODES)) * FUSED_CODES | FUSED_CODES
    best, ids = faiss.knn(vectors, codes[:size], 1)
    for first in range(size, len(codes), size):
        distances, places = faiss.knn(vectors, codes[first : first + size], 1)
        closer = distances < best  # strict: the earlier part wins a tie
        np.copyto(best, distances, where=closer)
        np.copyto(ids, places + first, where=closer)
    return ids[:, 0]


def nearest_tiles(
    vectors: Tensor, codes: Tensor, tile_vectors: int = TILE_VECTORS, tile_codes: int = TILE_CODES
) -> Tensor:
    """Running minimum over tiles of distances: float32[N, D], float32[K, D] on one device -> int64[N].

    |vector|^2 is the same for every code and omitted, which preserves precision.
    """
    norms = codes.square().sum(dim=1)
    ids = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    with full_float32_matmul():
        for begin in range(0, len(vectors), tile_vectors):
            rows = vectors[begin : begin + tile_vectors]
            best = torch.full((len(rows),), float("inf"), device=rows.device)
            best_id = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            for first in range(0, len(codes), tile_codes):
                tile = codes[first : first + tile_codes]
                distances = torch.addmm(norms[first : first + tile_codes], rows, tile.T, alpha=-2)
                tile_id = distances.argmin(dim=1)  # the first of equal minima
                tile_best = distances.gather(1, tile_id[:, None])[:, 0]
                closer = tile_best < best  # strict: the earlier tile wins a tie
                best = torch.where(closer, tile_best, best)
                best_id = torch.where(closer, tile_id + first, best_id)
            ids[begin : begin + tile_vectors] = best_id
    lowest = first_copies(codes)  # by rounding, any of equal codes may have won
    return ids if lowest is None else lowest[ids]


@contextmanager
def full_float32_matmul() -> Iterator[None]:
    """Disable TF32, which changes the nearest code of 0.7 % of the vectors at D = 8, K = 100,000."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
