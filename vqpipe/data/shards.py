"""Every form of `--images` as one ordered set, indexed once, with random access: see `open_images`."""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import overload

import fsspec
import numpy as np
from braceexpand import braceexpand

from vqpipe.artifacts import open_artifact
from vqpipe.data.folders import open_folder
from vqpipe.data.photos import open_photos
from vqpipe.data.sources import IMAGE_EXTENSIONS, NO_LABEL, Sample, Source
from vqpipe.data.tars import TarIndex, Tars, local_path, open_index
from vqpipe.errors import ArtifactError, DataError

__all__ = ["ImageSet", "Sample", "open_images"]


class ImageSet(Sequence[Sample]):
    """Ordered images of one or several sources. Knows every key and label; reads an image when it is asked for.

    Class folders of several sources are numbered together, over the sorted union of their names, so a name means one
    label throughout. Where class folders meet tars with numbers of their own, the two cannot be matched: then no image
    has a label, and `no_labels` says so.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.name = " + ".join(source.name for source in sources)
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.no_labels = ""
        self.ignored: dict[str, int] = dict(sum((Counter(source.ignored) for source in sources), Counter()))
        self.class_names: tuple[str, ...] = tuple(sorted({name for source in sources for name in source.class_names}))
        labels = [source.labels for source in sources]
        counts = [source.num_classes for source in sources if source.num_classes is not None]
        self.num_classes = len(self.class_names) or max(counts, default=None)
        if any(source.class_names for source in sources):
            if any(source.num_classes and not source.class_names for source in sources):
                self.no_labels = "class folders and shards with class numbers of their own were given together"
                self.class_names, self.num_classes = (), None
                labels = [np.full_like(part, NO_LABEL) for part in labels]
            else:
                labels = [self.renumber(source) for source in sources]
        elif self.num_classes is None:
            self.no_labels = "neither class folders nor .cls members were given"
        self.labels = np.concatenate(labels)
        """int32[N]; -1 where an image has no class."""

    def renumber(self, source: Source) -> np.ndarray:
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
        """The key of image `i`, without reading it."""
        source, local = self.locate(i)
        return source.key(local)

    def label(self, i: int) -> int | None:
        """The class of image `i`, without reading it."""
        label = int(self.labels[i])
        return None if label == NO_LABEL else label

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`.

        Raises:
            DataError: its file is gone or changed.
        """
        source, local = self.locate(i)
        return source.read(local)

    def locate(self, i: int) -> tuple[Source, int]:
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

    A name that exists as it stands is taken as it stands, whatever braces or stars are in it. Shell pipes are refused.

    Raises:
        DataError: nothing there, a missing shard, a damaged shard, no images.
        ArtifactError: an artifact of another kind, or unfinished.
    """
    names = [specs] if isinstance(specs, (str, Path)) else list(specs)
    if not names:
        raise DataError("no images were given", "Say where they are with --images")
    images = ImageSet([open_source(str(spec)) for spec in names])
    if not len(images):
        raise DataError(f"no images in {images.name}", "Its shards are empty")
    return images


def open_source(spec: str) -> Source:
    """One `--images` value as a source; a DataError where it names nothing that can be read."""
    if spec.startswith("builtin:"):
        return open_photos(spec)
    if spec.startswith("pipe:"):
        raise DataError(f"{spec} would run a shell command", "Give paths, or URLs that fsspec knows")
    spec = local_path(spec)
    path = Path(spec)
    if "://" not in spec and path.is_dir():
        return open_dataset(path) if is_artifact(path) else open_folder(path)
    if "://" not in spec and not path.exists() and path.with_name(path.name + ".partial").is_dir():
        return open_dataset(path)  # its error says how far it is
    urls = expand(spec)
    for url in urls:
        if os.path.splitext(url)[1][1:].lower() in IMAGE_EXTENSIONS:
            raise DataError(f"{url} is one image", f"Name the folder that holds it: {os.path.dirname(url) or '.'}")
    return Tars(open_all(urls), name=spec.rpartition("/")[2] or spec)


def is_artifact(path: Path) -> bool:
    """Whether the folder's manifest.json is one of ours: any folder may hold a file of that name."""
    try:
        table = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and {"schema", "kind", "request", "files"} <= table.keys()


def open_dataset(path: Path) -> Tars:
    artifact = open_artifact(path)
    if artifact.kind not in ("dataset", "images"):
        raise ArtifactError(f"{path} is a {artifact.kind} artifact, not images", "Give a dataset artifact or a folder")
    names = artifact.names("*.tar")
    hashes = [artifact.manifest.files[name]["sha256"] for name in names]
    shards = open_all([str(artifact.file(name)) for name in names], hashes)
    return Tars(shards, path.name, artifact.facts.get("num_classes"))


def open_all(urls: Sequence[str], hashes: Sequence[str] | None = None) -> list[TarIndex]:
    """The index of each shard, a few at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(open_index, urls, hashes or [None] * len(urls)))


def expand(spec: str) -> list[str]:
    """The shards a pattern stands for: sorted where a glob found them, in the pattern's order where braces did.

    Raises:
        DataError: a scheme fsspec does not know, nothing found, or a gap in a brace pattern.
    """
    if "://" in spec:
        unknown = {part.split("://")[0] for part in spec.split("::")} - set(fsspec.available_protocols())
        if unknown:
            raise DataError(f"{spec}: no file system for {', '.join(sorted(unknown))}", "fsspec lists what it knows")
    elif os.path.exists(spec):
        return [spec]
    try:
        patterns = list(braceexpand(spec))
    except ValueError:  # braces that do not pair: a name like any other
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
    """The paths or URLs that a pattern stands for, sorted; one without a wildcard stands for itself."""
    if "://" not in pattern:
        return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not glob.has_magic(pattern):
        return [pattern]  # opening it finds out
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        return [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
    except ImportError as error:
        raise DataError(f"cannot list {pattern}: {error}", "Install the extra: pip install 'vqpipe[remote]'") from error
    except OSError as error:
        raise DataError(f"cannot list {pattern}: {error.strerror or error}", "Check the network") from error
