"""`open_images`: every form of `--images` as one ordered set with random access.

Each form is an `ImageSource` in a file of its own; `open_source` chooses by the name that was given.
"""

import glob
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, overload
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from braceexpand import braceexpand

from vqpipe.artifacts import is_artifact, open_artifact
from vqpipe.data import remote
from vqpipe.data.decoding import Color
from vqpipe.data.folders import Folder, open_files, open_folder, visible, walk
from vqpipe.data.lists import EXTENSIONS as LIST_EXTENSIONS
from vqpipe.data.lists import open_list
from vqpipe.data.made_images import FOLDER
from vqpipe.data.parquets import Parquets, open_parquets
from vqpipe.data.photos import Photos, open_photos
from vqpipe.data.sources import (
    NO_LABEL,
    ImageSource,
    Sample,
    describe,
    has_image_extension,
    sorted_classes,
    summed,
)
from vqpipe.data.stored import StoredFile, StoredFiles, distinct_ends, open_each
from vqpipe.data.tars import TarIndex, Tars, open_index
from vqpipe.data.zips import open_zips
from vqpipe.errors import ArtifactError, DataError, printable
from vqpipe.file_kinds import kind_of_file
from vqpipe.files import absent_images, partial_path, valid_text
from vqpipe.provenance import without_secrets
from vqpipe.words import counted

KeyPrefix = Literal["shard"]

__all__ = ["ImageSet", "Sample", "open_images"]

MOST_CLASSES, MOST_CLASSES_PER_IMAGE = 1_000_000, 100
"""Class numbers beyond both are not of classes: networks have a parameter or more for each number up to the highest."""
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
"""The end of the names of the Parquet files of a split, as `datasets` writes them."""
SPLITS = ("train", "test", "validation", "val")
"""Names of Parquet files that are splits."""


