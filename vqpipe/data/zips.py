"""Zip archives of images: indexed by their central directory and read by offset. Nothing is extracted to disk.

An archive is read as the folder that was packed: folders in it are classes as in `open_folder`, below the one folder
that holds everything, if there is one.
"""

import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from vqpipe.data import remote
from vqpipe.data.folders import SYSTEM_FOLDERS
from vqpipe.data.sources import NO_LABEL, access_error, has_image_extension, read_cache, sorted_classes, write_cache
from vqpipe.data.tars import COPY_AGAIN, read_range
from vqpipe.errors import DataError
from vqpipe.file_kinds import explain, kind_of_file

METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
OTHER_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "PPMd", 99: "AES encryption"}
PACK_AGAIN = "Unpack it, and pack it with `zip -0 -r`"
ENCRYPTED = 1
"""Bit of the flags of a member."""
LOCAL_HEADER = 30
"""Bytes of the header before a member, without its name and extra field."""
LARGEST_MEMBER = 1 << 30
"""Largest uncompressed image in bytes: it is read into memory."""


@dataclass(frozen=True)
class ZipIndex:
    """The images of one archive. The lists have one entry per image, sorted by class and path."""

    url: str
    size: int
    sha256: str
    paths: list[str]
    offsets: list[int]
    """Of the local headers."""
    packed: list[int]
    """Compressed sizes."""
    sizes: list[int]
    crcs: list[int]
    methods: list[int]
    folders: list[str]
    """The folders at the top, also those without images."""
    ignored: dict[str, int]
    """Other members: reason or extension -> count."""
    mtime_ns: int | None = None
    """Modification time of a local file: an archive that changes during a job is an error."""


