"""Small files, forked processes, and an index cache for each test."""

import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """png(number) -> an encoded image of 8 x 8 pixels that differs by number."""

    def png(number: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
        return file.getvalue()

    return png


@pytest.fixture(scope="session")
def fork() -> Callable[[Callable[[], None]], int]:
    """fork(action) runs `action` in a forked process and returns the process id."""

    def fork(action: Callable[[], None]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads: the child has none
            child = os.fork()
        if child == 0:
            code = 1
            try:
                action()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException as error:
                print(f"in the child: {error!r}", file=sys.__stderr__)
            finally:
                os._exit(code)
        return child

    return fork


@pytest.fixture(scope="session")
def in_child(fork: Callable[[Callable[[], None]], int]) -> Callable[[Callable[[], None]], int]:
    """in_child(action) runs `action` in a forked process; returns its exit code, or minus the signal that ended it."""

    def in_child(action: Callable[[], None]) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])

    return in_child


@pytest.fixture(scope="session")
def remaining() -> Callable[[Callable[[int, int], bool]], list[int]]:
    """remaining(test) waits up to ten seconds until test(process, group) is false for all running processes (zombies
    excluded), and returns the processes for which it is still true."""

    def remaining(test: Callable[[int, int], bool]) -> list[int]:
        deadline = time.monotonic() + 10
        while (left := [number for number, group in running() if test(number, group)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    return remaining


def running() -> Iterator[tuple[int, int]]:
    """The id and the group of every running process."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = status.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if state not in "ZX":
            yield int(status.parent.name), int(group)