class ImageSet(Sequence[Sample]):
    """Ordered images of one or several sources. Keys and labels are in memory; an image is read when it is accessed.

    Class folders of several sources are numbered together, over the sorted union of their names, so a name has one
    label throughout. Class names cannot be matched with class numbers: if both are given, no image has a label.

    Args:
        key_prefix: "shard": keys begin with the name of the shard or folder that holds the image.
        color: whether embedded ICC profiles are applied where the images are decoded; see `decoding.to_srgb`.
    """

    def __init__(
        self, sources: Sequence[ImageSource], key_prefix: KeyPrefix | None = None, color: Color = "ignore"
    ) -> None:
        self.sources = tuple(sources)
        self.key_prefix, self.color = key_prefix, color
        self.name = " + ".join(source.name for source in sources)
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.shard_names = shard_names(sources)
        self.class_names: tuple[str, ...] = tuple(join_names([source.class_names for source in sources]))
        labels = [source.labels for source in sources]
        counts = [source.num_classes for source in sources if source.num_classes is not None]
        self.num_classes = len(self.class_names) or max(counts, default=None)
        reasons = [source.unlabeled for source in sources]
        numbered = [source.name for source in sources if source.num_classes and not source.class_names]
        if self.class_names and numbered:
            named = next(source.name for source in sources if source.class_names)
            reasons.append(f"{named} has class names, {numbered[0]} class numbers")
            self.class_names, self.num_classes = (), None
            labels = [np.full_like(part, NO_LABEL) for part in labels]
        elif self.class_names:
            labels = [self.renumber(source) for source in sources]
        self.labels = np.concatenate(labels)
        """int32[N]; -1 where an image has no class."""
        if stray := self.stray_label():
            reasons.append(stray)
            self.num_classes, self.labels = None, np.full_like(self.labels, NO_LABEL)
        self.left_out: dict[str, int] = summed(source.left_out for source in sources)
        """What was found beside the images and is not read: reason or extension -> count."""
        self.unlabeled = "; ".join(filter(None, reasons))
        """Why images that could have labels have none; empty otherwise."""

    def stray_label(self) -> str:
        """Why the class numbers cannot be used: the highest is far beyond the number of images. Else empty."""
        highest, total = int(self.labels.max(initial=NO_LABEL)), len(self.labels)
        if self.class_names or highest < max(MOST_CLASSES, MOST_CLASSES_PER_IMAGE * total):
            return ""
        source = next(source for source in self.sources if highest in source.labels)
        key = source.key(int(source.labels.argmax()))
        return f"the label {highest} of {key} would make {highest + 1:,} classes of {counted(total, 'images')}"

    def renumber(self, source: ImageSource) -> np.ndarray:
        """The labels of a source, numbered by `self.class_names`."""
        places = {name: label for label, name in enumerate(self.class_names)}
        table = np.array([*(places[name] for name in source.class_names), NO_LABEL], np.int32)
        return table[source.labels]

    @property
    def sets(self) -> list[range]:
        """The positions of the images of each source."""
        return [range(first, stop) for first, stop in pairwise(self.starts.tolist())]

    @property
    def whole_groups(self) -> bool:
        """Whether reading one image reads others too, so that shuffled reading is slow."""
        return any(isinstance(source, Parquets) and source.whole_groups for source in self.sources)

    @cached_property
    def digest(self) -> str:
        """sha256 over all keys, labels and bytes in order: equal for equal images at another place."""
        total = hashlib.sha256("".join(source.digest for source in self.sources).encode())
        total.update(self.labels.astype("<i4").tobytes())
        if self.key_prefix is not None:
            shards = dict.fromkeys(self.origin(i)[0] for i in range(len(self)))
            total.update("".join(f"{shard}\n" for shard in shards).encode())
        if self.color != "ignore":
            total.update(self.color.encode())
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
        if self.key_prefix is None:
            return source.key(local)
        return f"{stem(self.origin(i)[0])}/{source.key(local)}"

    def origin(self, i: int) -> tuple[str, int]:
        """The name of the shard or folder that holds image `i`, and the position of the image in it. Where several have
        the same name, it includes folders above them."""
        source, local = self.locate(i)
        name, position = source.origin(local)
        if self.shard_names and isinstance(source, StoredFiles):
            name = self.shard_names[source.files[source.place(local)[0]].shown]
        elif self.shard_names and isinstance(source, Folder):
            name = self.shard_names[source.place]
        return name, position

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
        length = len(self)
        if not -length <= i < length:
            raise IndexError(f"image {i} of {length}")
        i %= length
        part = bisect_right(self.starts, i) - 1
        return self.sources[part], i - int(self.starts[part])

    def keys(self) -> pa.ChunkedArray:
        """The keys of all images, in order."""
        if self.key_prefix is not None:
            return pa.chunked_array([pa.array(map(self.key, range(len(self))), pa.large_string())])
        return pa.chunked_array([source_keys(source) for source in self.sources])

    @cached_property
    def duplicate_keys(self) -> tuple[int, str]:
        """The number of keys that several images have, and a line about one of them."""
        if len(self.sources) == 1 and isinstance(self.sources[0], (Folder, Photos)):
            return 0, ""  # unique by construction
        keys = self.keys()
        counts = pc.value_counts(keys)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if not len(repeated):
            return 0, ""
        key = repeated[0]["values"].as_py()
        first = pc.index(keys, key).as_py()
        second = first + 1 + pc.index(keys.slice(first + 1), key).as_py()
        return len(repeated), f"{key} in {self.origin(first)[0]} and {self.origin(second)[0]}"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What an artifact made from these images records about them; empty where there is nothing to say."""
        facts = {
            "left_out": dict(sorted(self.left_out.items())),
            "unlabeled": self.unlabeled,
            "duplicate_keys": self.duplicate_keys[0],
            "color": "" if self.color == "ignore" else self.color,
        }
        return {name: value for name, value in facts.items() if value}

    @property
    def remarks(self) -> list[str]:
        """`facts` as lines for the user."""
        count, example = self.duplicate_keys
        are = "is that" if count == 1 else "are each those"
        repeated = f"{counted(count, 'keys')} {are} of several images, as {example}" if count else ""
        lines = {
            "left out": describe(self.left_out),
            "unlabeled": self.unlabeled,
            "duplicate keys": repeated,
        }
        return [f"{name}: {printable(line)}" for name, line in lines.items() if line]


class SelectedImages(ImageSet):
    """Some images of a set, in the order of `positions`. `sets` is defined only where these ascend."""

    def __init__(self, images: ImageSet, positions: np.ndarray | range) -> None:
        super().__init__(images.sources, images.key_prefix, images.color)
        self.images, self.positions = images, np.asarray(positions, np.int64)
        self.labels = images.labels[self.positions]
        self.starts = np.searchsorted(self.positions, images.starts)

    def __len__(self) -> int:
        return len(self.positions)

    def locate(self, i: int) -> tuple[ImageSource, int]:
        return self.images.locate(int(self.positions[i]))

    def keys(self) -> pa.ChunkedArray:
        return self.images.keys().take(pa.array(self.positions))

    @cached_property
    def digest(self) -> str:
        """sha256 over that of the whole set, and the positions: of the first n images the number n."""
        first = np.array_equal(self.positions, np.arange(len(self)))
        selection = len(self) if first else hashlib.sha256(self.positions.astype("<i8").tobytes()).hexdigest()
        return hashlib.sha256(f"{self.images.digest} {selection}".encode()).hexdigest()


def first_images(images: ImageSet, limit: int | None) -> ImageSet:
    """The first `limit` images of a set; all of them for None, or where there are fewer."""
    return images if limit is None or limit >= len(images) else SelectedImages(images, range(limit))


def join_names(lists: Sequence[Sequence[str]]) -> Sequence[str]:
    """The class names of all lists, in the order of the first list that has them all, else sorted."""
    names = {name for each in lists for name in each}
    return next((each for each in lists if len(set(each)) == len(names)), None) or sorted_classes(names)


def shard_names(sources: Sequence[ImageSource]) -> dict[str, str]:
    """Path or URL of each shard and folder -> its name, with folders above it; empty where the names alone differ."""
    named = {file.shown: file.name for source in sources if isinstance(source, StoredFiles) for file in source.files}
    named |= {source.place: source.name for source in sources if isinstance(source, Folder)}
    if len(set(named.values())) == len(named):
        return {}
    return dict(zip(named, map(valid_text, distinct_ends(list(named))), strict=True))


def source_keys(source: ImageSource) -> pa.Array:
    """The keys of a source."""
    if isinstance(source, Tars):
        return source.keys
    return pa.array((source.key(i) for i in range(len(source))), pa.large_string())


def stem(name: str) -> str:
    """The name of a shard without its extension."""
    root, extension = os.path.splitext(name)
    return root if extension in (".tar", ".parquet", ".zip", *LIST_EXTENSIONS) else name


def open_images(
    specs: Sequence[str | Path] | str | Path, key_prefix: KeyPrefix | None = None, color: Color = "ignore"
) -> ImageSet:
    """Open images by name; several names are joined in the order given.

    - a `dataset` (or `images`) artifact;
    - a folder: its subfolders, sorted by name, are classes; a folder with images of its own has none; either may have
      a list of labels or classes (label_lists.py);
    - WebDataset tars: a path, a glob, a brace pattern (`shards/{000000..000099}.tar`), or an fsspec URL of these;
    - Parquet files with encoded images: the same, or a folder of them; see parquets.py;
    - zip archives of images: the same; folders in them are classes; see zips.py;
    - image files: a path, a glob or a brace pattern;
    - a list of paths, .txt, .lst, .csv, .tsv or .jsonl: see lists.py;
    - `builtin:photos`, `builtin:photos/train`, `builtin:photos/heldout`: see photos.py.

    With `key_prefix` "shard" keys begin with the name of their shard or folder. With `color` "srgb" embedded ICC
    profiles are applied where the images are decoded.

    An existing path is used as it is, even if it contains braces or stars. Shell pipes are an error.

    Raises:
        DataError: nothing of that name, a missing or damaged shard, no images.
        ArtifactError: an artifact of another kind, or unfinished.
    """
    names = [specs] if isinstance(specs, (str, Path)) else list(specs)
    if not names:
        raise DataError("no images were given", "Name them with --images")
    images = ImageSet([open_source(str(spec)) for spec in names], key_prefix, color)
    if not len(images):
        left_out = f"It holds {describe(images.left_out)}" if images.left_out else "Its shards are empty"
        raise DataError(f"no images in {images.name}", left_out)
    return images


def open_source(spec: str) -> ImageSource:
    """Open one value of `--images`."""
    if not spec:  # a path of no characters is that of the current folder
        raise DataError("the name of the images is empty", "Name them, or write . for the current folder")
    if spec.startswith("builtin:"):
        return open_photos(spec)
    if spec.startswith("pipe:"):
        raise DataError(f"{spec} would run a shell command", "Give paths, or URLs of fsspec")
    if spec.startswith("file://"):
        spec = re.sub("^localhost(?=/)", "", spec.removeprefix("file://"))
        spec = str(Path(unquote(spec)))
    path = Path(spec)
    if "://" not in spec and path.is_dir():
        if is_artifact(path):
            return open_dataset(path)
        parquets = parquet_files(path)
        return open_parquets(parquets, path.name or str(path)) if parquets else open_folder(path)
    if "://" not in spec and not path.exists() and partial_path(path).is_dir():
        return open_dataset(path)  # raises: unfinished
    urls = expand(spec)
    for url in map(without_secrets, urls):
        if os.path.isdir(url):
            raise DataError(
                f"{without_secrets(spec)} names folders, as {url}",
                f"Give each its own --images, or --images {os.path.dirname(url) or '.'}, whose subfolders are classes",
            )
    forms = {form_of(url): without_secrets(url) for url in reversed(urls)}
    shown = without_secrets(spec)
    if len(forms) > 1:
        raise DataError(
            f"{shown} names files of several kinds: {', '.join(forms.values())}", "Give each kind its own --images"
        )
    parts = shown.split("/")
    name = printable("/".join(parts[-2:]) if parts[-1].startswith("*") else parts[-1] or shown)  # *.tar says nothing
    match next(iter(forms)):
        case "parquet":
            return open_parquets(urls, name)
        case "zip":
            return open_zips(urls, name)
        case "list":
            if len(urls) > 1 or "://" in urls[0]:
                raise DataError(f"{shown} is not one local list of paths", "Give each list its own --images")
            return open_list(Path(urls[0]))
        case "image":
            if "://" in urls[0]:
                raise DataError(f"{without_secrets(urls[0])} is one image", "Download it, or pack images into tars")
            return open_files(urls, name)
    return Tars(open_all(urls), name)


def form_of(url: str) -> str:
    """How a file or URL is opened: as "parquet", "zip", "list", "image" or "tar"; by its extension, else by its first
    bytes."""
    extension = os.path.splitext(without_secrets(url))[1].lower()
    if extension in LIST_EXTENSIONS:
        return "list"
    if has_image_extension(without_secrets(url)):
        return "image"
    if extension in (".tar", ".parquet", ".zip"):
        return extension[1:]
    if "://" not in url:
        with suppress(OSError):
            kind = kind_of_file(Path(url))
            return kind if kind in ("parquet", "zip") else "tar"
    return "tar"


def parquet_files(folder: Path) -> list[str]:
    """The Parquet files of a folder that holds no image files, sorted.

    Raises:
        DataError: they are of several splits (`train-00000-of-00004.parquet`), or in folders below.
    """
    if next(walk(folder), None) is not None:
        return []
    files = visible(folder, "*.parquet")
    if not files:
        if below := visible(folder, "**/*.parquet"):
            pattern = Path(below[0]).parent / f"{SPLIT_NAME.sub('', Path(below[0]).stem)}*.parquet"
            raise DataError(f"{folder} has Parquet files only in folders below it", f"Give them, as '{pattern}'")
        return []
    stems = [Path(file).stem for file in files]
    splits = sorted({SPLIT_NAME.sub("", stem) for stem in stems if SPLIT_NAME.search(stem) or stem in SPLITS})
    if len(splits) > 1:
        raise DataError(
            f"{folder} holds several splits: {', '.join(splits)}", f"Give one: '{folder / splits[0]}*.parquet'"
        )
    return files


def open_dataset(path: Path) -> Tars | Folder:
    """Open a `dataset` or `images` artifact."""
    artifact = open_artifact(path)
    if artifact.kind not in ("dataset", "images"):
        raise ArtifactError(f"{path} is a {artifact.kind} artifact, not images", "Give a dataset artifact or a folder")
    names = artifact.names("*.tar")
    if not names and artifact.names(f"{FOLDER}/*.png"):
        folder = open_folder(path / FOLDER)
        folder.name, folder.place = printable(path.name), os.path.abspath(path)
        folder.num_classes = artifact.facts.get("num_classes", folder.num_classes)
        return folder
    if not names and artifact.names("originals/*.png"):
        raise DataError(
            f"{path} holds originals and their reconstructions", f"Give {path}/originals or {path}/reconstructions"
        )
    hashes = [artifact.manifest.files[name]["sha256"] for name in names]
    shards = open_all([str(artifact.file(name)) for name in names], hashes)
    return Tars(shards, printable(path.name), artifact.facts.get("num_classes"))


def open_all(urls: Sequence[str], hashes: Sequence[str] | None = None) -> list[tuple[StoredFile, TarIndex]]:
    """Open the index of each shard."""
    return open_each(open_index, urls, hashes or [None] * len(urls))


def expand(spec: str) -> list[str]:
    """Expand a pattern to paths or URLs of shards: globs in sorted order, braces in the order of the pattern, each file
    once.

    Raises:
        DataError: a scheme unknown to fsspec, or no file for a pattern or for a part of a brace pattern.
    """
    if "://" in spec:
        remote.check_schemes(spec)
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
        raise absent_images(list(map(without_secrets, missing)))
    return list(dict.fromkeys(found))


def matching(pattern: str) -> list[str]:
    """The paths or URLs that match a glob, sorted. A URL without a wildcard is returned unchecked."""
    if "://" in pattern:
        return remote.find_shards(pattern)
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
