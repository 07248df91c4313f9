"""Files that can be trusted after a crash: hashed, flushed to disk, replaced in one rename."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vqpipe.faults import fault


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_a_name(path: Path) -> Path:
    """The path; of "." and "..", which have no name to show or to put ".partial" after, what they stand for."""
    return path.resolve() if path.name in ("", "..") else path


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(f".writing-{path.name}")
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        fault("write")
        temporary.write_text(text, encoding="utf-8")
        fault("written")
        flush_to_disk(temporary)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def rename(source: Path, target: Path) -> None:
    """Give a flushed file or directory its name, in one step; a file that has it already is replaced."""
    fault("rename")
    os.replace(source, target)
    fault("renamed")


def let_read(path: Path) -> None:
    """Let those read a file who may list its directory: what safetensors writes, only its owner may read."""
    now = path.stat().st_mode
    asked = now | path.parent.stat().st_mode & 0o444
    if asked != now:
        path.chmod(asked)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fault("fsync")
        os.fsync(handle)
        fault("fsynced")
    finally:
        os.close(handle)
