"""Tar shards in WebDataset's layout (key.jpg, key.cls): indexed once and read by offset; written reproducibly.

`tarfile` reads the headers. It ends silently at a damaged or missing one, so a shard cut at the boundary of a member
would read as a shorter shard: `check_end` makes that an error.
"""

import hashlib
import io
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from vqpipe.data.sources import (
    COMMON_EXTENSIONS,
    IMAGE_EXTENSIONS,
    NO_LABEL,
    access_error,
    class_of,
    count_classes,
    file_kind,
    number_labels,
    summed,
)
from vqpipe.data.stored import CHECK, COPY_AGAIN, StoredFile, StoredFiles
from vqpipe.errors import DataError
from vqpipe.file_kinds import explain, kind_of
from vqpipe.files import valid_text

INDEX_VERSION = 5
"""Of cached indices: changes with what `index_tar` finds."""


@dataclass(frozen=True)
class TarIndex:
    """The offsets of the images of one shard. The columns have one entry per image, in the order of the shard."""

    size: int
    sha256: str
    keys: list[str] | pa.Array
    offsets: list[int] | np.ndarray
    sizes: list[int] | np.ndarray
    labels: list[int | str]
    """Class numbers or names; NO_LABEL where there is none."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Other members: reason or extension -> count."""
    unreadable: str = ""
    """The first label that cannot be read; empty if there is none."""

    def compact(self) -> "TarIndex":
        """The same in buffers, and each label once: lists of numbers and texts take five times the memory."""
        labels = dict[int | str, int | str]()
        return replace(
            self,
            keys=pa.array(self.keys, pa.large_string()),
            offsets=np.array(self.offsets, np.int64),
            sizes=np.array(self.sizes, np.int64),
            labels=[labels.setdefault(label, label) for label in self.labels],
        )


class Tars(StoredFiles):
    """The images of several shards, in the order given. An ImageSource."""

    def __init__(
        self, indexed: Sequence[tuple[StoredFile, TarIndex]], name: str, num_classes: int | None = None
    ) -> None:
        shards = [index for _, index in indexed]
        super().__init__([file for file, _ in indexed], [len(shard.keys) for shard in shards])
        self.name = name
        self.keys = pa.concat_arrays([shard.keys for shard in shards])
        self.offsets = np.concatenate([shard.offsets for shard in shards])
        self.sizes = np.concatenate([shard.sizes for shard in shards])
        labels = [label for shard in shards for label in shard.labels]
        self.unlabeled = next((shard.unreadable for shard in shards if shard.unreadable), "") or self.mixed(labels)
        self.labels, self.class_names = number_labels([None] * len(labels) if self.unlabeled else labels)
        self.left_out: dict[str, int] = summed(shard.ignored for shard in shards)
        self.num_classes = len(self.class_names) or count_classes(self.labels)
        if num_classes is not None and self.num_classes is not None:
            self.num_classes = max(num_classes, self.num_classes)
        self.digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

    def key(self, i: int) -> str:
        """The key of image `i`."""
        return self.keys[i].as_py()

    def mixed(self, labels: Sequence[int | str]) -> str:
        """The first class name and the first class number, if there are both; else empty."""
        first = {isinstance(labels[i], str): i for i in reversed(range(len(labels))) if labels[i] != NO_LABEL}
        if len(first) < 2:
            return ""
        named, numbered = (f"{self.key(i)} of {self.origin(i)[0]}" for i in (first[True], first[False]))
        return f"{named} has the class name {labels[first[True]]!r}, {numbered} the class number {labels[first[False]]}"

    def read(self, i: int) -> bytes:
        """The bytes of image `i`; a DataError if its shard changed after it was indexed."""
        return self.files[self.place(i)[0]].read(int(self.offsets[i]), int(self.sizes[i]))


