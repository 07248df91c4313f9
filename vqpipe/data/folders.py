"""A folder of image files; its subfolders, if it has them, are classes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from vqpipe.data.sources import (
    IMAGE_EXTENSIONS,
    NO_LABEL,
    count_classes,
    patiently,
    read_cache,
    unreadable,
    write_cache,
)
from vqpipe.errors import DataError

CHECK = "Check the folder and the disk"


class Folder:
    """Image files under `root`, in the order given, with their labels."""

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int] | None = None, class_names: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.name = root.name or str(root)
        # Arrow's arrays hold a million names in one buffer: workers get them at once. Names are bytes, as on disk.
        self.files = pa.array([os.fsencode(file) for file in files], pa.large_binary())
        self.labels = np.full(len(files), NO_LABEL, np.int32) if labels is None else np.array(labels, np.int32)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names) or count_classes(self.labels)
        self.ignored: dict[str, int] = {}
        stems = [os.path.splitext(file)[0] for file in files]
        twice = {stem for stem, after in zip(sorted(stems), sorted(stems)[1:], strict=False) if stem == after}
        self.seen: np.ndarray | None = None
        """int64[N, 2]: size and modification time of each file when `digest` was taken."""
        self.keep_extension = frozenset(i for i, stem in enumerate(stems) if stem in twice)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """The relative path without its ending, which stays where two files differ only in it."""
        path = self.files[i].as_py().decode("utf-8", "backslashreplace")
        return path if i in self.keep_extension else os.path.splitext(path)[0]

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[i].as_py()))

    def read(self, i: int) -> bytes:
        path = self.path(i)

        def read() -> bytes:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if self.seen is not None and (status.st_size, status.st_mtime_ns) != tuple(self.seen[i].tolist()):
                    raise DataError(f"{path} changed after this run began", "Run the command again")
                return file.read()

        try:
            return patiently(read)
        except OSError as error:
            raise unreadable(path, error, CHECK) from error

    @cached_property
    def digest(self) -> str:
        """sha256 over keys, labels, sizes and each file's own sha256. Reads every file once, then cached by listing."""
        listing, newest = hashlib.sha256(str(self.root.resolve()).encode("utf-8", "surrogateescape")), 0
        seen = np.empty((len(self), 2), np.int64)
        for i in range(len(self)):
            try:
                status = os.stat(self.path(i))
            except OSError as error:
                raise unreadable(self.path(i), error, CHECK) from error
            seen[i] = status.st_size, status.st_mtime_ns
            listing.update(f"{self.key(i)} {self.labels[i]} {status.st_size} {status.st_mtime_ns}\n".encode())
            newest = max(newest, status.st_mtime_ns)
        self.seen = seen
        identity = f"folder {listing.hexdigest()}"
        known = read_cache(identity)
        if known is not None:
            return str(known["digest"])
        total = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, len(self), 4096):
                indices = range(start, min(start + 4096, len(self)))
                for i, (size, digest) in zip(indices, pool.map(self.hash_file, indices), strict=True):
                    total.update(f"{self.key(i)} {self.labels[i]} {size} {digest}\n".encode())
        write_cache(identity, {"digest": total.hexdigest()}, newest)
        return total.hexdigest()

    def hash_file(self, i: int) -> tuple[int, str]:
        data = self.read(i)
        return len(data), hashlib.sha256(data).hexdigest()


def open_folder(root: Path) -> Folder:
    """Class subfolders sorted by name give the labels, an empty one included. A folder with images of its own has none.

    Hidden files and folders are passed over; links to folders are followed, once.

    Raises:
        DataError: no image anywhere in it.
    """
    files = sorted(walk(root))
    flat = any("/" not in file for file in files)
    if not files:
        tars = next(root.glob("*.tar"), None)
        hint = f"Give its tars: '{root}/*.tar'" if tars else f"Endings read: {', '.join(sorted(IMAGE_EXTENSIONS))}"
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
        if here in above:  # a link back to a folder we came through
            continue
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((path, above | {here}))
                elif os.path.splitext(entry.name)[1][1:].lower() in IMAGE_EXTENSIONS and entry.is_file():
                    yield path
