"""A Lloyd iteration from the same centers: ours, faiss, scikit-learn, and flash-kmeans on CUDA.

N points of D dimensions, drawn from a mixture of 2 K Gaussians whose weights fall off like 1 / rank, and K centers. The
time of an iteration is the difference between a run of 1 + ITERATIONS and a run of one, divided by ITERATIONS: what a
run does once (copies, checks, the last assignment) cancels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe.benchmarks.planned import planned_iteration
from vqpipe.benchmarks.search import faiss_defaults, faiss_gpu_module, faiss_settings
from vqpipe.benchmarks.timing import Case, Method, Samples, Settings, available, measure, measurements, need, version_of
from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.lloyd import Points, lloyd
from vqpipe.progress import Progress
from vqpipe.search import engine_name, nearest

SIZE, QUICK_SIZE = (200_000, 64, 2000), (4000, 16, 50)
"""(N, D, K)."""
ITERATIONS = 5
BLOCK = 65_536
"""Points whose inertia is computed at once."""
ALL_POINTS = 10**9
"""Points per center up to which faiss does not subsample."""
REFERENCE = "faiss"
"""The method whose inertia is the unit of `inertia_ratio`; on CUDA its GPU build."""
FAISS_TUNING = {"distance_compute_blas_query_bs": 384}
"""Blocks of distances that fit into the cache, as in our search."""

Fit = Callable[[int], Tensor | np.ndarray]
"""Number of iterations -> centers, [K, D]."""


@dataclass(frozen=True)
class Problem:
    """Points to cluster and the initial centers: float32[N, D] and float32[K, D]."""

    points: Tensor
    centers: Tensor
    settings: Settings

    @property
    def array(self) -> np.ndarray:
        """The points on the CPU."""
        return self.points.cpu().numpy()


def cases(settings: Settings) -> list[Callable[[Progress], Case]]:
    """The one case."""
    return [partial(time_iteration, settings, *(QUICK_SIZE if settings.quick else SIZE))]


def time_iteration(settings: Settings, num_points: int, dim: int, k: int, progress: Progress) -> Case:
    """An iteration of every available method from the same centers, and the inertia after 1 + ITERATIONS."""
    title = f"k-means, one Lloyd iteration: N = {num_points:,}, D = {dim}, K = {k:,}"
    problem = draw(settings, num_points, dim, k)
    sizes = {"points": num_points, "dim": dim, "k": k, "iterations": 1 + ITERATIONS}
    case = Case(title, "points", sizes)
    methods = [ours(problem), *available(peers(problem), case)]
    short, long = ([with_iterations(method, n) for method in methods] for n in (1, 1 + ITERATIONS))
    timed = measure([run for pair in zip(short, long, strict=True) for run in pair], case, settings, progress)
    samples = {}
    for method, one, several in zip(methods, short, long, strict=True):
        if {one.name, several.name} <= timed.keys():
            samples[method.name] = difference(timed[several.name], timed[one.name], ITERATIONS)
        else:
            reasons = [case.not_run.pop(run.name, "") for run in (one, several)]
            case.not_run[method.name] = next(filter(None, reasons))
    case.rows = measurements(methods, samples, settings, num_points)
    reached = {name: inertia(problem.points, its.result) for name, its in samples.items()}
    for row in case.rows:
        row.extra["inertia"] = reached[row.name]
        row.extra["inertia_ratio"] = reached[row.name] / reached[REFERENCE] if REFERENCE in reached else None
        if row.ours:
            row.extra.update(planned_iteration(num_points, dim, k, settings))
    return case


def draw(settings: Settings, num_points: int, dim: int, k: int) -> Problem:
    """Points of the mixture, of which K distinct ones are the initial centers."""
    random = np.random.default_rng(settings.seed)
    weights = 1.0 / np.arange(1, 2 * k + 1)
    means = random.standard_normal((2 * k, dim), dtype=np.float32)
    components = random.choice(2 * k, num_points, p=weights / weights.sum())
    points = means[components] + 0.5 * random.standard_normal((num_points, dim), dtype=np.float32)
    start = points[np.sort(random.choice(num_points, k, replace=False))]
    device = settings.device
    return Problem(torch.from_numpy(points).to(device), torch.from_numpy(start).to(device), settings)


def with_iterations(method: Method, iterations: int) -> Method:
    """A method whose call is a `Fit`, with the number of iterations."""
    return replace(method, name=f"{method.name}, {iterations} iterations", call=partial(method.call, iterations))


def difference(long: Samples, short: Samples, steps: int) -> Samples:
    """Samples of a step, where `long` makes `steps` more of them than `short` in the same rounds."""
    wall, cpu = (
        [(one - other) / steps for one, other in zip(*pair, strict=False)]
        for pair in ((long.wall, short.wall), (long.cpu, short.cpu))
    )
    return replace(long, wall=wall, cpu=cpu)


def inertia(points: Tensor, centers: Tensor | np.ndarray) -> float:
    """Mean squared distance of float[N, D] points to the nearest of float[K, D] centers."""
    codes = torch.as_tensor(centers).to(points)
    blocks = points.split(BLOCK)
    return sum(float((part - codes[nearest(part, codes)]).double().square().sum()) for part in blocks) / len(points)


def ours(problem: Problem) -> Method:
    """Our Lloyd loop, on points that were hashed and checked before."""
    device = problem.settings.device
    points = Points(FeatureSet([problem.array], ["drawn points"]), device, shared=False)
    version = f"{version_of('vqpipe')}, {engine_name(device)}"
    fit: Fit = lambda n: lloyd(points, problem.centers, n, 0.0).codebook  # noqa: E731
    return Method(name="vqpipe", call=fit, version=version, ours=True)


def peers(problem: Problem) -> dict[str, Callable[[], Method]]:
    """Name -> constructor of each peer, which raises Unavailable."""
    makers: dict[str, Callable[[], Method]] = {REFERENCE: lambda: in_faiss(problem, {})}
    if problem.settings.device.type == "cuda":
        makers["flash-kmeans"] = lambda: in_flash(problem)
    else:
        makers["faiss tuned"] = lambda: in_faiss(problem, FAISS_TUNING)
        makers["scikit-learn"] = lambda: in_sklearn(problem)
    return makers


def in_faiss(problem: Problem, tuning: Mapping[str, int]) -> Method:
    """faiss.Kmeans on all points, with its default global settings except for `tuning`."""
    on_gpu = problem.settings.device.type == "cuda"
    faiss: Any = faiss_gpu_module() if on_gpu else need("faiss")
    points, start, seed = problem.array, problem.centers.cpu().numpy(), 1 + problem.settings.seed
    k, dim = start.shape

    def fit(iterations: int) -> np.ndarray:
        clusters = faiss.Kmeans(dim, k, niter=iterations, seed=seed, gpu=on_gpu, max_points_per_centroid=ALL_POINTS)
        with faiss_settings(faiss_defaults() | dict(tuning)):
            clusters.train(points, init_centroids=start)
        return clusters.centroids

    note = ", ".join(f"{key} = {value}" for key, value in tuning.items())
    return Method(call=fit, version=f"faiss {faiss.__version__}{', GPU' if on_gpu else ''}", note=note)


def in_sklearn(problem: Problem) -> Method:
    """KMeans of scikit-learn, without early stopping."""
    cluster: Any = need("sklearn.cluster")
    points, start = problem.array, problem.centers.cpu().numpy()

    def fit(iterations: int) -> np.ndarray:
        model = cluster.KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd")
        return model.fit(points).cluster_centers_

    return Method(call=fit, version=version_of("scikit-learn"))


def in_flash(problem: Problem) -> Method:
    """flash-kmeans, whose float32 products are TF32."""
    package: Any = need("flash_kmeans")
    points, start = problem.points[None], problem.centers[None]

    def fit(iterations: int) -> Tensor:
        k = start.shape[1]
        fitted = package.batch_kmeans_Euclid(points, k, max_iters=iterations, tol=0.0, init_centroids=start)
        return fitted[1][0]

    version = version_of("flash-kmeans", "flash_kmeans")
    return Method(call=fit, version=version, exact=False, note="TF32 products")
