"""Parquet files with encoded images, as Hugging Face `datasets` stores them.

The image column is struct<bytes: binary, path: string> or binary. The metadata of the schema, if `datasets` wrote it,
names the image column and the classes. Images are read by row group, which stays in memory for the next images.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqpipe.data.sources import (
    NO_LABEL,
    access_error,
    classes_of,
    count_classes,
    number_labels,
    read_with_retries,
)
from vqpipe.data.stored import CHECK, COPY_AGAIN, StoredFile, StoredFiles, distinct_ends, open_each
from vqpipe.errors import DataError
from vqpipe.file_kinds import explain, kind_of_file

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes")
"""Names of the image column, where several columns hold bytes; the first is preferred."""
LABEL_COLUMNS = ("label", "labels", "class", "cls", "class_id", "target")
"""Names of the label column, where the metadata names none; the first is preferred."""
NO_BYTES = "row without image bytes"
"""The reason in `left_out` for rows that only have the path of an image."""
CACHED_GROUPS = 2
"""Row groups in memory, in each process."""
LARGEST_GROUP = 1 << 31
"""Largest image column of a row group in bytes: it is read as a whole."""
READ_ERRORS = (pa.ArrowException, ValueError, OSError)
"""What pyarrow raises for files that are absent or damaged."""


@dataclass(frozen=True)
class ParquetFile:
    """One file, and where its rows are."""

    file: StoredFile
    sha256: str
    column: str
    """The leaf column of the encoded bytes: `image.bytes` or `image`."""
    group_rows: tuple[int, ...]
    """Rows of each row group."""


@dataclass(frozen=True)
class Rows:
    """The rows of one file that have image bytes."""

    numbers: np.ndarray
    """int64[N]: row numbers, ascending."""
    num_rows: int
    """All rows of the file."""
    paths: list[str | None]
    """The path stored with each image."""
    labels: list[int | str | None]
    """The number or the name of the class of each image."""
    class_names: tuple[str, ...]
    """The names of the numbers."""
    unlabeled: str
    """Why no image has a label though the file has classes."""


class Parquets(StoredFiles):
    """The images of several Parquet files, in the order given. An ImageSource.

    A key is the image's stored path without extension if all of these differ; else `FILE/ROW`, with the file's name
    without extension and the row's number.
    """

    def __init__(self, files: Sequence[ParquetFile], rows: Sequence[Rows], name: str) -> None:
        super().__init__([part.file for part in files], [len(part.numbers) for part in rows])
        self.name = name
        self.parts = tuple(files)
        self.rows = np.concatenate([part.numbers for part in rows])
        self.labels, self.class_names, unreadable = join_labels(files, rows)
        self.num_classes = len(self.class_names) or count_classes(self.labels)
        self.unlabeled = "; ".join(filter(None, [*(part.unlabeled for part in rows), unreadable]))
        left_out = sum(part.num_rows - len(part.numbers) for part in rows)
        self.left_out: dict[str, int] = {NO_BYTES: left_out} if left_out else {}
        self.stems = distinct_stems([part.file.shown for part in files])
        keys = [path_key(path) for part in rows for path in part.paths]
        self.keys = pa.array(keys, pa.large_string()) if all(keys) and len(set(keys)) == len(keys) else None
        content = [f"{stem} {part.sha256}\n" for stem, part in zip(self.stems, files, strict=True)]
        self.digest = hashlib.sha256("".join(content).encode()).hexdigest()

    def key(self, i: int) -> str:
        """The stored path without extension, or `FILE/ROW`."""
        if self.keys is not None:
            return self.keys[i].as_py()
        return f"{self.stems[self.place(i)[0]]}/{self.rows[i]}"

    def origin(self, i: int) -> tuple[str, int]:
        """The name of the file, and the row."""
        return self.files[self.place(i)[0]].name, int(self.rows[i])

    def read(self, i: int) -> bytes:
        """The bytes of image `i`; its row group is read, unless this process has it in memory."""
        part, row = self.parts[self.place(i)[0]], int(self.rows[i])
        ends = np.cumsum(part.group_rows)
        group = int(np.searchsorted(ends, row, side="right"))
        place = row - int(ends[group]) + part.group_rows[group]

        def read() -> bytes:
            return read_group(part, group)[place].as_py()

        try:
            return read_with_retries(read)
        except READ_ERRORS as error:
            raise not_read(part.file, error) from None

    @property
    def whole_groups(self) -> bool:
        """Whether reading one image reads others too."""
        return any(rows > 1 for part in self.parts for rows in part.group_rows)


@lru_cache(CACHED_GROUPS)
def read_group(part: ParquetFile, group: int) -> pa.ChunkedArray:
    """The encoded images of a row group. No file stays open, and no thread is started, for fork and pickle."""
    with open_parquet(part.file) as opened:
        size = leaf(opened, part.column, group).total_uncompressed_size
        if size > LARGEST_GROUP:
            raise DataError(
                f"{part.file.shown} has {size / 1e9:.1f} GB of images in one row group, which is read as a whole",
                "Write it again with pyarrow.parquet.write_table(..., row_group_size=1000)",
            )
        column = opened.read_row_group(group, columns=[part.column], use_threads=False).column(0)
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def leaf(file: pq.ParquetFile, column: str, group: int) -> pq.ColumnChunkMetaData:
    """The metadata of a leaf column in a row group."""
    row_group = file.metadata.row_group(group)
    parts = (row_group.column(number) for number in range(row_group.num_columns))
    (found,) = (part for part in parts if part.path_in_schema == column)
    return found


@contextmanager
def open_parquet(file: StoredFile) -> Iterator[pq.ParquetFile]:
    """Open a file as Parquet; a DataError if it changed. (pyarrow itself opens no path that is not UTF-8.)"""
    with file.open_binary() as source:
        if file.is_local:
            file.check(source.fileno())
        with pq.ParquetFile(source) as opened:
            yield opened


def not_read(file: StoredFile, error: Exception) -> DataError:
    """The DataError for a file that cannot be read: of another kind, damaged, or behind an error of its file system."""
    if isinstance(error, OSError) and error.errno is not None:
        return access_error("read", file.shown, error, CHECK)
    if file.is_local:
        kind = kind_of_file(Path(file.url))
        if kind not in ("parquet", "unknown"):
            return DataError(*explain(file.url, kind, "a Parquet file", "Correct its name"))
    reason = " ".join(str(error).split())[:120]
    return DataError(f"{file.shown} cannot be read as Parquet: {reason}", COPY_AGAIN)


def open_parquets(urls: Sequence[str], name: str) -> Parquets:
    """Open Parquet files with images.

    Raises:
        DataError: a file cannot be read, has no column of image bytes, or has only their paths.
    """
    opened = open_each(open_file, urls)
    source = Parquets([file for file, _ in opened], [rows for _, rows in opened], name)
    if not len(source) and source.left_out:
        raise DataError(
            f"{name} has only the paths of its images, not their bytes",
            "Give the folder of images, or a list of their paths",
        )
    return source


def open_file(url: str) -> tuple[ParquetFile, Rows]:
    """Open one file: hash it, unless its hash is cached, and read its labels and paths."""
    file = StoredFile.locate(url)
    url = file.shown
    try:
        with open_parquet(file) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            features = read_features(schema)
            image = find_image_column(url, schema, features)
            column = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
            groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))

            def index() -> dict[str, Any]:
                missing = [row for group in range(len(groups)) for row in null_rows(opened, column, group)]
                return {"sha256": file.sha256(), "missing": missing}

            found = file.cached(f"parquet {column}", index)
            rows = read_rows(opened, url, image, features, found["missing"])
    except READ_ERRORS as error:
        raise not_read(file, error) from None
    return ParquetFile(file, found["sha256"], column, groups), rows


def null_rows(file: pq.ParquetFile, column: str, group: int) -> list[int]:
    """The rows of a row group without image bytes. The images are read only where the statistics do not exclude it."""
    statistics = leaf(file, column, group).statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
        return []
    first = sum(file.metadata.row_group(before).num_rows for before in range(group))
    rows = list[int]()
    for batch in file.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
        images = batch.column(0)
        nulls = images.is_null() if not pa.types.is_struct(images.type) else pc.struct_field(images, "bytes").is_null()
        rows += (first + np.flatnonzero(nulls.to_numpy(zero_copy_only=False))).tolist()
        first += len(batch)
    return rows


def read_features(schema: pa.Schema) -> dict[str, Any]:
    """The features that `datasets` describes in the schema's metadata: column -> description; {} where it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: value for name, value in features.items() if name in schema.names and isinstance(value, dict)}


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def find_image_column(url: str, schema: pa.Schema, features: dict[str, Any]) -> str:
    """The name of the image column.

    Raises:
        DataError: there is none, or it is unclear which of several it is.
    """
    columns = [field.name for field in schema if holds_bytes(field.type)]
    described = [name for name in columns if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in IMAGE_COLUMNS if name in columns]
    for found in (described, columns):
        if len(found) == 1:
            return found[0]
        if found and (preferred := [name for name in named if name in found]):
            return preferred[0]
    if columns:
        raise DataError(
            f"{url} has several columns of bytes: {', '.join(columns)}", "Name that of the images `image`, and write it"
        )
    raise DataError(
        f"{url} is a Parquet file without a column of image bytes: it has {', '.join(schema.names) or 'no column'}",
        "Its images are stored elsewhere: give them as a folder, as tars, or as a list of paths",
    )


