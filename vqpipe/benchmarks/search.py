"""The nearest-code search, beside what the public codes and libraries do.

N vectors and K codes of D dimensions, all drawn from a standard normal distribution.

Two floors stand beside the times. FLOP floor: 2 N K D operations at the rate of PyTorch's float32 matrix product in the
same rounds; a search that screens in a narrower type may pass below it, and so may one that multiplies faster than that
library on this CPU. Bytes floor: reading both sides once and writing the ids, at the rate of a copy in the same rounds.
"""

import statistics
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
from vqpipe.benchmarks.measure import (
    Case,
    Method,
    Plan,
    Row,
    Samples,
    Settings,
    Stopwatch,
    Unavailable,
    need,
    need_memory,
    offered,
    version_of,
)

SHAPES = ((4096, 100_000, 8), (2048, 100_000, 8), (65_536, 8192, 8), (4096, 100_000, 32))
CUDA_SHAPES = (*SHAPES, (65_536, 100_000, 8))
QUICK_SHAPES = ((512, 2000, 8), (256, 3000, 32))
CHECKED = 1024
"""Vectors whose ids are compared with a float64 search."""
MATMUL_SIDE, COPY_FLOATS = 1024, 2**24
MATRICES = 3
"""N x K matrices that the expanded distance holds at its peak."""
PEERS = 7
"""Methods beside ours at most, for the progress bar; the two probes with them."""
FAISS_TUNING = {"distance_compute_blas_threshold": 1}
"""From the first vector on faiss's fused kernels, and not a scalar loop 20 times slower."""


def plans(settings: Settings) -> list[Plan]:
    """A case per shape."""
    shapes = QUICK_SHAPES if settings.quick else CUDA_SHAPES if settings.device.type == "cuda" else SHAPES
    return [
        Plan(f"nearest code: N = {n:,}, K = {k:,}, D = {d}", 1 + PEERS, partial(compare, settings, n, k, d))
        for n, k, d in shapes
    ]


def compare(settings: Settings, num_vectors: int, num_codes: int, dim: int, stopwatch: Stopwatch) -> Case:
    """Search N vectors among K codes by every method that can be had."""
    generator = torch.Generator().manual_seed(settings.seed)
    vectors = torch.randn(num_vectors, dim, generator=generator).to(settings.device)
    codes = torch.randn(num_codes, dim, generator=generator).to(settings.device)
    case = Case(
        title=f"nearest code: N = {num_vectors:,}, K = {num_codes:,}, D = {dim}",
        unit="vectors",
        settings={"vectors": num_vectors, "codes": num_codes, "dim": dim},
    )
    methods = [ours(vectors, codes), *offered(peers(settings, vectors, codes), case), *probes(settings.device)]
    samples = stopwatch.measure(methods, case)
    checked = min(CHECKED, num_vectors)
    truth = reference_ids(vectors[:checked], codes)
    case.facts = {"checked_vectors": checked, **floors(samples, num_vectors, num_codes, dim)}
    case.rows = [
        with_floor(row, case.facts, samples[row.name])
        for row in stopwatch.rows(methods, samples, num_vectors, partial(share_of_equal, truth))
    ]
    return case


def ours(vectors: Tensor, codes: Tensor) -> Method:
    """`vqpipe.search.nearest`, checks and all."""
    return Method(
        name="vqpipe",
        call=lambda: search.nearest(vectors, codes),
        version=f"{version_of('vqpipe')}, {search.engine_name(vectors.device)}",
        ours=True,
    )


