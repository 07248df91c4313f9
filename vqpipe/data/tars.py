"""Tar shards in WebDataset's layout (key.jpg, key.cls): indexed once and read by offset; written reproducibly.

The headers are read here, not by `tarfile`: that module ends silently at a damaged or missing header, so a shard cut at
the boundary of a member would read as a shorter shard. Here every byte is checked, up to the end mark.
"""

import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import pyarrow as pa

from vqpipe.data.sources import (
    IMAGE_EXTENSIONS,
    NO_LABEL,
    access_error,
    count_classes,
    read_cache,
    read_with_retries,
    write_cache,
)
from vqpipe.errors import DataError
from vqpipe.file_kinds import explain, kind_of


@dataclass(frozen=True)
class TarIndex:
    """The offsets of the images of one shard. The lists have one entry per image, in the order of the shard."""

    url: str
    size: int
    sha256: str
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    ignored: dict[str, int] = field(default_factory=dict)
    """Other members: reason or extension -> count."""
    mtime_ns: int | None = None
    """Modification time of a local file: a shard that changes during a job is an error."""


class Tars:
    """The images of several shards, in the order given. An ImageSource."""

    def __init__(self, shards: Sequence[TarIndex], name: str, num_classes: int | None = None) -> None:
        self.name = name
        self.shards = [(shard.url, shard.size, shard.mtime_ns) for shard in shards]
        self.starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self.keys = pa.array([key for shard in shards for key in shard.keys], pa.large_string())
        self.offsets = np.array([offset for shard in shards for offset in shard.offsets], np.int64)
        self.sizes = np.array([size for shard in shards for size in shard.sizes], np.int64)
        self.labels = np.array([label for shard in shards for label in shard.labels], np.int32)
        self.class_names: tuple[str, ...] = ()
        self.left_out: dict[str, int] = dict(sum((Counter(shard.ignored) for shard in shards), Counter()))
        self.unlabeled = ""
        self.num_classes = count_classes(self.labels)
        if num_classes is not None and self.num_classes is not None:
            self.num_classes = max(num_classes, self.num_classes)
        self.digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, i: int) -> str:
        """The key of image `i`."""
        return self.keys[i].as_py()

    def origin(self, i: int) -> tuple[str, int]:
        """The file name of the shard, and the position of image `i` in it."""
        shard = self.shard_of(i)
        return self.shards[shard][0].rpartition("/")[2], i - int(self.starts[shard])

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds image `i`."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def read(self, i: int) -> bytes:
        """The bytes of image `i`; a DataError if its shard changed after it was indexed."""
        shard = self.shard_of(i)
        url, size, mtime_ns = self.shards[shard]
        return read_range(url, int(self.offsets[i]), int(self.sizes[i]), size, mtime_ns)


