"""From images to shards of numbers: decoding, encoding and writing go on at the same time.

    loader processes --batches in order--> device: encode --rows, one batch behind--> a shard in memory --thread--> disk

The decoders start once for all shards. A shard holds a fixed number of consecutive images and rank r of w writes every
w-th, so files are the same bytes whatever the number of ranks and processes, and a shard is the unit of resuming.

B images of a batch.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.data.batches import Batch, OrderedBatches, Piece, check_skipped
from vqpipe.data.images import ImageSet
from vqpipe.errors import DataError

WAITING, ENCODING, COPYING, WRITING = "waiting for images", "encoding", "copying", "writing"
"""The parts of the time that a stopwatch counts here."""


class Progress(Protocol):
    """Who hears how far it is."""

    def resume(self, count: int) -> None:
        """`count` images were done by an earlier run."""

    def advance(self, count: int) -> None:
        """`count` more images are done with."""


Item = TypeVar("Item")


class Stopwatch:
    """Wall time since it was made, and how much of it each named part took.

    A CUDA device is never waited for on its account: what the device does shows as the time spent waiting for results.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.images = 0
        """Images done, for the rate."""
        self.parts = Counter[str]()
        """part -> seconds of the main process; together no more than `seconds`."""
        self.beside = Counter[str]()
        """part -> seconds of a second thread, which the main process did not wait for."""

    @property
    def seconds(self) -> float:
        """Wall time, up to now or to `stop`."""
        return max((self.ended or time.perf_counter()) - self.began, 1e-9)

    def stop(self) -> None:
        """The job is over."""
        self.ended = time.perf_counter()

    @contextmanager
    def part(self, name: str, *, beside: bool = False) -> Iterator[None]:
        """Count the time of this block under `name`; `beside` from a second thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            (self.beside if beside else self.parts)[name] += time.perf_counter() - began  # type: ignore[assignment]

    def waiting(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, the time until each is there counted under `name`."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def shares(self) -> dict[str, float]:
        """part -> its share of the wall time, 0..1, largest first."""
        return {name: seconds / self.seconds for name, seconds in self.parts.most_common()}


@dataclass(frozen=True, kw_only=True)
class RowEncoder:
    """What makes rows of numbers of images, and how they are kept."""

    encode: Callable[[Tensor], Tensor]
    """uint8[B, 3, S, S] on `device` -> [B, *row_shape] there, waiting for the device as little as it can."""
    check: Callable[[Tensor, list[str]], None]
    """Raises a VqpipeError where [B, *row_shape], by now on the CPU, of images with these keys must not be stored."""
    device: torch.device
    row_shape: tuple[int, ...]
    """Shape of what one image becomes."""
    dtype: np.dtype
    """As which it is stored."""


@dataclass
class EncodedShard:
    """One shard's images, encoded."""

    space: np.ndarray
    """[images, *row_shape], allocated once; the end of it stays empty where images were left out."""
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """-1 where an image has no class."""
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> np.ndarray:
        """[len(keys), *row_shape]."""
        return self.space[: len(self.keys)]

    def add(self, piece: Piece, encoded: Tensor | None) -> None:
        self.skipped.update(piece.skipped)
        if piece.batch is None or encoded is None:
            return
        first = len(self.keys)
        self.space[first : first + len(encoded)] = encoded.numpy()
        self.keys += piece.batch.keys
        self.labels += piece.batch.labels.tolist()


