"""Lists of image files: a text file with a path per line, or a CSV, TSV or JSONL file with a column of paths."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqpipe.data.folders import Folder
from vqpipe.data.label_lists import read_rows
from vqpipe.data.sources import access_error, classes_of, number_labels
from vqpipe.errors import DataError
from vqpipe.file_kinds import HEAD, NAMES, explain, kind_of
from vqpipe.files import valid_text

EXTENSIONS = (".txt", ".lst", ".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("path", "file", "file_name", "filename", "image", "key")
"""Names of the column of paths; the first is preferred."""
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class Entry:
    """One line of a list."""

    line: int
    path: str
    label: Any = None
    """The number or the name of a class; None or empty where there is none."""


def open_list(file: Path) -> Folder:
    """Open the images that a list names, in its order.

    Paths are absolute, or relative to the folder of the list. In a text file empty lines and lines that begin with #
    are ignored. In other lists `label` is the number or the name of the class of each image; names are numbered in
    sorted order. Keys are paths relative to the folder of the list, or, if images are outside of it, to the folder that
    holds them all.

    Raises:
        DataError: the list cannot be read, names no image, an image twice, or a file that does not exist.
    """
    entries = read_list(file)
    if not entries:
        raise DataError(f"{file} lists no images", "Write one path per line")
    for entry in entries:
        if valid_text(str(entry.label)) != str(entry.label):
            raise DataError(f"{file} is not UTF-8: see the label in line {entry.line}", "Store it as UTF-8")
    folder = os.path.abspath(file.parent)
    paths = [os.path.normpath(os.path.join(folder, entry.path)) for entry in entries]
    check_exist(file, entries, paths)
    first = dict[str, int]()
    for entry, path in zip(entries, paths, strict=True):
        if first.setdefault(path, entry.line) != entry.line:
            raise DataError(
                f"{file} lists {entry.path} in line {first[path]} and again in line {entry.line}", "Drop one"
            )
    if any(os.path.commonpath([folder, path]) != folder for path in paths):
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    labels, class_names = labels_of(file, entries)
    files = [os.path.relpath(path, folder) for path in paths]
    images = Folder(Path(folder), files, labels, class_names, named=True)
    images.name, images.place = file.name, os.path.abspath(file)
    return images


def check_exist(file: Path, entries: Sequence[Entry], paths: Sequence[str]) -> None:
    """Raise a DataError if a listed file does not exist."""
    with ThreadPoolExecutor(8) as pool:
        missing = [entry for entry, found in zip(entries, pool.map(os.path.isfile, paths), strict=True) if not found]
    if not missing:
        return
    hint = "Paths are absolute, or relative to the folder of the list"
    if any("://" in entry.path for entry in missing):
        hint = "A list names local files: download them, or pack them into tars"
    elif all(entry.path.rpartition(" ")[2].isdigit() for entry in missing):
        hint = "Lists with labels are CSV files with the columns path and label"
    raise DataError(
        f"{file} lists {len(missing):,} of {len(entries):,} files that do not exist, "
        f"the first in line {missing[0].line}: {missing[0].path}",
        hint,
    )


def read_list(file: Path) -> list[Entry]:
    """The entries of a list; its format is that of its extension."""
    try:
        with file.open("rb") as opened:
            kind = kind_of(opened.read(HEAD))
        if kind not in ("text", "empty", "json"):
            raise DataError(*explain(str(file), kind, "a list of paths", "Correct its name"))
        # A path that is no UTF-8 keeps its bytes; `open_list` refuses such labels.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            text = opened.read()
    except OSError as error:
        raise access_error("read", str(file), error, "Check the path and the disk") from error
    extension = file.suffix.lower()
    if extension in (".csv", ".tsv", ".jsonl"):
        return read_table(file, text, extension)
    if kind == "json":
        raise DataError(f"{file} is {NAMES[kind]}, not a list of paths", "Write one path per line, or end it in .jsonl")
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [Entry(number, line) for number, line in stripped if line and not line.startswith("#")]


def read_table(file: Path, text: str, extension: str) -> list[Entry]:
    """The entries of a list with columns."""
    entries = list[Entry]()
    try:
        for line, row in read_rows(text, extension):
            column = find_column(file, list(row))
            if row[column] in (None, ""):
                raise DataError(f"{file} has no {column} in line {line}", "Name a file in every line")
            if not isinstance(row[column], str):
                raise DataError(f"{file}: {column} has a wrong type in line {line}", "Use strings")
            entries.append(Entry(line, row[column], row.get(LABEL_COLUMN)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} has {error}", "Write it again") from None
    return entries


def find_column(file: Path, columns: Sequence[str]) -> str:
    """The name of the column of paths."""
    for name in PATH_COLUMNS:
        if name in columns:
            return name
    listed = ", ".join(str(column)[:40] for column in columns[:5]) or "none"
    raise DataError(f"{file} has no column of paths; its columns are {listed}", f"Name one {', '.join(PATH_COLUMNS)}")


def labels_of(file: Path, entries: Sequence[Entry]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The label of each entry, and the names of the classes, which are empty if all labels are numbers."""
    try:
        return number_labels(classes_of(entry.label for entry in entries))
    except ValueError as error:
        entry = entries[error.args[0]]
    raise DataError(
        f"{file} has the label {str(entry.label)[:40]} in line {entry.line}", "Number classes from 0, or name them"
    )