def open_index(url: str, sha256: str | None = None) -> tuple[StoredFile, TarIndex]:
    """Index one shard, or read the cached index where the shard is unchanged.

    With a known `sha256` (that of an artifact's file) the bytes of the images are not read.

    Raises:
        DataError: the shard cannot be read, or is not a complete, uncompressed tar.
    """
    file = StoredFile.locate(url)

    def index() -> dict[str, Any]:
        try:
            with file.open_binary() as opened:
                found = index_tar(opened, file.shown, sha256)
        except OSError as error:
            raise access_error("open", url, error, CHECK) from error
        if found.size != file.size:
            raise DataError(f"{file.shown} has {found.size} bytes, its file system says {file.size}", COPY_AGAIN)
        return vars(found)

    return file, TarIndex(**file.cached(f"tar {INDEX_VERSION}", index)).compact()


def index_tar(file: BinaryIO, name: str, sha256: str | None = None) -> TarIndex:
    """Read a tar from its first byte to its last and index its images.

    The members of one key form a sample; the key is the path up to the first dot of the file name. `key.jpg` (or
    another of IMAGE_EXTENSIONS, in any case) is its image; `key.cls`, or else a field of `key.json`, its label,
    anywhere in the shard (see `parse_label`). A sample without an image of that name may have images with dots in their
    keys: `key.final.jpg` has the key `key.final`, and its label is `key.final.cls`, else `key.cls`. A link is read as
    the member that it points to. Everything else is counted in `ignored`.

    Raises:
        DataError: compressed, truncated, damaged, two joined tars, a duplicate key, or a path outside the tar's folder.
    """
    kind = kind_of(file.read(BLOCK))
    if kind not in ("tar", "unknown"):
        raise DataError(*explain(name, kind, "a tar", HINTS.get(kind, "Give a tar, or a folder of images")))
    file.seek(0)
    reader = ForwardFile(file, name, hashed=sha256 is None)
    members, texts = list[Member](), dict[int, bytes]()
    for member in read_members(reader):
        members.append(member)
        if member.path.lower().endswith(LABEL_ENDINGS) and 0 < member.size <= LONGEST_TEXT and not member.refused:
            texts[member.offset] = reader.read(member.size)
    size = file.tell()
    ignored: Counter[str] = Counter()
    samples: dict[str, list[Part]] = {}
    for order, member in enumerate(resolve_links(members)):
        key, extension = ("", "") if member.refused else split_member(name, member.path)
        if not key:
            ignored[member.refused or "hidden file"] += 1
        else:
            samples.setdefault(key, []).append(Part(order, extension, member))
    labels = Labels(file, name, texts)
    images = [image for key, parts in samples.items() for image in sample_images(name, key, parts, labels, ignored)]
    images.sort(key=lambda image: image.order)
    return TarIndex(
        size=size,
        sha256=sha256 or reader.hash.hexdigest(),
        keys=[image.key for image in images],
        offsets=[image.member.offset for image in images],
        sizes=[image.member.size for image in images],
        labels=[image.label for image in images],
        ignored=dict(ignored),
        unreadable=labels.unreadable,
    )


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar: its path, and where its data is."""

    path: str
    offset: int
    size: int
    refused: str = ""
    """Why it is not read: "dead link" or "device"."""
    target: str = ""
    """Of a link: the path in the tar that it points to."""


DEAD_LINK = Member("", 0, 0, "dead link")


class Part(NamedTuple):
    """One member of a sample."""

    order: int
    """Its position in the tar."""
    extension: str
    """What follows the first dot of its file name, in lower case."""
    member: Member


class TarImage(NamedTuple):
    """One image of a tar, in the order of `order`."""

    order: int
    key: str
    member: Member
    label: int | str


def sample_images(
    name: str, key: str, parts: Sequence[Part], labels: "Labels", ignored: Counter[str]
) -> Iterator[TarImage]:
    """Yield the images of the members of one key, and count the other members in `ignored`."""
    found: dict[str, list[Part]] = {}  # the part of the extension before its last dot -> images
    for part in parts:
        middle, _, last = part.extension.rpartition(".")
        if last in IMAGE_EXTENSIONS:
            found.setdefault(middle, []).append(part)
    if "" in found:  # the image of the key itself: the others are further members of its sample
        found = {"": found[""]}
    used = {f"{middle}.{last}".lstrip(".") for middle in ("", *found) for last in LABELS}
    texts = {part.extension: part for part in reversed(parts) if part.extension in used}
    for extension in texts:
        if sum(part.extension == extension for part in parts) > 1:
            labels.unreadable = labels.unreadable or f"{labels.shard}: two members {key}.{extension}"
    kept = set[int]()
    for middle, same in found.items():
        common = [part for part in same if part.extension.rpartition(".")[2] in COMMON_EXTENSIONS]
        image, *others = common or same
        stem = image.member.path.rpartition("/")[2].partition(".")[2].rpartition(".")[0]  # `middle` as it is written
        full = f"{key}.{stem}" if stem else key
        if others:
            raise DataError(
                f"{name} has two images of the key {full!r}: {image.member.path} at byte {image.member.offset}, "
                f"{others[0].member.path} at {others[0].member.offset}",
                "Give every image of a shard its own key",
            )
        label: int | str | None = None
        for extension in (f"{middle}.cls", "cls", f"{middle}.json", "json"):
            text = texts.get(extension.lstrip("."))
            if text is not None and label is None:
                label = labels.read(text.member)
                kept |= {text.order} if label is not None else set()
        kept.add(image.order)
        order = image.order if middle else parts[0].order
        yield TarImage(order, full, image.member, NO_LABEL if label is None else label)
    for part in parts:
        if part.order not in kept and part.extension != "cls":
            ignored[file_kind(part.extension)] += 1
    if not found:
        ignored["key without an image"] += 1


class Labels:
    """The labels of one tar, and what keeps them from being used.

    Args:
        texts: the data of label members, by their offset.
    """

    def __init__(self, file: BinaryIO, name: str, texts: dict[int, bytes]) -> None:
        self.file, self.texts = file, texts
        self.shard = valid_text(name.rpartition("/")[2])
        self.unreadable = ""

    def read(self, member: Member) -> int | str | None:
        """The label in a member; NO_LABEL where it is not readable, which `unreadable` then says; None for a JSON
        without a label."""
        text = self.texts.get(member.offset, b"")
        if not text and member.size <= LONGEST_TEXT:  # the target of a link
            self.file.seek(member.offset)
            text = self.file.read(member.size)
        try:
            return parse_label(member.path, text)
        except ValueError:
            self.unreadable = self.unreadable or f"{self.shard}: {member.path} is not a class: {text[:20]!r}"
            return NO_LABEL


def resolve_links(members: Sequence[Member]) -> Iterator[Member]:
    """Yield the members in order; for a link its own path with the data of the member that it points to, or a member
    that is refused as a "dead link" where that is outside the tar, absent, or not a file."""
    files = {posixpath.normpath(member.path): member for member in members if member.target or not member.refused}
    for member in members:
        end, steps = member, 0
        while end.target and steps < LONGEST_CHAIN:
            end, steps = files.get(end.target, DEAD_LINK), steps + 1
        if member.target:
            refused = end.refused or ("dead link" if end.target else "")
            member = Member(member.path, end.offset, end.size, refused)
        yield member


def split_member(name: str, path: str) -> tuple[str, str]:
    """A member's key and lower-case extension: `a/B.seg.PNG` -> `a/B`, `seg.png`."""
    path = path.removeprefix("./")
    if path.startswith("/") or ".." in path.split("/"):
        raise DataError(f"{name} has a member outside its own folder: {path!r}", "Pack it with relative paths")
    folder, slash, file = path.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else "", extension.lower())


