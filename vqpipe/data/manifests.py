"""The files of data_manifests/: a data set, its splits, the layout of a copy on disk, and the counts of a complete
copy."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from vqpipe.config import from_table, nearest_name, read_toml
from vqpipe.data.folders import Folder, open_folder, use, visible, walk
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.sources import number_labels
from vqpipe.data.transforms import Framing, Rule
from vqpipe.errors import ConfigError, DataError
from vqpipe.image_size import parse_size
from vqpipe.progress import SILENT, Progress

ANY_IMAGES = "folder"
"""The manifest of any images, whose source is not the copy of a known data set."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file to download."""

    file: str
    md5: str = ""
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class NameList:
    """A file of the data set that lists the images of a split."""

    file: str
    """Its path below the source folder, or below the split's."""

    second: str = ""
    """In a text file, which has a name per line: lines are a name and a second word, and only those with this one are
    of the split."""

    key: str = ""
    """In a JSON file: the key of the names, which are a list or the keys of an object; empty: all lists of the file."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: the counts of a complete copy, and its place below the source folder.

    Without `tars`, `files`, `numbers` and `names` the subfolders are classes, and a folder with images of its own has
    none. With one of them a split has no classes, except those stored in tars.
    """

    num_images: int | None = None
    num_classes: int | None = None
    """Counts of a complete copy; None where unknown."""

    num_kept: int | None = None
    """The number of images left after `min_size`; None where unknown."""

    stems_sha256: str = ""
    """sha256 of all file names without folder and extension, sorted, one per line; empty where unknown."""

    folders: tuple[str, ...] = ()
    """Candidate folders: the first that exists is used, else the source folder itself."""

    tars: tuple[str, ...] = ()
    """Patterns of WebDataset tars: "*" matches part of a name, "**/" any folders."""

    files: tuple[str, ...] = ()
    """Patterns of image files; "{name}" matches a name of `names`."""

    names: NameList | None = None
    """The list of this split's files; at least one pattern then contains "{name}"."""

    numbers: tuple[int, int] | None = None
    """For files with numbers as names: the first and last number of this split."""

    stride: int = 1
    """For frames of videos: use the first and every `stride`-th file after it, in each folder, by name."""

    min_size: tuple[int, int] | None = None
    """(width, height) in pixels: smaller images are left out, and counted as excluded."""

    class_lists: tuple[str, ...] = ()
    """For a flat split with classes: a file of class names, one per line, in the order of the image file names."""

    devkit: str = ""
    """For a flat split with classes: the unpacked development kit of ILSVRC 2012, which lists them by number."""

    def __post_init__(self) -> None:
        chosen = [key for key in ("tars", "files", "numbers") if getattr(self, key)]
        if len(chosen) > 1:
            raise ConfigError(f"a split has {' and '.join(chosen)}", "Give one of them")
        if (self.names is not None) != any("{name}" in pattern for pattern in self.files):
            raise ConfigError("a split needs both names and {name} in files, or neither")
        if self.stride < 1 or (self.min_size is not None and min(self.min_size) < 1):
            raise ConfigError("stride and min_size are at least 1")
        for path in (*self.folders, *self.tars, *self.files, *([self.names.file] if self.names else [])):
            if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path:
                raise ConfigError(f"{path!r} is outside the data set's folder", "Use paths below it, with /")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A crop of this set that a paper (or its code) evaluated tokenizers with."""

    table: str
    """Paper and table."""

    split: str
    rule: Rule
    """See transforms.py; our choice where `unstated` says so."""

    size: str
    """See `parse_size`."""

    def __post_init__(self) -> None:
        _ = self.framing  # validates rule and size

    @property
    def framing(self) -> Framing:
        """The crop."""
        return Framing(rule=self.rule, size=parse_size(self.size))


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """One data set. `splits` is in the order of the file; the first is the default."""

    name: str
    title: str
    licence: str
    homepage: str
    how_to_obtain: str
    paper_split: str
    """The split of the papers."""

    unstated: tuple[str, ...] = ()
    """What the papers do not state, and what is done here instead."""

    unverified: tuple[str, ...] = ()
    """Statements of this file without a source."""

    archives: tuple[Archive, ...] = ()
    measured: tuple[Measured, ...] = ()
    splits: Mapping[str, Split] = field(default_factory=dict)

    def split(self, name: str | None) -> tuple[str, Split]:
        """Return (name, split); the first split for None.

        Raises:
            ConfigError: unknown name.
        """
        if name is None:
            return next(iter(self.splits.items()))
        if name not in self.splits:
            raise ConfigError(f"{self.name} has no split {name!r}", nearest_name(name, self.splits))
        return name, self.splits[name]


def manifest_folder() -> Path:
    """The folder of the manifests: inside vqpipe in an installed wheel, beside it in a checkout."""
    installed = Path(__file__).parents[1] / "data_manifests"
    return installed if installed.is_dir() else installed.parents[1] / "data_manifests"


def manifest_names() -> list[str]:
    """The names of data_manifests/, sorted."""
    return sorted(file.stem for file in manifest_folder().glob("*.toml"))


def load_manifest(name: str) -> DatasetManifest:
    """Load a manifest of data_manifests/ by name, or a TOML file by path.

    Raises:
        ConfigError: unknown name, or an error in the file.
    """
    if name.endswith(".toml"):
        path = Path(name)
    else:
        known = manifest_names()
        if name not in known:
            raise ConfigError(f"unknown data set {name!r}", nearest_name(name, known))
        path = manifest_folder() / f"{name}.toml"
    table = read_toml(path)
    splits = table.pop("splits", {})
    if not isinstance(splits, dict) or not splits:
        raise ConfigError(f"{path} has no splits", "Add [splits.all]")
    manifest = from_table(DatasetManifest, table, path.name)
    for measured in manifest.measured:
        if measured.split not in splits:
            raise ConfigError(f"{path}: {measured.table} is measured on the unknown split {measured.split!r}")
    return replace(manifest, splits={key: from_table(Split, split, f"splits.{key}") for key, split in splits.items()})


def check_copy(
    manifest: DatasetManifest, name: str, images: ImageSet, allow_partial: bool = False, progress: Progress = SILENT
) -> None:
    """Check the images found in a copy of split `name`; with `allow_partial` only print how they differ.

    Raises:
        DataError: no images, another number of images or classes, or other names.
    """
    if not len(images):
        raise DataError(f"no images of {manifest.name}/{name} were found", "Check --source and --split")
    try:
        check_counts(manifest, name, images)
    except DataError as error:
        if not allow_partial:
            raise
        progress.message(f"accepted with --allow-partial: {error.what}")


def check_counts(manifest: DatasetManifest, name: str, images: ImageSet) -> None:
    """Compare images with a complete copy of split `name`: their counts, and their names where their sha256 is known.

    Raises:
        DataError: another number of images or classes, or other names.
    """
    split = manifest.splits[name]
    for what, expected, found in (
        ("images", split.num_images, len(images)),
        ("classes", split.num_classes, images.num_classes or 0),
    ):
        if expected is not None and found != expected:
            raise DataError(
                f"{manifest.name}/{name} should hold {expected:,} {what}, found {found:,}",
                "Complete the copy, or accept it with --allow-partial",
            )
    if split.stems_sha256 and hash_stems(images) != split.stems_sha256:
        raise DataError(
            f"{manifest.name}/{name} holds the right number of images, but other names",
            "Check that it is this split, or accept it with --allow-partial",
        )


def check_kept(manifest: DatasetManifest, name: str, num_images: int, allow_partial: bool = False) -> None:
    """Check how many images of split `name` are left after `min_size` and unreadable files.

    Raises:
        DataError: none, or another number than the manifest's.
    """
    if not num_images:
        raise DataError(f"no image of {manifest.name}/{name} is left", "Check its min_size and its files")
    kept = manifest.splits[name].num_kept
    if kept not in (None, num_images) and not allow_partial:
        raise DataError(
            f"{manifest.name}/{name} should keep {kept:,} images, {num_images:,} are left",
            "Accept them with --allow-partial",
        )


def hash_stems(images: ImageSet) -> str:
    """sha256 of the last part of every key, sorted, one per line."""
    stems = sorted(images.key(i).rpartition("/")[2] for i in range(len(images)))
    return hashlib.sha256("".join(f"{stem}\n" for stem in stems).encode()).hexdigest()


def check_archives(manifest: DatasetManifest, source: Path) -> list[str]:
    """Check the MD5 of the manifest's archives found in `source`; return their names.

    Raises:
        DataError: another MD5.
    """
    checked = []
    for archive in manifest.archives:
        file = source / archive.file
        if not archive.md5 or not file.is_file():
            continue
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "md5").hexdigest()
        if found != archive.md5:
            raise DataError(f"{file} has the MD5 {found}, {archive.md5} is expected", "Download it again")
        checked.append(archive.file)
    return checked


def open_split(manifest: DatasetManifest, split: Split, source: str | Path) -> ImageSet:
    """Open the images of a split in the user's copy `source`; for the manifest `folder`, anything `open_images` opens.

    Files selected by pattern or list are ordered by path, files selected by number by that number; they have no
    classes. Names of a list are only compared with existing files; no path is built from them.

    Raises:
        DataError: no such folder, no images, a missing list or a listed file that is missing, or a flat split with
            classes without its class list.
    """
    if manifest.name == ANY_IMAGES and split == Split():
        return open_images(source)
    source = Path(source)
    if not source.is_dir():
        raise DataError(f"{source} is not a folder", f"To get {manifest.name}: {manifest.how_to_obtain.strip()}")
    root = next((source / folder for folder in split.folders if (source / folder).is_dir()), source)
    if split.tars:
        return open_images(find_tars(root, split.tars))
    if split.files or split.numbers is not None:
        left_out = Counter[str]()
        files = every(split.stride, find_files(root, split, source, left_out))
        return ImageSet([Folder(root, files, left_out=left_out)])
    folder = open_folder(root)
    if split.num_classes is not None and not folder.class_names:
        folder = with_classes(folder, read_class_list(split, source, root, len(folder)))
    return ImageSet([folder])


def find_tars(root: Path, patterns: Sequence[str]) -> list[str]:
    """Paths of the tars below `root` that match, sorted; a DataError if there are none."""
    found = sorted({path for pattern in patterns for path in visible(root, pattern) if os.path.isfile(path)})
    if not found:
        raise DataError(f"{root} holds no {' or '.join(patterns)}", "Check --source")
    return found


def find_files(root: Path, split: Split, source: Path, left_out: Counter[str]) -> list[str]:
    """Relative paths of the image files of a split given by numbers or patterns, in order."""
    files = sorted(walk(root, left_out))
    if split.numbers is not None:
        first, last = split.numbers
        return sorted((file for file in files if first <= file_number(file) <= last), key=file_number)
    rules = [re.compile(as_expression(pattern)) for pattern in split.files]
    listed = dict.fromkeys([] if split.names is None else read_names(split.names, source, root))
    kept, found = list[str](), set[str | None]()
    for file in files:
        names = {match.groupdict().get("name") for rule in rules if (match := rule.fullmatch(file)) is not None}
        if None in names or names & listed.keys():  # None: of a pattern without {name}
            kept.append(file)
            found |= names
    if split.names is not None:
        if (root / split.names.file).is_file():
            use(left_out, split.names.file)
        missing = [name for name in listed if name not in found]
        if missing:
            raise DataError(
                f"{root} lacks {len(missing)} of the {len(listed)} files in {split.names.file}, as {missing[0]!r}",
                "Complete the copy",
            )
    return kept


def as_expression(pattern: str) -> str:
    """The regular expression for a pattern of relative paths with "*", "?", "**/" and "{name}", which is the same name
    wherever it occurs."""
    name = "(?P<name>.+)"
    parts = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]", "{name}": name}
    found = re.sub(r"\*\*/|\*|\?|\{name\}|[^*?{]+|.", lambda part: parts.get(part[0], re.escape(part[0])), pattern)
    before, first, after = found.partition(name)
    return before + first + after.replace(name, "(?P=name)")


def every(stride: int, files: Sequence[str]) -> list[str]:
    """Of each folder's sorted files, the first and every `stride`-th after it."""
    seen: dict[str, int] = defaultdict(int)
    kept = []
    for file in files:
        folder = file.rpartition("/")[0]
        if seen[folder] % stride == 0:
            kept.append(file)
        seen[folder] += 1
    return kept


