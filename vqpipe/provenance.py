"""How, where and when an artifact was made. Not part of any digest."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from vqpipe.files import valid_text


def provenance(world_size: int) -> dict[str, Any]:
    """Versions, git commit, hardware, world size and command of this process."""
    return {**environment(world_size), "git": git_commit(), "command": command()}


def command() -> list[str]:
    """The command line of this process: the name of its program, and the words after it."""
    return [valid_text(word) for word in (Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:]))]


def without_secrets(word: str) -> str:
    """A URL, or a word of a command line: URLs without password, and those of web servers without query, which may hold
    a token."""
    word = re.sub(r"(\w://)[^/@:\s]*:[^/@\s]*@", r"\1", word)
    return re.sub(r"(https?://)(?:[^/@\s]*@)?([^?#\s]*)(\?\S*)?", r"\1\2", word)


def command_again() -> str:
    """The command line of this process, to copy and run again, with `--out DIR` as a placeholder."""
    words = ["vqpipe", *command()[1:]]
    for place, word in enumerate(words):
        if word.startswith("--out="):
            words[place] = "--out=DIR"
        elif word == "--out":
            words[place + 1 : place + 2] = ["DIR"]
    return shlex.join(words)


def stage_command(words: Sequence[str]) -> list[str]:
    """The words of a command line from the name of the command on: `train ...` of `vqpipe --import NAME train ...`."""
    words = list(words[1:])
    while words and words[0].startswith("--import"):
        words = words[1 if "=" in words[0] else 2 :]
    return words


def options_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line with their values, "" for those without: `--a b --c=d --e` -> [("--a", "b"),
    ("--c", "d"), ("--e", "")]."""
    found = []
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found.append((option, value if equals else "" if following.startswith("--") else following))
    return found


def environment(world_size: int) -> dict[str, Any]:
    """What may change the bits of a result: versions, hardware, number of threads and of ranks."""
    packages = ("vqpipe", "torch", "numpy", "faiss-gpu", "faiss-cpu", "open_clip_torch", "timm", "pillow")
    hardware: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        hardware["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            hardware["gpu"] = torch.cuda.get_device_name()
    software = {"python": platform.python_version(), **versions(packages)}
    return {"versions": software, "hardware": hardware, "world_size": world_size}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each of these packages that is installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def version(package: str) -> str:
    """The version of an installed package. (Looking it up parses all of the metadata of the package.)"""
    return metadata.version(package)


@cache
def git_commit() -> str | None:
    """The commit of this checkout, marked `-dirty` if files were changed; None outside a checkout.

    It is that of the first call: what changes later is not the code of this process.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.decode().strip() or None


def now() -> str:
    """The time, UTC, to seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
