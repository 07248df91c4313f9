"""k-means, beside what the libraries do: an iteration from the same centres, and whole runs from each one's own.

N points of D dimensions, drawn from a mixture of 2 K Gaussians whose weights fall off like 1 / rank, and K centres.

The time of an iteration is the difference between a long and a short run, divided by the iterations between them: what
each method does once (copies, checks, a last assignment) is left out for all alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe.benchmarks.measure import (
    Case,
    Method,
    Plan,
    Settings,
    Stopwatch,
    Unavailable,
    need,
    offered,
    version_of,
)
from vqpipe.benchmarks.search import faiss_defaults, faiss_settings
from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.codebooks.lloyd import Points, lloyd
from vqpipe.search import engine_name, nearest

ITERATIONS = 5
"""Between the short and the long run; the short one makes one."""
OWN_ITERATIONS = 10
"""From each method's own seeding."""
BLOCK = 65_536
ALL_POINTS = 10**9
"""Points per centre up to which faiss takes all of them."""
REFERENCE = "faiss"
"""Whose inertia is the unit of `inertia_ratio`; on CUDA that of faiss's GPU build, under the same name."""
FAISS_TUNING = {"distance_compute_blas_query_bs": 384}
"""Blocks of distances that stay in the cache, as our own search has them."""


@dataclass(frozen=True)
class Problem:
    """Points to cluster, and centres to start from: float32[N, D] and float32[K, D]."""

    points: Tensor
    centres: Tensor
    settings: Settings

    @property
    def array(self) -> np.ndarray:
        return self.points.cpu().numpy()


Fit = Callable[[int], Tensor | np.ndarray]
"""Iterations -> centres, [K, D]."""


def plans(settings: Settings) -> list[Plan]:
    """The same start, then own starts."""
    size = (4000, 16, 50) if settings.quick else (200_000, 64, 2000)
    return [
        Plan(title("one Lloyd iteration", *size), 10, partial(one_iteration, settings, *size)),
        Plan(title(f"{OWN_ITERATIONS} iterations from own seeding", *size), 2, partial(whole_runs, settings, *size)),
    ]


def title(what: str, num_points: int, dim: int, k: int) -> str:
    return f"k-means, {what}: N = {num_points:,}, D = {dim}, K = {k:,}"


def draw(settings: Settings, num_points: int, dim: int, k: int) -> Problem:
    """The mixture, and K of its points as the centres that all start from."""
    random = np.random.default_rng(settings.seed)
    weights = 1.0 / np.arange(1, 2 * k + 1)
    middles = random.standard_normal((2 * k, dim), dtype=np.float32)
    of = random.choice(2 * k, num_points, p=weights / weights.sum())
    points = middles[of] + 0.5 * random.standard_normal((num_points, dim), dtype=np.float32)
    start = points[np.sort(random.choice(num_points, k, replace=False))]
    device = settings.device
    return Problem(torch.from_numpy(points).to(device), torch.from_numpy(start).to(device), settings)


def one_iteration(settings: Settings, num_points: int, dim: int, k: int, stopwatch: Stopwatch) -> Case:
    """An iteration of every method from the same centres, and the inertia that as many of them reach."""
    problem = draw(settings, num_points, dim, k)
    sizes = {"points": num_points, "dim": dim, "k": k, "iterations": 1 + ITERATIONS}
    case = Case(title=title("one Lloyd iteration", num_points, dim, k), unit="points", settings=sizes)
    methods = [our_lloyd(problem), *offered(same_start(problem), case)]
    runs = [run for method in methods for run in (shorter(method), longer(method))]
    timed = stopwatch.measure(runs, case)
    samples = {
        method.name: timed[longer(method).name].minus(timed[shorter(method).name], ITERATIONS)
        for method in methods
        if {shorter(method).name, longer(method).name} <= timed.keys()
    }
    for method in methods:
        if method.name not in samples:
            reasons = (case.not_run.pop(run.name, "") for run in (shorter(method), longer(method)))
            case.not_run[method.name] = next(filter(None, reasons), "failed")
    case.rows = stopwatch.rows(methods, samples, num_points)
    add_inertia(case, problem, {name: its.result for name, its in samples.items()})
    return case


