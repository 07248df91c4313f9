"""Hashing, atomic writes, and disk errors as one line."""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vqpipe.errors import ArtifactError, DataError
from vqpipe.words import first_names

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE)
"""Errors of writing. Any other OSError does not come from the file that is being written."""
HINTS = {
    errno.EDQUOT: "Your quota is used up: free some of it and run the same command again",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EMFILE: "Raise the limit on open files (ulimit -n) and run the same command again",
}
BUILTIN_IMAGES = ("builtin:photos", "builtin:photos/train", "builtin:photos/heldout")
BUILTIN_TOKENIZERS = ("builtin:photos-f8",)
MAKE_ROOM = "Finished files are kept: free some space or repair the disk, and run the same command again"


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def valid_text(name: str) -> str:
    """A file name as text that UTF-8 can encode: bytes that are not UTF-8 become `\\xe9`."""
    name = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", name)
    return name.encode("utf-8", "backslashreplace").decode()


def nearest_path(path: Path, hint: str = "Check the path", builtin: Sequence[str] = ()) -> str:
    """The hint for a path that does not exist: the name among `builtin` that lacks only its `builtin:`, a similar name
    in the same folder, else `hint`. No name is similar to a pattern."""
    if f"builtin:{path}" in builtin:
        return f"Did you mean builtin:{path}?"
    if any(mark in path.name for mark in "*?[{"):
        return hint
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        close = []
    return f"Did you mean {path.with_name(close[0])}?" if close else hint


def absent_artifact(path: Path) -> ArtifactError:
    """The error for an artifact that does not exist."""
    is_on_hub = len(path.parts) == 2 and not path.parent.exists()
    hint = f"Check the path, or write hf:{path} for a repository of the model hub" if is_on_hub else "Check the path"
    what = f"{path} is not a vqpipe artifact: there is no such folder"
    return ArtifactError(what, nearest_path(path, hint, BUILTIN_TOKENIZERS))


def absent_images(names: Sequence[str]) -> DataError:
    """The error for images, folders, and patterns that name nothing."""
    hint = "Give a folder, tars, Parquet, a zip, a list of paths, or an artifact"
    return DataError(f"no such images: {first_names(names, 5)}", nearest_path(Path(names[0]), hint, BUILTIN_IMAGES))


def with_final_name(path: Path) -> Path:
    """The path; "." and "..", which have no name to append ".partial" to, are resolved."""
    return path.resolve() if path.name in ("", "..") else path


def partial_path(out: Path) -> Path:
    """The directory of an artifact that is being written."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path, option: str = "--out") -> Path:
    """Return `out`; an ArtifactError if it is not UTF-8, which safetensors and JSON need."""
    if valid_text(str(out)) != str(out):
        raise ArtifactError(f"{option} {out} is not UTF-8", "Choose another name")
    return out


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file so that after a crash `path` is either the old file or the whole new one.

    Yields a temporary path in the same directory and with the same suffix. On exit the file written there is flushed
    and renamed to `path`, and the directory is flushed; after an exception it is deleted.
    """
    temporary = path.with_name(f".writing-{path.name}")
    try:
        yield temporary
        copy_read_permission(temporary)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def json_bytes(value: Any) -> bytes:
    """A JSON file: indented, UTF-8. NaN and infinity are a ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    content = json_bytes(value)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, one JSON object per line; none if there is no file.

    Its writer flushes each row before the next, so a kill can cut off only the last line: a line without its newline
    that is not JSON is left out.

    Raises:
        ArtifactError: another line is not JSON.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else (), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line.endswith(b"\n"):
                hint = "Restore the file, or remove the line"
                raise ArtifactError(f"line {number} of {path} is damaged", hint) from None
    return rows


def copy_read_permission(path: Path) -> None:
    """Let everyone read a file who may list its directory. (safetensors lets only the owner read its files.)"""
    current = path.stat().st_mode
    wanted = current | path.parent.stat().st_mode & 0o444
    if wanted != current:
        path.chmod(wanted)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raise errors of writing `target` as an ArtifactError that states the reason and the free space.

    numpy and safetensors do not pass on the error number. An OSError about another file is raised unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not concerns(error, target):
            raise
        number = error.errno if isinstance(error, OSError) else None
        elsewhere = number in (*FORBIDDEN, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
        free = f" ({free_space(target)} are free)" if number in (*FULL, None) else ""
        failure = ArtifactError(
            f"cannot write {target}: {reason(error)}{free}",
            "Choose another --out" if elsewhere else HINTS.get(number or 0, MAKE_ROOM),
        )
        failure.sysexit_code = 77 if number in FORBIDDEN else 74
        raise failure from None


def concerns(error: Exception, target: Path) -> bool:
    """Whether an error comes from writing `target`."""
    if not isinstance(error, OSError):
        return True
    if error.filename is not None and isinstance(error.filename, (str, bytes)):
        named = Path(os.fsdecode(error.filename))
        if not (named.is_relative_to(target.parent) or target.is_relative_to(named)):
            return False
    if error.errno is None:
        return "written" in str(error)  # numpy: "8192 requested and 4080 written"
    return error.errno in (*FORBIDDEN, *FULL, *BROKEN)


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in a few words."""
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split()) or type(error).__name__


def free_space(path: Path) -> str:
    """The free space of the disk that holds `path`, or will hold it: `1,234.5 MB`."""
    with suppress(OSError):
        existing = next(folder for folder in path.absolute().parents if folder.exists())
        return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB"
    return "unknown MB"