def peers(settings: Settings, vectors: Tensor, codes: Tensor) -> Mapping[str, Callable[[], Method]]:
    """By name, what makes each peer's method, or says why it cannot."""
    both = settings, vectors, codes
    everywhere: dict[str, Callable[[], Method]] = {
        "naive expansion": lambda: in_torch("naive expansion", expanded, MATRICES, *both, note=PUBLISHED),
        "torch.cdist": lambda: in_torch("torch.cdist", by_cdist, 1, *both),
        "torch.compile of naive": lambda: compiled(*both),
    }
    if settings.device.type == "cuda":
        return everywhere | {
            "faiss GPU": lambda: faiss_on_gpu(vectors, codes),
            "flash-kmeans": lambda: flash_kmeans(vectors, codes),
        }
    return everywhere | {
        "faiss as it comes": lambda: in_faiss("faiss as it comes", faiss_defaults(), vectors, codes),
        "faiss tuned": lambda: in_faiss("faiss tuned", faiss_defaults() | FAISS_TUNING, vectors, codes),
        "scikit-learn": lambda: in_sklearn(vectors, codes),
    }


PUBLISHED = "as in taming, VQGAN-LC, LlamaGen"


def expanded(vectors: Tensor, codes: Tensor) -> Tensor:
    """The search of taming-transformers that VQGAN-LC, LlamaGen and MGVQ ship as well: all N x K distances."""
    distances = (
        (vectors**2).sum(dim=1, keepdim=True) + (codes**2).sum(dim=1) - 2 * torch.einsum("nd,kd->nk", vectors, codes)
    )
    return distances.argmin(dim=1)


def by_cdist(vectors: Tensor, codes: Tensor) -> Tensor:
    return torch.cdist(vectors, codes).argmin(dim=1)


def in_torch(
    name: str,
    find: Callable[[Tensor, Tensor], Tensor],
    matrices: int,
    settings: Settings,
    vectors: Tensor,
    codes: Tensor,
    note: str = "",
) -> Method:
    """A search that holds `matrices` N x K matrices of float32."""
    need_matrices(matrices, settings, vectors, codes)
    return Method(name=name, call=lambda: find(vectors, codes), version=version_of("torch"), note=note)


def need_matrices(matrices: int, settings: Settings, vectors: Tensor, codes: Tensor) -> None:
    """Raise Unavailable where so many N x K matrices do not fit the budget."""
    gigabytes = matrices * 4e-9 * len(vectors) * len(codes)
    need_memory(gigabytes, settings, f"{matrices} matrices of N x K" if matrices > 1 else "N x K distances")


def compiled(settings: Settings, vectors: Tensor, codes: Tensor) -> Method:
    """The expansion through torch.compile; the first call compiles, and no cache of earlier runs helps it."""
    if settings.quick:
        raise Unavailable("compiling takes longer than a quick look")
    need_matrices(MATRICES, settings, vectors, codes)
    from torch._inductor import config

    torch._dynamo.reset()
    find: Any = torch.compile(expanded, dynamic=False)

    def call() -> Tensor:
        with config.patch(force_disable_caches=True, compile_threads=1):
            return find(vectors, codes)

    return Method(name="torch.compile of naive", call=call, version=version_of("torch"))


def in_faiss(name: str, tuning: Mapping[str, int], vectors: Tensor, codes: Tensor) -> Method:
    """faiss's exhaustive search on the CPU under its global settings `tuning`, put back after each call."""
    faiss: Any = need("faiss")
    queries, database = vectors.numpy(), codes.numpy()

    def call() -> np.ndarray:
        with faiss_settings(tuning):
            return faiss.knn(queries, database, 1)[1][:, 0]

    changed = {key: value for key, value in tuning.items() if value != faiss_defaults()[key]}
    note = ", ".join(f"{key} = {value}" for key, value in changed.items())
    return Method(name=name, call=call, version=f"faiss {faiss.__version__}", note=note)


@contextmanager
def faiss_settings(values: Mapping[str, int]) -> Iterator[None]:
    """faiss's global settings inside, those before afterwards."""
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
    """faiss's global settings as a fresh process finds them: in this one our own search may have changed them."""
    names = ("distance_compute_blas_threshold", "distance_compute_blas_query_bs", "distance_compute_blas_database_bs")
    values = ", ".join(f"faiss.cvar.{name}" for name in names)
    need("faiss")
    answer = subprocess.run([sys.executable, "-c", f"import faiss; print({values})"], capture_output=True, check=True)
    return dict(zip(names, map(int, answer.stdout.split()), strict=True))


