"""The files of a published tokenizer: found, downloaded and checked; or how to get them by hand."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from vqpipe import downloads
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.files import hash_file
from vqpipe.progress import SILENT, Progress
from vqpipe.words import counted
from vqpipe.zoo import Entry, ZooFile


def fetch(entry: Entry, out: Path | None, progress: Progress = SILENT) -> list[Path]:
    """The files of an entry, in its order, downloaded if they are not in the cache. Their hashes are checked.

    Raises:
        WeightsError: a file cannot be downloaded, or has another hash.
    """
    hint = by_hand(entry, out)
    if not entry.files or not all(file.source for file in entry.files):
        raise WeightsError(f"{entry.name} cannot be downloaded by a program", hint)
    return [downloads.fetch(address(file), hint, sha256=file.sha256, progress=progress) for file in entry.files]


def address(file: ZooFile) -> downloads.Address:
    """The address of a file that has one."""
    parsed = downloads.parse(file.source)
    if parsed is None:
        raise ConfigError(f"{file.source!r} is not an address", "Write hf:OWNER/NAME/FILE or a URL")
    return parsed


def cached(entry: Entry) -> bool:
    """Whether all files are in the cache."""
    return bool(entry.files) and all(
        file.source and downloads.cached(address(file)) is not None for file in entry.files
    )


def check_own_files(entry: Entry, given: Sequence[Path]) -> list[Path]:
    """The user's own copies of the files of an entry, in its order. They are found by name if there are several.

    Raises:
        WeightsError: one is absent, or has another hash; it is left as it is.
    """
    expected = entry.files or (ZooFile(name=given[0].name),)
    if len(given) != len(expected):
        names = " and ".join(file.name for file in expected)
        raise WeightsError(
            f"{counted(len(given), 'files')} for {entry.name}, which has {len(expected)}", f"Pass {names} with --file"
        )
    named = {path.name: path for path in given}
    paths = []
    for file in expected:
        path = given[0] if len(expected) == 1 else named.get(file.name)
        if path is None:
            raise WeightsError(f"no --file is called {file.name}", "Keep the published names of the files")
        if not path.is_file():
            raise WeightsError(f"{path} is not a file", "Check the path of --file")
        if file.sha256 and (actual := hash_file(path)) != file.sha256:
            origin = f" (read from {file.sha256_of})" if file.sha256_of else ""
            raise WeightsError(
                f"{path} has sha256 {actual}; {file.name} of {entry.name} has {file.sha256}{origin}",
                "Download it again; if its publisher replaced it and you trust it, pass the path in place of the name",
            )
        paths.append(path)
    return paths


def by_hand(entry: Entry, out: Path | None) -> str:
    """The command that imports files that were downloaded by hand into the working directory, their hashes, and where
    to get them."""
    names = [file.name for file in entry.files] or ["FILE"]
    words = ["vqpipe", "import-checkpoint", entry.name, *(word for name in names for word in ("--file", name))]
    files = [file.name + (f" (sha256 {file.sha256})" if file.sha256 else "") for file in entry.files]
    return (
        f"Run `{shlex.join([*words, '--out', str(out or 'DIR')])}` after downloading "
        f"{' and '.join(files) or 'its checkpoint as FILE'} from {entry.page} in a browser"
    )