def shorter(method: Method) -> Method:
    """The run of one iteration, of a method whose call is a `Fit`."""
    return replace(method, name=f"{method.name}, 1 iteration", call=partial(method.call, 1))


def longer(method: Method) -> Method:
    """The run of ITERATIONS more."""
    return replace(
        method, name=f"{method.name}, {1 + ITERATIONS} iterations", call=partial(method.call, 1 + ITERATIONS)
    )


def whole_runs(settings: Settings, num_points: int, dim: int, k: int, stopwatch: Stopwatch) -> Case:
    """Whole runs, seeding included, once each: time, and the inertia reached after the same iterations."""
    problem = draw(settings, num_points, dim, k)
    sizes = {"points": num_points, "dim": dim, "k": k, "iterations": OWN_ITERATIONS}
    name = title(f"{OWN_ITERATIONS} iterations from own seeding", num_points, dim, k)
    case = Case(title=name, unit="points", settings=sizes)
    methods = [our_kmeans(problem), *offered(own_start(problem), case)]
    runs = [replace(method, call=partial(method.call, OWN_ITERATIONS)) for method in methods]
    samples = stopwatch.measure(runs, case, once=True)
    case.rows = stopwatch.rows(methods, samples, num_points * OWN_ITERATIONS)
    add_inertia(case, problem, {name: its.result for name, its in samples.items()})
    return case


def add_inertia(case: Case, problem: Problem, centres: Mapping[str, Any]) -> None:
    """Give each row its mean squared distance to the nearest centre, and that in units of faiss's."""
    reached = {name: inertia(problem.points, found) for name, found in centres.items()}
    for row in case.rows:
        row.extra["inertia"] = reached[row.name]
        row.extra["inertia_ratio"] = reached[row.name] / reached[REFERENCE] if REFERENCE in reached else None


def inertia(points: Tensor, centres: Tensor | np.ndarray) -> float:
    """Mean squared distance of float[N, D] points to the nearest of float[K, D] centres."""
    codes = torch.as_tensor(centres).to(points)
    total = sum(float((block - codes[nearest(block, codes)]).double().square().sum()) for block in points.split(BLOCK))
    return total / len(points)


# ------------------------------------------------------------------------------------------------------ the methods


def ours(problem: Problem, fit: Fit, note: str = "") -> Method:
    version = f"{version_of('vqpipe')}, {engine_name(problem.settings.device)}"
    return Method(name="vqpipe", call=fit, version=version, ours=True, note=note)


def our_lloyd(problem: Problem) -> Method:
    """Our Lloyd loop, on points that were looked at (hashed, checked) before."""
    points = Points(features_of(problem), problem.settings.device, shared=False)
    return ours(problem, lambda n: lloyd(points, problem.centres, n, 0.0).codebook)


def our_kmeans(problem: Problem) -> Method:
    """The whole of `vqpipe kmeans` but for the files."""
    settings, features = problem.settings, features_of(problem)

    def fit(iterations: int) -> Tensor:
        config = KmeansConfig(k=len(problem.centres), iterations=iterations, tolerance=0.0)
        return kmeans(features, config, seed=settings.seed, device=settings.device).codebook

    return ours(problem, fit, note="seeded by k-means||")


def features_of(problem: Problem) -> FeatureSet:
    return FeatureSet([problem.array], ["drawn points"])


