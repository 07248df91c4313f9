"""What a file in data_manifests/ means: one data set, its splits, and what a whole copy of each split holds."""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from vqpipe.config import from_table, nearest_name, read_toml
from vqpipe.data.images import Folder, ImageSet, open_folder, open_images, walk
from vqpipe.data.transforms import Framing, Rule, parse_size
from vqpipe.errors import ConfigError, DataError
from vqpipe.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file to download."""

    file: str
    md5: str = ""
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class NameList:
    """A file of the data set's own that says what a split holds."""

    file: str
    """Its path below the folder that users give, or below the split's."""

    second: str = ""
    """In a text file, whose lines begin with a name: only those lines whose second word is this."""

    key: str = ""
    """In a JSON file: the entry that holds the names, as a list or as the keys of a table; empty: all of its lists."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: what a whole copy holds, and where it lies below the folder that users give.

    With none of `tars`, `files`, `numbers` and `names` the folder's subfolders are classes, and a folder with images of
    its own has none. With one of these a split has no classes but what tars themselves say.
    """

    num_images: int | None = None
    num_classes: int | None = None
    """Counts of a whole copy; left out where unknown."""

    num_kept: int | None = None
    """Of them, how many are left after `min_size`; left out where unknown."""

    stems_sha256: str = ""
    """sha256 of all file names without folder and ending, sorted, one a line; left out where unknown."""

    folders: tuple[str, ...] = ()
    """Where to look; the first that exists is taken, and else the given folder itself."""

    tars: tuple[str, ...] = ()
    """Patterns of WebDataset tars: "*" stands for part of a name, "**/" for any folders."""

    files: tuple[str, ...] = ()
    """Patterns of image files, the same; "{name}" stands for a name of `names`."""

    names: NameList | None = None
    """Which of the files are this split's; at least one pattern then has "{name}"."""

    numbers: tuple[int, int] | None = None
    """For files named by number: the first and last number of this split."""

    stride: int = 1
    """For frames of videos: every how many of each folder's files, by name, counted from the first."""

    min_size: tuple[int, int] | None = None
    """(width, height) in pixels: images that are narrower or lower are left out, and counted as excluded."""

    class_lists: tuple[str, ...] = ()
    """For a flat split with classes: a file of class names, one a line, in the order of the image files' names."""

    devkit: str = ""
    """For a flat split with classes: the unpacked development kit of ILSVRC 2012, which knows them by number."""

    def __post_init__(self) -> None:
        chosen = [key for key in ("tars", "files", "numbers") if getattr(self, key)]
        if len(chosen) > 1:
            raise ConfigError(f"a split is given by {' and by '.join(chosen)}", "Give one of them")
        if (self.names is not None) != any("{name}" in pattern for pattern in self.files):
            raise ConfigError("names go with {name} in files, each needs the other")
        if self.stride < 1 or (self.min_size is not None and min(self.min_size) < 1):
            raise ConfigError("stride and min_size start at 1")
        own = [*self.folders, *self.tars, *self.files, *([self.names.file] if self.names else [])]
        for path in own:
            if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path:
                raise ConfigError(f"{path!r} leaves the data set's folder", "Write paths below it, with /")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way a paper (or its code) cut this set to measure tokenizers."""

    table: str
    """Paper and table."""

    split: str
    rule: Rule
    """See framing.py; our choice where `unstated` says that the paper is silent."""

    size: str
    """As for parse_size."""

    def __post_init__(self) -> None:
        _ = self.framing  # a rule and a size that do not go together are an error here

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
    """How the papers split it, and where they do not say."""

    unstated: tuple[str, ...] = ()
    """What the papers leave open, and what is done here in its place."""

    unverified: tuple[str, ...] = ()
    """What is stated in this file from memory or hearsay: no source for it was at hand when it was written."""

    archives: tuple[Archive, ...] = ()
    measured: tuple[Measured, ...] = ()
    splits: Mapping[str, Split] = field(default_factory=dict)

    def split(self, name: str | None) -> tuple[str, Split]:
        """A split by name; the first for None.

        Raises:
            ConfigError: no split of that name.
        """
        if name is None:
            return next(iter(self.splits.items()))
        if name not in self.splits:
            raise ConfigError(f"{self.name} has no split {name!r}", nearest_name(name, self.splits))
        return name, self.splits[name]


def manifest_names() -> list[str]:
    """What data_manifests/ holds, sorted."""
    return sorted(file.stem for file in Path(str(resources.files("data_manifests"))).glob("*.toml"))


def load_manifest(name: str) -> DatasetManifest:
    """A manifest of data_manifests/ by name, or any TOML file of that form.

    Raises:
        ConfigError: no such manifest, or a mistake in the file.
    """
    if name.endswith(".toml"):
        path = Path(name)
    else:
        known = manifest_names()
        if name not in known:
            raise ConfigError(f"no data set is named {name!r}", nearest_name(name, known))
        path = Path(str(resources.files("data_manifests"))) / f"{name}.toml"
    table = read_toml(path)
    splits = table.pop("splits", {})
    if not isinstance(splits, dict) or not splits:
        raise ConfigError(f"{path} has no splits", "Add at least [splits.all]")
    manifest = from_table(DatasetManifest, table, path.name)
    for measured in manifest.measured:
        if measured.split not in splits:
            raise ConfigError(f"{path}: {measured.table} measures a split {measured.split!r} that is not there")
    return replace(manifest, splits={key: from_table(Split, split, f"splits.{key}") for key, split in splits.items()})


def check_copy(
    manifest: DatasetManifest, name: str, images: ImageSet, allow_partial: bool = False, progress: Progress = SILENT
) -> None:
    """Check the images found in a copy of split `name`; with `allow_partial` only print in what they differ.

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
    """Compare images with a whole copy of split `name`: their counts, and their names where the digest is known.

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
                "Complete the copy, or take it as it is with --allow-partial",
            )
    if split.stems_sha256 and stems_digest(images) != split.stems_sha256:
        raise DataError(
            f"{manifest.name}/{name} has as many images as it should, but other names",
            "Check that it is this split, or take it as it is with --allow-partial",
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


def stems_digest(images: ImageSet) -> str:
    """sha256 of the last part of every key, sorted, one a line."""
    stems = sorted(images.key(i).rpartition("/")[2] for i in range(len(images)))
    return hashlib.sha256("".join(f"{stem}\n" for stem in stems).encode()).hexdigest()


def check_archives(manifest: DatasetManifest, source: Path) -> list[str]:
    """Hash the archives of the manifest that lie in `source`; the names of those that are as they should be.

    Raises:
        DataError: one is not.
    """
    whole = []
    for archive in manifest.archives:
        file = source / archive.file
        if not archive.md5 or not file.is_file():
            continue
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "md5").hexdigest()
        if found != archive.md5:
            raise DataError(f"{file} has the MD5 {found}, {archive.md5} is expected", "Fetch it again")
        whole.append(archive.file)
    return whole


def open_split(manifest: DatasetManifest, split: Split, source: Path) -> ImageSet:
    """The images of a split in the user's copy `source`.

    Files chosen by pattern, number or list come in the order of their paths (by number: of their numbers) and have no
    classes. No path is made from what a list says: names are looked for among the files that are there.

    Raises:
        DataError: no such folder, no images, a list that is not there or names what is not, or a flat split of a data
            set with classes without its class list.
    """
    if not source.is_dir():
        raise DataError(f"{source} is no folder", f"To get {manifest.name}: {one_line(manifest.how_to_obtain)}")
    root = next((source / folder for folder in split.folders if (source / folder).is_dir()), source)
    if split.tars:
        return open_images(find_tars(root, split.tars))
    if split.files or split.numbers is not None:
        return ImageSet([Folder(root, every(split.stride, find_files(root, split, source)))])
    folder = open_folder(root)
    if split.num_classes is not None and not folder.class_names:
        folder = with_classes(folder, read_class_list(split, source, root, len(folder)))
    return ImageSet([folder])


def find_tars(root: Path, patterns: Sequence[str]) -> list[str]:
    """Paths of the tars below `root` that match, sorted; a DataError where none does."""
    found = sorted({str(path) for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    if not found:
        raise DataError(f"{root} holds no {' or '.join(patterns)}", "Check --source")
    return found


def find_files(root: Path, split: Split, source: Path) -> list[str]:
    """Relative paths of the image files of a split given by numbers or patterns, in order."""
    files = sorted(walk(root))
    if split.numbers is not None:
        first, last = split.numbers
        return sorted((file for file in files if first <= file_number(file) <= last), key=file_number)
    rules = [re.compile(as_expression(pattern)) for pattern in split.files]
    names = None if split.names is None else dict.fromkeys(read_names(split.names, source, root), False)
    kept = []
    for file in files:
        for match in filter(None, (rule.fullmatch(file) for rule in rules)):
            name = match.groupdict().get("name")
            if names is None or name is None or name in names:
                kept.append(file)
                if names is not None and name is not None:
                    names[name] = True
                break
    missing = [name for name, found in (names or {}).items() if not found]
    if split.names is not None and missing:
        raise DataError(
            f"{split.names.file} names {len(missing)} of {len(names or {})} that are not in {root}, as {missing[0]!r}",
            "Complete the copy",
        )
    return kept


def as_expression(pattern: str) -> str:
    """The regular expression of a pattern over relative paths: "*", "?", "**/" and "{name}", else as it stands."""
    parts = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]", "{name}": "(?P<name>.+)"}
    return re.sub(r"\*\*/|\*|\?|\{name\}|[^*?{]+|.", lambda part: parts.get(part[0], re.escape(part[0])), pattern)


def every(stride: int, files: Sequence[str]) -> list[str]:
    """Of each folder's files, which are in order, the first and every `stride`-th after it."""
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
    """What a split's list says, in the list's order.

    Raises:
        DataError: it is not there, cannot be read, or names nothing.
    """
    file = next((place / names.file for place in (source, root, root.parent) if (place / names.file).is_file()), None)
    if file is None:
        raise DataError(f"{source} has no {names.file}, which says what this split holds", "Put it there")
    try:
        text = file.read_text(encoding="utf-8")
        found = names_of(json.loads(text), names.key) if file.suffix == ".json" else words_of(text, names.second)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a list of names: {error!r}", "Fetch it again") from None
    if not found:
        raise DataError(f"{file} names nothing for this split", "Fetch it again")
    return [name.removeprefix("./") for name in found]


