"""Small files for the catalogue of faults, and an index cache of each test's own."""

import io
import os
import sys
import tarfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def pack() -> Callable[[Mapping[str, bytes]], bytes]:
    """pack({"a.png": bytes, ...}) -> the bytes of a tar."""

    def pack(members: Mapping[str, bytes]) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    return pack


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """png(number) -> an encoded image of 8 x 8 pixels that differs by number."""

    def png(number: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
        return file.getvalue()

    return png


@pytest.fixture(scope="session")
def in_child() -> Callable[[Callable[[], None]], int]:
    """in_child(action) runs it in a forked process and returns its exit code, or minus the signal that ended it."""

    def in_child(action: Callable[[], None]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside other threads: the child has none
            child = os.fork()
        if child == 0:
            code = 1
            try:
                action()
                code = 0
            except BaseException as error:
                print(f"in the child: {error!r}", file=sys.__stderr__)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return in_child
