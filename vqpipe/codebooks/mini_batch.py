"""Mini-batch k-means (Sculley 2010, "Web-scale k-means clustering"): centres move after every batch of vectors.

A centre's learning rate is 1 / (vectors it has had), so a centre is the mean of all vectors that ever were nearest to
it. That mean is held as an exact integer sum and a count: nothing depends on the order within a batch or on ranks.

An epoch shows every vector once. Vectors lie on disk in the order of their images, so an epoch goes through runs of
CHUNK rows in an order drawn for it; a batch is so many runs as make up its size, rounded up.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe.artifacts.saved import Checkpoints, Saved
from vqpipe.codebooks.clustering import Clustering
from vqpipe.codebooks.lloyd import NOWHERE, add_up, lloyd, move, reseed, settled
from vqpipe.codebooks.points import Points
from vqpipe.search import nearest

CHUNK = 128


def mini_batch(
    points: Points,
    centres: Tensor,
    epochs: int,
    tolerance: float,
    batch: int,
    key: tuple[int, ...],
    on_step: Callable[[float], None] = lambda inertia: None,
    *,
    saved: Saved | None = None,
    checkpoints: Checkpoints = NOWHERE,
) -> Clustering:
    """Epochs of mini-batches from float32[K, D] `centres`, then one pass over all vectors for exact counts.

    A centre that no vector of an epoch was nearest to is re-seeded as in `lloyd`, at the end of that epoch, and starts
    to count anew; the last pass is `lloyd` without iterations, so that it ends with every cluster in use.

    Args:
        tolerance: stop when an epoch lowers the inertia, measured on the way, by less than this share of it.
        batch: vectors per step, on all ranks together.
        key: numbers that every random order is a function of, together with the epoch.
        saved: a state of `checkpoints` to go on from.
        checkpoints: where the state after each epoch goes, as series "iterations".
    """
    features = points.features
    k = len(centres)
    tensors, state = (saved.tensors, saved.state) if saved is not None else ({}, {})
    centres = centres.clone()
    sums = tensors.get("sums", torch.zeros(centres.shape, dtype=torch.int64)).to(points.device)
    counts = tensors.get("counts", torch.zeros(k, dtype=torch.int64)).to(points.device)
    history: tuple[float, ...] = tuple(state.get("history", ()))
    reseeded: int = state.get("reseeded", 0)
    points.watch.phase("mini-batches", (epochs - len(history)) * features.num_vectors)
    while len(history) < epochs and not settled(history, tolerance):
        epoch = len(history)
        of_epoch = torch.zeros_like(counts)
        distances = torch.zeros(features.num_vectors)
        inertia = 0.0
        for starts in batches(features.num_vectors, batch, (*key, epoch)):
            inertia += step(points, starts, centres, sums, counts, of_epoch, distances)
            points.watch.advance(int(np.minimum(features.num_vectors - starts, CHUNK).sum()))
        history = (*history, inertia / features.num_vectors)
        points.watch.note(f"epoch {epoch + 1}, inertia {history[-1]:.6g}")
        dead = (of_epoch == 0).nonzero()[:, 0]
        if len(dead):
            moved = dead[: reseed(points, centres, dead, distances)]
            sums[moved], counts[moved] = 0, 0
            reseeded += len(moved)
        whole: dict[str, Any] = {"history": history, "reseeded": reseeded}
        checkpoints.save("iterations", Saved(len(history), {"centres": centres, "sums": sums, "counts": counts}, whole))
        on_step(history[-1])
    result = lloyd(points, centres, 0, 0.0, on_step)
    return Clustering(
        result.codes,
        result.counts,
        (*history, *result.history),
        settled(history, tolerance),
        len(history),
        reseeded + result.reseeded,
    )


def batches(num_vectors: int, batch: int, key: tuple[int, ...]) -> list[np.ndarray]:
    """First rows of the runs that make up each batch of an epoch: int64[<= ceil(batch / CHUNK)] each."""
    order = np.random.default_rng(key).permutation(-(-num_vectors // CHUNK)) * CHUNK
    runs = -(-batch // CHUNK)
    return [np.sort(order[begin : begin + runs]) for begin in range(0, len(order), runs)]


def step(
    points: Points,
    starts: np.ndarray,
    centres: Tensor,
    sums: Tensor,
    counts: Tensor,
    of_epoch: Tensor,
    distances: Tensor,
) -> float:
    """Show one batch: everything after `starts` is changed in place. Returns the sum of squared distances.

    Each rank takes the runs that lie in its own blocks. Only the sums of centres that the batch touches travel.
    """
    own = starts[starts // points.features.block_stop(0) % points.ranks == points.rank]
    vectors = points.rows(own, CHUNK)
    ids = nearest(vectors, centres)
    number = points.total(torch.bincount(ids, minlength=len(centres)))
    touched = number.nonzero()[:, 0]
    places = (number > 0).cumsum(0) - 1
    fresh = torch.zeros(len(touched), centres.shape[1], dtype=torch.int64, device=points.device)
    squared, _ = add_up(fresh, places[ids], vectors, centres, ids, points.scale)
    rows = np.concatenate([np.arange(start, min(start + CHUNK, len(distances))) for start in own] or [own])
    distances[torch.from_numpy(rows)] = squared
    parts = torch.zeros(len(starts), dtype=torch.float64)
    parts[torch.from_numpy(np.isin(starts, own))] = torch.tensor(
        [float(run.double().sum()) for run in squared.split(CHUNK)], dtype=torch.float64
    )
    sums[touched] += points.total(fresh)
    counts += number
    of_epoch += number
    means = centres[touched]
    move(means, sums[touched], counts[touched], points.scale)
    centres[touched] = means
    return math.fsum(points.total(parts).tolist())
