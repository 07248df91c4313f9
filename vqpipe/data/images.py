"""`open_images`: every form of `--images` as one ordered set with random access; folders of image files."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import overload

import fsspec
import numpy as np
import pyarrow as pa
from braceexpand import braceexpand

from vqpipe.artifacts import open_artifact
from vqpipe.data.photos import open_photos
from vqpipe.data.sources import (
    IMAGE_EXTENSIONS,
    NO_LABEL,
    ImageSource,
    Sample,
    count_classes,
    read_cache,
    read_error,
    read_with_retries,
    write_cache,
)
from vqpipe.data.tars import TarIndex, Tars, local_path, open_index
from vqpipe.errors import ArtifactError, DataError

__all__ = ["Folder", "ImageSet", "Sample", "open_folder", "open_images"]

CHECK = "Check the folder and the disk"


class ImageSet(Sequence[Sample]):
    """Ordered images of one or several sources. Keys and labels are in memory; an image is read when it is accessed.

    Class folders of several sources are numbered together, over the sorted union of their names, so a name has one
    label throughout. Class folders and tars with class numbers of their own cannot be matched: given together, no image
    has a label.
    """

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = tuple(sources)
        self.name = " + ".join(source.name for source in sources)
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.class_names: tuple[str, ...] = tuple(sorted({name for source in sources for name in source.class_names}))
        labels = [source.labels for source in sources]
        counts = [source.num_classes for source in sources if source.num_classes is not None]
        self.num_classes = len(self.class_names) or max(counts, default=None)
        if self.class_names and any(source.num_classes and not source.class_names for source in sources):
            self.class_names, self.num_classes = (), None
            labels = [np.full_like(part, NO_LABEL) for part in labels]
        elif self.class_names:
            labels = [self.renumber(source) for source in sources]
        self.labels = np.concatenate(labels)
        """int32[N]; -1 where an image has no class."""

    def renumber(self, source: ImageSource) -> np.ndarray:
        """The labels of a source, numbered by `self.class_names`."""
        table = np.array([*(self.class_names.index(name) for name in source.class_names), NO_LABEL], np.int32)
        return table[source.labels]

    @cached_property
    def digest(self) -> str:
        """sha256 over all keys, labels and bytes in order: equal for equal images at another place."""
        total = hashlib.sha256("".join(source.digest for source in self.sources).encode())
        total.update(self.labels.astype("<i4").tobytes())
        return total.hexdigest()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return Sample(self.key(i), self.read(i), self.label(i))

    def key(self, i: int) -> str:
        """The key of image `i`, without reading the image."""
        source, local = self.locate(i)
        return source.key(local)

    def label(self, i: int) -> int | None:
        """The class of image `i`, without reading the image."""
        label = int(self.labels[i])
        return None if label == NO_LABEL else label

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`.

        Raises:
            DataError: its file is absent, unreadable or changed.
        """
        source, local = self.locate(i)
        return source.read(local)

    def locate(self, i: int) -> tuple[ImageSource, int]:
        """The source of image `i`, and its position there."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        i %= len(self)
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.sources[part], i - int(self.starts[part])


def open_images(specs: Sequence[str | Path] | str | Path) -> ImageSet:
    """Open images by name; several names are joined in the order given.

    - a `dataset` (or `images`) artifact;
    - a folder: its subfolders, sorted by name, are classes; a folder with images of its own has none;
    - WebDataset tars: a path, a glob, a brace pattern (`shards/{000000..000099}.tar`), or an fsspec URL of these;
    - `builtin:photos`, `builtin:photos/train`, `builtin:photos/heldout`: see photos.py.

    An existing path is used as it is, even if it contains braces or stars. Shell pipes are an error.

    Raises:
        DataError: nothing of that name, a missing or damaged shard, no images.
        ArtifactError: an artifact of another kind, or unfinished.
    """
    names = [specs] if isinstance(specs, (str, Path)) else list(specs)
    if not names:
        raise DataError("no images were given", "Name them with --images")
    images = ImageSet([open_source(str(spec)) for spec in names])
    if not len(images):
        raise DataError(f"no images in {images.name}", "Its shards are empty")
    return images


def open_source(spec: str) -> ImageSource:
    """Open one value of `--images`."""
    if spec.startswith("builtin:"):
        return open_photos(spec)
    if spec.startswith("pipe:"):
        raise DataError(f"{spec} would run a shell command", "Give paths, or URLs of fsspec")
    spec = local_path(spec)
    path = Path(spec)
    if "://" not in spec and path.is_dir():
        return open_dataset(path) if is_artifact(path) else open_folder(path)
    if "://" not in spec and not path.exists() and path.with_name(path.name + ".partial").is_dir():
        return open_dataset(path)  # raises: unfinished
    urls = expand(spec)
    for url in urls:
        if os.path.splitext(url)[1][1:].lower() in IMAGE_EXTENSIONS:
            raise DataError(f"{url} is one image", f"Name the folder that holds it: {os.path.dirname(url) or '.'}")
    return Tars(open_all(urls), name=spec.rpartition("/")[2] or spec)


def is_artifact(path: Path) -> bool:
    """Whether the folder's manifest.json is an artifact's: any folder may hold a file of that name."""
    try:
        table = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and {"schema", "kind", "request", "files"} <= table.keys()


def open_dataset(path: Path) -> Tars:
    """Open a `dataset` or `images` artifact."""
    artifact = open_artifact(path)
    if artifact.kind not in ("dataset", "images"):
        raise ArtifactError(f"{path} is a {artifact.kind} artifact, not images", "Give a dataset artifact or a folder")
    names = artifact.names("*.tar")
    hashes = [artifact.manifest.files[name]["sha256"] for name in names]
    shards = open_all([str(artifact.file(name)) for name in names], hashes)
    return Tars(shards, path.name, artifact.facts.get("num_classes"))


def open_all(urls: Sequence[str], hashes: Sequence[str] | None = None) -> list[TarIndex]:
    """Open the index of each shard, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(open_index, urls, hashes or [None] * len(urls)))


