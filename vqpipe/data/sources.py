"""The interface of a source of images (tars, folders, built-in photographs), and what the sources share."""

import errno
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vqpipe.errors import DataError
from vqpipe.files import atomic_write, digest_json

Image.init()
FORMATS = tuple(
    name
    for name in (
        *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "PSD", "ICO", "ICNS"),
        *("DDS", "BLP", "DCX", "FLI", "FTEX", "MSP", "PIXAR", "SGI", "SUN", "XBM", "XPM", "PCD"),
        *("CUR", "DIB", "PCX", "GBR", "IM", "TGA"),
    )
    if name in Image.OPEN
)
"""The formats of Pillow that are read, in the order in which they are tried: the first bytes of the last ones prove
little. Those of this list that the installed Pillow lacks (AVIF before 11.3) are left out. Not in the list:

- EPS runs Ghostscript;
- BUFR, GRIB, HDF5, MPEG, WMF and EMF are recognized by Pillow, but not decoded by it;
- PDF and PALM are written by Pillow, not read;
- FPX and MIC need olefile, and hold images of further formats, as IPTC does, which Pillow opens without this list;
- FITS holds measurements: Pillow does not apply their scale, so black and white are not defined;
- IMT, MCIDAS, SPIDER and XVTHUMB have no file extension.
"""
FLOAT_EXTENSIONS = frozenset({"pfm"})
"""Extensions of FORMATS whose pixels are always floats, which have no defined range."""
IMAGE_EXTENSIONS = (
    frozenset(
        extension.removeprefix(".")
        for extension, name in Image.registered_extensions().items()
        if name in FORMATS or name == "MPO"  # a JPEG with several pictures, opened as one
    )
    - FLOAT_EXTENSIONS
)
"""File extensions of images, compared in lower case. Other files of a folder or a tar are counted as left out."""
COMMON_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
"""Where a sample of a tar has files of several extensions, one of these is its image, and the others are not."""
NO_LABEL = -1
"""The label of an image without a class."""
LONGEST_CLASS_NAME = 200
"""Characters of a class name; a longer text is not one."""
NUMBER = re.compile(r"[+-]?[0-9]{1,200}(\.0)?")
"""Not all that `int` reads: 1_0 is a name."""
MOST_KINDS = 10
"""Kinds of files that a message lists."""
RETRY_DELAYS = (0.2, 2.0)
"""Seconds before each retry of a failed read."""
TRANSIENT_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)
"""Errors of network disks that a retry may solve."""
RACY_NS = 2_000_000_000
"""A file modified less than this ago is not cached: its modification time may be too coarse to show the next change."""


@dataclass(frozen=True)
class Sample:
    """One stored image: its key, its encoded bytes, its class if it has one."""

    key: str
    image: bytes
    label: int | None


