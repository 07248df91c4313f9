"""What every source of images offers: tars, folders and the built-in photographs each in a file of its own."""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vqpipe.errors import DataError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
"""File endings taken for images, compared in lower case. Anything else in a folder or a tar is left alone."""

NO_LABEL = -1

PAUSES = (0.2, 2.0)
"""Seconds before each new try to read what could not be read: network disks have hiccups."""
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)


def patiently(read: Callable[[], bytes]) -> bytes:
    """What `read` returns, tried again after PAUSES where the disk fails in a way that may pass; else its OSError."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return read()


def unreadable(path: str, error: OSError, hint: str = "Check the path and the disk") -> DataError:
    """What to say of a file that the disk does not give."""
    failure = DataError(f"cannot read {path}: {error.strerror or error}", hint)
    failure.cause = 66 if isinstance(error, FileNotFoundError) else 74
    return failure


@dataclass(frozen=True)
class Sample:
    """One image as it is stored: its key, its encoded bytes, its class if it has one."""

    key: str
    image: bytes
    label: int | None


class Source(Protocol):
    """An ordered, indexed set of encoded images with random access; cheap to pickle to a worker process."""

    name: str
    """A short name, for people."""

    labels: np.ndarray
    """int32[N]; NO_LABEL where an image has no class."""

    class_names: tuple[str, ...]
    """One name per label; empty where the source knows only numbers."""

    num_classes: int | None

    ignored: dict[str, int]
    """What was found and not used: reason -> count."""

    @property
    def digest(self) -> str:
        """sha256 over keys, labels and bytes, in order."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str: ...

    def read(self, i: int) -> bytes: ...


def count_classes(labels: np.ndarray) -> int | None:
    """The largest label plus one; None where no image has a label."""
    return int(labels.max()) + 1 if labels.size and labels.max() > NO_LABEL else None


# ------------------------------------------------------------------------------------------- the index cache
# Hashing a data set takes as long as reading it. What was found is kept per file (or folder listing) under the
# user's cache directory, and believed as long as path, size and modification time stand. Losing it costs only time.

RACY_NS = 2_000_000_000


def cache_path(identity: str) -> Path | None:
    """Where facts about `identity` are kept; None on a system without a home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "vqpipe" / "index" / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}.json"


def read_cache(identity: str) -> dict[str, Any] | None:
    """The facts kept about `identity`; None where there are none, or none that can be read."""
    path = cache_path(identity)
    try:
        table = json.loads(path.read_bytes()) if path else {}
        facts = table["facts"]
        whole = table["identity"] == identity and table["check"] == checksum(facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def write_cache(identity: str, facts: Mapping[str, Any], mtime_ns: int = 0) -> None:
    """Keep `facts`, unless the file changed within two seconds: its clock may be too coarse to show a next change."""
    path = cache_path(identity)
    if path is None or time.time_ns() - mtime_ns < RACY_NS:
        return
    with suppress(OSError, UnicodeEncodeError):  # a read-only or full disk: then there is no cache
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"identity": identity, "check": checksum(facts), "facts": facts}, file)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def checksum(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
