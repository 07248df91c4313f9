"""Zip archives of images: indexed by their central directory and read by offset. Nothing is extracted to disk.

An archive is read as the folder that was packed: folders in it are classes as in `open_folder`, below the one folder
that holds everything, if there is one. Lists of labels and classes (label_lists.py) and symbolic links are not read.
"""

import hashlib
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vqpipe.data.folders import SYSTEM_FOLDERS
from vqpipe.data.label_lists import CLASSES, LABELS
from vqpipe.data.sources import (
    access_error,
    ambiguous,
    extension_of,
    file_kind,
    has_image_extension,
    number_labels,
    sorted_classes,
    summed,
)
from vqpipe.data.stored import CHECK, COPY_AGAIN, StoredFile, StoredFiles, open_each
from vqpipe.errors import DataError
from vqpipe.file_kinds import explain, kind_of_file

INDEX_VERSION = 4
"""Of cached indices: changes with what `index_members` finds."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
OTHER_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "PPMd", 99: "AES encryption"}
PACK_AGAIN = "Unpack it, and pack it with `zip -0 -r`"
ENCRYPTED = 1
"""Bit of the flags of a member."""
LOCAL_HEADER = 30
"""Bytes of the header before a member, without its name and extra field."""
LONGEST_NAMES = 2 * 0xFFFF
"""Largest name and extra field together."""
LARGEST_MEMBER = 1 << 30
"""Largest uncompressed image in bytes: it is read into memory."""


@dataclass(frozen=True)
class ZipIndex:
    """The images of one archive. The lists have one entry per image, sorted by class and path."""

    sha256: str
    paths: list[str]
    offsets: list[int]
    """Of the local headers."""
    spans: list[int]
    """Bytes from there to the next member."""
    packed: list[int]
    """Compressed sizes."""
    sizes: list[int]
    crcs: list[int]
    methods: list[int]
    folders: list[str]
    """The folders at the top, also those without images."""
    lists: list[str]
    """The lists of labels and classes, which are not read."""
    ignored: dict[str, int]
    """Other members: reason or extension -> count."""


class Zips(StoredFiles):
    """The images of several archives, in the order given. An ImageSource."""

    def __init__(self, indexed: Sequence[tuple[StoredFile, ZipIndex]], name: str) -> None:
        archives = [index for _, index in indexed]
        super().__init__([file for file, _ in indexed], [len(archive.paths) for archive in archives])
        self.name = name
        self.keys = pa.array([key for archive in archives for key in keys_of(archive.paths)], pa.large_string())
        columns = ("offsets", "spans", "packed", "sizes", "crcs", "methods")
        values = [[value for archive in archives for value in getattr(archive, column)] for column in columns]
        self.members = np.array(values, np.int64).reshape(len(columns), -1)
        folders = [path.rpartition("/")[0].split("/")[0] for archive in archives for path in archive.paths]
        names = {name for archive in archives for name in archive.folders}
        classes = sorted_classes(names) if folders and all(folders) else []
        self.labels, self.class_names = number_labels(folders if classes else [None] * len(folders), classes)
        self.num_classes = len(self.class_names) or None
        self.left_out: dict[str, int] = summed(archive.ignored for archive in archives)
        loose = next((path for archive in archives for path in archive.paths if "/" not in path), "")
        lists = sorted({file for archive in archives for file in archive.lists})
        reasons = [f"{name} has {loose} outside of its folders"] if loose and any(folders) else []
        reasons += [f"{name} has {', '.join(lists)}: unpack it to use such lists"] if lists else []
        self.unlabeled = "; ".join(reasons)
        self.digest = hashlib.sha256("".join(archive.sha256 for archive in archives).encode()).hexdigest()

    def key(self, i: int) -> str:
        """The path in the archive, without its extension, which is kept where several files would have the same key."""
        return self.keys[i].as_py()

    def read(self, i: int) -> bytes:
        """The bytes of image `i`, checked against their CRC; a DataError if its archive changed."""
        file = self.files[self.place(i)[0]]
        offset, span, packed, size, crc, method = self.members[:, i].tolist()
        stored = file.read(offset, max(0, min(span, LOCAL_HEADER + LONGEST_NAMES + packed)))
        if not stored.startswith(b"PK\x03\x04"):
            raise DataError(f"{file.shown} has no member at byte {offset}", COPY_AGAIN)
        start = LOCAL_HEADER + sum(int.from_bytes(stored[at : at + 2], "little") for at in (26, 28))
        data = stored[start : start + packed]
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error:
                data = b""
        if len(data) != size or zlib.crc32(data) != crc:
            raise DataError(f"{file.shown} is damaged in {self.key(i)}, at byte {offset}", COPY_AGAIN)
        return data


def open_zips(urls: Sequence[str], name: str) -> Zips:
    """Open archives of images.

    Raises:
        DataError: as `open_zip`, or they hold no images.
    """
    source = Zips(open_each(open_zip, urls), name)
    if not len(source):
        found = ", ".join(f"{count} x {reason}" for reason, count in source.left_out.items())
        raise DataError(f"{name} holds no images", f"It holds {found or 'nothing'}")
    return source


def open_zip(url: str) -> tuple[StoredFile, ZipIndex]:
    """Index one archive, or read the cached index where it is unchanged.

    Raises:
        DataError: it is no zip, damaged, split or encrypted, or an image is compressed with an unusual method.
    """
    file = StoredFile.locate(url)

    def index() -> dict[str, Any]:
        try:
            sha256 = file.sha256()
            with file.open_binary() as opened, zipfile.ZipFile(opened) as archive:
                members, end = archive.infolist(), archive.start_dir
        except OSError as error:
            raise access_error("open", url, error, CHECK) from error
        except DataError:
            raise
        except Exception as error:  # zipfile raises many types on damaged files
            kind = kind_of_file(Path(url)) if file.is_local else "unknown"
            if kind not in ("zip", "npz", "pytorch", "torchscript", "unknown"):
                raise DataError(*explain(url, kind, "a zip archive", "Correct its name")) from None
            raise DataError(f"{file.shown} is a damaged or split zip archive: {error}", COPY_AGAIN) from None
        return vars(index_members(file.shown, sha256, members, end))

    return file, ZipIndex(**file.cached(f"zip {INDEX_VERSION}", index))


def index_members(url: str, sha256: str, members: Sequence[zipfile.ZipInfo], end: int) -> ZipIndex:
    """Index the images among the members of an archive, which are before byte `end`."""
    images = dict[str, zipfile.ZipInfo]()
    ignored = Counter[str]()
    folders, lists = set[str](), set[str]()
    for member in members:
        parts = [part for part in member.filename.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        path = "/".join(parts)
        is_folder = member.filename.endswith(("/", "\\"))
        if any(part in SYSTEM_FOLDERS for part in parts[: None if is_folder else -1]):
            ignored["system folder"] += not is_folder
        elif any(part.startswith(".") for part in parts):
            ignored["hidden file"] += not is_folder
        elif stat.S_ISLNK(member.external_attr >> 16):
            ignored["symbolic link"] += 1
            folders.add(path.rpartition("/")[0])
        elif is_folder or not parts:
            folders.add(path)
        elif not has_image_extension(path):
            ignored[file_kind(extension_of(path))] += 1
            folders.add(path.rpartition("/")[0])
            lists |= {path} if parts[-1] in (CLASSES, *LABELS) else set()
        elif path in images:
            raise DataError(f"{url} has two images of the path {path!r}", "Give every image its own path")
        else:
            check_member(url, path, member)
            images[path] = member
            folders.add(path.rpartition("/")[0])
    root = common_folder(list(images))
    below = {folder.removeprefix(root).partition("/")[0] for folder in folders if f"{folder}/".startswith(root)}
    ordered = sorted(images)
    if all("/" in path.removeprefix(root) for path in ordered):  # classes: "a" before "a-b", as `open_folder`
        ordered.sort(key=lambda path: path.removeprefix(root).partition("/")[0])
    found = [images[path] for path in ordered]
    starts = sorted({member.header_offset for member in members} | {end})
    following = dict(pairwise(starts))
    return ZipIndex(
        sha256=sha256,
        paths=[path.removeprefix(root) for path in ordered],
        offsets=[member.header_offset for member in found],
        spans=[following.get(member.header_offset, end) - member.header_offset for member in found],
        packed=[member.compress_size for member in found],
        sizes=[member.file_size for member in found],
        crcs=[member.CRC for member in found],
        methods=[member.compress_type for member in found],
        folders=sorted(below - {"", root.removesuffix("/")}),
        lists=sorted({path.removeprefix(root) for path in lists} & {CLASSES, *LABELS}),
        ignored=dict(+ignored),
    )


def check_member(url: str, path: str, member: zipfile.ZipInfo) -> None:
    """Raise a DataError for an image that cannot be read."""
    if member.flag_bits & ENCRYPTED:
        raise DataError(f"{url} is encrypted", "Unpack it with its password, and give the folder")
    if member.volume:
        raise DataError(f"{url} is split into several files", "Join them: zip -s 0 SPLIT.zip --out JOINED.zip")
    if member.compress_type not in METHODS:
        method = OTHER_METHODS.get(member.compress_type, f"method {member.compress_type}")
        raise DataError(f"{url}: {path} is compressed with {method}", PACK_AGAIN)
    if member.file_size > LARGEST_MEMBER:
        raise DataError(f"{url}: {path} has {member.file_size:,} bytes, too many for an image", "Pack it without it")


def common_folder(paths: Sequence[str]) -> str:
    """The first folder of all paths, with its `/`, if it is one folder; else empty."""
    first = {path.partition("/")[0] for path in paths}
    return f"{first.pop()}/" if len(first) == 1 and all("/" in path for path in paths) else ""


def keys_of(paths: Sequence[str]) -> list[str]:
    """The paths without their extensions, which are kept where several paths would have the same key."""
    kept = ambiguous(paths)
    return [path if i in kept else os.path.splitext(path)[0] for i, path in enumerate(paths)]