def write_shards(
    draft: Draft,
    images: ImageSet,
    encoder: RowEncoder,
    write: Callable[[int, EncodedShard], None],
    *,
    name: Callable[[int], str],
    shard_size: int,
    stop: int,
    max_skipped: float,
    stopwatch: Stopwatch,
    progress: Progress,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Encode the images [0, stop) and write this rank's shards that are not written yet.

    `write(number, shard)` writes one with `Draft.write`, `name(number)` last; it runs in a second thread while the next
    shard is encoded. `options` go to OrderedBatches. Returns the records of all shards over all ranks and the images
    skipped, reason -> count. `stopwatch` then holds the images encoded now by all ranks, and this rank's time.

    Raises:
        DataError: more images than `max_skipped` cannot be read, or none can.
    """
    spans = [range(start, min(start + shard_size, stop)) for start in range(0, stop, shard_size)]
    mine = range(distributed.rank(), len(spans), distributed.world_size())
    missing = [number for number in mine if draft.record(name(number)) is None]
    progress.resume(sum(len(spans[number]) for number in set(mine) - set(missing)))
    batches = OrderedBatches(images, spans=[spans[number] for number in missing], **options)
    with Background(stopwatch) as background:
        for number, shard in zip(missing, encode_shards(batches, encoder, stopwatch, progress), strict=True):
            background.submit(partial(write, number, shard))
    stopwatch.stop()
    mine_written = [draft.record(name(number)) or {} for number in mine]
    everyone = distributed.gather_objects((mine_written, stopwatch.images))
    stopwatch.images = sum(count for _, count in everyone)
    records = [record for part, _ in everyone for record in part]
    skipped: Counter[str] = sum((Counter(record["skipped"]) for record in records), Counter())
    check_skipped(skipped, stop, max_skipped)
    if skipped.total() == stop:
        raise DataError(f"none of the {stop} images of {images.name} can be read", "Check the images")
    return records, dict(sorted(skipped.items()))


def share(stop: int, shard_size: int) -> int:
    """How many of `stop` images are this rank's."""
    spans = [min(shard_size, stop - start) for start in range(0, stop, shard_size)]
    return sum(spans[distributed.rank() :: distributed.world_size()])


def encode_shards(
    batches: OrderedBatches, encoder: RowEncoder, stopwatch: Stopwatch, progress: Progress
) -> Iterator[EncodedShard]:
    """Each span of `batches`, encoded. Two shards are in memory while the caller holds one: it and the next."""
    pieces = encoded(stopwatch.waiting(WAITING, batches.pieces()), encoder, stopwatch)
    for span in batches.spans:
        shard = EncodedShard(np.empty((len(span), *encoder.row_shape), encoder.dtype))
        for piece, rows in pieces:
            with stopwatch.part(COPYING):
                if piece.batch is not None and rows is not None:
                    encoder.check(rows, piece.batch.keys)
                shard.add(piece, rows)
            stopwatch.images += len(piece.positions)
            progress.advance(len(piece.positions))
            if piece.positions.stop == span.stop:
                break
        yield shard


def encoded(
    pieces: Iterator[Piece], encoder: RowEncoder, stopwatch: Stopwatch
) -> Iterator[tuple[Piece, Tensor | None]]:
    """Every piece with its rows on the CPU, one piece behind: while a CUDA device works on one, the host fetches and
    hands over the next, so its only wait for the device is for the results of the piece before."""
    behind: tuple[Piece, Result | None] | None = None
    for piece in pieces:
        with stopwatch.part(ENCODING):
            ahead = piece, None if piece.batch is None else Result(encoder, piece.batch)
        if behind is not None:
            yield collect(*behind, stopwatch)
        behind = ahead
    if behind is not None:
        yield collect(*behind, stopwatch)


def collect(piece: Piece, result: "Result | None", stopwatch: Stopwatch) -> tuple[Piece, Tensor | None]:
    with stopwatch.part(ENCODING):
        return piece, None if result is None else result.wait()


class Result:
    """Rows being computed; on CUDA both copies and the computing are queued, and nothing is waited for until `wait`."""

    def __init__(self, encoder: RowEncoder, batch: Batch) -> None:
        rows = encoder.encode(batch.images.to(encoder.device, non_blocking=True))  # pinned by the loader
        self.rows = rows.to("cpu", non_blocking=rows.is_cuda)
        self.ready: torch.cuda.Event | None = None
        if rows.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(rows.device))

    def wait(self) -> Tensor:
        """The rows, on the CPU."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.rows


class Background:
    """A thread that does one job at a time while its owner goes on; an error of a job is raised at the next call.

    Leaving the context waits for the last job, also where the owner was interrupted: what is begun is kept.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.pool = ThreadPoolExecutor(1, "shard-writer")  # its thread starts with the first job, after the loader's
        self.job: Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def submit(self, job: Callable[[], None]) -> None:
        """Start `job` when the one before is done."""
        with self.stopwatch.part(WRITING):
            self.wait()
        self.job = self.pool.submit(self.timed, job)

    def timed(self, job: Callable[[], None]) -> None:
        with self.stopwatch.part(WRITING, beside=True):
            job()

    def wait(self) -> None:
        job, self.job = self.job, None
        if job is not None:
            job.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.stopwatch.part(WRITING):
            self.pool.shutdown(wait=True)
        if kind is None:
            self.wait()
