"""The images of a set that cannot be used: judged against a tolerance, counted by reason, and listed.

The list is `skipped.parquet`, one row per image, in the order of the set (of native sizes, in theirs): key,
shard (of a folder: its name), index (the position in the shard), reason. An artifact has it where images were skipped.
A run that stops leaves it in `<out>.partial`.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.artifacts.draft import SKIPPED
from vqpipe.data.images import ImageSet
from vqpipe.errors import DataError
from vqpipe.files import disk_errors
from vqpipe.progress import Progress
from vqpipe.words import counted, first_names

SCHEMA = pa.schema([("key", pa.string()), ("shard", pa.string()), ("index", pa.int64()), ("reason", pa.string())])
NAMED = 3
"""Images that a message names."""


@dataclass(frozen=True)
class Skipped:
    """The images that cannot be used, of `total` images of a set."""

    images: ImageSet
    total: int
    reasons: Mapping[int, str]
    """Position in the set -> reason."""

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        """`3 of 9 images cannot be used (2 empty, 1 truncated)`"""
        return f"{len(self):,} of {counted(self.total, 'images')} cannot be used ({text_of(self.counts())})"

    def counts(self) -> dict[str, int]:
        """reason -> count, sorted by reason."""
        return dict(sorted(Counter(self.reasons.values()).items()))

    def first_names(self) -> str:
        """The first images with their shards and reasons, and how many more there are."""
        positions = sorted(self.reasons)
        first = [f"{self.images.key(i)} of {self.images.origin(i)[0]} ({self.reasons[i]})" for i in positions[:NAMED]]
        return first_names([*first, *positions[NAMED:]], NAMED)

    def exceeds(self, max_skipped: float) -> bool:
        """Whether more than this share of the images cannot be used."""
        return len(self) / max(self.total, 1) > max_skipped  # a product would round: 0.29 x 100 < 29

    def check(self, max_skipped: float, draft: Draft | None, *, so_far: bool = False) -> None:
        """Raise a DataError if more than a share of `max_skipped` cannot be used; the list is in the draft then. Every
        rank calls it, with the images of all of them.

        Args:
            draft: that of the run; None: there is none, and no list.
            so_far: this rank calls it alone, before all images are read: the number is certain to be too large.
        """
        if not self.exceeds(max_skipped):
            return
        listed, hint = "", "Repair or remove them, or raise max_skipped"
        if draft is not None:
            if so_far:
                self.write_beside(draft.path)
            else:
                distributed.on_main(lambda: self.write_beside(draft.path))  # torchrun ends it once another rank ended
            listed = f"; all are listed in {draft.path / SKIPPED}"
            hint = (
                f"Raise {draft.tolerance}: the same command continues with what is written. Or repair or remove them,"
                f" and choose another {draft.option}"
            )
        least = "at least " if so_far else ""
        allowed = f"more than the {100 * max_skipped:g} % allowed"
        raise DataError(f"{least}{self}, {allowed}: {self.first_names()}{listed}", hint)

    def publish(self, draft: Draft, progress: Progress) -> None:
        """Write the list into the artifact, if there is anything to list, and report it. Every rank calls it."""
        if self.reasons and distributed.is_main():
            with draft.write(SKIPPED) as path:
                self.write(path)
            progress.message(f"{self}: {self.first_names()}; all are listed in {draft.out / SKIPPED}")

    def write_beside(self, folder: Path) -> None:
        """Write the list into the folder of a draft, which does not record it. Several ranks may do so at once."""
        temporary = folder / f".writing-{distributed.rank()}-{SKIPPED}"
        with disk_errors(folder / SKIPPED):
            self.write(temporary)
            os.replace(temporary, folder / SKIPPED)

    def write(self, path: Path) -> None:
        """Write the list."""
        rows = []
        for i in sorted(self.reasons):
            shard, index = self.images.origin(i)
            rows.append({"key": self.images.key(i), "shard": shard, "index": index, "reason": self.reasons[i]})
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, compression="zstd")


def merged(parts: Iterable[Mapping[Any, str]]) -> dict[int, str]:
    """The reasons of several shards or ranks, by position; in JSON the positions are text."""
    return dict(sorted((int(i), reason) for part in parts for i, reason in part.items()))


def text_of(counts: Mapping[str, int]) -> str:
    """Counts in a message: `2 empty, 1 truncated`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.items()))
