"""Encode images into shards of arrays (tokens, latents, features): decoding, encoding and writing run at the same time.

    loader processes --batches in order--> device: encode --rows, one batch behind--> a shard in memory --thread--> disk

The loader processes start once for all shards. A shard holds a fixed number of consecutive images, and rank r of w
writes every w-th shard. So files have the same bytes for any number of ranks and processes, and a resumed run
continues with the first missing shard.

B images of a batch.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.data.batches import Batch, OrderedBatches, Piece, chunks
from vqpipe.data.images import ImageSet
from vqpipe.data.skipped import Skipped, merged, text_of
from vqpipe.device import bf16_is_faster
from vqpipe.errors import DataError
from vqpipe.progress import SILENT, Progress
from vqpipe.words import counted, percent

Item = TypeVar("Item")

WAITING, ENCODING, COPYING, WRITING = "waiting for images", "encoding", "copying", "writing"
"""The parts of a job that the stopwatch measures."""
IMAGES_PER_SHARD = 4096
"""Of tokens and latents. Fixed, so that shards have the same bytes for any number of ranks and workers."""
ADVICE = {
    WAITING: "Faster: more --num-workers, the extra `fast` (simplejpeg), or a faster disk.",
    WRITING: "Faster: another disk for --out.",
}
"""What to change, by the part that takes most of the time; for ENCODING see `faster_network`."""
ADVICE_SECONDS = 60.0
"""Shortest job after which ADVICE is printed."""
MIN_SHARE = 0.05
"""Smallest share of the time that is reported."""


class Stopwatch:
    """Wall time since it was made, and the time of each named part.

    It adds no CUDA synchronization: device time appears as the time spent waiting for results.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.images = 0
        """Images encoded, for the rate."""
        self.parts = Counter[str]()
        """part -> seconds; their sum is at most `seconds`."""

    @property
    def seconds(self) -> float:
        """Wall time, up to now or to `stop`."""
        return max((self.ended or time.perf_counter()) - self.began, 1e-9)

    def stop(self) -> None:
        """End the wall time."""
        self.ended = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of this block to the part `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - began  # type: ignore[assignment]

    def waiting(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`; the time to obtain each is added to the part `name`."""
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

    def report(self) -> str:
        """Images per second and the shares of the time."""
        parts = ", ".join(f"{name} {percent(part, 0)}" for name, part in self.shares().items() if part >= MIN_SHARE)
        seconds = timedelta(seconds=round(self.seconds))
        rate = f"{counted(self.images, 'images')} in {seconds}, {self.images / self.seconds:.3g}/s"
        return f"{rate}: {parts}."

    def advice(self, faster_encoding: str) -> str:
        """After a long job what to change, where encoding took most of the time `faster_encoding`; else ""."""
        slowest = next(iter(self.shares()), "")
        return {**ADVICE, ENCODING: faster_encoding}.get(slowest, "") if self.seconds >= ADVICE_SECONDS else ""


def faster_network(device: torch.device, precision: str) -> str:
    """What makes a network faster than on `device` in `precision`."""
    ways = ["more GPUs (torchrun)"] if device.type == "cuda" else ["a GPU"]
    ways += ["--precision bf16 (less exact)"] if precision == "fp32" and bf16_is_faster(device) else []
    return f"Faster: {' or '.join(ways)}."


@dataclass(frozen=True)
class Shard:
    """One shard of a job."""

    number: int
    name: str
    """The file written last; its record marks the shard complete, and holds its `skipped`."""
    positions: range
    """Its images, by their positions in the image set."""
    row_shape: tuple[int, ...]
    """Of the encoding of an image."""
    batch_size: int


def equal_shards(
    name: str, num_images: int, shard_size: int, row_shape: tuple[int, ...], batch_size: int
) -> list[Shard]:
    """Shards of `shard_size` images each, named by the format string `name` with their numbers."""
    return [
        Shard(number, name.format(number), positions, row_shape, batch_size)
        for number, positions in enumerate(chunks(range(num_images), shard_size))
    ]


@dataclass
class EncodedShard:
    """The encoded images of one shard."""

    number: int
    name: str
    buffer: np.ndarray
    """[images, *row_shape], with room for every image of the shard; the end stays unused if images were skipped."""
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """-1 where an image has no class."""
    origins: list[tuple[str, int]] = field(default_factory=list)
    """Where each image is stored: see `ImageSet.origin`."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Position in the image set -> reason."""

    @property
    def rows(self) -> np.ndarray:
        """[len(keys), *row_shape]."""
        return self.buffer[: len(self.keys)]

    def add(self, batch: Batch, rows: Tensor, images: ImageSet) -> None:
        """Append the rows of a batch of `images`."""
        first = len(self.keys)
        self.buffer[first : first + len(rows)] = rows.numpy()
        self.keys += batch.keys
        self.labels += batch.labels.tolist()
        self.origins += [images.origin(i) for i in batch.indices]