def file_number(file: str) -> int:
    """`images/00042.png` -> 42; -1 for other names."""
    stem = os.path.splitext(file.rpartition("/")[2])[0]
    return int(stem) if stem.isascii() and stem.isdigit() else -1


def read_names(names: NameList, source: Path, root: Path) -> list[str]:
    """The names in a split's list, in its order.

    Raises:
        DataError: it is missing, unreadable or empty.
    """
    file = next((place / names.file for place in (source, root, root.parent) if (place / names.file).is_file()), None)
    if file is None:
        raise DataError(f"{source} has no {names.file}, the list of this split", "Put it there")
    try:
        text = file.read_text(encoding="utf-8")
        found = names_of(json.loads(text), names.key) if file.suffix == ".json" else names_of_lines(text, names.second)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a list of names: {error!r}", "Download it again") from None
    if not found:
        raise DataError(f"{file} lists nothing for this split", "Download it again")
    return [name.removeprefix("./") for name in found]


def names_of(table: Any, key: str) -> list[str]:
    """The names in a JSON value: a list, the keys of the table under `key`, or all lists of a table."""
    chosen = table[key] if key else table
    if isinstance(chosen, dict):
        parts = [list(chosen)] if key else list(chosen.values())
        chosen = [name for part in parts for name in part] if all(isinstance(part, list) for part in parts) else None
    if not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen):
        raise TypeError("no list of strings")
    return chosen