def names_of(table: Any, key: str) -> list[str]:
    """The names in a JSON value: a list, the keys of the table under `key`, or all lists of a table, one by one."""
    chosen = table[key] if key else table
    if isinstance(chosen, dict):
        parts = [list(chosen)] if key else list(chosen.values())
        chosen = [name for part in parts for name in part] if all(isinstance(part, list) for part in parts) else None
    if not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen):
        raise TypeError("no list of strings")
    return chosen


def words_of(text: str, second: str) -> list[str]:
    """The first word of each line, or of those lines whose second word is `second`."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [words[0] for words in lines if not second or words[1:2] == [second]]


def read_class_list(split: Split, source: Path, root: Path, num_images: int) -> list[str]:
    """The class name of each file of a flat split, in the order of file names."""
    found = [place / file for file in split.class_lists for place in (source, root.parent) if (place / file).is_file()]
    kit = source / split.devkit / "data"
    if found:
        names = found[0].read_text(encoding="utf-8").split()
    elif split.devkit and kit.is_dir():
        found, names = [kit], read_devkit(kit)
    else:
        places = [*split.class_lists, *([f"{split.devkit}/"] if split.devkit else [])]
        hint = f"Sort the images into class folders{', or put there ' + ' or '.join(places) if places else ''}"
        raise DataError(f"{root} is flat, and nothing in {source} says its classes", hint)
    if len(names) != num_images:
        raise DataError(f"{found[0]} lists {len(names):,} images, {root} holds {num_images:,}", "Complete the copy")
    return names


def read_devkit(kit: Path) -> list[str]:
    """WordNet id of each ILSVRC 2012 validation image: its ground-truth number, looked up in the kit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(kit / "meta.mat"), squeeze_me=True)["synsets"]
        names = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        truth = (kit / "ILSVRC2012_validation_ground_truth.txt").read_text(encoding="utf-8").split()
        return [names[int(number)] for number in truth]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{kit} is not the ILSVRC 2012 development kit: {error!r}", "Unpack it again") from error


def with_classes(folder: Folder, names: list[str]) -> Folder:
    """The same files with a class each, classes numbered in the order of their names."""
    classes = sorted(set(names))
    number = {name: label for label, name in enumerate(classes)}
    files = [os.fsdecode(file.as_py()) for file in folder.files]
    return Folder(folder.root, files, [number[name] for name in names], classes)


def one_line(text: str) -> str:
    return " ".join(text.split())
