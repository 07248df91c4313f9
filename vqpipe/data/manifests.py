"""What a file in data_manifests/ means: one data set, its splits, and what a whole copy of each split holds."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePosixPath

from vqpipe.config import from_table, nearest_name, read_toml
from vqpipe.data.framing import Framing, Rule, parse_size
from vqpipe.data.shards import ImageSet
from vqpipe.errors import ConfigError, DataError


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


def check_counts(manifest: DatasetManifest, name: str, split: Split, images: ImageSet) -> None:
    """Compare what was found with what a whole copy holds: counts, and the files' names where their digest is known.

    Raises:
        DataError: another number of images or classes, or other names.
    """
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