class Zips:
    """The images of several archives, in the order given. An ImageSource."""

    def __init__(self, archives: Sequence[ZipIndex], name: str) -> None:
        self.name = name
        self.archives = [(archive.url, archive.size, archive.mtime_ns) for archive in archives]
        self.starts = np.cumsum([0, *(len(archive.paths) for archive in archives)])
        self.keys = pa.array([key for archive in archives for key in keys_of(archive.paths)], pa.large_string())
        columns = ("offsets", "packed", "sizes", "crcs", "methods")
        values = [[value for archive in archives for value in getattr(archive, column)] for column in columns]
        self.members = np.array(values, np.int64).reshape(len(columns), -1)
        folders = [path.rpartition("/")[0].split("/")[0] for archive in archives for path in archive.paths]
        names = {name for archive in archives for name in archive.folders}
        self.class_names = tuple(sorted_classes(names)) if folders and all(folders) else ()
        number = {name: label for label, name in enumerate(self.class_names)}
        self.labels = np.array([number.get(folder, NO_LABEL) for folder in folders], np.int32)
        self.num_classes = len(self.class_names) or None
        self.left_out: dict[str, int] = dict(sum((Counter(archive.ignored) for archive in archives), Counter()))
        loose = next((path for archive in archives for path in archive.paths if "/" not in path), "")
        self.unlabeled = f"{name} has {loose} outside of its folders" if loose and any(folders) else ""
        self.digest = hashlib.sha256("".join(archive.sha256 for archive in archives).encode()).hexdigest()

    def __len__(self) -> int:
        return self.members.shape[1]

    def key(self, i: int) -> str:
        """The path in the archive, without its extension, which is kept where two files differ only in it."""
        return self.keys[i].as_py()

    def origin(self, i: int) -> tuple[str, int]:
        """The file name of the archive, and the position of image `i` among its images."""
        archive = self.archive_of(i)
        return self.archives[archive][0].rpartition("/")[2], i - int(self.starts[archive])

    def archive_of(self, i: int) -> int:
        """The number of the archive that holds image `i`."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def read(self, i: int) -> bytes:
        """The bytes of image `i`, checked against their CRC; a DataError if its archive changed."""
        url, file_size, mtime_ns = self.archives[self.archive_of(i)]
        offset, packed, size, crc, method = self.members[:, i].tolist()
        read = partial(remote.read, validators={}) if "://" in url else partial(read_range, mtime_ns=mtime_ns)
        header = read(url, offset, LOCAL_HEADER, file_size)
        if not header.startswith(b"PK\x03\x04"):
            raise DataError(f"{url} has no member at byte {offset}", COPY_AGAIN)
        name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = offset + LOCAL_HEADER + name_length + extra_length
        data = read(url, start, packed, file_size)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error:
                data = b""
        if len(data) != size or zlib.crc32(data) != crc:
            raise DataError(f"{url} is damaged in {self.key(i)}, at byte {offset}", COPY_AGAIN)
        return data


def open_zips(urls: Sequence[str], name: str) -> Zips:
    """Open archives of images.

    Raises:
        DataError: as `open_zip`, or they hold no images.
    """
    source = Zips([open_zip(url) for url in urls], name)
    if not len(source):
        found = ", ".join(f"{count} x {reason}" for reason, count in source.left_out.items())
        raise DataError(f"{name} holds no images", f"It holds {found or 'nothing'}")
    return source


def open_zip(url: str) -> ZipIndex:
    """Index one archive, or read the cached index where it is unchanged.

    Raises:
        DataError: it is no zip, damaged, split or encrypted, or an image is compressed with an unusual method.
    """
    try:
        url, size, mtime_ns, identity = remote.locate(url)
        if identity and (cached := read_cache(f"zip {identity}")) is not None:
            return ZipIndex(**cached)
        with remote.open_binary(url) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a buffered reader
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
    except OSError as error:
        raise access_error("open", url, error, "Check the path and the disk") from error
    except DataError:
        raise
    except Exception as error:  # zipfile raises many types on damaged files
        kind = kind_of_file(Path(url)) if "://" not in url else "unknown"
        if kind not in ("zip", "npz", "pytorch", "torchscript", "unknown"):
            raise DataError(*explain(url, kind, "a zip archive", "Correct its name")) from None
        raise DataError(f"{url} is a damaged or split zip archive: {error}", COPY_AGAIN) from None
    index = index_members(url, size, sha256, members, mtime_ns)
    if identity:
        write_cache(f"zip {identity}", asdict(index), mtime_ns or 0)
    return index


def index_members(
    url: str, size: int, sha256: str, members: Sequence[zipfile.ZipInfo], mtime_ns: int | None
) -> ZipIndex:
    """Index the images among the members of an archive."""
    images = dict[str, zipfile.ZipInfo]()
    ignored = Counter[str]()
    folders = set[str]()
    for member in members:
        parts = [part for part in member.filename.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        path = "/".join(parts)
        is_folder = member.filename.endswith(("/", "\\"))
        if any(part in SYSTEM_FOLDERS for part in parts[: None if is_folder else -1]):
            ignored["system folder"] += not is_folder
        elif any(part.startswith(".") for part in parts):
            ignored["hidden"] += not is_folder
        elif is_folder or not parts:
            folders.add(path)
        elif not has_image_extension(path):
            ignored[os.path.splitext(path)[1].lower() or "no extension"] += 1
            folders.add(path.rpartition("/")[0])
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
    return ZipIndex(
        url=url,
        size=size,
        sha256=sha256,
        paths=[path.removeprefix(root) for path in ordered],
        offsets=[member.header_offset for member in found],
        packed=[member.compress_size for member in found],
        sizes=[member.file_size for member in found],
        crcs=[member.CRC for member in found],
        methods=[member.compress_type for member in found],
        folders=sorted(below - {"", root.removesuffix("/")}),
        ignored=dict(+ignored),
        mtime_ns=mtime_ns,
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
    """The paths without their extensions, which are kept where two paths differ only in them."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(stems)
    return [path if counts[stem] > 1 else stem for path, stem in zip(paths, stems, strict=True)]
