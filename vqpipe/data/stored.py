"""Files of images, local or behind URLs: each as it was when it was indexed, which every read compares."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np

from vqpipe import distributed
from vqpipe.data import remote
from vqpipe.data.sources import access_error, read_cache, read_with_retries, write_cache
from vqpipe.errors import DataError
from vqpipe.files import digest_json, valid_text
from vqpipe.provenance import without_secrets

Opened = TypeVar("Opened")

CHECK = "Check the path and the disk"
COPY_AGAIN = "Copy or download it again"


@dataclass(frozen=True)
class StoredFile:
    """One file, and its state when it was indexed."""

    url: str
    """The URL, or the absolute path."""
    size: int
    mtime_ns: int = 0
    """The modification time of a local file."""
    validators: remote.Validators = ()
    """What changes with a remote file."""

    @classmethod
    def locate(cls, url: str) -> "StoredFile":
        """The file of this path or URL, in its present state.

        Raises:
            DataError: it is absent, or a remote folder.
        """
        if "://" in url:
            size, validators = remote.with_retries("open", url, lambda seconds: remote.describe(url, seconds))
            return cls(url, size, validators=validators)
        try:
            status = os.stat(url)
        except OSError as error:
            raise access_error("open", url, error, CHECK) from error
        return cls(os.path.abspath(url), status.st_size, status.st_mtime_ns)

    @property
    def is_local(self) -> bool:
        """Whether `url` is a path."""
        return "://" not in self.url

    @cached_property
    def shown(self) -> str:
        """The path, or the URL without password and query."""
        return without_secrets(self.url)

    @cached_property
    def name(self) -> str:
        """The name of the file."""
        return valid_text(self.shown.rpartition("/")[2])

    @property
    def identity(self) -> str:
        """A text that changes with the file. It is empty for a remote file without validators, which is not cached."""
        if self.is_local:
            return f"{self.url} {self.size} {self.mtime_ns}"
        return f"{digest_json([self.url])} {self.size} {sorted(self.validators)}" if self.validators else ""

    def cached(self, kind: str, index: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `index` finds in the file, or found in its present state before: it is cached under the name `kind`."""
        identity = f"{kind} {self.identity}"
        found = read_cache(identity) if self.identity else None
        if found is None:
            found = index()
            if self.identity:
                write_cache(identity, found, self.mtime_ns)
        return found

    def check(self, opened: int) -> None:
        """Raise a DataError if a local file, which is open as the descriptor `opened`, changed."""
        status = os.fstat(opened)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise remote.changed(self.url)

    def open_binary(self) -> BinaryIO:
        """Open it, to read it from the begin to the end. A remote file is read in large requests."""
        if self.is_local:
            return open(self.url, "rb")
        return cast(BinaryIO, remote.RemoteFile(self.url, self.size, self.validators))

    def sha256(self) -> str:
        """The hash of the whole file, hex."""
        with self.open_binary() as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]  # of its stub

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size). No file stays open, for fork and pickle.

        Raises:
            DataError: the file is gone, unreadable, or not the one that was indexed.
        """
        if not self.is_local:
            return remote.read(self.url, offset, size, self.size, self.validators)

        def read() -> bytes:
            file = os.open(self.url, os.O_RDONLY)
            try:
                self.check(file)
                return os.pread(file, size, offset)
            finally:
                os.close(file)

        try:
            data = read_with_retries(read)
        except OSError as error:
            raise access_error("read", self.url, error, CHECK) from error
        if len(data) != size:
            raise DataError(f"{self.url} ends inside the image at byte {offset}", COPY_AGAIN)
        return data


class StoredFiles:
    """The images of several files, in the order given: what sources of such images share."""

    def __init__(self, files: Sequence[StoredFile], counts: Sequence[int]) -> None:
        self.files = tuple(files)
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, i: int) -> tuple[int, int]:
        """The number of the file that holds image `i`, and the position of the image in it."""
        number = bisect_right(self.starts, i) - 1
        return number, i - int(self.starts[number])

    def origin(self, i: int) -> tuple[str, int]:
        """The name of the file, and the position of image `i` in it."""
        number, position = self.place(i)
        return self.files[number].name, position


def open_each(open_one: Callable[..., Opened], *columns: Sequence[Any]) -> list[Opened]:
    """`list(map(open_one, *columns))`, eight at a time, of a function that caches what it finds in a file.

    In a command under torchrun each rank opens a share of the files first, so that a machine reads every file once: the
    others are in the cache then. An error of any rank is raised on every rank. Every rank calls it.
    """
    open_once = cache(open_one)  # where nothing can be cached on disk, no rank opens its share twice
    share = distributed.machine_share()
    if share is not None:
        with distributed.sharing_errors():
            remote.in_threads(open_once, *(column[share] for column in columns))
    return remote.in_threads(open_once, *columns)


def distinct_ends(paths: Sequence[str]) -> list[str]:
    """The names at the end of paths, with as many folders before them as it takes that all differ.

    Raises:
        ValueError: two paths are equal.
    """
    parts = [path.split("/") for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]).lstrip("/") for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise ValueError("equal paths")