LABELS = ("cls", "json")
LABEL_ENDINGS = (".cls", ".json")
LABEL_FIELDS = ("label", "cls", "class")


def parse_label(path: str, body: bytes) -> int | str | None:
    """The class number or name in the text of a `.cls` member, or in the first of LABEL_FIELDS of a `.json`.

    NO_LABEL for -1 and null; None for a JSON without such a field, or one that is no JSON object.

    Raises:
        ValueError: anything else: another negative number, an empty or binary text, a list.
    """
    if not path.lower().endswith(".json"):
        return class_of(body.decode("utf-8"))
    try:
        table = json.loads(body)
    except (ValueError, RecursionError):
        return None
    values = [table[field] for field in LABEL_FIELDS if isinstance(table, dict) and field in table]
    if not values:
        return None
    return NO_LABEL if values[0] is None else class_of(values[0])


BLOCK = tarfile.BLOCKSIZE
HINTS = {
    "parquet": "Let its name end in .parquet",
    "zip": "Let its name end in .zip",
    "text": "Let the name of a list of paths end in .txt, .csv or .tsv",
    "json": "A list of paths with labels is a .csv or .jsonl file",
    "image": "Give the folder that holds it",
}
"""What to do with a file that is no tar."""
LONGEST_TEXT = 1 << 20
"""Largest read, in bytes: that of a long name, of a pax header or of a label."""
LARGEST_MEMBER = 1 << 43
"""8 TiB; the format allows up to 2**88, and negative sizes."""
LONGEST_CHAIN = 40
"""Links that point to links are followed so many times, as by Linux."""


