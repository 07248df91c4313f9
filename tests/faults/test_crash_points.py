"""Every moment of a write is a moment to die at: afterwards the result is absent or whole, and a rerun is the same run.

The process is killed at the first crash point (`vqpipe.faults`), then at the second, ... until it ends by itself.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqpipe import faults
from vqpipe.artifacts import Artifact, draft, open_artifact, start
from vqpipe.artifacts.saved import Checkpoints
from vqpipe.artifacts.saved import Saved as Clustered
from vqpipe.errors import ArtifactError, ConfigError
from vqpipe.training import checkpoints

pytestmark = pytest.mark.usefixtures("fast_disk")

InChild = Callable[[Callable[[], None]], int]
LIMIT = 200
"""More crash points than any of these has."""


def every(stride: int) -> pytest.MarkDecorator:
    """A fork of a process that holds torch takes its time: some of the points, and all when there is time."""
    return pytest.mark.parametrize("stride", [stride, pytest.param(1, marks=pytest.mark.slow)])


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: a process that dies loses nothing that it wrote; that power loss is survived too is a
    matter of order, which row 39 looks at."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def each_crash(
    action: Callable[[], None], in_child: InChild, monkeypatch: pytest.MonkeyPatch, stride: int
) -> Iterator[int]:
    """Kill `action` at its first crash point, its next, ...; yields after each death, and ends when none is left."""
    for number in range(1, LIMIT, stride):
        with monkeypatch.context() as patch:
            patch.setenv(faults.VARIABLE, f"any:{number}")
            code = in_child(action)
        if code == 0:
            assert number > 9, "crash points are missing"
            return
        assert code == -signal.SIGKILL
        yield number
    raise AssertionError("the run never ended by itself")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(out: Path, written: list[str]) -> Artifact:
    """Publish an artifact of two files, or find it published; notes down which files it wrote."""
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
def test_rows_2_4_11_an_artifact_is_absent_or_whole_and_its_files_are_not_made_twice(
    tmp_path: Path, in_child: InChild, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(draft, "provenance", lambda world_size: {})
    monkeypatch.setattr(draft, "surroundings", lambda world_size: {})
    monkeypatch.setattr(draft, "now", lambda: "then")
    make(tmp_path / "whole" / "out", [])
    expected = tree(tmp_path / "whole")
    folder = tmp_path / "killed"
    spared = 0
    for number in each_crash(lambda: void(make(folder / "out", [])), in_child, monkeypatch, stride):
        recorded = len(list(folder.glob("out.partial/.records/[!.]*.json")))
        if (folder / "out").exists():
            open_artifact(folder / "out").verify()
        else:
            with pytest.raises(ArtifactError):
                open_artifact(folder / "out")
        again: list[str] = []
        make(folder / "out", again)
        assert tree(folder) == expected, f"after crash point {number}"
        assert len(again) + recorded <= 2
        spared += recorded
        shutil.rmtree(folder)
    assert spared > 1


def void(result: object) -> None:
    """An action returns nothing."""


@every(11)
def test_rows_6_7_9_a_training_checkpoint_is_the_old_one_or_the_new_one(
    tmp_path: Path, in_child: InChild, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(checkpoints, "SHARED_BYTES", 64)

    def save(run: Path, step: int) -> None:
        tensors = {"codes": torch.full((40,), step // 9), "weight": torch.full((3,), step)}
        parts = {"model": tensors, "optimizer": {"moment": torch.full((2,), -step)}}
        checkpoints.write(run, {"step": step}, parts, {"model": ["codes"]}, keep_every=0)

    for step in (3, 6):
        save(tmp_path / "begun", step)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    save(tmp_path / "whole", 9)
    expected, run = tree(tmp_path / "whole"), tmp_path / "killed"
    shutil.copytree(tmp_path / "begun", run)
    steps = set()
    for number in each_crash(lambda: save(run, 9), in_child, monkeypatch, stride):
        found, passed_over = checkpoints.newest(run)
        assert found is not None
        assert passed_over == []
        saved = checkpoints.read(found)
        step = saved.counters["step"]
        assert saved.parts["model"]["weight"].tolist() == [step] * 3
        assert saved.parts["model"]["codes"].tolist() == [step // 9] * 40
        steps.add(step)
        save(run, 9)
        assert tree(run) == expected, f"after crash point {number}"
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "begun", run)
    assert steps == {6, 9}


@every(4)
def test_row_3_a_clustering_is_the_old_one_or_the_new_one(
    tmp_path: Path, in_child: InChild, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    def save(folder: Path, step: int) -> None:
        Checkpoints(folder, "asked").save("iterations", Clustered(step, {"centres": torch.full((4,), step)}))

    for step in (1, 2):
        save(tmp_path / "begun", step)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    save(tmp_path / "whole", 3)
    expected, folder = contents(tmp_path / "whole"), tmp_path / "killed"
    shutil.copytree(tmp_path / "begun", folder)
    notes: list[str] = []
    steps = set()
    for _ in each_crash(lambda: save(folder, 3), in_child, monkeypatch, stride):
        saved = Checkpoints(folder, "asked", notes.append).newest("iterations")
        assert saved is not None
        assert saved.tensors["centres"].tolist() == [saved.step] * 4
        steps.add(saved.step)
        save(folder, 3)
        assert contents(folder) == expected
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "begun", folder)
    assert steps == {2, 3}
    assert notes == []


def contents(folder: Path) -> dict[str, dict[str, list[float]]]:
    """The tensors of every file; safetensors writes the notes in its header in any order."""
    return {path.name: {name: t.tolist() for name, t in load_file(path).items()} for path in sorted(folder.iterdir())}


def test_a_point_is_named_counted_and_inert_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        monkeypatch.setattr(faults, "passed", faults.Counter())
        faults.fault("rename")
        assert not faults.passed
        monkeypatch.setenv(faults.VARIABLE, "rename:2:SIGUSR2")
        for name in ("rename", "write", "write"):
            faults.fault(name)
        assert heard == []
        faults.fault("rename")
        assert heard == [signal.SIGUSR2]
        faults.fault("rename")
        assert len(heard) == 1
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert faults.parse(f"write:1:{int(signal.SIGTERM)}") == ("write", 1, signal.SIGTERM)
    for wrong in ("", "rename", "rename:x", "rename:1:SIGNOTHING"):
        with pytest.raises(ConfigError, match="VQPIPE_CRASH"):
            faults.parse(wrong)
