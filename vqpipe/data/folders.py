"""Folders of image files."""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from vqpipe.artifacts import is_artifact
from vqpipe.data.label_lists import CLASSES, read_classes, read_labels
from vqpipe.data.sources import (
    NO_LABEL,
    access_error,
    ambiguous,
    count_classes,
    describe,
    extension_of,
    file_kind,
    has_image_extension,
    read_cache,
    read_with_retries,
    sorted_classes,
    write_cache,
)
from vqpipe.errors import DataError, printable
from vqpipe.files import valid_text
from vqpipe.words import counted

CHECK = "Check the folder and the disk"
SYSTEM_FOLDERS = frozenset(
    {
        *("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"),
        *(".ipynb_checkpoints", ".thumbnails"),
    }
)
"""Folders of file servers, operating systems and programs: neither classes nor read, but counted."""


class Folder:
    """Image files under `root`, in the order given, with their labels. An ImageSource.

    Args:
        named: the class names are not those of the subfolders: they are part of the digest.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: Sequence[str] = (),
        left_out: Mapping[str, int] | None = None,
        unlabeled: str = "",
        *,
        named: bool = False,
    ) -> None:
        self.root = root
        self.name = printable(root.name or str(root))
        self.place = os.path.abspath(root)
        """The path whose end is `name`: it differs between sources of one name."""
        # An Arrow array is one buffer: cheap to send to workers. Names are bytes, as on disk.
        self.files = pa.array([os.fsencode(file) for file in files], pa.large_binary())
        self.labels = np.full(len(files), NO_LABEL, np.int32) if labels is None else np.array(labels, np.int32)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names) or count_classes(self.labels)
        self.keep_extension = ambiguous(files)
        self.left_out = {reason: count for reason, count in (left_out or {}).items() if count}
        self.unlabeled = valid_text(unlabeled)
        self.listed_names = "\n".join(["", *self.class_names]) if named else ""
        self.stats: np.ndarray | None = None
        """int64[N, 2]: size and modification time of each file when `digest` was computed."""

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """The relative path without its extension, which is kept where several files would have the same key."""
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
        listing.update(self.listed_names.encode())
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
        total.update(self.listed_names.encode())
        write_cache(identity, {"digest": total.hexdigest()}, newest)
        return total.hexdigest()

    def hash_file(self, i: int) -> tuple[int, str]:
        """The size and the sha256 of file `i`."""
        data = self.read(i)
        return len(data), hashlib.sha256(data).hexdigest()


def open_files(files: Sequence[str], name: str) -> Folder:
    """Image files in the order given, without labels; keys are paths relative to the folder that holds all of them."""
    paths = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    images = Folder(Path(root), [os.path.relpath(path, root) for path in paths])
    images.name, images.place = name, os.path.join(root, name.rpartition("/")[2])
    return images


def open_folder(root: Path) -> Folder:
    """Open a folder. If it has no images itself, its subfolders are the classes, numbered in the order of their names
    (of their values, if all are decimal numbers), or of classes.txt; empty ones count. A list of labels in the folder
    has priority: see label_lists.py.

    Hidden files and folders are left out, as are those of SYSTEM_FOLDERS, and artifacts, finished or not, which a
    command wrote among the images; links to folders are followed once.

    Raises:
        DataError: it holds no image, a subfolder is unreadable, or a class folder is not in classes.txt.
    """
    left_out = Counter[str]()
    files = sorted(walk(root, left_out))
    if not files:
        tars = next(root.glob("*.tar"), None)
        found = f" (left out: {describe(left_out)})" if left_out and not tars else ""
        hint = f"Give its tars: '{root}/*.tar'" if tars else "Image files end in .jpg, .png, .webp, .tif and so on"
        raise DataError(f"{root} holds no images{found}", hint)
    listed = read_labels(root, files)
    unlabeled = listed.unlabeled if listed is not None else ""
    if listed is not None and listed.labels is not None:
        use(left_out, listed.file, CLASSES if (root / CLASSES).is_file() else "")
        left_out += Counter({"label without an image": listed.unused})
        return Folder(root, files, listed.labels, listed.class_names, left_out, unlabeled, named=True)
    if listed is not None and listed.unusable:
        return Folder(root, files, left_out=left_out, unlabeled=unlabeled)
    folders = sorted_classes(
        entry.name
        for entry in scan(root)
        if kind_of(entry) == "folder" and not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS
    )
    if any("/" not in file for file in files):
        return Folder(root, files, left_out=left_out, unlabeled=unlabeled or stray(root, files, folders))
    class_of = {folder: valid_text(folder) for folder in folders}
    names = read_classes(root)
    if names is None:
        names = list(class_of.values())
    elif not set(class_of.values()) & set(names):
        reason = f"{root.name}/{CLASSES} names none of the class folders"  # such as a list of objects, beside images/
        return Folder(root, files, left_out=left_out, unlabeled=reason)
    else:
        use(left_out, CLASSES)
        unknown = next((folder for folder in folders if class_of[folder] not in names), None)
        if unknown is not None:
            raise DataError(f"the class folder {root / unknown} is not in {CLASSES}", f"Add a line to {root / CLASSES}")
    reason = f"{unlabeled}: the class folders are the labels" if listed is not None and listed.unused else ""
    number = {name: label for label, name in enumerate(names)}
    labelled = sorted((number[class_of[file.split("/", 1)[0]]], file) for file in files)
    return Folder(root, [file for _, file in labelled], [label for label, _ in labelled], names, left_out, reason)


def stray(root: Path, files: Sequence[str], folders: Sequence[str]) -> str:
    """Why a folder with images of its own has no labels, if its subfolders hold images too."""
    first, *more = (file for file in files if "/" not in file)
    if len(more) + 1 == len(files):
        return ""
    others = f" and {len(more):,} more" if more else ""
    verb, pronoun = ("lie", "them") if more else ("lies", "it")
    return (
        f"{root.name or root}/{first}{others} {verb} beside the class folders: without {pronoun}, the images have "
        f"{counted(len(folders), 'classes')}"
    )


def use(left_out: Counter[str], *files: str) -> None:
    """Do not count these files of the root, which were read."""
    for file in filter(None, files):
        left_out[file_kind(extension_of(file))] -= 1


def walk(root: Path, left_out: Counter[str] | None = None) -> Iterator[str]:
    """Relative paths of the image files under `root`, with "/" between their parts. Everything else is counted in
    `left_out`, by reason.

    Raises:
        DataError: a folder cannot be read.
    """
    others = Counter[str]() if left_out is None else left_out
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        try:
            status = os.stat(root / folder)
        except OSError as error:
            raise access_error("list", str(root / folder), error, CHECK) from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            others["link to an enclosing folder"] += 1
            continue
        for entry in scan(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            kind = kind_of(entry)
            if entry.name in SYSTEM_FOLDERS and kind == "folder":
                others["system folder"] += 1
            elif entry.name.startswith(".") and kind in ("file", "folder"):
                others[f"hidden {kind}"] += 1
            elif kind == "folder":
                pending.append((path, above | {here}))
            elif kind != "file":
                others[kind] += 1
            elif has_image_extension(entry.name):
                yield path
            else:
                others[file_kind(extension_of(entry.name))] += 1


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; a DataError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise access_error("list", str(folder), error, CHECK) from error


def visible(root: Path, pattern: str) -> list[str]:
    """The paths below `root` that match a glob, sorted. Hidden files, as the `._NAME` of macOS, and those in hidden
    folders are left out."""
    found = (path for path in root.glob(pattern) if not any(part[0] == "." for part in path.relative_to(root).parts))
    return sorted(map(str, found))


def kind_of(entry: os.DirEntry[str]) -> str:
    """ "file", "folder", or why an entry is neither."""
    try:
        if entry.is_dir():
            path = Path(entry.path)
            unfinished = path.suffix == ".partial" and (path / "request.json").is_file()
            return "vqpipe artifact" if unfinished or is_artifact(path) else "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise access_error("read", entry.path, error, CHECK) from error
    return "dead link" if entry.is_symlink() else "special file"