def expand(spec: str) -> list[str]:
    """Expand a pattern to paths or URLs of shards: globs in sorted order, braces in the order of the pattern.

    Raises:
        DataError: a scheme unknown to fsspec, or no file for a pattern or for a part of a brace pattern.
    """
    if "://" in spec:
        unknown = {part.split("://")[0] for part in spec.split("::")} - set(fsspec.available_protocols())
        if unknown:
            raise DataError(f"{spec}: no file system for {', '.join(sorted(unknown))}", "Use one of fsspec's")
    elif os.path.exists(spec):
        return [spec]
    try:
        patterns = list(braceexpand(spec))
    except ValueError:  # unbalanced braces: an ordinary name
        patterns = [spec]
    found, missing = list[str](), list[str]()
    for pattern in patterns:
        matches = matching(pattern)
        found += matches
        missing += [] if matches else [pattern]
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(f"no such images: {listed}", "Give a folder, tars, an artifact, or builtin:photos")
    return found


def matching(pattern: str) -> list[str]:
    """The paths or URLs that match a glob, sorted. A URL without a wildcard is returned unchecked."""
    if "://" not in pattern:
        return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not glob.has_magic(pattern):
        return [pattern]
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        return [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
    except ImportError as error:
        raise DataError(f"cannot list {pattern}: {error}", "Install the extra: pip install 'vqpipe[remote]'") from error
    except OSError as error:
        raise DataError(f"cannot list {pattern}: {error.strerror or error}", "Check the network") from error


class Folder:
    """Image files under `root`, in the order given, with their labels."""

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int] | None = None, class_names: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.name = root.name or str(root)
        # An Arrow array is one buffer: cheap to send to workers. Names are bytes, as on disk.
        self.files = pa.array([os.fsencode(file) for file in files], pa.large_binary())
        self.labels = np.full(len(files), NO_LABEL, np.int32) if labels is None else np.array(labels, np.int32)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names) or count_classes(self.labels)
        stems = [os.path.splitext(file)[0] for file in files]
        duplicates = {stem for stem, after in zip(sorted(stems), sorted(stems)[1:], strict=False) if stem == after}
        self.keep_extension = frozenset(i for i, stem in enumerate(stems) if stem in duplicates)
        self.stats: np.ndarray | None = None
        """int64[N, 2]: size and modification time of each file when `digest` was computed."""

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """The relative path without its extension, which is kept where two files differ only in it."""
        path = self.files[i].as_py().decode("utf-8", "backslashreplace")
        return path if i in self.keep_extension else os.path.splitext(path)[0]

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[i].as_py()))

    def read(self, i: int) -> bytes:
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
            raise read_error(path, error, CHECK) from error

    @cached_property
    def digest(self) -> str:
        """sha256 over keys, labels, sizes and each file's own sha256. Reads every file once; cached by listing."""
        listing, newest = hashlib.sha256(str(self.root.resolve()).encode("utf-8", "surrogateescape")), 0
        stats = np.empty((len(self), 2), np.int64)
        for i in range(len(self)):
            try:
                status = os.stat(self.path(i))
            except OSError as error:
                raise read_error(self.path(i), error, CHECK) from error
            stats[i] = status.st_size, status.st_mtime_ns
            listing.update(f"{self.key(i)} {self.labels[i]} {status.st_size} {status.st_mtime_ns}\n".encode())
            newest = max(newest, status.st_mtime_ns)
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
        write_cache(identity, {"digest": total.hexdigest()}, newest)
        return total.hexdigest()

    def hash_file(self, i: int) -> tuple[int, str]:
        data = self.read(i)
        return len(data), hashlib.sha256(data).hexdigest()


def open_folder(root: Path) -> Folder:
    """Open a folder. Its subfolders, sorted by name and empty ones included, are classes, unless it has images itself.

    Hidden files and folders are ignored; links to folders are followed once.

    Raises:
        DataError: it holds no image.
    """
    files = sorted(walk(root))
    flat = any("/" not in file for file in files)
    if not files:
        tars = next(root.glob("*.tar"), None)
        hint = f"Give its tars: '{root}/*.tar'" if tars else f"Image files end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
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
        if here in above:  # a link to an enclosing folder
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
