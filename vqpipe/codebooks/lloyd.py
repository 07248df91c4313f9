"""k-means iterations: Lloyd's algorithm (Lloyd 1982) and mini-batches (Sculley 2010, "Web-scale k-means clustering").

Sums of vectors are 64-bit integers in units of 1 / scale, which do not depend on the order of addition: the centers are
the same for any number of ranks, blocks and threads, and for features kept on a GPU or streamed to it. One exception:
each rank searches its share of a mini-batch in one call, and on a CPU with D > 16 the rounding of a distance depends on
the other vectors of the call. If two centers are equally near in float32, another number of ranks may choose the other.

No offset is subtracted from the features, although those of CLIP have a large common mean. The search subtracts the
mean of the codes where it is far from zero (`vqpipe.search.nearest`), the distance to a center is a sum of squared
differences, and sums of vectors are exact integers. Where vectors form groups that are far apart compared with their
size, one mean is not enough: the search compares float32 distances, whose rounding then decides between near centers.

Shapes: N vectors, K centers, D dimensions, R rows of a block.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts.states import State, States, read
from vqpipe.codebooks.codebook import Clustering
from vqpipe.codebooks.features import FeatureSet
from vqpipe.errors import NumericError
from vqpipe.progress import SILENT, Progress
from vqpipe.search import nearest, row_hashes

LARGEST_EXPONENT = 120
"""Maximum exponent of the scale, a power of two, so that it stays inside the range of float32."""
MAX_RESEEDS = 100
"""Passes after the last iteration that may fill empty clusters; one or two are usual."""
CHUNK_ELEMENTS = 2**15 - 1
"""Numbers added at a time on the CPU: below 2**15, torch computes in the calling thread and in its cache. The sums take
a tenth of the time of the search, and distributing them over threads costs more than it saves."""
RUN = 128
"""Consecutive rows that a mini-batch takes together."""
PART = "clustering"
"""The part of a saved state that holds its tensors."""


class Points:
    """Features on a device, divided among the ranks, and statistics of one pass over all of them.

    Every pass reads the same blocks in the same order; a thread reads the next block while the caller works on one. On
    a CPU that takes the memory of two blocks: the shards are memory-mapped, and the operating system caches them. On a
    GPU this rank's features stay on the device in the precision they are stored in, if they fit into `room`; otherwise
    every pass copies them from pinned memory. All three give the same float32 numbers.

    Args:
        shared: rank r of w reads blocks r, r + w, ...; otherwise every rank reads all blocks.
        visits: how often one sum may include each vector; `scale` leaves room for it.
        room: bytes of the device for this rank's features; None: on a GPU half of the free memory.
        progress: advances by the vectors of every block, over all ranks.

    Attributes:
        distinct: int64[M], the first row of each distinct vector, ascending.
        scale: the fixed-point unit is 1 / scale: sums of all N vectors stay below 2**62.
    """

    def __init__(
        self,
        features: FeatureSet,
        device: torch.device,
        shared: bool,
        *,
        visits: int = 1,
        room: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.features, self.device, self.shared, self.progress = features, device, shared, progress
        self.kept: dict[int, Tensor] | None = {} if self.fits(room) else None
        hashes = torch.zeros(features.num_vectors, dtype=torch.int64)
        largest = torch.zeros(self.ranks)
        progress.start("reading features", features.num_vectors, "vectors")
        for start, block in self.blocks():
            hashes[start : start + len(block)] = row_hashes(block).cpu()
            largest[self.rank] = max(float(largest[self.rank]), self.largest_value(start, block))
        _, first = np.unique(self.all_reduce(hashes).numpy(), return_index=True)
        self.distinct: np.ndarray = np.sort(first)
        magnitude = np.frexp(float(self.all_reduce(largest).amax()))[1] + np.frexp(features.num_vectors * visits)[1]
        self.scale = 2.0 ** float(min(62 - magnitude, LARGEST_EXPONENT))

    @property
    def rank(self) -> int:
        return distributed.rank() if self.shared else 0

    @property
    def ranks(self) -> int:
        return distributed.world_size() if self.shared else 1

    def fits(self, room: int | None) -> bool:
        """Whether this rank's features, in their stored precision, take at most `room` bytes."""
        if room is None:
            room = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else 0
        rows = sum(self.features.block_stop(start) - start for start in self.block_starts())
        return rows * self.features.dim * np.dtype(self.features.dtype).itemsize <= room

    def block_starts(self) -> list[int]:
        """First rows of this rank's blocks."""
        return list(self.features.block_starts())[self.rank :: self.ranks]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """This rank's blocks: (first row, float32[R, D] on the device)."""
        starts = self.block_starts()
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.load, start) for start in starts[:1]]
            for index, start in enumerate(starts):
                block = ahead.pop().result().to(self.device, non_blocking=True)
                ahead += [reader.submit(self.load, following) for following in starts[index + 1 : index + 2]]
                if self.kept is not None:
                    self.kept[start] = block
                yield start, block.float()
                group = min(start + self.ranks * (self.features.block_stop(start) - start), self.features.num_vectors)
                self.progress.advance(group - start)

    def load(self, start: int) -> Tensor:
        """The block at `start` in its stored precision: the kept one, or a copy in memory (pinned for a GPU)."""
        if self.kept is not None and start in self.kept:
            return self.kept[start]
        block = self.features.stored(start, self.features.block_stop(start))
        if self.device.type != "cuda":
            return block
        with torch.cuda.device(self.device):  # the current device of a new thread is the first GPU
            return block.pin_memory()

    def rows(self, starts: np.ndarray, length: int) -> Tensor:
        """Runs of `length` rows (fewer at the end of the features) from each of `starts`: float32[R, D].

        Each run must be part of one block of this rank.
        """
        parts = []
        size = self.features.block_stop(0)
        for start in starts.tolist():
            stop = min(start + length, self.features.num_vectors)
            first = start // size * size
            if self.kept is not None and first in self.kept:
                parts.append(self.kept[first][start - first : stop - first])
            else:
                parts.append(self.features.stored(start, stop))
        joined = torch.cat(parts) if parts else torch.empty(0, self.features.dim)
        return joined.to(self.device).float()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share these points."""
        if not self.shared:
            return tensor
        return distributed.all_reduce_sum(tensor.to(self.device)).to(tensor.device)

    def largest_value(self, start: int, block: Tensor) -> float:
        """The largest absolute value of a block.

        Raises:
            NumericError: a NaN or an infinity; the message names its shard and row.
        """
        low, high = torch.aminmax(block)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = (~torch.isfinite(block)).any(dim=1).nonzero()[:, 0]
            raise NumericError(
                f"features hold NaN or infinity: {self.features.place(start + int(bad[0]))}"
                f" ({len(bad)} such vectors in rows {start} to {start + len(block) - 1})",
                "Extract the features again; look at the images of those rows",
            )
        return float(max(-low, high))


class CollectiveStates:
    """Saved states of a clustering that all ranks compute together: rank 0 writes, every rank reads.

    Every rank makes each call. Of each series of states the newest two are kept. With `folder` None nothing is saved.

    Raises (all methods):
        ArtifactError: on every rank, if a state cannot be written or belongs to another `request`.
    """

    def __init__(self, folder: Path | None, request: str = "", progress: Progress = SILENT) -> None:
        self.folder, self.request, self.progress = folder, request, progress
        self.last: tuple[str, int] | None = None
        self.saved_at = time.monotonic()

    def newest(self, series: str) -> State | None:
        """The newest state that is not damaged."""
        if self.folder is None:
            return None
        path, problems = distributed.on_main(States(self.folder, self.request, prefix=series).newest)
        for problem in problems:
            self.progress.message(f"{problem}; the state before it is used, if there is one")
        state = None if path is None else read(path)
        self.last, self.saved_at = None if state is None else (series, state.step), time.monotonic()
        return state

    def save(self, series: str, step: int, tensors: dict[str, Tensor], *, seconds: float = 0.0, **values: Any) -> None:
        """Save the state of `step`, unless the last one was saved less than `seconds` ago or is of the same step."""

        def write() -> None:
            if self.last != (series, step) and time.monotonic() - self.saved_at >= seconds:
                States(self.folder, self.request, prefix=series).save(step, {PART: tensors}, values)
                self.last, self.saved_at = (series, step), time.monotonic()

        if self.folder is not None:
            distributed.on_main(write)

    def discard(self, *names: str) -> None:
        """Delete the states of series that are no longer needed."""
        for series in names if self.folder is not None else ():
            distributed.on_main(States(self.folder, self.request, prefix=series).discard)


UNSAVED = CollectiveStates(None)


def lloyd(
    points: Points,
    centers: Tensor,
    iterations: int,
    tolerance: float,
    *,
    saved: State | None = None,
    states: CollectiveStates = UNSAVED,
) -> Clustering:
    """Lloyd's iterations from float32[K, D] `centers`, until every cluster has a vector.

    Empty clusters take the vectors farthest from their centers (`reseed`). Each such step lowers the inertia, so it
    terminates; it may take some passes after the last iteration.

    Args:
        tolerance: stop when an iteration lowers the inertia by at most this share of its value before.
        saved: the state of `states` to resume from, whose centers `centers` are.
        states: where each iteration is saved, as series "iterations".

    Raises:
        NumericError: clusters stay empty, because too few vectors differ in float32.
    """
    centers = centers.clone()
    history, reseeded = progress_of(saved)
    passes = iterations + 1 - len(history)
    if passes > 0:
        points.progress.start("k-means", passes * points.features.num_vectors, "assignments")
    while True:
        if len(history) > iterations:
            points.progress.start("filling empty clusters", points.features.num_vectors, "vectors")
        found = assign(points, centers)
        history = (*history, found.inertia)
        done = len(history) - 1
        points.progress.note(f"iteration {done}, inertia {found.inertia:.6g}")
        converged = has_converged(history[: iterations + 1], tolerance)
        empty = (found.counts == 0).nonzero()[:, 0]
        if len(empty) == 0 and (converged or done >= iterations):
            return Clustering(centers.cpu(), found.counts.cpu(), history, converged, min(done, iterations), reseeded)
        if done >= iterations + MAX_RESEEDS:
            raise NumericError(
                f"{len(empty)} of {len(centers)} clusters stay empty", "Too few features differ in float32: reduce k"
            )
        if done < iterations:
            move(centers, found.sums, found.counts, points.scale)
        if len(empty):
            reseeded += reseed(points, centers, empty, found.distances)
        states.save("iterations", len(history), {"centers": centers}, history=history, reseeded=reseeded)


def mini_batch(
    points: Points,
    centers: Tensor,
    epochs: int,
    tolerance: float,
    batch: int,
    key: tuple[int, ...],
    *,
    saved: State | None = None,
    states: CollectiveStates = UNSAVED,
) -> Clustering:
    """Epochs of mini-batches from float32[K, D] `centers`, then one pass over all vectors for exact counts.

    The learning rate of a center is 1 / (vectors assigned to it so far), so a center is the mean of all vectors that
    have been assigned to it: an exact integer sum and a count. An epoch visits every vector once. Vectors are stored in
    the order of their images, so an epoch visits runs of RUN rows in a random order; a batch is as many runs as make up
    its size, rounded up.

    A center without a vector in an epoch is moved at its end as in `lloyd`, and its sum and count restart. The last
    pass is `lloyd` without iterations, so every cluster has a vector.

    Args:
        tolerance, saved, states: as in `lloyd`, for epochs, whose inertia is measured while the centers move.
        batch: vectors per step, over all ranks.
        key: seed of the random orders, together with the epoch.
    """
    features = points.features
    k = len(centers)
    before = {} if saved is None else saved.parts[PART]
    centers = centers.clone()
    sums = before.get("sums", torch.zeros(centers.shape, dtype=torch.int64)).to(points.device)
    counts = before.get("counts", torch.zeros(k, dtype=torch.int64)).to(points.device)
    history, reseeded = progress_of(saved)
    points.progress.start("mini-batches", (epochs - len(history)) * features.num_vectors, "assignments")
    while len(history) < epochs and not has_converged(history, tolerance):
        epoch = len(history)
        epoch_counts = torch.zeros_like(counts)
        distances = torch.zeros(features.num_vectors)
        inertia = 0.0
        for starts in batches(features.num_vectors, batch, (*key, epoch)):
            inertia += step(points, starts, centers, sums, counts, epoch_counts, distances)
            points.progress.advance(int(np.minimum(features.num_vectors - starts, RUN).sum()))
        history = (*history, inertia / features.num_vectors)
        points.progress.note(f"epoch {epoch + 1}, inertia {history[-1]:.6g}")
        empty = (epoch_counts == 0).nonzero()[:, 0]
        if len(empty):
            moved = empty[: reseed(points, centers, empty, distances)]
            sums[moved], counts[moved] = 0, 0
            reseeded += len(moved)
        tensors = {"centers": centers, "sums": sums, "counts": counts}
        states.save("iterations", len(history), tensors, history=history, reseeded=reseeded)
    result = lloyd(points, centers, 0, 0.0)
    return Clustering(
        result.codebook,
        result.counts,
        (*history, *result.history),
        has_converged(history, tolerance),
        len(history),
        reseeded + result.reseeded,
    )


def batches(num_vectors: int, batch: int, key: tuple[int, ...]) -> list[np.ndarray]:
    """First rows of the runs of each batch of an epoch: int64[<= ceil(batch / RUN)] each."""
    order = np.random.default_rng(key).permutation(-(-num_vectors // RUN)) * RUN
    runs = -(-batch // RUN)
    return [np.sort(order[begin : begin + runs]) for begin in range(0, len(order), runs)]


def step(
    points: Points,
    starts: np.ndarray,
    centers: Tensor,
    sums: Tensor,
    counts: Tensor,
    epoch_counts: Tensor,
    distances: Tensor,
) -> float:
    """One step on the runs at `starts`; updates all later arguments in place. Returns the sum of squared distances.

    Each rank takes the runs of its own blocks. Only the sums of centers with vectors in the batch are all-reduced.
    """
    own = starts[starts // points.features.block_stop(0) % points.ranks == points.rank]
    vectors = points.rows(own, RUN)
    ids = nearest(vectors, centers)
    batch_counts = points.all_reduce(torch.bincount(ids, minlength=len(centers)))
    used = batch_counts.nonzero()[:, 0]
    places = (batch_counts > 0).cumsum(0) - 1
    batch_sums = torch.zeros(len(used), centers.shape[1], dtype=torch.int64, device=points.device)
    squared, _ = add_vectors(batch_sums, places[ids], vectors, centers, ids, points.scale)
    rows = np.concatenate([np.arange(start, min(start + RUN, len(distances))) for start in own] or [own])
    distances[torch.from_numpy(rows)] = squared
    parts = torch.zeros(len(starts), dtype=torch.float64)
    parts[torch.from_numpy(np.isin(starts, own))] = torch.tensor(
        [float(run.double().sum()) for run in squared.split(RUN)], dtype=torch.float64
    )
    sums[used] += points.all_reduce(batch_sums)
    counts += batch_counts
    epoch_counts += batch_counts
    means = centers[used]
    move(means, sums[used], counts[used], points.scale)
    centers[used] = means
    return math.fsum(points.all_reduce(parts).tolist())


def progress_of(saved: State | None) -> tuple[tuple[float, ...], int]:
    """The history of the inertia, and the number of moved empty clusters; empty and 0 where nothing is saved."""
    values = {} if saved is None else saved.values
    return tuple(values.get("history", ())), values.get("reseeded", 0)


def has_converged(history: tuple[float, ...], tolerance: float) -> bool:
    """Whether the last iteration lowered the inertia by at most `tolerance` times its value before."""
    return len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


@dataclass(frozen=True)
class Assignment:
    """The assignment of every vector to its nearest center."""

    sums: Tensor
    """int64[K, D]: sum of each center's vectors over all ranks, in units of 1 / scale."""
    counts: Tensor
    """int64[K]: number of each center's vectors over all ranks."""
    distances: Tensor
    """float32[N] on the CPU: squared distances of this rank's vectors; 0 for the others."""
    inertia: float
    """Mean squared distance over all ranks."""