def same_start(problem: Problem) -> dict[str, Callable[[], Method]]:
    """Peers that start from the problem's centres."""
    start = problem.centres.cpu().numpy()
    if problem.settings.device.type == "cuda":
        return {REFERENCE: lambda: in_faiss(problem, start), "flash-kmeans": lambda: in_flash(problem)}
    return {
        REFERENCE: lambda: in_faiss(problem, start),
        "faiss tuned": lambda: in_faiss(problem, start, "faiss tuned", FAISS_TUNING),
        "scikit-learn": lambda: in_sklearn(problem, "KMeans", start, algorithm="lloyd"),
        "scikit-learn mini-batch": lambda: in_sklearn(
            problem, "MiniBatchKMeans", start, note="one pass in mini-batches", exact=False, **ALL_PASSES
        ),
    }


def own_start(problem: Problem) -> dict[str, Callable[[], Method]]:
    """Peers that choose their first centres."""
    if problem.settings.device.type == "cuda":
        return {
            REFERENCE: lambda: in_faiss(problem, None),
            "flash-kmeans": lambda: in_flash(problem, own=True),
        }
    return {
        REFERENCE: lambda: in_faiss(problem, None),
        "scikit-learn": lambda: in_sklearn(problem, "KMeans", "k-means++", note="seeded by greedy k-means++"),
        "scikit-learn mini-batch": lambda: in_sklearn(
            problem, "MiniBatchKMeans", "k-means++", note="passes in mini-batches", exact=False, **ALL_PASSES
        ),
    }


ALL_PASSES = {"max_no_improvement": None}
"""Mini-batches until the passes asked for are through."""


def in_faiss(
    problem: Problem, start: np.ndarray | None, name: str = REFERENCE, tuning: Mapping[str, int] | None = None
) -> Method:
    """faiss.Kmeans on all points, under faiss's own global settings but for `tuning`; on CUDA its GPU build."""
    faiss: Any = need("faiss")
    on_gpu = problem.settings.device.type == "cuda"
    if on_gpu and (not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0):
        raise Unavailable("the faiss that is installed has no GPU build, or finds no GPU")
    points, (k, dim) = problem.array, problem.centres.shape

    def fit(iterations: int) -> np.ndarray:
        clusters = faiss.Kmeans(
            dim, k, niter=iterations, seed=1 + problem.settings.seed, gpu=on_gpu, max_points_per_centroid=ALL_POINTS
        )
        with faiss_settings(faiss_defaults() | dict(tuning or {})):
            clusters.train(points, init_centroids=start)
        return clusters.centroids

    changed = [f"{key} = {value}" for key, value in (tuning or {}).items()]
    note = ", ".join(changed if start is not None else ["seeded by random points", *changed])
    return Method(name=name, call=fit, version=f"faiss {faiss.__version__}{', GPU' if on_gpu else ''}", note=note)


def in_sklearn(
    problem: Problem, kind: str, start: np.ndarray | str, note: str = "", exact: bool = True, **options: Any
) -> Method:
    """KMeans or MiniBatchKMeans of scikit-learn, one start, no early stop."""
    cluster: Any = need("sklearn.cluster")
    points, k = problem.array, len(problem.centres)

    def fit(iterations: int) -> np.ndarray:
        model = getattr(cluster, kind)(
            k, init=start, n_init=1, max_iter=iterations, tol=0.0, random_state=problem.settings.seed, **options
        )
        return model.fit(points).cluster_centers_

    name = "scikit-learn" if kind == "KMeans" else "scikit-learn mini-batch"
    return Method(name=name, call=fit, version=version_of("scikit-learn"), note=note, exact=exact)


def in_flash(problem: Problem, own: bool = False) -> Method:
    """flash-kmeans, whose float32 products are TF32."""
    package: Any = need("flash_kmeans")
    start = None if own else problem.centres[None]

    def fit(iterations: int) -> Tensor:
        return package.batch_kmeans_Euclid(
            problem.points[None], len(problem.centres), max_iters=iterations, tol=0.0, init_centroids=start
        )[1][0]

    return Method(
        name="flash-kmeans",
        call=fit,
        version=version_of("flash-kmeans", "flash_kmeans"),
        exact=False,
        note="TF32 products" + ("; seeded by random points" if own else ""),
    )
