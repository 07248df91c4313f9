"""What a file in data_manifests/ means: one data set, its splits, and what a whole copy of each split holds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from vqpipe.config import from_table, nearest_name, read_toml
from vqpipe.data.folders import Folder, open_folder, walk
from vqpipe.data.shards import ImageSet
from vqpipe.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file to download."""

    file: str
    md5: str = ""
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: what a whole copy holds, and where it lies below the folder that users give."""

    num_images: int | None = None
    num_classes: int | None = None
    """Counts of a whole copy; left out where unknown."""

    folders: tuple[str, ...] = ()
    """Where to look; the first that exists is taken, and else the given folder itself."""

    numbers: tuple[int, int] | None = None
    """For files named by number: the first and last number of this split. Such a split has no classes."""

    class_lists: tuple[str, ...] = ()
    """For a flat split with classes: a file of class names, one a line, in the order of the image files' names."""

    devkit: str = ""
    """For a flat split with classes: the unpacked development kit of ILSVRC 2012, which knows them by number."""


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

    archives: tuple[Archive, ...] = ()
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


def load_manifest(name: str) -> DatasetManifest:
    """A manifest of data_manifests/ by name, or any TOML file of that form.

    Raises:
        ConfigError: no such manifest, or a mistake in the file.
    """
    if name.endswith(".toml"):
        path = Path(name)
    else:
        folder = Path(str(resources.files("data_manifests")))
        known = [file.stem for file in folder.glob("*.toml")]
        if name not in known:
            raise ConfigError(f"no data set is named {name!r}", nearest_name(name, known))
        path = folder / f"{name}.toml"
    table = read_toml(path)
    splits = table.pop("splits", {})
    if not isinstance(splits, dict) or not splits:
        raise ConfigError(f"{path} has no splits", "Add at least [splits.all]")
    manifest = from_table(DatasetManifest, table, path.name)
    return replace(manifest, splits={key: from_table(Split, split, f"splits.{key}") for key, split in splits.items()})


def open_split(manifest: DatasetManifest, split: Split, source: Path) -> ImageSet:
    """The images of a split in the folder `source`, by the layout that its manifest describes.

    Raises:
        DataError: no images, or classes that cannot be found out.
    """
    if not source.is_dir():
        raise DataError(f"{source} is no folder", f"To get {manifest.name}: {one_line(manifest.how_to_obtain)}")
    root = next((source / folder for folder in split.folders if (source / folder).is_dir()), source)
    if split.numbers is not None:
        first, last = split.numbers
        files = [file for file in sorted(walk(root)) if first <= file_number(file) <= last]
        return ImageSet([Folder(root, sorted(files, key=file_number))])
    folder = open_folder(root)
    if split.num_classes is not None and not folder.class_names:
        folder = with_classes(folder, read_class_list(split, source, root, len(folder)))
    return ImageSet([folder])


def check_counts(manifest: DatasetManifest, name: str, split: Split, images: ImageSet) -> None:
    """Compare what was found with what a whole copy holds.

    Raises:
        DataError: another number of images or classes.
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


def file_number(file: str) -> int:
    """`images/00042.png` -> 42; -1 for other names."""
    stem = os.path.splitext(file.rpartition("/")[2])[0]
    return int(stem) if stem.isascii() and stem.isdigit() else -1


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
    classes = sorted(set(names))
    number = {name: label for label, name in enumerate(classes)}
    files = [os.fsdecode(file.as_py()) for file in folder.files]
    return Folder(folder.root, files, [number[name] for name in names], classes)


def one_line(text: str) -> str:
    return " ".join(text.split())