def assign(points: Points, centers: Tensor) -> Assignment:
    """Assign every vector to its nearest center, over all ranks."""
    sums = torch.zeros(centers.shape, dtype=torch.int64, device=points.device)
    counts = torch.zeros(len(centers), dtype=torch.int64, device=points.device)
    distances = torch.zeros(points.features.num_vectors)
    parts = torch.zeros(len(points.features.block_starts()), dtype=torch.float64)

    def add(start: int, block: Tensor, ids: Tensor) -> None:
        squared, parts[start // points.features.block_stop(0)] = add_vectors(
            sums, ids, block, centers, ids, points.scale
        )
        distances[start : start + len(block)] = squared
        counts.add_(torch.bincount(ids, minlength=len(centers)))

    with ThreadPoolExecutor(1) as adder:  # the sums take one core while the next block's search takes the others
        before = adder.submit(lambda: None)
        for start, block in points.blocks():
            ids = nearest(block, centers, check=False)  # `Points` has checked the numbers
            before.result()
            before = adder.submit(add, start, block, ids)
        before.result()
    inertia = math.fsum(points.all_reduce(parts).tolist()) / points.features.num_vectors
    return Assignment(points.all_reduce(sums), points.all_reduce(counts), distances, inertia)


def add_vectors(
    sums: Tensor, places: Tensor, vectors: Tensor, centers: Tensor, ids: Tensor, scale: float
) -> tuple[Tensor, float]:
    """Add float32[R, D] `vectors` to the rows `places` of `sums`, and measure their distances to `centers[ids]`.

    Returns:
        float32[R] squared distances on the CPU, and their sum, which does not depend on the number of threads.
    """
    squared = torch.empty(len(vectors), device=vectors.device)
    rows = max(1, CHUNK_ELEMENTS // vectors.shape[1]) if vectors.device.type == "cpu" else max(1, len(vectors))
    for begin in range(0, len(vectors), rows):
        here = slice(begin, begin + rows)
        part = vectors[here]
        squared[here] = centers.index_select(0, ids[here]).sub_(part).square_().sum(dim=1)
        sums.index_add_(0, places[here], (part * scale).long())  # truncates digits below 1 / scale
    squared = squared.cpu()
    return squared, float(squared.numpy().sum(dtype=np.float64))


def move(centers: Tensor, sums: Tensor, counts: Tensor, scale: float) -> None:
    """Set each center that has vectors to their mean, in place."""
    rows = max(1, CHUNK_ELEMENTS // centers.shape[1])
    for begin in range(0, len(centers), rows):
        here = slice(begin, begin + rows)
        number = counts[here, None]
        means = (sums[here].double() / (scale * number.clamp(min=1).double())).float()
        centers[here] = torch.where(number > 0, means, centers[here])


def reseed(points: Points, centers: Tensor, empty: Tensor, distances: Tensor) -> int:
    """Move the centers `empty` to the distinct vectors farthest from their centers, in place; the lower row first where
    distances are equal. Returns how many were moved: fewer where fewer distances are above 0."""
    squared, distinct = points.all_reduce(distances).numpy(), points.distinct
    rows = distinct[np.argsort(-squared[distinct], kind="stable")[: len(empty)]]
    rows = rows[squared[rows] > 0]
    centers[empty[: len(rows)]] = points.features.take(rows).to(centers)
    return len(rows)
