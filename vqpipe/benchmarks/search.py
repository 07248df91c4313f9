"""The nearest-code search: ours, the published expansion, torch.cdist, faiss, scikit-learn, and flash-kmeans on CUDA.

N vectors and K codes of D dimensions, drawn from a standard normal distribution.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe import search
from vqpipe.benchmarks.planned import planned_search
from vqpipe.benchmarks.timing import Case, Method, Settings, Unavailable, need, timed, version_of
from vqpipe.progress import Progress

SHAPES = ((4096, 100_000, 8), (2048, 100_000, 8), (65_536, 8192, 8), (4096, 100_000, 32))
"""(N, K, D)."""
CUDA_SHAPES = (*SHAPES, (65_536, 100_000, 8))
QUICK_SHAPES = ((512, 2000, 8), (256, 3000, 32))
CHECKED = 1024
"""Vectors whose ids are compared with those of a float64 search."""
MATRICES = 3
"""N x K matrices that the published expansion holds at its peak."""
PUBLISHED = "as in taming-transformers, VQGAN-LC, LlamaGen and MGVQ"
FAISS_TUNING = {"distance_compute_blas_threshold": 1}
"""Blocked matrix products for any number of queries, in place of a scalar loop that is 20 times slower."""


def cases(settings: Settings) -> list[Callable[[Progress], Case]]:
    """A case per shape."""
    shapes = QUICK_SHAPES if settings.quick else CUDA_SHAPES if settings.device.type == "cuda" else SHAPES
    return [partial(time_search, settings, *shape) for shape in shapes]


def time_search(settings: Settings, num_vectors: int, num_codes: int, dim: int, progress: Progress) -> Case:
    """Search N vectors among K codes with every available method."""
    title = f"nearest code: N = {num_vectors:,}, K = {num_codes:,}, D = {dim}"
    generator = torch.Generator().manual_seed(settings.seed)
    vectors = torch.randn(num_vectors, dim, generator=generator).to(settings.device)
    codes = torch.randn(num_codes, dim, generator=generator).to(settings.device)
    case = Case(title, "vectors", {"vectors": num_vectors, "codes": num_codes, "dim": dim})
    truth = reference_ids(vectors[:CHECKED], codes)
    case.facts = {"checked_vectors": len(truth)}
    others, same_ids = peers(settings, vectors, codes), partial(share_equal, truth)
    case.rows = timed([ours(vectors, codes)], others, case, settings, progress, num_vectors, same_ids)
    case.rows[0].extra.update(planned_search(vectors, codes))
    return case


def ours(vectors: Tensor, codes: Tensor) -> Method:
    """`vqpipe.search.nearest`."""
    version = f"{version_of('vqpipe')}, {search.engine_name(vectors.device)}"
    return Method(name="vqpipe", call=lambda: search.nearest(vectors, codes), version=version, ours=True)


def peers(settings: Settings, vectors: Tensor, codes: Tensor) -> dict[str, Callable[[], Method]]:
    """Name -> constructor of each peer, which raises Unavailable."""

    def in_torch(find: Callable[[Tensor, Tensor], Tensor], matrices: int, note: str = "") -> Method:
        need_matrices(matrices, len(vectors), len(codes), settings)
        return Method(call=lambda: find(vectors, codes), version=version_of("torch"), note=note)

    makers: dict[str, Callable[[], Method]] = {
        "naive expansion": lambda: in_torch(expansion, MATRICES, PUBLISHED),
        "torch.cdist": lambda: in_torch(cdist, 1),
    }
    if settings.device.type == "cuda":
        makers["faiss GPU"] = lambda: faiss_on_gpu(vectors, codes)
        makers["flash-kmeans"] = lambda: flash_kmeans(vectors, codes)
    else:
        makers["faiss, default settings"] = lambda: in_faiss(faiss_defaults(), vectors, codes)
        makers["faiss tuned"] = lambda: in_faiss(faiss_defaults() | FAISS_TUNING, vectors, codes)
        makers["scikit-learn"] = lambda: in_sklearn(vectors, codes)
    return makers


def expansion(vectors: Tensor, codes: Tensor) -> Tensor:
    """The published search, by |v|^2 + |c|^2 - 2 vc of all N x K pairs."""
    distances = (
        (vectors**2).sum(dim=1, keepdim=True) + (codes**2).sum(dim=1) - 2 * torch.einsum("nd,kd->nk", vectors, codes)
    )
    return distances.argmin(dim=1)


def cdist(vectors: Tensor, codes: Tensor) -> Tensor:
    """The search by `torch.cdist` of all N x K pairs."""
    return torch.cdist(vectors, codes).argmin(dim=1)


def need_matrices(matrices: int, num_vectors: int, num_codes: int, settings: Settings) -> None:
    """Raise Unavailable where so many N x K matrices of float32 are over the budget."""
    shape = f"{num_vectors:,} x {num_codes:,}"
    what = f"{matrices} matrices of {shape}" if matrices > 1 else f"{shape} distances"
    gigabytes = 4e-9 * matrices * num_vectors * num_codes
    if gigabytes > settings.memory:
        raise Unavailable(f"{what} take {gigabytes:.3g} GB, the budget is {settings.memory:.3g} GB")


def in_faiss(values: Mapping[str, int], vectors: Tensor, codes: Tensor) -> Method:
    """faiss's exhaustive search on the CPU with `values` of its global settings."""
    faiss: Any = need("faiss")
    queries, database = vectors.numpy(), codes.numpy()

    def call() -> np.ndarray:
        with faiss_settings(values):
            return faiss.knn(queries, database, 1)[1][:, 0]

    changed = {key: value for key, value in values.items() if value != faiss_defaults()[key]}
    note = ", ".join(f"{key} = {value}" for key, value in changed.items())
    return Method(call=call, version=f"faiss {faiss.__version__}", note=note)


