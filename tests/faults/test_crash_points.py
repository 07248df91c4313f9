"""A process that is killed at any file operation leaves its result absent or whole, and a rerun ends in the same files.

The process is killed at its first file operation (tests/faults/crash.py), then at its second, ... until it ends by
itself.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vqpipe.artifacts import Artifact, draft, open_artifact, start, states
from vqpipe.artifacts.states import States
from vqpipe.errors import ArtifactError

InChild = Callable[[Callable[[], None]], int]
EachCrash = Callable[[Callable[[], None], Path, int], Iterator[int]]
LIMIT = 500
"""More file operations than any of these actions has."""


def every(stride: int) -> pytest.MarkDecorator:
    """Some of the operations in a fast run, all in a slow one: forking a process that has loaded torch takes time."""
    return pytest.mark.parametrize("stride", [stride, pytest.param(1, marks=pytest.mark.slow)])


@pytest.fixture
def each_crash(crash: ModuleType, in_child: InChild, monkeypatch: pytest.MonkeyPatch) -> EachCrash:
    """each_crash(action, folder, stride) kills `action` at every stride-th file operation below `folder`; it yields
    after each death, and ends when the action ends by itself.

    Nothing is flushed: a process that dies loses nothing that it wrote. Power loss is a matter of order, which
    test_disk.py checks.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def each(action: Callable[[], None], folder: Path, stride: int) -> Iterator[int]:
        def armed(number: int) -> Callable[[], None]:
            return lambda: (crash.arm(number, folder), action())[1]

        for number in range(1, LIMIT, stride):
            code = in_child(armed(number))
            if code == 0:
                assert number > 20, "file operations are missing"
                return
            assert code == -signal.SIGKILL
            yield number
        raise AssertionError("the action never ended by itself")

    return each


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(out: Path, written: list[str]) -> Artifact:
    """Publish an artifact of two files, or open the published one; appends the names of the files it wrote."""
    begun = start(out, "codebook", {"k": 3}, {"images": "0" * 64})
    if isinstance(begun, Artifact):
        return begun
    with begun:
        for name in ("a.bin", "sub/b.bin"):
            if begun.record(name) is None:
                with begun.write(name, rows=1) as path:
                    path.write_bytes(name.encode() * 100)
                written.append(name)
        return begun.publish({"k": 3})


@every(11)
def test_killed_artifact_is_absent_or_whole_and_finished_files_are_not_written_again(
    tmp_path: Path, each_crash: EachCrash, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(draft, "provenance", lambda world_size: {})
    monkeypatch.setattr(draft, "environment", lambda world_size: {})
    monkeypatch.setattr(draft, "now", lambda: "then")
    make(tmp_path / "whole" / "out", [])
    expected = tree(tmp_path / "whole")
    folder = tmp_path / "killed"
    kept = 0
    for number in each_crash(lambda: void(make(folder / "out", [])), folder, stride):
        recorded = len(list(folder.glob("out.partial/.records/[!.]*.json")))
        if (folder / "out").exists():
            open_artifact(folder / "out").verify()
        else:
            with pytest.raises(ArtifactError):
                open_artifact(folder / "out")
        again: list[str] = []
        make(folder / "out", again)
        assert tree(folder) == expected, f"after file operation {number}"
        assert len(again) + recorded <= 2
        kept += recorded
        shutil.rmtree(folder)
    assert kept > 1


def void(result: object) -> None:
    """An action returns nothing."""


@every(4)
def test_killed_save_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, each_crash: EachCrash, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(states, "SHARED_BYTES", 64)

    def save(folder: Path, step: int) -> None:
        tensors = {"codes": torch.full((40,), step // 9), "weight": torch.full((3,), step)}
        parts = {"model": tensors, "optimizer": {"moment": torch.full((2,), -step)}}
        States(folder, "request").save(step, parts, {"images": step * 2}, unchanging={"model": ["codes"]})

    for step in (3, 6):
        save(tmp_path / "begun", step)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    save(tmp_path / "whole", 9)
    expected, folder = tree(tmp_path / "whole"), tmp_path / "killed"
    shutil.copytree(tmp_path / "begun", folder)
    steps = set()
    for number in each_crash(lambda: save(folder, 9), folder, stride):
        path, problems = States(folder, "request").newest()
        assert path is not None
        assert problems == []
        assert not list(folder.glob(".*"))
        state = states.read(path)
        assert state.values == {"images": state.step * 2}
        assert state.parts["model"]["weight"].tolist() == [state.step] * 3
        assert state.parts["model"]["codes"].tolist() == [state.step // 9] * 40
        steps.add(state.step)
        save(folder, 9)
        assert tree(folder) == expected, f"after file operation {number}"
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "begun", folder)
    assert steps == {6, 9}


@pytest.mark.parametrize("event", ["open", "torn", "fsync", "rename", "unlink", "mkdir"])
def test_every_kind_of_file_operation_is_a_crash_point(
    event: str, tmp_path: Path, crash: ModuleType, in_child: InChild
) -> None:
    def write() -> None:
        crash.arm(1, tmp_path / "folder", f"{event} *")
        (tmp_path / "elsewhere").write_text("not below the folder", encoding="utf-8")
        States(tmp_path / "folder").save(1, {"model": {"a": torch.ones(2)}})
        for step in (2, 3):
            States(tmp_path / "folder").save(step, {"model": {"a": torch.ones(2)}})

    assert in_child(write) == -signal.SIGKILL
    assert (tmp_path / "elsewhere").exists()
