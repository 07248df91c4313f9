"""The images of an `images` artifact: tar shards of PNG files, or one PNG file each.

tar    shard-000000.tar     KEY.png and KEY.cls
png    images/NAME.png      in the order of their names
       images/labels.csv    file_name, label; without labels there is none
       shard-000000.csv     file_name, key, label of the images that were written together
"""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.data.label_lists import read_rows
from vqpipe.data.tars import write_tar

Form = Literal["tar", "png"]
FOLDER = "images"
NAME_BYTES = 120
"""Longest name of a file, without its extension: file systems have 255 bytes, and some names get more words."""


class ImageWriter(Protocol):
    """Writes the images of one shard."""

    def write(self, key: str, image: bytes, extension: str, label: int | None = None) -> None:
        """Append an image; a negative label or None is no label."""


class PngWriter:
    """Writes an image as a file of its own."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.rows: list[tuple[str, str, str]] = []
        """file_name, key and label."""

    def write(self, key: str, image: bytes, extension: str, label: int | None = None) -> None:
        plain = re.sub(r"[^\w.-]", "_", key).encode()[:NAME_BYTES].decode(errors="ignore")
        name = f"{plain}.{extension}"
        self.draft.write_bytes(f"{FOLDER}/{name}", image)
        self.rows.append((name, key, "" if label is None or label < 0 else str(label)))


def shard_file(number: int, form: Form) -> str:
    """The file that is written last of a shard: if it is recorded, the shard is complete."""
    return f"shard-{number:06d}.{'tar' if form == 'tar' else 'csv'}"


@contextmanager
def write_shard(draft: Draft, number: int, form: Form, count: int) -> Iterator[ImageWriter]:
    """Write a shard of `count` images. As PNG files, keys differ in what is left of them in file names."""
    if form == "tar":
        with draft.write(shard_file(number, form), images=count) as path, write_tar(path) as tar:
            yield tar
        return
    writer = PngWriter(draft)
    yield writer
    with draft.write(shard_file(number, form), images=count) as path:
        write_rows(path, [("file_name", "key", "label"), *writer.rows])


def write_labels(draft: Draft, form: Form) -> None:
    """Write the labels of all shards of PNG files as the list that `open_images` reads. Every rank calls it."""
    if form == "tar":
        return
    distributed.barrier()
    if distributed.is_main():
        lists = (file.read_text(encoding="utf-8") for file in sorted(draft.path.glob("shard-*.csv")))
        rows = [row for text in lists for _, row in read_rows(text, ".csv")]
        labelled = [(row["file_name"], row["label"]) for row in rows if row["label"]]
        if labelled:
            with draft.write(f"{FOLDER}/labels.csv") as path:
                write_rows(path, [("file_name", "label"), *labelled])


def write_rows(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
