"""Lloyd's iterations on every vector (Lloyd 1982), and the exact sums they share with mini-batches.

Sums are 64-bit integers in units of 1 / scale, where order does not matter: the centres are the same for any number of
ranks, blocks and threads, and for features kept on a GPU or streamed to it.

N vectors, K centres, D dimensions.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqpipe.artifacts.saved import Checkpoints, Saved
from vqpipe.codebooks.clustering import Clustering
from vqpipe.codebooks.points import Points
from vqpipe.errors import NumericError
from vqpipe.search import nearest

RESCUES = 100  # passes that may follow the last iteration to fill empty clusters; one or two are usual
# Fewer than 2**15 numbers at a time, torch works on in the calling thread and in its cache. Sums take a tenth of the
# time of the search; sharing them out among threads saves less than the threads waste on waiting for each other.
CHUNK_ELEMENTS = 2**15 - 1
NOWHERE = Checkpoints(None)


def lloyd(
    points: Points,
    centres: Tensor,
    iterations: int,
    tolerance: float,
    on_step: Callable[[float], None] = lambda inertia: None,
    *,
    history: tuple[float, ...] = (),
    reseeded: int = 0,
    checkpoints: Checkpoints = NOWHERE,
) -> Clustering:
    """Lloyd's iterations from float32[K, D] `centres`, ending with every cluster in use.

    Clusters without a vector take the vectors farthest from their centres, one each; among equals the lowest row goes
    first, and of equal vectors only one is taken. Each such step lowers the inertia, so that it ends; it may go on for
    some passes after the last iteration.

    Args:
        tolerance: stop when an iteration lowers the inertia by less than this share of it.
        on_step: hears the inertia after each pass over the features.
        history, reseeded: of the iterations that led to `centres`, where a saved run goes on.
        checkpoints: where the state after each iteration goes, as series "iterations".

    Raises:
        NumericError: clusters stay empty, because float32 cannot tell enough vectors apart.
    """
    centres = centres.clone()
    passes = iterations + 1 - len(history)
    if passes > 0:
        points.watch.phase("k-means", passes * points.features.num_vectors)
    while True:
        if len(history) > iterations:
            points.watch.phase("filling empty clusters", points.features.num_vectors)
        found = assign(points, centres)
        history = (*history, found.inertia)
        done = len(history) - 1
        points.watch.note(f"iteration {done}, inertia {found.inertia:.6g}")
        on_step(found.inertia)
        converged = settled(history[: iterations + 1], tolerance)
        empty = (found.counts == 0).nonzero()[:, 0]
        if len(empty) == 0 and (converged or done >= iterations):
            return Clustering(centres.cpu(), found.counts.cpu(), history, converged, min(done, iterations), reseeded)
        if done >= iterations + RESCUES:
            raise NumericError(
                f"{len(empty)} of {len(centres)} clusters stay empty", "The features differ by less than float32 shows"
            )
        if done < iterations:
            move(centres, found.sums, found.counts, points.scale)
        if len(empty):
            reseeded += reseed(points, centres, empty, found.distances)
        checkpoints.save(
            "iterations", Saved(len(history), {"centres": centres}, {"history": history, "reseeded": reseeded})
        )


def settled(history: tuple[float, ...], tolerance: float) -> bool:
    """Whether the last iteration lowered the inertia by no more than `tolerance` of it."""
    return len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


@dataclass(frozen=True)
class Assignment:
    """Every vector with its nearest centre."""

    sums: Tensor
    """int64[K, D]: of each centre's vectors, all ranks', in units of 1 / scale."""
    counts: Tensor
    """int64[K]: each centre's vectors, all ranks'."""
    distances: Tensor
    """float32[N] on the CPU: squared, of this rank's vectors; 0 for the others."""
    inertia: float
    """Mean squared distance, over all ranks."""


def assign(points: Points, centres: Tensor) -> Assignment:
    """Every vector to its nearest centre, over all ranks."""
    sums = torch.zeros(centres.shape, dtype=torch.int64, device=points.device)
    counts = torch.zeros(len(centres), dtype=torch.int64, device=points.device)
    distances = torch.zeros(points.features.num_vectors)
    parts = torch.zeros(len(points.features.block_starts()), dtype=torch.float64)

    def take(start: int, block: Tensor, ids: Tensor) -> None:
        squared, parts[start // points.features.block_stop(0)] = add_up(sums, ids, block, centres, ids, points.scale)
        distances[start : start + len(block)] = squared
        counts.add_(torch.bincount(ids, minlength=len(centres)))

    with ThreadPoolExecutor(1) as adder:  # adding up takes one core, and the search of the next block all that are left
        before: Future[None] | None = None
        for start, block in points.blocks():
            ids = nearest(block, centres, check=False)  # `points` has looked at the numbers
            if before is not None:
                before.result()
            before = adder.submit(take, start, block, ids)
        if before is not None:
            before.result()
    inertia = math.fsum(points.total(parts).tolist()) / points.features.num_vectors
    return Assignment(points.total(sums), points.total(counts), distances, inertia)


def add_up(
    sums: Tensor, places: Tensor, vectors: Tensor, centres: Tensor, ids: Tensor, scale: float
) -> tuple[Tensor, float]:
    """Add float32[R, D] `vectors` to the rows `places` of `sums`, and measure them from `centres[ids]`.

    Returns:
        float32[R] squared distances on the CPU, and their sum, which no number of threads changes.
    """
    squared = torch.empty(len(vectors), device=vectors.device)
    rows = max(1, CHUNK_ELEMENTS // vectors.shape[1]) if vectors.device.type == "cpu" else max(1, len(vectors))
    for begin in range(0, len(vectors), rows):
        here = slice(begin, begin + rows)
        part = vectors[here]
        squared[here] = centres.index_select(0, ids[here]).sub_(part).square_().sum(dim=1)
        sums.index_add_(0, places[here], (part * scale).long())  # digits below 1 / scale fall away
    squared = squared.cpu()
    return squared, float(squared.numpy().sum(dtype=np.float64))


def move(centres: Tensor, sums: Tensor, counts: Tensor, scale: float) -> None:
    """Put each centre that has vectors at their mean, in place."""
    rows = max(1, CHUNK_ELEMENTS // centres.shape[1])
    for begin in range(0, len(centres), rows):
        here = slice(begin, begin + rows)
        number = counts[here, None]
        means = (sums[here].double() / (scale * number.clamp(min=1).double())).float()
        centres[here] = torch.where(number > 0, means, centres[here])


def reseed(points: Points, centres: Tensor, empty: Tensor, distances: Tensor) -> int:
    """Move the centres `empty` to the vectors farthest from theirs, in place; how many there were vectors for."""
    rows = farthest(points.total(distances).numpy(), points.distinct, len(empty))
    centres[empty[: len(rows)]] = points.features.take(rows).to(centres)
    return len(rows)


def farthest(distances: np.ndarray, distinct: np.ndarray, count: int) -> np.ndarray:
    """The `count` distinct rows with the largest distances above 0 (or fewer), farthest first, then lowest row."""
    rows = distinct[np.argsort(-distances[distinct], kind="stable")[:count]]
    return rows[distances[rows] > 0]