def find_label_column(schema: pa.Schema, features: dict[str, Any]) -> tuple[str | None, str]:
    """The name of the label column, if there is one; else why it is unclear which, or nothing."""
    described = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    found = described if len(described) == 1 else [name for name in LABEL_COLUMNS if name in schema.names][:1]
    if not found:
        return None, f"several columns are classes: {', '.join(described)}" if described else ""
    kind = schema.field(found[0]).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(value) or holds_text(value):
        return found[0], ""
    return None, f"its column {found[0]} is of the type {kind}"


def read_rows(file: pq.ParquetFile, url: str, image: str, features: dict[str, Any], missing: Sequence[int]) -> Rows:
    """Read the labels and the paths of the images of a file; `missing`: the rows without image bytes."""
    schema, num_rows = file.schema_arrow, file.metadata.num_rows
    kept = np.setdiff1d(np.arange(num_rows, dtype=np.int64), np.array(missing, np.int64))
    kind = schema.field(image).type
    paths: list[str | None] = [None] * len(kept)
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 and holds_text(kind.field("path").type):
        column = file.read(columns=[f"{image}.path"], use_threads=False).column(0)
        paths = pc.struct_field(column, "path").take(kept).to_pylist()
    label, unclear = find_label_column(schema, features)
    labels: list[int | str | None] = [None] * len(kept)
    names: tuple[str, ...] = ()
    if label is not None:
        labels = file.read(columns=[label], use_threads=False).column(0).take(kept).to_pylist()
        listed = features.get(label, {}).get("names")
        names = tuple(map(str, listed)) if isinstance(listed, list) else ()
        names = names if len(set(names)) == len(names) else ()
        numbers = [number for number in labels if isinstance(number, int)]
        if numbers and (max(numbers) >= (len(names) or 1 << 31) or min(numbers) < NO_LABEL):
            raise DataError(
                f"{url} has the classes {min(numbers)} to {max(numbers)} in its column {label}",
                f"Numbers from 0 to {len(names) - 1} are expected" if names else "Numbers from 0 are expected",
            )
    return Rows(kept, num_rows, paths, labels, names, f"{url}: {unclear}" if unclear else "")