class ForwardFile:
    """A file for `tarfile` that is read from its first byte to its last, and hashed: what it seeks is read too.

    Without `hashed` what is passed over is not read.
    """

    def __init__(self, file: BinaryIO, name: str, hashed: bool) -> None:
        self.file, self.name, self.hashed = file, name, hashed
        self.hash = hashlib.sha256()
        self.last = b""
        """What the last call of `read` returned."""

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int) -> bytes:
        """The next bytes, up to `size`: a header, a text, or a part of the data of a member."""
        if not 0 <= size <= LONGEST_TEXT:
            raise DataError(f"{self.name} has a header of {size:,} bytes before byte {self.tell()}", COPY_AGAIN)
        self.last = self.file.read(size)
        if self.hashed:
            self.hash.update(self.last)
        return self.last

    def seek(self, position: int) -> None:
        if not self.hashed:
            self.file.seek(position)
        while self.tell() < position and self.read(min(LONGEST_TEXT, position - self.tell())):
            pass


def read_members(file: ForwardFile) -> Iterator[Member]:
    """Yield every member of a tar in order; a DataError at the first byte that is not a tar's. After a regular member
    was yielded, the file is at its data."""
    options: Any = {"fileobj": file, "encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with tarfile.open(mode="r:", **options) as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else all stay in memory
                yield from member_of(header, file)
    except (DataError, OSError):
        raise
    except Exception as error:  # tarfile raises many types on damaged headers
        what = "has no tar header" if file.read(1) else "is truncated"
        raise DataError(f"{file.name} {what} before byte {file.tell()}: {error}", COPY_AGAIN) from None
    check_end(file, tar.offset)


def member_of(header: tarfile.TarInfo, file: ForwardFile) -> Iterator[Member]:
    """The member of a header; none for a folder."""
    path, offset = header.name, header.offset_data
    if header.issparse() or any(key.startswith("GNU.sparse") for key in header.pax_headers):
        raise DataError(f"{file.name}: {path} is a sparse member", "Pack the shard without --sparse")
    if not 0 <= header.size <= LARGEST_MEMBER:
        raise DataError(f"{file.name} has a member of impossible size before byte {offset}", COPY_AGAIN)
    if header.isreg():
        yield Member(path, offset, header.size)
    elif header.issym() or header.islnk():
        # A symbolic link is relative to its folder, a hard link to the tar.
        target = posixpath.join(posixpath.dirname(path) if header.issym() else "", header.linkname)
        yield Member(path, offset, 0, "dead link", posixpath.normpath(target))
    elif not header.isdir():
        yield Member(path, offset, 0, "device")


def check_end(file: ForwardFile, start: int) -> None:
    """Raise a DataError unless the block at `start`, the last that was read, begins the end mark: two blocks of zeros,
    with nothing but zeros after them. (`tarfile` ends silently at a damaged or missing header.)"""
    if any(file.last) and len(file.last) == BLOCK:
        raise DataError(f"{file.name} has no tar header at byte {start}", COPY_AGAIN)
    while rest := file.read(LONGEST_TEXT):
        if rest.count(0) != len(rest):
            raise DataError(
                f"{file.name} has data after its end mark at byte {start}", f"Split two joined tars. {COPY_AGAIN}"
            )
    if file.tell() < start + 2 * BLOCK:
        raise DataError(f"{file.name} is truncated: no end mark at byte {start}", COPY_AGAIN)


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
