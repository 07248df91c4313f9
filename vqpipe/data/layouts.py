"""A local copy of a data set, laid out as its manifest says -> its images in order."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqpipe.data.folders import Folder, open_folder, walk
from vqpipe.data.manifests import DatasetManifest, NameList, Split
from vqpipe.data.shards import ImageSet, open_images
from vqpipe.errors import DataError


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
