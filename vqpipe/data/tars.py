"""Tar shards in WebDataset's layout (key.jpg, key.cls), each indexed once and then read by offset."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import fsspec
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
from vqpipe.data.tar_walk import COPY_AGAIN, Walk
from vqpipe.errors import DataError


@dataclass(frozen=True)
class TarIndex:
    """Where the images of one shard lie. Lists run in parallel, one entry per image, in the order of the shard."""

    url: str
    size: int
    sha256: str
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    ignored: dict[str, int] = field(default_factory=dict)
    mtime_ns: int | None = None
    """Modification time of a local file: a shard that changes under a running job is an error."""


class Tars:
    """The images of several shards, one after another, in the order given."""

    def __init__(self, shards: Sequence[TarIndex], name: str, num_classes: int | None = None) -> None:
        self.name = name
        self.shards = [(shard.url, shard.size, shard.mtime_ns) for shard in shards]
        self.starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self.keys = pa.array([key for shard in shards for key in shard.keys], pa.large_string())
        self.offsets = np.array([offset for shard in shards for offset in shard.offsets], np.int64)
        self.sizes = np.array([size for shard in shards for size in shard.sizes], np.int64)
        self.labels = np.array([label for shard in shards for label in shard.labels], np.int32)
        self.class_names: tuple[str, ...] = ()
        self.num_classes = count_classes(self.labels)
        if num_classes is not None and self.num_classes is not None:
            self.num_classes = max(num_classes, self.num_classes)
        self.ignored: dict[str, int] = dict(sum((Counter(shard.ignored) for shard in shards), Counter()))
        self.digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        return self.keys[i].as_py()

    def read(self, i: int) -> bytes:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        url, size, mtime_ns = self.shards[shard]
        return read_range(url, int(self.offsets[i]), int(self.sizes[i]), size, mtime_ns)


def read_range(url: str, offset: int, size: int, file_size: int, mtime_ns: int | None) -> bytes:
    """Bytes [offset, offset + size) of a local file or an fsspec URL. Holds nothing open, so forks and pickles well.

    Raises:
        DataError: the file is gone, unreadable, or not the one that was indexed.
    """

    def read() -> bytes:
        if "://" in url:
            system, path = fsspec.core.url_to_fs(url)
            fetched: bytes = system.cat_file(path, start=offset, end=offset + size)
            return fetched
        with open(url, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size != file_size or status.st_mtime_ns != mtime_ns:
                raise DataError(f"{url} changed after it was indexed", "Run the command again")
            return os.pread(file.fileno(), size, offset)

    try:
        data = patiently(read)
    except OSError as error:
        raise unreadable(url, error) from error
    if len(data) != size:
        raise DataError(f"{url} ends inside the image at byte {offset}", COPY_AGAIN)
    return data


def open_index(url: str, sha256: str | None = None) -> TarIndex:
    """The index of one shard, from the cache where the shard is unchanged.

    With `sha256` (a published artifact knows it) the images' own bytes are not read.

    Raises:
        DataError: the shard cannot be read, or is not a whole, plain tar.
    """
    try:
        if "://" in url:
            system, path = fsspec.core.url_to_fs(url)
            size, mtime_ns, identity = system.info(path)["size"], None, f"{url} {system.ukey(path)}"
        else:
            url = os.path.abspath(url)
            status = os.stat(url)
            size, mtime_ns = status.st_size, status.st_mtime_ns
            identity = f"{url} {size} {mtime_ns}"
        if (known := read_cache(f"tar {identity}")) is not None:
            return TarIndex(**known)
        with system.open(path, "rb") if mtime_ns is None else open(url, "rb") as file:
            index = index_tar(file, url, sha256, mtime_ns)
    except ImportError as error:
        raise DataError(f"cannot open {url}: {error}", "Install the extra: pip install 'vqpipe[remote]'") from error
    except OSError as error:
        raise DataError(f"cannot open {url}: {error.strerror or error}", "Check the path and the network") from error
    if size is not None and index.size != size:
        raise DataError(f"{url} has {index.size} bytes where {size} were announced", COPY_AGAIN)
    write_cache(f"tar {identity}", asdict(index), mtime_ns or 0)
    return index


def index_tar(file: BinaryIO, name: str, sha256: str | None = None, mtime_ns: int | None = None) -> TarIndex:
    """Walk a tar from its first byte to its last and note where its images lie.

    One sample is all members that share a key: the path up to the first dot of the file's name. `key.jpg` (or another
    of IMAGE_EXTENSIONS, in any case) is its image, `key.cls` its label, wherever in the shard they stand. Links and
    devices are never followed; they, other fields, and keys without an image are counted in `ignored`.

    Raises:
        DataError: compressed, cut short, damaged, joined from two, a key twice, a key that leaves its directory, or a
            label that is no number.
    """
    walk = Walk(file, name, hashed=sha256 is None)
    images: dict[str, tuple[str, int, int]] = {}  # key -> member, offset, size
    labels: dict[str, int] = {}
    order: dict[str, None] = {}
    ignored: Counter[str] = Counter()
    for member in walk.members():
        if member.refused:
            ignored[member.refused] += 1
            continue
        key, extension = split_member(name, member.path)
        if not key:
            ignored["hidden"] += 1
            continue
        order.setdefault(key)
        if extension in IMAGE_EXTENSIONS:
            if key in images:
                other, at, _ = images[key]
                raise DataError(
                    f"{name} has two images of the key {key!r}: {other} at byte {at}, {member.path} at {member.offset}",
                    "Give every image of a shard its own key",
                )
            images[key] = (member.path, member.offset, member.size)
        elif extension == "cls":
            if key in labels:
                raise DataError(f"{name} has two labels of the key {key!r}, the second at byte {member.offset}")
            labels[key] = parse_label(name, member.path, walk.body(member))
        else:
            ignored[f".{extension}"] += 1
    keys = [key for key in order if key in images]
    if len(order) > len(keys):
        ignored["key without an image"] = len(order) - len(keys)
    return TarIndex(
        url=name,
        size=walk.position,
        sha256=sha256 or walk.hash.hexdigest(),
        keys=keys,
        offsets=[images[key][1] for key in keys],
        sizes=[images[key][2] for key in keys],
        labels=[labels.get(key, NO_LABEL) for key in keys],
        ignored=dict(ignored),
        mtime_ns=mtime_ns,
    )


def split_member(name: str, path: str) -> tuple[str, str]:
    """A member's key and lower-case extension: `a/B.seg.PNG` -> `a/B`, `seg.png`."""
    path = path.removeprefix("./")
    if path.startswith("/") or ".." in path.split("/"):
        raise DataError(f"{name} has a member outside its own folder: {path!r}", "Pack it with relative paths")
    folder, slash, file = path.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else "", extension.lower())


def parse_label(name: str, path: str, body: bytes) -> int:
    try:
        label = int(body.decode("ascii"))
    except ValueError:
        label = NO_LABEL
    if not 0 <= label < 2**31:
        raise DataError(f"{name}: {path} is no class number: {body[:20]!r}", "A .cls member holds one integer >= 0")
    return label


def local_path(url: str) -> str:
    """`file://` URLs are paths; other URLs stay."""
    return str(Path(url.removeprefix("file://"))) if url.startswith("file://") else url