def in_sklearn(vectors: Tensor, codes: Tensor) -> Method:
    metrics: Any = need("sklearn.metrics")
    queries, database = vectors.numpy(), codes.numpy()
    return Method(
        name="scikit-learn",
        call=lambda: metrics.pairwise_distances_argmin(queries, database),
        version=version_of("scikit-learn"),
        note="pairwise_distances_argmin",
    )


def faiss_on_gpu(vectors: Tensor, codes: Tensor) -> Method:
    """faiss's exhaustive search on the GPU, on arrays that lie there already."""
    faiss: Any = need("faiss")
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise Unavailable("the faiss that is installed has no GPU build, or finds no GPU")
    need("faiss.contrib.torch_utils")  # lets faiss read torch's tensors
    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()
    return Method(
        name="faiss GPU",
        call=lambda: faiss.knn_gpu(resources, vectors, codes, 1)[1][:, 0],
        version=f"faiss {faiss.__version__}",
        note="its memory is not seen by PyTorch",
    )


def flash_kmeans(vectors: Tensor, codes: Tensor) -> Method:
    """flash-kmeans's assignment step."""
    package: Any = need("flash_kmeans")
    trained = package.FlashKMeans(codes.shape[1], len(codes))
    trained.centroids_b, trained._batch_size = codes[None], None
    return Method(
        name="flash-kmeans",
        call=lambda: trained.predict(vectors),
        version=version_of("flash-kmeans", "flash_kmeans"),
        exact=False,
        note="TF32 products",
    )


# ------------------------------------------------------------------------------------------------- truth and floors


def reference_ids(vectors: Tensor, codes: Tensor) -> Tensor:
    """The nearest codes in float64: int64[N] on the CPU."""
    wide = codes.double()
    norms = wide.square().sum(dim=1)
    rows = max(1, 2**24 // len(codes))
    return torch.cat([(norms - 2 * part.double() @ wide.T).argmin(dim=1) for part in vectors.split(rows)]).cpu()


def share_of_equal(truth: Tensor, ids: Any) -> float:
    """Share of the first ids that are the true ones, 0..1."""
    found = torch.as_tensor(ids)[: len(truth)].cpu().long()
    return float((found == truth).double().mean())


def probes(device: torch.device) -> list[Method]:
    """The rates that the floors come from: a square float32 matrix product, and a copy."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device) for _ in range(2))
    source = torch.ones(COPY_FLOATS, device=device)
    target = torch.empty_like(source)
    return [
        Method(name="matrix product", call=lambda: a @ b, probe=True),
        Method(name="copy", call=lambda: target.copy_(source), probe=True),
    ]


def floors(samples: Mapping[str, Samples], num_vectors: int, num_codes: int, dim: int) -> dict[str, float]:
    """What the probes measured, and the least that the search could then take."""
    product, copy = samples["matrix product"], samples["copy"]
    flops = 2.0 * MATMUL_SIDE**3
    wall, cpu = flops / statistics.median(product.wall), flops / max(statistics.median(product.cpu), 1e-9)
    bandwidth = 2 * 4 * COPY_FLOATS / statistics.median(copy.wall)
    work = 2.0 * num_vectors * num_codes * dim
    return {
        "matmul_gflops": wall / 1e9,
        "matmul_gflops_per_cpu_second": cpu / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "flop_floor_ms": 1e3 * work / wall,
        "flop_floor_cpu_ms": 1e3 * work / cpu,
        "bytes_floor_ms": 1e3 * (4 * dim * (num_vectors + num_codes) + 8 * num_vectors) / bandwidth,
    }


def with_floor(row: Row, facts: Mapping[str, float], samples: Samples) -> Row:
    """The row with its time in units of the FLOP floor, and what its first call cost where it compiled."""
    row.extra["over_floor"] = row.wall_ms / facts["flop_floor_ms"]
    row.extra["over_floor_cpu"] = row.cpu_ms / facts["flop_floor_cpu_ms"]
    if row.name.startswith("torch.compile"):
        row.extra["compile_s"] = samples.first
    return row