@contextmanager
def faiss_settings(values: Mapping[str, int]) -> Iterator[None]:
    """Set global settings of faiss, and restore them afterwards."""
    import faiss

    before = {key: getattr(faiss.cvar, key) for key in values}
    try:
        for key, value in values.items():
            setattr(faiss.cvar, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(faiss.cvar, key, value)


@cache
def faiss_defaults() -> dict[str, int]:
    """faiss's global settings in a new process: in this one our own search may have changed them."""
    names = ("distance_compute_blas_threshold", "distance_compute_blas_query_bs", "distance_compute_blas_database_bs")
    values = ", ".join(f"faiss.cvar.{name}" for name in names)
    need("faiss")
    answer = subprocess.run([sys.executable, "-c", f"import faiss; print({values})"], capture_output=True, check=True)
    return dict(zip(names, map(int, answer.stdout.split()), strict=True))


def in_sklearn(vectors: Tensor, codes: Tensor) -> Method:
    """scikit-learn's exhaustive search."""
    metrics: Any = need("sklearn.metrics")
    queries, database = vectors.numpy(), codes.numpy()
    return Method(
        call=lambda: metrics.pairwise_distances_argmin(queries, database),
        version=version_of("scikit-learn"),
        note="pairwise_distances_argmin",
    )


def faiss_gpu_module() -> Any:
    """faiss with its GPU build, else Unavailable."""
    faiss: Any = need("faiss")
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise Unavailable("the installed faiss has no GPU build, or finds no GPU")
    return faiss


def faiss_on_gpu(vectors: Tensor, codes: Tensor) -> Method:
    """faiss's exhaustive search of arrays on the GPU."""
    faiss = faiss_gpu_module()
    need("faiss.contrib.torch_utils")  # makes faiss accept torch tensors
    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()
    return Method(
        call=lambda: faiss.knn_gpu(resources, vectors, codes, 1)[1][:, 0],
        version=f"faiss {faiss.__version__}",
        note="its memory is not counted",
    )


def flash_kmeans(vectors: Tensor, codes: Tensor) -> Method:
    """The assignment step of flash-kmeans."""
    package: Any = need("flash_kmeans")
    trained = package.FlashKMeans(codes.shape[1], len(codes))
    trained.centroids_b, trained._batch_size = codes[None], None
    return Method(
        call=lambda: trained.predict(vectors),
        version=version_of("flash-kmeans", "flash_kmeans"),
        exact=False,
        note="TF32 products",
    )


def reference_ids(vectors: Tensor, codes: Tensor) -> Tensor:
    """The nearest codes in float64: int64[N] on the CPU."""
    wide = codes.double()
    norms = wide.square().sum(dim=1)
    rows = max(1, 2**24 // len(codes))
    return torch.cat([(norms - 2 * part.double() @ wide.T).argmin(dim=1) for part in vectors.split(rows)]).cpu()


def share_equal(truth: Tensor, ids: Any) -> float:
    """Share of the first ids that equal `truth`, 0..1."""
    found = torch.as_tensor(ids)[: len(truth)].cpu().long()
    return float((found == truth).double().mean())