def join_labels(files: Sequence[ParquetFile], rows: Sequence[Rows]) -> tuple[np.ndarray, tuple[str, ...], str]:
    """int32[N] and the class names of several files, which must agree on these; and why there are no labels, if one
    cannot be read. Names that are stored as strings are numbered in sorted order."""
    values = [label for part in rows for label in part.labels]
    texts = any(isinstance(label, str) for label in values)
    named = {part.class_names for part in rows if len(part.numbers)}
    if len(named) > 1 or (texts and any(isinstance(label, int) for label in values)):
        raise DataError(
            f"{files[0].file.shown} and the files after it do not have the same classes",
            "Give them as several --images",
        )
    if not texts:
        return number_labels(values)[0], next(iter(named), ()), ""
    try:
        return *number_labels(classes_of(values)), ""
    except ValueError as error:
        position: int = error.args[0]
        ends = np.cumsum([len(part.labels) for part in rows])
        name = files[int(np.searchsorted(ends, position, side="right"))].file.name
        reason = f"{name}: a label is not a class: {str(values[position])[:20]!r}"
        return np.full(len(values), NO_LABEL, np.int32), (), reason


def path_key(path: str | None) -> str:
    """A stored path without its extension, as a key: relative, and without `..`."""
    parts = [part for part in (path or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return os.path.splitext("/".join(parts))[0]


def distinct_stems(urls: Sequence[str]) -> list[str]:
    """File names without extension; with as many folders before them as it takes that all differ."""
    stems = [os.path.splitext(url)[0] for url in urls]
    try:
        return distinct_ends(stems)
    except ValueError:
        twice = next(url for url, stem in zip(urls, stems, strict=True) if stems.count(stem) > 1)
        raise DataError(f"{twice} is given twice", "Give it once") from None
