"""Saved states: whole or absent, damaged ones are skipped, unchanging tensors are stored once.

tests/faults/test_crash_points.py kills a save at every file operation.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from vqpipe.artifacts import states
from vqpipe.artifacts.states import States, damage, digest, read
from vqpipe.errors import ArtifactError


def save(folder: Path, *steps: int, keep_every: int = 0) -> None:
    for step in steps:
        parts = {"model": {"weight": torch.full((3,), step), "frozen": torch.ones(300)}, "empty": {}}
        States(folder, "request").save(step, parts, {"images": 2 * step}, keep_every=keep_every)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, byte: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(bytes(data))


def test_newest_state_is_read_as_it_was_saved(tmp_path: Path) -> None:
    bfloat = torch.tensor([1.5, -2], dtype=torch.bfloat16)
    parts = {"model": {"a": bfloat, "b": torch.arange(6).view(2, 3).T}, "optimizer": {"step": torch.tensor(4.0)}}
    values = {"images": 7, "history": [1, {"psnr": 2.5}]}
    States(tmp_path, "request").save(12, parts, values)
    path, problems = States(tmp_path, "request").newest()
    assert path == tmp_path / "step-00000012"
    assert problems == []
    state = read(path)
    assert (state.step, state.values) == (12, values)
    assert state.parts.keys() == parts.keys()
    for part, tensors in parts.items():
        assert state.parts[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert state.parts[part][name].dtype == tensor.dtype
            assert torch.equal(state.parts[part][name], tensor)


def test_without_a_folder_nothing_is_saved_and_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    States(None).save(1, {"model": {"a": torch.ones(1)}})
    assert States(None).newest() == (None, [])
    States(None).discard()
    assert names(tmp_path) == []


def test_an_absent_folder_holds_no_state(tmp_path: Path) -> None:
    assert States(tmp_path / "absent", "request").newest() == (None, [])
    States(tmp_path / "absent").discard()


def test_two_newest_states_are_kept_and_those_of_keep_every(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    save(tmp_path, 4, 5, 6, 7, 8, 9, keep_every=4)
    assert names(tmp_path) == ["step-00000004", "step-00000008", "step-00000009"]


def test_states_of_other_prefixes_and_other_files_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-notes").mkdir()
    other = States(tmp_path, "request", prefix="rounds")
    for step in (1, 2, 3):
        other.save(step, {"model": {"a": torch.ones(1)}})
    assert names(tmp_path) == ["rounds-00000002", "rounds-00000003", "step-00000001", "step-notes"]
    other.discard()
    assert names(tmp_path) == ["step-00000001", "step-notes"]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda state: flip(state / "model.safetensors"), "model.safetensors is damaged"),
    "truncated file": (lambda state: os.truncate(state / "model.safetensors", 40), "model.safetensors is damaged"),
    "missing file": (
        lambda state: (state / "model.safetensors").unlink(),
        "model.safetensors: No such file or directory",
    ),
    "edited values": (
        lambda state: (state / "state.json").write_text(
            (state / "state.json").read_text(encoding="utf-8").replace('"images": 12', '"images": 13'), encoding="utf-8"
        ),
        "state.json is damaged",
    ),
    "no JSON": (lambda state: (state / "state.json").write_bytes(b"{"), "state.json is damaged"),
    "a list": (lambda state: (state / "state.json").write_bytes(b"[]"), "state.json is damaged"),
    "missing state.json": (lambda state: (state / "state.json").unlink(), "state.json: No such file or directory"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_state_is_skipped_and_overwritten(kind: str, tmp_path: Path) -> None:
    action, message = DAMAGE[kind]
    save(tmp_path, 3, 6)
    action(tmp_path / "step-00000006")
    path, problems = States(tmp_path, "request").newest()
    assert path == tmp_path / "step-00000003"
    assert problems == [f"step-00000006: {message}"]
    save(tmp_path, 6)
    assert States(tmp_path, "request").newest() == (tmp_path / "step-00000006", [])


def test_damaged_state_after_the_resumed_one_is_deleted_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 3, 9)
    flip(tmp_path / "step-00000009" / "model.safetensors")
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_all_states_damaged_finds_none(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    for step in (3, 6):
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors")
    path, problems = States(tmp_path, "request").newest()
    assert path is None
    assert [line.split(":")[0] for line in problems] == ["step-00000006", "step-00000003"]


def test_state_of_another_request_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(ArtifactError, match="step-00000003 was saved by a run with other inputs or settings"):
        States(tmp_path, "another").newest()


def with_codebook(folder: Path, step: int, codebook: torch.Tensor) -> None:
    """A state whose codebook is likely unchanged; `small` is below the size that is worth a file of its own."""
    parts = {
        "model": {"codebook": codebook, "small": torch.ones(2), "weight": torch.full((9,), step)},
        "ema": {"codebook": codebook.clone()},
    }
    States(folder, "request").save(step, parts, unchanging={"model": ["codebook", "small"], "ema": ["codebook"]})


@pytest.fixture
def _small_tensors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SHARED_BYTES", 64)


def shared(folder: Path) -> list[Path]:
    return sorted(folder.glob("shared-*"))


@pytest.mark.usefixtures("_small_tensors_are_shared")
def test_unchanging_tensor_is_stored_once_and_deleted_with_its_last_state(tmp_path: Path) -> None:
    first, second = torch.arange(100.0), torch.arange(100.0) + 1
    for step in (1, 2):
        with_codebook(tmp_path, step, first)
    (file,) = shared(tmp_path)
    assert not any("codebook" in str(safetensors.torch.load_file(own).keys()) for own in tmp_path.glob("step-*/*.saf*"))
    path, _ = States(tmp_path, "request").newest()
    assert path is not None
    parts = read(path).parts
    assert torch.equal(parts["model"]["codebook"], first)
    assert torch.equal(parts["ema"]["codebook"], first)
    assert parts["model"]["weight"].tolist() == [2] * 9
    with_codebook(tmp_path, 3, second)
    assert len(shared(tmp_path)) == 2
    with_codebook(tmp_path, 4, second)
    assert len(shared(tmp_path)) == 1
    assert file not in shared(tmp_path)
    States(tmp_path, "request").discard()
    assert names(tmp_path) == []


def test_tensors_of_equal_bytes_but_other_types_and_shapes_are_not_shared() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, dtype=torch.int32)]
    assert len({digest(tensor) for tensor in zeros}) == 4


@pytest.mark.usefixtures("_small_tensors_are_shared")
def test_damaged_shared_tensor_damages_the_states_that_use_it(tmp_path: Path) -> None:
    with_codebook(tmp_path, 1, torch.zeros(100))
    (old,) = shared(tmp_path)
    with_codebook(tmp_path, 2, torch.ones(100))
    (new,) = set(shared(tmp_path)) - {old}
    flip(new)
    path, problems = States(tmp_path, "request").newest()
    assert path == tmp_path / "step-00000001"
    assert problems == [f"step-00000002: {new.name} is damaged"]


@pytest.mark.usefixtures("_small_tensors_are_shared")
def test_damaged_state_keeps_every_shared_tensor(tmp_path: Path) -> None:
    """Which tensors it uses is unknown."""
    with_codebook(tmp_path, 1, torch.zeros(100))
    with_codebook(tmp_path, 2, torch.ones(100))
    (tmp_path / "step-00000002" / "state.json").write_bytes(b"{")
    States(tmp_path, "request").newest()
    assert len(shared(tmp_path)) == 2


def test_leftovers_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for name in (".saving-step-00000006", ".deleting-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"torn")
    (tmp_path / ".writing-shared-0.safetensors").write_bytes(b"torn")
    assert States(tmp_path, "request").newest() == (tmp_path / "step-00000003", [])
    assert names(tmp_path) == ["step-00000003"]


FULL = OSError(errno.ENOSPC, "No space left on device")
UNWRITTEN = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
MOMENTS: list[tuple[object, str, int, Exception]] = [
    *[(safetensors.torch, "serialize_file", call, UNWRITTEN) for call in (1, 2, 3)],  # the shared tensor, two parts
    *[(os, "fsync", call, FULL) for call in (1, 2, 5)],
    *[(os, "replace", call, FULL) for call in (1, 2, 3)],  # the shared tensor, state.json, the folder
    (states, "hash_file", 1, OSError(errno.EIO, "Input/output error")),
]


@pytest.mark.usefixtures("_small_tensors_are_shared")
@pytest.mark.parametrize(("module", "name", "call", "error"), MOMENTS)
def test_failed_save_leaves_earlier_states_and_states_the_space(
    module: object, name: str, call: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 6):
        with_codebook(tmp_path, step, torch.zeros(100))
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(call, error, getattr(module, name)))
        with pytest.raises(ArtifactError) as failure:
            with_codebook(tmp_path, 9, torch.ones(100))
    message = str(failure.value)
    assert message.startswith(f"cannot save step 9 in {tmp_path}: ")
    assert " MB are needed, " in message
    assert " MB are free). Earlier states are intact: free some space" in message
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before
    assert States(tmp_path, "request").newest() == (tmp_path / "step-00000006", [])
    with_codebook(tmp_path, 9, torch.ones(100))
    assert States(tmp_path, "request").newest() == (tmp_path / "step-00000009", [])


def failing(call: int, error: Exception, original: Callable[..., object]) -> Callable[..., object]:
    """`original`, but its `call`-th call raises `error`."""
    calls = iter(range(1, 1000))

    def function(*args: object, **options: object) -> object:
        if next(calls) == call:
            raise error
        return original(*args, **options)

    return function


def test_state_json_lists_size_and_hash_of_every_file(tmp_path: Path) -> None:
    save(tmp_path, 5)
    table = json.loads((tmp_path / "step-00000005" / "state.json").read_text(encoding="utf-8"))
    assert (table["step"], table["values"], table["request"]) == (5, {"images": 10}, "request")
    assert set(table["files"]) == {"model.safetensors", "empty.safetensors"}
    assert damage(tmp_path / "step-00000005") is None


def test_steps_beyond_eight_digits_are_ordered_by_number(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000)
    assert [path.name for path in States(tmp_path, "request").paths()] == ["step-99999999", "step-100000000"]