def names_of_lines(text: str, second: str = "") -> list[str]:
    """The lines that are not empty; with `second` the first words of those with that second word."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [line.split()[0] for line in lines if line.split()[1:2] == [second]] if second else lines


def read_class_list(split: Split, source: Path, root: Path, num_images: int) -> list[str]:
    """The class name of each file of a flat split, in the order of file names."""
    found = [place / file for file in split.class_lists for place in (source, root.parent) if (place / file).is_file()]
    kit = source / split.devkit / "data"
    if found:
        try:
            names = names_of_lines(found[0].read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{found[0]} is not a list of names: {error!r}", "Download it again") from None
    elif split.devkit and kit.is_dir():
        found, names = [kit], read_devkit(kit)
    else:
        places = [*split.class_lists, *([f"{split.devkit}/"] if split.devkit else [])]
        hint = f"Sort the images into class folders{', or put there ' + ' or '.join(places) if places else ''}"
        raise DataError(f"{root} is flat, and {source} has no list of its classes", hint)
    if len(names) != num_images:
        raise DataError(f"{found[0]} lists {len(names):,} images, {root} holds {num_images:,}", "Complete the copy")
    return names


def read_devkit(kit: Path) -> list[str]:
    """The WordNet id of each ILSVRC 2012 validation image: its ground-truth number, looked up in the kit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(kit / "meta.mat"), squeeze_me=True)["synsets"]
        names = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        truth = (kit / "ILSVRC2012_validation_ground_truth.txt").read_text(encoding="utf-8").split()
        return [names[int(number)] for number in truth]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{kit} is not the ILSVRC 2012 development kit: {error!r}", "Unpack it again") from error


def with_classes(folder: Folder, names: list[str]) -> Folder:
    """The same files with classes, numbered in the order of their names."""
    files = [os.fsdecode(file.as_py()) for file in folder.files]
    return Folder(folder.root, files, *number_labels(names), folder.left_out)