class EncodingJob:
    """Encodes images and writes this rank's shards that an earlier run has not written.

        shards = equal_shards("tokens-{:05d}.parquet", len(images), 4096, row_shape, batch_size)
        job = EncodingJob(draft, images, shards, title="tokenize")
        job.run(encode, write_shard, ...)
        records, skipped = job.finish()

    Every shard that was encoded is written, also where too many images cannot be used: with a larger `max_skipped` the
    job continues after it.

    Args:
        shards: those of all ranks; rank r of w encodes every w-th.
        skipped: images that are in no shard because they cannot be used, position -> reason.
        excluded: the same of those left out on request: they are listed, and do not count towards `max_skipped`.
        max_skipped: the largest share of images that cannot be used.
        faster_encoding: advice that is printed if encoding took long; see `faster_network`.
    """

    def __init__(
        self,
        draft: Draft,
        images: ImageSet,
        shards: Sequence[Shard],
        *,
        title: str,
        skipped: Mapping[int, str] | None = None,
        excluded: Mapping[int, str] | None = None,
        max_skipped: float = 0.01,
        progress: Progress = SILENT,
        faster_encoding: str = "",
    ) -> None:
        self.faster_encoding = faster_encoding
        self.draft, self.images, self.shards, self.progress = draft, images, shards, progress
        self.skipped, self.excluded, self.max_skipped = dict(skipped or {}), dict(excluded or {}), max_skipped
        self.num_images = sum(len(shard.positions) for shard in shards) + len(self.skipped) + len(self.excluded)
        self.mine = shards[distributed.rank() :: distributed.world_size()]
        self.missing = [shard for shard in self.mine if self.draft.record(shard.name) is None]
        self.stopwatch = Stopwatch()
        self.unit = "images" if len({shard.row_shape for shard in shards}) < 2 else "tokens"
        """Of the progress. Of images of several sizes it counts tokens: the largest images come first, and the time of
        an image is in proportion to its tokens."""
        total, left = (
            sum(self.amount(shard, len(shard.positions)) for shard in part) for part in (self.mine, self.missing)
        )
        progress.start(distributed.share_title(title), total, self.unit, done=total - left)

    def amount(self, shard: Shard, count: int) -> int:
        """The units of the progress in `count` images of a shard."""
        return count if self.unit == "images" else count * math.prod(shard.row_shape)

    def run(
        self,
        encode: Callable[[Tensor], Tensor],
        write: Callable[[Draft, EncodedShard], None],
        *,
        check: Callable[[Tensor, list[str]], None],
        device: torch.device,
        dtype: type[np.generic] | np.dtype,
        image_size: int,
        num_workers: int,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        """Encode the missing shards, and write each in a second thread while the next one is encoded.

        Args:
            encode: uint8[B, 3, S, S] on `device` -> [B, *row_shape] there, without synchronizing.
            write: writes one shard, called in order.
            check: called with rows [B, *row_shape] on the CPU and their keys; raises if they must not be stored.
            dtype: the stored type.
            image_size, num_workers, transform: see `OrderedBatches`.

        Raises:
            DataError: the images of this rank that cannot be used are too many already.
        """
        if not self.missing:
            return
        records = [record for shard in self.mine if (record := self.draft.record(shard.name)) is not None]
        found = merged([self.skipped, *(record["skipped"] for record in records)])
        self.check_so_far(found)
        batches = OrderedBatches(
            self.images,
            spans=[span for shard in self.missing for span in chunks(shard.positions, shard.batch_size)],
            image_size=image_size,
            batch_size=max(shard.batch_size for shard in self.missing),
            num_workers=num_workers,
            transform=transform,
        )
        encoded = self.encode_batches(batches, encode, device)
        writing: Future[None] | None = None
        # The thread starts with the first shard, after the loader processes. Leaving the block waits for it, also after
        # an error or an interruption.
        with ThreadPoolExecutor(1, "shard-writer") as pool:
            for shard in self.missing:
                buffer = np.empty((len(shard.positions), *shard.row_shape), dtype)
                result = EncodedShard(shard.number, shard.name, buffer)
                for piece, rows in encoded:
                    with self.stopwatch.part(COPYING):
                        if piece.batch is not None and rows is not None:
                            check(rows, piece.batch.keys)
                            result.add(piece.batch, rows, self.images)
                            self.stopwatch.images += len(rows)
                        result.skipped |= piece.skipped
                    self.progress.advance(self.amount(shard, len(piece.positions)))
                    if piece.positions.stop == shard.positions.stop:
                        break
                self.wait(writing)
                writing = pool.submit(write, self.draft, result)
                found |= result.skipped
                if shard is not self.missing[-1]:  # else `finish` checks, over all ranks
                    self.check_so_far(found)
            self.wait(writing)

    def check_so_far(self, found: dict[int, str]) -> None:
        """Raise a DataError if this rank alone has found too many already."""
        Skipped(self.images, self.num_images, found).check(self.max_skipped, self.draft, so_far=True)

    def encode_batches(
        self, batches: OrderedBatches, encode: Callable[[Tensor], Tensor], device: torch.device
    ) -> Iterator[tuple[Piece, Tensor | None]]:
        """Yield every piece with its rows on the CPU, one piece behind: a CUDA device computes one piece while the host
        loads and submits the next. The host waits only for the results of the piece before."""
        behind: tuple[Piece, AsyncRows | None] | None = None
        for piece in self.stopwatch.waiting(WAITING, batches.pieces()):
            with self.stopwatch.part(ENCODING):
                ahead = piece, None if piece.batch is None else AsyncRows(encode, piece.batch.images, device)
            if behind is not None:
                yield self.collect(*behind)
            behind = ahead
        if behind is not None:
            yield self.collect(*behind)

    def collect(self, piece: Piece, rows: "AsyncRows | None") -> tuple[Piece, Tensor | None]:
        """Wait for the rows of a piece."""
        with self.stopwatch.part(ENCODING):
            return piece, None if rows is None else rows.wait()

    def wait(self, writing: Future[None] | None) -> None:
        """Wait for the shard being written, if there is one, and raise its error."""
        with self.stopwatch.part(WRITING):
            if writing is not None:
                writing.result()

    def finish(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return the records of the shards of all ranks, in order, and the skipped images, reason -> count. The list of
        these and the excluded ones is written into the draft.

        Raises:
            DataError: more images than `max_skipped` are unreadable, or all are.
        """
        self.stopwatch.stop()
        mine = {shard.number: self.draft.record(shard.name) or {} for shard in self.mine}
        everyone = distributed.gather_objects((mine, self.stopwatch.images))
        self.stopwatch.images = sum(count for _, count in everyone)
        records = [record for _, record in sorted(pair for part, _ in everyone for pair in part.items())]
        found = merged([self.skipped, *(record["skipped"] for record in records)])
        skipped = Skipped(self.images, self.num_images, found)
        skipped.check(self.max_skipped, self.draft)
        left_out = Skipped(self.images, self.num_images, found | self.excluded)
        if len(left_out) == self.num_images:
            why = f"used ({text_of(left_out.counts())})" if self.excluded else "read"
            hint = "Check them, or raise --max-pixels" if "too-large" in self.excluded.values() else "Check them"
            raise DataError(f"none of the {self.num_images} images of {self.images.name} can be {why}", hint)
        if self.stopwatch.images:
            self.progress.message(self.stopwatch.report())
            if advice := self.stopwatch.advice(self.faster_encoding):
                self.progress.message(advice)
        left_out.publish(self.draft, self.progress)
        return records, skipped.counts()


def with_flip(images: Tensor, flip: bool) -> list[Tensor]:
    """The images and, with `flip`, their horizontal flips."""
    return [images, images.flip(-1)] if flip else [images]


def encode_views(
    images: Tensor, views: Callable[[Tensor], Sequence[Tensor]], encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Encode several views of each image: uint8[B, 3, S, S] -> [B, V, ...]."""
    return torch.stack([encode(view) for view in views(images)], dim=1)


class AsyncRows:
    """Rows being computed. On CUDA the copies and the computation are queued, and only `wait` synchronizes."""

    def __init__(self, encode: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> None:
        rows = encode(images.to(device, non_blocking=True))  # the loader has pinned them
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


ORIGIN_FIELDS = (
    pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    pa.field("index", pa.int64(), nullable=False),
)
"""Columns that say where an image is stored, as `ImageSet.origin`."""


def sample_columns(
    keys: Sequence[str],
    labels: Sequence[int],
    origins: Sequence[tuple[str, int]] | None = None,
    *,
    rows_per_image: int = 1,
) -> dict[str, list[Any]]:
    """Columns key, shard and index (if the origins are given), label (None: unknown) and flipped. Of several rows per
    image the second half are flips."""
    stored = dict[str, list[Any]]()
    if origins is not None:
        names = [name.encode("utf-8", "backslashreplace").decode() for name, _ in origins]
        stored = {
            "shard": [name for name in names for _ in range(rows_per_image)],
            "index": [index for _, index in origins for _ in range(rows_per_image)],
        }
    return {
        "key": [key for key in keys for _ in range(rows_per_image)],
        **stored,
        "label": [None if label < 0 else label for label in labels for _ in range(rows_per_image)],
        "flipped": [2 * row >= rows_per_image for _ in keys for row in range(rows_per_image)],
    }


def read_samples(artifact: Artifact, names: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """Columns of the lists `names` of an artifact's images, one list after the other; label is -1 where unknown. The
    hashes of the files are checked."""
    files = map(artifact.verified_bytes, names)  # read once, and pyarrow opens no path that is not UTF-8
    table = pa.concat_tables([pq.read_table(pa.BufferReader(file), columns=list(columns)) for file in files])
    if "key" in columns:  # Arrow cannot join more than 2 GiB of `string`
        table = table.set_column(table.column_names.index("key"), "key", table["key"].cast(pa.large_string()))
    return table.set_column(table.column_names.index("label"), "label", table["label"].fill_null(-1))