def read_range(url: str, offset: int, size: int, file_size: int, mtime_ns: int | None) -> bytes:
    """Bytes [offset, offset + size) of a local file or an fsspec URL. No file stays open, for fork and pickle.

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
        data = read_with_retries(read)
    except OSError as error:
        raise access_error("read", url, error, "Check the path and the disk") from error
    if len(data) != size:
        raise DataError(f"{url} ends inside the image at byte {offset}", COPY_AGAIN)
    return data


def open_index(url: str, sha256: str | None = None) -> TarIndex:
    """Index one shard, or read the cached index where the shard is unchanged.

    With a known `sha256` (that of an artifact's file) the bytes of the images are not read.

    Raises:
        DataError: the shard cannot be read, or is not a complete, uncompressed tar.
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
        if (cached := read_cache(f"tar {identity}")) is not None:
            return TarIndex(**cached)
        with system.open(path, "rb") if mtime_ns is None else open(url, "rb") as file:
            index = index_tar(file, url, sha256, mtime_ns)
    except (ImportError, OSError) as error:
        raise access_error("open", url, error, "Check the path and the network") from error
    if size is not None and index.size != size:
        raise DataError(f"{url} has {index.size} bytes, its file system says {size}", COPY_AGAIN)
    write_cache(f"tar {identity}", asdict(index), mtime_ns or 0)
    return index


def index_tar(file: BinaryIO, name: str, sha256: str | None = None, mtime_ns: int | None = None) -> TarIndex:
    """Read a tar from its first byte to its last and index its images.

    The members of one key form a sample; the key is the path up to the first dot of the file name. `key.jpg` (or
    another of IMAGE_EXTENSIONS, in any case) is its image, `key.cls` its label, anywhere in the shard. Links and
    devices are never followed; they, other members, and keys without an image are counted in `ignored`.

    Raises:
        DataError: compressed, truncated, damaged, two joined tars, a duplicate key, a path outside the tar's folder, or
            a label that is not a number.
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
    """The class number in a `.cls` member."""
    try:
        label = int(body.decode("ascii"))
    except ValueError:
        label = NO_LABEL
    if not 0 <= label < 2**31:
        raise DataError(f"{name}: {path} is not a class number: {body[:20]!r}", "A .cls member holds one integer >= 0")
    return label


BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20
COPY_AGAIN = "Copy or download it again"
HINTS = {
    "parquet": "Let its name end in .parquet",
    "zip": "Let its name end in .zip",
    "text": "Let the name of a list of paths end in .txt, .csv or .tsv",
    "json": "A list of paths with labels is a .csv or .jsonl file",
    "image": "Give the folder that holds it",
}
"""What to do with a file that is no tar."""
LONGEST_TEXT = 1 << 20
"""Largest long name, pax header or label, in bytes: they are read into memory."""
LARGEST_MEMBER = 1 << 43
"""8 TiB; the format allows up to 2**88, and negative sizes."""


@dataclass(frozen=True)
class Member:
    """One member of a tar: its path, and where its data is."""

    path: str
    offset: int
    size: int
    refused: str = ""
    """Why it is not read: "link" or "device"."""


class Walk:
    """Reads a tar strictly forward, and hashes it, member by member."""

    def __init__(self, file: BinaryIO, name: str, hashed: bool) -> None:
        self.file, self.name, self.hashed = file, name, hashed
        self.hash = hashlib.sha256()
        self.position = 0
        self.pending = 0  # bytes left of the current member

    def members(self) -> Iterator[Member]:
        """Yield every member in order, long names resolved; a DataError at the first byte that is not a tar's."""
        long_path, pax = "", dict[str, str]()
        while (header := self.header()) is not None:
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                body = self.text(header).rstrip(b"\0").decode("utf-8", "backslashreplace")
                long_path = body if header.type == tarfile.GNUTYPE_LONGNAME else long_path
                continue
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                body_bytes = self.text(header)
                pax = parse_pax(self.name, body_bytes) if header.type != tarfile.XGLTYPE else pax
                continue
            path = pax.get("path") or long_path or header.name
            if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax):
                raise DataError(f"{self.name}: {path} is a sparse member", "Pack the shard without --sparse")
            size = self.size_of(header, pax.get("size"))
            if header.isreg():
                self.pending = -(-size // BLOCK) * BLOCK
                yield Member(path, self.position, size)
                self.skip(self.pending)
                self.pending = 0
            elif not header.isdir():
                yield Member(path, self.position, 0, "link" if header.issym() or header.islnk() else "device")
            long_path, pax = "", {}

    def text(self, header: tarfile.TarInfo) -> bytes:
        """The data of a header that holds a text."""
        size = self.size_of(header)
        if size > LONGEST_TEXT:
            raise DataError(f"{self.name} has a header of {size:,} bytes before byte {self.position}", COPY_AGAIN)
        return self.read(-(-size // BLOCK) * BLOCK)[:size]

    def size_of(self, header: tarfile.TarInfo, pax: str | None = None) -> int:
        """The number of bytes after a header; `pax` is the size in the pax header before it, if there is one."""
        size = header.size if pax is None else int(pax) if pax.isascii() and pax.isdigit() else -1
        if not 0 <= size <= LARGEST_MEMBER:
            raise DataError(f"{self.name} has a member of impossible size before byte {self.position}", COPY_AGAIN)
        return size

    def body(self, member: Member) -> bytes:
        """The data of the member just yielded, which is a text."""
        if member.size > LONGEST_TEXT:
            raise DataError(f"{self.name}: {member.path} has {member.size:,} bytes, too many for a text", COPY_AGAIN)
        data = self.read(self.pending)[: member.size]
        self.pending = 0
        return data

    def header(self) -> tarfile.TarInfo | None:
        """The next header; None at the end mark, after which only padding may follow."""
        start = self.position
        block = self.file.read(BLOCK)
        if start == 0:
            kind = kind_of(block)
            if kind not in ("tar", "empty", "unknown"):
                raise DataError(
                    *explain(self.name, kind, "a tar", HINTS.get(kind, "Give a tar, or a folder of images"))
                )
        self.advance(block)
        if not block:
            what = "is empty" if start == 0 else f"is truncated: no end mark at byte {start}"
            raise DataError(f"{self.name} {what}", COPY_AGAIN)
        if len(block) < BLOCK:
            raise DataError(f"{self.name} is truncated inside the header at byte {start}", COPY_AGAIN)
        if not any(block):
            if any(self.read(BLOCK)):
                raise DataError(f"{self.name} is damaged: half an end mark at byte {start}", COPY_AGAIN)
            while rest := self.file.read(CHUNK):
                if rest.count(0) != len(rest):
                    raise DataError(f"{self.name} has data after its end mark at byte {start}", "Split two joined tars")
                self.advance(rest)
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise DataError(f"{self.name} has no tar header at byte {start}: {error}", COPY_AGAIN) from None

    def read(self, size: int) -> bytes:
        """The next `size` bytes; a DataError where the file ends before."""
        data = self.file.read(size)
        self.advance(data)
        if len(data) < size:
            raise DataError(f"{self.name} is truncated at byte {self.position}", COPY_AGAIN)
        return data

    def skip(self, size: int) -> None:
        """Pass over `size` bytes, which are read only to hash them."""
        if self.hashed:
            for start in range(0, size, CHUNK):
                self.read(min(CHUNK, size - start))
        elif size:
            self.file.seek(size - 1, os.SEEK_CUR)
            self.position += size - 1
            self.read(1)

    def advance(self, data: bytes) -> None:
        """Count and hash bytes that were read."""
        self.position += len(data)
        if self.hashed:
            self.hash.update(data)


def parse_pax(name: str, body: bytes) -> dict[str, str]:
    """A pax header's records, each `LENGTH KEY=VALUE\\n` with its own length in decimal."""
    records, position = dict[str, str](), 0
    try:
        while position < len(body):
            length = int(body[position : body.index(b" ", position)])
            record = body[position : position + length]
            if length < 1 or len(record) < length:
                raise ValueError(length)
            key, _, value = record.partition(b" ")[2].rstrip(b"\n").partition(b"=")
            records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
            position += length
    except ValueError:
        raise DataError(f"{name} has a damaged pax header", COPY_AGAIN) from None
    return records


class TarWriter:
    """Writes samples of one image each, so that equal samples give equal bytes: no time and no user in the headers."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar

    def write(self, key: str, image: bytes, extension: str, label: int | None = None) -> None:
        """Append `key.extension` and, for a label >= 0, `key.cls`, in the order of their names."""
        members = {extension: image}
        if label is not None and label >= 0:
            members["cls"] = str(label).encode("ascii")
        for ending, data in sorted(members.items()):
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size, member.mode, member.uname, member.gname = len(data), 0o444, "vqpipe", "vqpipe"
            self.tar.addfile(member, io.BytesIO(data))


@contextmanager
def write_tar(path: Path) -> Iterator[TarWriter]:
    """Write a tar shard in WebDataset's layout."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        yield TarWriter(tar)


def tar_keys(keys: Iterable[str]) -> list[str]:
    """Keys for a tar, where a key ends at its first dot: dots become underscores, duplicates get a number."""
    fit = dict[str, None]()
    for number, key in enumerate(keys):
        folder, slash, stem = key.rpartition("/")
        plain = folder + slash + stem.replace(".", "_")
        while plain in fit:
            plain = f"{plain}_{number}"
        fit[plain] = None
    return list(fit)
