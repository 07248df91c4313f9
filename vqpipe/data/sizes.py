"""Images at their own sizes: measured by their headers, cropped to whole patches, and grouped by size.

Each side is brought to the multiple of the tokenizer's downsample factor below it, by a crop of the center. Batches and
shards are of one size. Larger sizes come first, so that a job for which memory does not suffice ends at its begin.

In memory are 16 bytes for each image of the set, one batch and one shard: as many images as `batch_size` of NATIVE_SIDE
x NATIVE_SIDE pixels, at least one, and IDS_PER_SHARD ids.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.data.batches import chunks, through_workers, worker_count
from vqpipe.data.decoding import MAX_PIXELS, BadImage, decoded_size
from vqpipe.data.encode import IMAGES_PER_SHARD, Shard
from vqpipe.data.images import ImageSet, SelectedImages
from vqpipe.files import atomic_write, disk_errors
from vqpipe.progress import Progress
from vqpipe.words import counted

SIZES = "sizes.npz"
"""The sizes of all images, in a draft: a resumed run does not read the headers again. It is not published."""
NATIVE_SIDE = 256
"""A batch has as many pixels as `batch_size` squares of this side."""
IDS_PER_SHARD = 1 << 24
HEADERS_PER_TASK = 256
TOO_SMALL, TOO_LARGE = "too-small", "too-large"
"""The reasons for an image with a side below the downsample factor, and for one of more pixels than the limit."""


def batch_size_of(batch_size: int, height: int, width: int) -> int:
    """The images of H x W pixels in a batch."""
    return min(batch_size, max(1, batch_size * NATIVE_SIDE**2 // (height * width)))


@dataclass(frozen=True)
class SizedImages:
    """The images of a set by size."""

    images: SelectedImages
    """All images: by size, the largest first; the order within a size is that of the set. At the end are those that
    cannot be used."""
    sizes: dict[tuple[int, int], range]
    """(height, width) of the crops in pixels -> positions in `images`."""
    skipped: dict[int, str]
    """Position in `images` -> reason of those that cannot be used."""
    excluded: dict[int, str]
    """The same of those that are smaller than the downsample factor, or larger than the `max_pixels` asked for."""

    def __str__(self) -> str:
        """`3 sizes, the largest 640x480 (1 image), the most frequent 500x375 (28 images)`"""
        if not self.sizes:
            return "no image can be used"
        named = {"largest": next(iter(self.sizes)), "most frequent": max(self.sizes, key=lambda s: len(self.sizes[s]))}
        parts = []
        for name, (height, width) in named.items():
            count = len(self.sizes[height, width])
            parts.append(f"the {name} {width}x{height} ({counted(count, 'images')})")
        return f"{counted(len(self.sizes), 'sizes')}, {', '.join(parts)}"

    def side(self, batch_size: int) -> int:
        """The side of squares of which as many as the images of a batch have the pixels of the largest batch."""
        images = [batch_size_of(batch_size, *size) for size in self.sizes]
        pixels = [count * height * width for count, (height, width) in zip(images, self.sizes, strict=True)]
        return math.isqrt(max(pixels, default=0) // max(images, default=1)) + 1

    def shards(self, name: str, row_shape: Callable[[int, int], tuple[int, int]], batch_size: int) -> list[Shard]:
        """The shards of every size.

        Args:
            name: a format string for WIDTHxHEIGHT and the number of a shard among those of the size.
            row_shape: height, width -> views and ids of an image.
        """
        found = list[Shard]()
        for (height, width), positions in self.sizes.items():
            shape, size = row_shape(height, width), batch_size_of(batch_size, height, width)
            per_shard = min(IMAGES_PER_SHARD, max(1, IDS_PER_SHARD // (shape[0] * shape[1])))
            for number, part in enumerate(chunks(positions, per_shard)):
                found.append(Shard(len(found), name.format(f"{width}x{height}", number), part, shape, size))
        return found


def group_by_size(
    draft: Draft,
    images: ImageSet,
    downsample_factor: int,
    *,
    max_pixels: int | None,
    num_workers: int,
    progress: Progress,
) -> SizedImages:
    """Read the headers of all images, each rank those of a share, and group the images. Every rank calls it."""
    sizes, reasons = measure(draft.path / SIZES, images, max_pixels or MAX_PIXELS, num_workers, progress)
    crops = sizes // downsample_factor * downsample_factor
    usable = crops.all(axis=1)
    reasons = dict.fromkeys(np.flatnonzero(~usable).tolist(), TOO_SMALL) | dict(reasons)
    pixels = crops.prod(axis=1, dtype=np.int64)
    order = np.lexsort((crops[:, 1], -pixels, ~usable))  # the last key is the first criterion; stable
    count = int(usable.sum())
    ordered = crops[order[:count]]
    firsts = np.flatnonzero(np.diff(ordered, axis=0, prepend=0).any(axis=1)).tolist()
    groups = dict[tuple[int, int], range]()
    for first, stop in pairwise([*firsts, count]):
        height, width = ordered[first].tolist()
        groups[height, width] = range(first, stop)
    left_out = {place: reasons[i] for place, i in enumerate(order[count:].tolist(), count)}
    rules = (TOO_SMALL,) if max_pixels is None else (TOO_SMALL, TOO_LARGE)
    excluded = {place: reason for place, reason in left_out.items() if reason in rules}
    skipped = {place: reason for place, reason in left_out.items() if place not in excluded}
    return SizedImages(SelectedImages(images, order), groups, skipped, excluded)


def measure(
    file: Path, images: ImageSet, max_pixels: int, num_workers: int, progress: Progress
) -> tuple[np.ndarray, Mapping[int, str]]:
    """(height, width) of each image when decoded, int32[N, 2], zeros for those that cannot be used; and their reasons.
    They are read from `file` if it exists, else from the images, and written to it."""
    if not distributed.on_main(file.is_file):
        tasks = chunks(range(len(images)), HEADERS_PER_TASK)
        mine = tasks[distributed.rank() :: distributed.world_size()]
        progress.start(distributed.share_title("sizes"), sum(map(len, mine)))
        dataset, workers = ImageSizes(images, max_pixels), worker_count(num_workers, len(mine), 1)
        found = list[tuple[range, np.ndarray, dict[int, str]]]()
        for task, (part, skipped) in zip(mine, through_workers(dataset, mine, workers), strict=True):
            found.append((task, part, skipped))
            progress.advance(len(task))
        sizes, reasons = np.zeros((len(images), 2), np.int32), dict[int, str]()
        for task, part, skipped in (each for share in distributed.gather_objects(found) for each in share):
            sizes[task.start : task.stop] = part
            reasons |= skipped

        def save() -> None:
            with disk_errors(file), atomic_write(file) as path:
                np.savez(path, sizes=sizes, positions=list(reasons), reasons=np.array([*reasons.values()], np.str_))

        distributed.on_main(save)
    with np.load(file, allow_pickle=False) as stored:
        return stored["sizes"], dict(zip(stored["positions"].tolist(), stored["reasons"].tolist(), strict=True))


class ImageSizes(Dataset[tuple[np.ndarray, dict[int, str]]]):
    """Dataset for loader processes: positions -> (height, width) of each image, int32[n, 2], and the reasons of those
    that cannot be used, which have zeros."""

    def __init__(self, images: ImageSet, max_pixels: int) -> None:
        self.images, self.max_pixels = images, max_pixels

    def __getitem__(self, positions: Sequence[int]) -> tuple[np.ndarray, dict[int, str]]:
        sizes, skipped = np.zeros((len(positions), 2), np.int32), dict[int, str]()
        for place, i in enumerate(positions):
            try:
                sizes[place] = decoded_size(self.images.read(i), self.max_pixels)
            except BadImage as error:
                skipped[i] = error.reason
        return sizes, skipped