class ImageSource(Protocol):
    """An ordered set of encoded images with random access. Cheap to pickle to a worker process."""

    name: str
    """A short name for messages."""

    labels: np.ndarray
    """int32[N]; NO_LABEL where an image has no class."""

    class_names: tuple[str, ...]
    """One name per label; empty where classes have only numbers."""

    num_classes: int | None
    """Labels are in [0, num_classes); None where no image has one."""

    left_out: dict[str, int]
    """What was found beside the images and is not read: reason or extension -> count."""

    unlabeled: str
    """Why images that could have labels have none, naming the file; empty otherwise."""

    @property
    def digest(self) -> str:
        """sha256 over keys, labels and bytes, in order."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The key of image `i`, without reading the image."""

    def origin(self, i: int) -> tuple[str, int]:
        """The name of the shard that holds image `i` (of a folder: its own name), and the position of the image in
        it."""

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`.

        Raises:
            DataError: its file is absent, unreadable or changed.
        """


def extension_of(name: str) -> str:
    """`a/B.seg.PNG` -> `png`."""
    return os.path.splitext(name)[1][1:].lower()


def has_image_extension(name: str) -> bool:
    """Whether the file name ends in one of IMAGE_EXTENSIONS."""
    return extension_of(name) in IMAGE_EXTENSIONS


def ambiguous(paths: Sequence[str]) -> frozenset[int]:
    """The positions of the paths whose keys keep the extension, because another file would have the same key: `a.jpg`
    and `a.png`, and beside these also `a.png.jpg`."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(stems)
    kept = {path for path, stem in zip(paths, stems, strict=True) if counts[stem] > 1}
    more = kept
    while more:
        more = {path for path, stem in zip(paths, stems, strict=True) if stem in kept} - kept
        kept |= more
    return frozenset(i for i, path in enumerate(paths) if path in kept)


def file_kind(extension: str) -> str:
    """The reason for leaving out a file that is not an image: its extension in lower case, if that is a plain one."""
    if not extension:
        return "file without an extension"
    return f".{extension}" if re.fullmatch(r"[a-z0-9_.-]{1,16}", extension) else "other file"


def describe(left_out: Mapping[str, int]) -> str:
    """`4 dead links, 3 .txt`: what is left out, most first, the rarest kinds in one number."""
    kinds = sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    shown, rest = kinds[:MOST_KINDS], sum(count for _, count in kinds[MOST_KINDS:])
    parts = [f"{count:,} {kind if kind.startswith('.') or count == 1 else plural(kind)}" for kind, count in shown]
    return ", ".join([*parts, *([f"{rest:,} of other kinds"] if rest else [])])


def plural(reason: str) -> str:
    """`key without an image` -> `keys without an image`."""
    return re.sub(r"^(.*?)(?= without | to |$)", r"\1s", reason, count=1)


def class_of(value: Any) -> int | str:
    """The class number, or NO_LABEL for -1, or class name of a stored label: a number, or a text that holds either.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        number = number_of(value)
        value = value.strip() if number is None else number
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_CLASS_NAME:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and NO_LABEL <= value < 2**31:
        return value
    raise ValueError(value)


def classes_of(values: Iterable[Any]) -> list[int | str | None]:
    """The class number or name of each stored label, as `class_of` reads it; None for None and an empty text. If some
    are names, the numbers are names too, as they are written.

    Raises:
        ValueError: a label is neither; its argument is the position of the label.
    """
    classes = list[int | str | None]()
    names = list[str | None]()
    for position, value in enumerate(values):
        try:
            found = None if value is None or value == "" else class_of(value)
        except ValueError:
            raise ValueError(position) from None
        classes.append(found)
        names.append(None if found in (None, NO_LABEL) else str(value).strip())
    return list(names) if any(isinstance(found, str) for found in classes) else classes


def number_of(text: str) -> int | None:
    """The whole number in a text, which may end in `.0`, as pandas writes a column with gaps; else None."""
    return int(text.strip().removesuffix(".0")) if NUMBER.fullmatch(text.strip()) else None


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of their numbers: that of the text, or of the values where all are decimal numbers."""
    found = set(names)
    if all(name.isascii() and name.isdigit() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def number_labels(
    labels: Iterable[int | str | None], names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """int32[N] of class numbers, class names and None for none; and the names in the order of their numbers: `names`,
    or by default those in `labels`."""
    values = list(labels)
    found = sorted_classes(value for value in values if isinstance(value, str)) if names is None else names
    number = {name: label for label, name in enumerate(found)}
    numbers = [NO_LABEL if value is None else number[value] if isinstance(value, str) else value for value in values]
    return np.array(numbers, np.int32), tuple(found)


def summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several tables of counts."""
    return dict(sum(map(Counter, counts), Counter[str]()))


def count_classes(labels: np.ndarray) -> int | None:
    """The largest label plus one; None where no image has a label."""
    return int(labels.max()) + 1 if labels.size and labels.max() > NO_LABEL else None


def read_with_retries(read: Callable[[], bytes]) -> bytes:
    """Return `read()`; after a transient error of the disk try again, once for each of RETRY_DELAYS."""
    for delay in RETRY_DELAYS:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            time.sleep(delay)
    return read()


def access_error(action: str, path: str, error: OSError, hint: str) -> DataError:
    """The DataError for a file that cannot be listed, opened or read; remote.failure is that of a URL."""
    hint = "Check its permissions" if isinstance(error, PermissionError) else hint
    failure = DataError(f"cannot {action} {path}: {error.strerror or error}", hint)
    failure.sysexit_code = 66 if isinstance(error, FileNotFoundError) else 74
    return failure


# Hashing a data set takes as long as reading it. The result is cached per file (or per listing of a folder) in the
# user's cache directory, and is valid while path, size and modification time are unchanged. Deleting it is harmless.


def cache_path(identity: str) -> Path | None:
    """The cache file of `identity`; None on a system without a home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "vqpipe" / "index" / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}.json"


def read_cache(identity: str) -> dict[str, Any] | None:
    """The cached facts of `identity`; None where there are none, or they are damaged."""
    path = cache_path(identity)
    try:
        table = json.loads(path.read_bytes()) if path else {}
        facts = table["facts"]
        valid = table["identity"] == identity and table["check"] == digest_json(facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if valid else None


def write_cache(identity: str, facts: Mapping[str, Any], mtime_ns: int = 0) -> None:
    """Cache the facts of `identity`, unless the file was modified (at `mtime_ns`) less than RACY_NS ago."""
    path = cache_path(identity)
    if path is None or time.time_ns() - mtime_ns < RACY_NS:
        return
    with suppress(OSError):  # a read-only or full disk: nothing is cached
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            table = {"identity": identity, "check": digest_json(facts), "facts": facts}
            temporary.write_text(json.dumps(table), encoding="utf-8")
