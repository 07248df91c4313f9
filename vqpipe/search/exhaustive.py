"""Exact search that compares float32 distances tile by tile: faiss on the CPU, torch on anything else.

N vectors, K codes, D dimensions.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from torch import Tensor

from vqpipe.search.copies import first_copies, lowest_of_equals

FUSED_DIMENSIONS = 32  # up to here faiss needs no tiles of distances in memory, where the processor has AVX-512
FAISS_VECTORS = 384  # longer vectors in one matrix product, a multiple of what its kernels do at once
FUSED_BYTES = 768 * 1024  # of codes at a time: a core's second cache keeps them for the next few vectors
FUSED_CODES = 64  # a part is an odd multiple of it, also of what any fused kernel compares at once
SHARE = 3  # such products at a time: a thread that is held up leaves the rest to the others
TILE_VECTORS, TILE_CODES = 1024, 8192


def nearest_faiss(vectors: Tensor, codes: Tensor) -> Tensor:
    """faiss's exhaustive search: float32[N, D], float32[K, D] on the CPU -> int64[N].

    Short vectors are left to faiss's threads, which share them out (`nearest_fused`). Longer ones go through matrix
    products tile by tile, where those threads would wait for each other, spinning, after every tile: on a machine that
    others use too that costs up to nine times the CPU time. So each thread searches its own share of them.

    The same call gives the same ids for any number of threads: shares are whole tiles, so that each matrix product has
    the same shape. Another batch may round another way, where two codes are equally near to float32's precision.
    """
    # Below this product of N and D faiss leaves its fused kernels for a scalar loop, 20 times slower. Both settings are
    # global to the process; every call writes the same values, so threads cannot disagree about them.
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.cvar.distance_compute_blas_query_bs = FAISS_VECTORS
    database = codes.numpy()

    def search(share: Tensor) -> np.ndarray:
        with faiss_threads(1):
            _, ids = faiss.knn(share.numpy(), database, 1)
        return ids[:, 0]

    threads = torch.get_num_threads()
    if vectors.shape[1] <= FUSED_DIMENSIONS:
        with faiss_threads(threads):  # one in a worker of a DataLoader, where more would wait for each other for ever
            ids = nearest_fused(vectors.numpy(), database)
    else:
        shares = vectors.split(FAISS_VECTORS * min(SHARE, -(-len(vectors) // (FAISS_VECTORS * threads))))
        with ThreadPoolExecutor(threads) as pool:
            ids = np.concatenate(list(pool.map(search, shares)))
    # -1 is that of a vector that is not finite. Of equal codes any may win: places in a tile are rounded differently.
    return torch.from_numpy(lowest_of_equals(np.maximum(ids, 0, out=ids), database))


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """Inside, faiss takes so many threads, where it is called from this one: its OpenMP need not be torch's."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest_fused(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """faiss's fused kernels over one part of the codes after the other: float32[N, D], float32[K, D] -> int64[N].

    A kernel reads all its codes once for every few vectors, one dimension in each of D rows as long as there are codes:
    with a multiple of 1024 codes the rows share a place in the first cache, which for D > 8 costs up to 1.6 times the
    time.
    """
    aligned = len(codes) % 1024 == 0 and codes.shape[1] > 8
    parts = max(2 if aligned else 1, -(-codes.nbytes // FUSED_BYTES))
    size = -(-len(codes) // (parts * FUSED_CODES)) * FUSED_CODES | FUSED_CODES
    best, ids = faiss.knn(vectors, codes[:size], 1)
    for first in range(size, len(codes), size):
        distances, places = faiss.knn(vectors, codes[first : first + size], 1)
        closer = distances < best  # strictly: an earlier part keeps a tie
        np.copyto(best, distances, where=closer)
        np.copyto(ids, places + first, where=closer)
    return ids[:, 0]


def nearest_tiles(
    vectors: Tensor, codes: Tensor, tile_vectors: int = TILE_VECTORS, tile_codes: int = TILE_CODES
) -> Tensor:
    """A running minimum over tiles of distances: float32[N, D], float32[K, D] on one device -> int64[N].

    |vector|^2 is the same for every code and left out: fewer digits are lost.
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
                closer = tile_best < best  # strictly: an earlier tile keeps a tie
                best = torch.where(closer, tile_best, best)
                best_id = torch.where(closer, tile_id + first, best_id)
            ids[begin : begin + tile_vectors] = best_id
    lowest = first_copies(codes)  # of equal codes any may have won, by rounding
    return ids if lowest is None else lowest[ids]


@contextmanager
def full_float32_matmul() -> Iterator[None]:
    """No TF32 inside: it picks another code in 0.7 % of cases at D = 8, K = 100,000."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
