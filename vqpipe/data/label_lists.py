"""Lists of labels and classes in the root of a folder of images.

| file | content |
|---|---|
| classes.txt | a class name per line, in the order of their numbers |
| labels.csv, labels.json, labels.parquet, metadata.csv, metadata.jsonl | a label for each image |

The latter have a column `file_name` (as in Hugging Face's ImageFolder) or `key`, the path of an image below the folder,
with or without its extension, and a column `label`, a number or a class name. labels.json is a list of such records, or
an object of path -> label.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqpipe.data.sources import NO_LABEL, access_error, class_of, number_labels
from vqpipe.errors import DataError
from vqpipe.files import valid_text

CLASSES = "classes.txt"
LABELS = ("labels.csv", "labels.json", "labels.parquet", "metadata.csv", "metadata.jsonl")
PATHS = ("file_name", "key")


@dataclass(frozen=True)
class Listed:
    """The labels of images by a list."""

    file: str
    labels: np.ndarray | None = None
    """int32[N]; None where the list has none, or they cannot be used."""
    class_names: tuple[str, ...] = ()
    unlabeled: str = ""
    """Why images have no labels."""
    unused: int = 0
    """Labels of images that are absent."""
    unusable: bool = False
    """Whether it holds labels that cannot be used, for the reason `unlabeled`."""


def read_classes(root: Path) -> list[str] | None:
    """The names in classes.txt, in order; None without that file.

    Raises:
        DataError: it is unreadable, empty, or names a class twice.
    """
    file = root / CLASSES
    if not file.is_file():
        return None
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise access_error("read", str(file), error, "Check its permissions") from None
    except ValueError:
        raise DataError(f"{file} is not UTF-8", "Store it as UTF-8, with a class name per line") from None
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None or not names:
        what = "names no class" if twice is None else f"names the class {twice!r} twice"
        raise DataError(f"{file} {what}", "Give it every class once, in the order of their numbers")
    return names


def read_labels(root: Path, files: Sequence[str]) -> Listed | None:
    """The labels of the images `files` by the first of LABELS in the folder; None without such a file.

    Raises:
        DataError: the file cannot be read, or holds a class that classes.txt lacks.
    """
    name = next((name for name in LABELS if (root / name).is_file()), None)
    if name is None:
        return None
    try:
        entries, problem = collect(name, root / name)
    except OSError as error:
        raise access_error("read", str(root / name), error, "Check its permissions") from None
    except (ValueError, RecursionError, pa.ArrowException) as error:
        return Listed(name, unusable=True, unlabeled=f"{name} is damaged: {' '.join(str(error).split())[:100]}")
    if problem or not entries:
        return Listed(name, unusable=bool(problem), unlabeled=problem or f"{name} has no columns file_name and label")
    paths = list(map(valid_text, files))
    stems = [os.path.splitext(path)[0] for path in paths]
    known = set(paths)  # the label of a.png is not that of a.png.jpg
    found = [
        entries.get(path, None if stem in known else entries.get(stem)) for path, stem in zip(paths, stems, strict=True)
    ]
    labels, class_names, problem = number(name, found, read_classes(root))
    if labels is None:
        unused = sum(label is not None for label in entries.values())
        reason = problem or f"no label of {name} is that of an image"
        return Listed(name, unusable=bool(problem), unlabeled=reason, unused=unused)
    missing = sum(label is None for label in found)
    if missing:
        problem = f"{missing:,} of {len(files):,} images have no label in {name}"
    return Listed(name, labels, class_names, problem, len(entries.keys() - {*paths, *stems}))


def number(
    name: str, found: Sequence[int | str | None], classes: list[str] | None
) -> tuple[np.ndarray | None, tuple[str, ...], str]:
    """Class numbers int32[N] for labels, the class names, and why there are none.

    Raises:
        DataError: a class name is not in `classes`.
    """
    named = [None if label is None else str(label) for label in found]
    if classes is not None and {*named} - {None} <= {*classes} != {str(i) for i in range(len(classes))}:
        found = named  # also names that look like numbers
    texts = {label for label in found if isinstance(label, str)}
    numbers = {label for label in found if isinstance(label, int)}
    if texts and numbers:
        return None, (), f"{name} holds class names, as {min(texts)!r}, and numbers, as {min(numbers)}"
    if classes is not None and numbers and max(numbers) >= len(classes):
        return None, (), f"{name} holds the label {max(numbers)}, {CLASSES} names {len(classes)} classes"
    unknown = texts - set(classes) if classes is not None else set()
    if unknown:
        raise DataError(f"the class {min(unknown)!r} of {name} is not in {CLASSES}", "Add a line for it")
    if not texts and not numbers:
        return None, (), ""
    return *number_labels(found, classes), ""


def collect(name: str, path: Path) -> tuple[dict[str, int | str | None], str]:
    """Path without "./" -> label; None where it is empty. And why the list cannot be used."""
    entries: dict[str, int | str | None] = {}
    for row in records(name, path):
        place = next((row[key] for key in PATHS if row.get(key) not in (None, "")), None)
        if place is None or "label" not in row:
            continue
        place = str(place).replace("\\", "/").removeprefix("./")
        value = row["label"]
        try:
            label = None if value is None or value == "" else class_of(value)
        except ValueError:
            return {}, f"{name}: the label of {place} is not a class: {str(value)[:20]!r}"
        if label == NO_LABEL:
            label = None
        if entries.setdefault(place, label) != label:
            return {}, f"{name} has two labels for {place}"
    return entries, ""


def records(name: str, path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a list."""
    if name.endswith(".parquet"):
        with path.open("rb") as handle, pq.ParquetFile(handle) as file:
            wanted = [column for column in (*PATHS, "label") if column in file.schema_arrow.names]
            yield from file.read(columns=wanted).to_pylist()
        return
    text = path.read_text(encoding="utf-8-sig")
    if not name.endswith(".json"):
        yield from (row for _, row in read_rows(text, path.suffix))
        return
    table = json.loads(text)
    if isinstance(table, dict):
        yield from ({"key": key, "label": label} for key, label in table.items())
    elif isinstance(table, list) and all(isinstance(row, dict) for row in table):
        yield from table
    else:
        raise ValueError("it is not a list of objects")


def read_rows(text: str, extension: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a .csv, a .tsv or a .jsonl, each with the number of its line.

    Raises:
        ValueError: `no JSON object in line 2`, or the like.
    """
    if extension == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may contain U+2028 and others
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"no JSON object in line {number}")
                yield number, row
        return
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if extension == ".tsv" else ",")
    try:
        yield from ((rows.line_num, row) for row in rows)
    except csv.Error as error:
        raise ValueError(f"damage in line {rows.line_num}: {error}") from None
