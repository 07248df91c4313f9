"""Pack a data set into tar shards: every image decoded once, and stored as it is or as an ADM center crop.

A shard holds a fixed number of consecutive images, less those left out, and rank r of w writes every w-th shard. So
files have the same bytes for any number of ranks and processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.data.batches import chunks, through_workers, worker_count
from vqpipe.data.decoding import BadImage, decode, encode_jpeg, image_extension
from vqpipe.data.images import ImageSet
from vqpipe.data.skipped import Skipped, merged
from vqpipe.data.tars import tar_keys, write_tar
from vqpipe.data.transforms import center_crop
from vqpipe.progress import SILENT, Progress

IMAGES_PER_TASK = 32
"""Images that a loader process handles at a time."""
SAMPLES_SCHEMA = pa.schema(
    [("key", pa.string()), ("label", pa.int32()), ("shard", pa.string()), ("source", pa.string())]
)
SHARD = "shard-{:06d}.tar"


@dataclass(frozen=True)
class StoredImage:
    """One image as it is stored in a shard, or the reason why it is left out."""

    index: int
    """Position in the source."""
    extension: str = ""
    data: bytes = b""
    reason: str = ""
    excluded: bool = False
    """Left out by a rule of the data set (too small), not for a damaged file."""


class StoredImages(Dataset[list[StoredImage]]):
    """Dataset for loader processes: positions -> the files as they are, each decoded once to check it; or, with
    `image_size`, their ADM center crops as JPEG. Images below `min_size`, (width, height), are excluded."""

    def __init__(self, images: ImageSet, image_size: int | None, min_size: tuple[int, int] | None) -> None:
        self.images, self.image_size, self.min_size = images, image_size, min_size

    def __getitem__(self, positions: Sequence[int]) -> list[StoredImage]:
        return [self.store(i) for i in positions]

    def store(self, i: int) -> StoredImage:
        """Decode image `i`, and return the file to store."""
        data = self.images.read(i)
        try:
            image = decode(data, color=self.images.color)
        except BadImage as error:
            return StoredImage(i, reason=error.reason)
        if self.min_size is not None and (image.width < self.min_size[0] or image.height < self.min_size[1]):
            return StoredImage(i, reason="smaller than {}x{}".format(*self.min_size), excluded=True)
        if self.image_size is None:
            return StoredImage(i, image_extension(data), data)
        return StoredImage(i, "jpg", encode_jpeg(center_crop(image, self.image_size)))


def pack_images(
    draft: Draft,
    images: ImageSet,
    *,
    shard_size: int = 1000,
    image_size: int | None = None,
    min_size: tuple[int, int] | None = None,
    num_workers: int = 0,
    max_skipped: float = 0.01,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write this rank's missing shards of a `dataset` artifact, and on rank 0 the list of its images, samples.parquet.
    Returns the artifact's facts, over all ranks. The loader processes start once for all shards.

    Raises:
        DataError: more images than `max_skipped` are unreadable.
    """
    shards = chunks(range(len(images)), shard_size)
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    missing = [number for number in mine if draft.record(SHARD.format(number)) is None]
    tasks = {number: chunks(shards[number], IMAGES_PER_TASK) for number in missing}
    work = [task for number in missing for task in tasks[number]]
    keys = tar_keys(images.key(i) for i in range(len(images)))
    workers = worker_count(num_workers, len(work), 1)  # encoded images come through a pipe, not through shared memory
    stored = through_workers(StoredImages(images, image_size, min_size), work, workers)
    total, left = (sum(len(shards[number]) for number in part) for part in (mine, missing))
    progress.start(distributed.share_title("prepare-data"), total, done=total - left)
    found = merged(record["skipped"] for number in mine if (record := draft.record(SHARD.format(number))))
    for number in missing:
        Skipped(images, len(images), found).check(max_skipped, draft, so_far=True)
        write_image_shard(draft, number, images, keys, islice(stored, len(tasks[number])), progress)
        found |= merged([(draft.record(SHARD.format(number)) or {})["skipped"]])
    distributed.barrier()
    records = [draft.record(SHARD.format(number)) or {} for number in range(len(shards))]
    skipped, excluded = (
        Skipped(images, len(images), merged(record[kind] for record in records)) for kind in ("skipped", "excluded")
    )
    skipped.check(max_skipped, draft)
    omitted = [{int(i) for kind in ("skipped", "excluded") for i in record[kind]} for record in records]
    if distributed.is_main():
        write_samples(draft, images, keys, shards, omitted)
    facts: dict[str, Any] = {"num_images": len(images) - sum(map(len, omitted)), "num_classes": images.num_classes}
    facts |= {"skipped": skipped.counts()} | ({"excluded": excluded.counts()} if len(excluded) else {})
    skipped.publish(draft, progress)
    return facts | images.facts


def write_image_shard(
    draft: Draft,
    number: int,
    images: ImageSet,
    keys: list[str],
    stored: Iterator[list[StoredImage]],
    progress: Progress,
) -> None:
    """Write one tar; its record holds the images left out, position -> reason."""
    skipped, excluded = dict[str, str](), dict[str, str]()  # filled while the tar is written, recorded after it
    with draft.write(SHARD.format(number), skipped=skipped, excluded=excluded) as path, write_tar(path) as tar:
        for task in stored:
            for image in task:
                if image.reason:
                    (excluded if image.excluded else skipped)[str(image.index)] = image.reason
                else:
                    tar.write(keys[image.index], image.data, image.extension, images.label(image.index))
            progress.advance(len(task))


def write_samples(
    draft: Draft, images: ImageSet, keys: list[str], shards: list[range], omitted: list[set[int]]
) -> None:
    """Write samples.parquet: one row per image, in order: key, label (null: none), shard, and its key in the source."""
    rows = [
        {"key": keys[i], "label": images.label(i), "shard": SHARD.format(number), "source": images.key(i)}
        for number, shard in enumerate(shards)
        for i in shard
        if i not in omitted[number]
    ]
    with draft.write("samples.parquet", rows=len(rows)) as path:
        pq.write_table(pa.Table.from_pylist(rows, SAMPLES_SCHEMA), path, compression="zstd")
