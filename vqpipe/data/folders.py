"""Folders of image files."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from vqpipe.data.sources import (
    NO_LABEL,
    access_error,
    count_classes,
    has_image_extension,
    read_cache,
    read_with_retries,
    write_cache,
)
from vqpipe.errors import DataError

CHECK = "Check the folder and the disk"


class Folder:
    """Image files under `root`, in the order given, with their labels. An ImageSource."""

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int] | None = None, class_names: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.name = root.name or str(root)
        # An Arrow array is one buffer: cheap to send to workers. Names are bytes, as on disk.
        self.files = pa.array([os.fsencode(file) for file in files], pa.large_binary())
        self.labels = np.full(len(files), NO_LABEL, np.int32) if labels is None else np.array(labels, np.int32)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names) or count_classes(self.labels)
        stems = [os.path.splitext(file)[0] for file in files]
        duplicates = {stem for stem, after in zip(sorted(stems), sorted(stems)[1:], strict=False) if stem == after}
        self.keep_extension = frozenset(i for i, stem in enumerate(stems) if stem in duplicates)
        self.left_out: dict[str, int] = {}
        self.unlabeled = ""
        self.stats: np.ndarray | None = None
        """int64[N, 2]: size and modification time of each file when `digest` was computed."""

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """The relative path without its extension, which is kept where two files differ only in it."""
        path = self.files[i].as_py().decode("utf-8", "backslashreplace")
        return path if i in self.keep_extension else os.path.splitext(path)[0]

    def origin(self, i: int) -> tuple[str, int]:
        """The name of the folder, and `i`."""
        return self.name, i

    def path(self, i: int) -> str:
        """The path of file `i`."""
        return os.path.join(self.root, os.fsdecode(self.files[i].as_py()))

    def read(self, i: int) -> bytes:
        """The bytes of file `i`; a DataError if it changed after `digest` was computed."""
        path = self.path(i)

        def read() -> bytes:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if self.stats is not None and (status.st_size, status.st_mtime_ns) != tuple(self.stats[i].tolist()):
                    raise DataError(f"{path} changed during this run", "Run the command again")
                return file.read()

        try:
            return read_with_retries(read)
        except OSError as error:
            raise access_error("read", path, error, CHECK) from error

    @cached_property
    def digest(self) -> str:
        """sha256 over keys, labels, sizes and each file's own sha256. Reads every file once; cached by listing."""
        listing, newest = hashlib.sha256(str(self.root.resolve()).encode("utf-8", "surrogateescape")), 0
        stats = np.empty((len(self), 2), np.int64)
        for i in range(len(self)):
            try:
                status = os.stat(self.path(i))
            except OSError as error:
                raise access_error("read", self.path(i), error, CHECK) from error
            stats[i] = status.st_size, status.st_mtime_ns
            listing.update(f"{self.key(i)} {self.labels[i]} {status.st_size} {status.st_mtime_ns}\n".encode())
            newest = max(newest, status.st_mtime_ns)
        self.stats = stats
        identity = f"folder {listing.hexdigest()}"
        cached = read_cache(identity)
        if cached is not None:
            return str(cached["digest"])
        total = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, len(self), 4096):
                indices = range(start, min(start + 4096, len(self)))
                for i, (size, digest) in zip(indices, pool.map(self.hash_file, indices), strict=True):
                    total.update(f"{self.key(i)} {self.labels[i]} {size} {digest}\n".encode())
        write_cache(identity, {"digest": total.hexdigest()}, newest)
        return total.hexdigest()

    def hash_file(self, i: int) -> tuple[int, str]:
        """The size and the sha256 of file `i`."""
        data = self.read(i)
        return len(data), hashlib.sha256(data).hexdigest()


def open_folder(root: Path) -> Folder:
    """Open a folder. If it has no images itself, its subfolders are the classes, numbered in the order of their names;
    empty ones count.

    Hidden files and folders are ignored; links to folders are followed once.

    Raises:
        DataError: it holds no image.
    """
    files = sorted(walk(root))
    flat = any("/" not in file for file in files)
    if not files:
        tars = next(root.glob("*.tar"), None)
        hint = f"Give its tars: '{root}/*.tar'" if tars else "Image files end in .jpg, .png, .webp, .tif and so on"
        raise DataError(f"{root} holds no images", hint)
    if flat:
        return Folder(root, files)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    number = {name: label for label, name in enumerate(classes)}
    files.sort(key=lambda file: (number[file.split("/", 1)[0]], file))
    return Folder(root, files, [number[file.split("/", 1)[0]] for file in files], classes)


def walk(root: Path) -> Iterator[str]:
    """Relative paths of the image files under `root`, with "/" between their parts."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(root / folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to an enclosing folder
            continue
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((path, above | {here}))
                elif has_image_extension(entry.name) and entry.is_file():
                    yield path
