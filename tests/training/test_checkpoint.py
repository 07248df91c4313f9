"""Checkpoints of a training state: what is saved is restored, damage is skipped, another run's is refused.

tests/artifacts/test_states.py tests how states are stored.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqpipe.artifacts import states as disk
from vqpipe.errors import ArtifactError
from vqpipe.quantizers import EmaConfig, LcConfig, MultiGroupConfig
from vqpipe.training.checkpoint import COUNTERS, TrainState, checkpoints
from vqpipe.training.config import TrainConfig
from vqpipe.training.optim import make_optimizer

LC = LcConfig(codebook_size=64, feature_dim=16, code_dim=4, codebook_init="uniform")
PARTS = ["discriminator", "discriminator_optimizer", "ema", "model", "optimizer"]
NAMES = ["state.json", *(f"{part}.safetensors" for part in PARTS)]


@pytest.fixture(autouse=True)
def _small_tensors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SHARED_BYTES", 1024)


Make = Callable[..., TrainState]


def advance(state: TrainState, step: int) -> TrainState:
    """Change every tensor of a state as training does, and set it to `step`."""
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    if "discriminator" in state.networks:
        state.networks["discriminator"](torch.rand(2, 3, 16, 16))
    state.weight_ema.update(state.step)
    state.step, state.images_seen, state.nonfinite_steps, state.nonfinite_in_a_row = step, 4 * step, step // 3, step % 3
    return state


def saved(state: TrainState, run_dir: Path, *steps: int, keep_every: int = 0) -> TrainState:
    for step in steps:
        advance(state, step).save(run_dir, keep_every=keep_every)
    return state


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    parts = {**state.tensors(), "ema": state.weight_ema.network.state_dict()}
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def same(first: TrainState, second: TrainState) -> bool:
    here, there = state_tensors(first), state_tensors(second)
    counters = [[getattr(state, name) for name in COUNTERS] for state in (first, second)]
    return (
        here.keys() == there.keys()
        and all(torch.equal(here[name], there[name]) for name in here)
        and counters[0] == counters[1]
    )


def steps_of(run_dir: Path) -> list[int]:
    return [disk.step_of(folder) for folder in checkpoints(run_dir).paths()]


def flip(file: Path) -> None:
    """Flip one bit near the end."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def test_saved_state_is_restored(tmp_path: Path, make_state: Make) -> None:
    state = saved(make_state(), tmp_path, 7)
    other = make_state(seed=1)
    assert not same(state, other)
    assert other.resume(tmp_path)
    assert same(state, other)
    assert other.damaged == []
    assert not make_state().resume(tmp_path / "nothing here")


def test_optimizer_saved_before_its_first_step_starts_the_same(tmp_path: Path, make_state: Make) -> None:
    state = make_state()
    state.save(tmp_path)
    other = make_state(seed=1)
    other.resume(tmp_path)
    for each in (state, other):
        torch.manual_seed(5)
        advance(each, 1)
    assert same(state, other)


def test_frozen_codebook_shared_by_groups_is_stored_once(tmp_path: Path, make_state: Make) -> None:
    groups = make_state(MultiGroupConfig(num_groups=2, group=LC))
    groups.networks["model"].quantizer.load_codebook(torch.rand(64, 16))
    saved(groups, tmp_path, 1, 2, 3, keep_every=1)
    assert steps_of(tmp_path) == [1, 2, 3]
    codebook_bytes = 64 * 16 * 4
    assert len(list((tmp_path / "checkpoints").glob("shared-*"))) == 1
    for folder in checkpoints(tmp_path).paths():
        kept = disk.load_file(folder / "model.safetensors")
        assert not [name for name, tensor in kept.items() if tensor.nbytes == codebook_bytes and "codes" in name]
        assert not [name for name in disk.load_file(folder / "ema.safetensors") if "codes" in name]
    other = make_state(MultiGroupConfig(num_groups=2, group=LC), seed=1)
    other.resume(tmp_path)
    assert same(groups, other)


def test_frozen_weights_are_stored_once_and_old_codebooks_are_deleted(tmp_path: Path, make_state: Make) -> None:
    state = make_state(EmaConfig(codebook_size=64, code_dim=8))
    state.networks["model"].encoder.requires_grad_(False)
    state.optimizers["optimizer"] = make_optimizer(TrainConfig(), list(state.networks["model"].parameters()))
    for step in (1, 2, 3, 4):
        state.networks["model"].quantizer.codes.normal_()
        saved(state, tmp_path, step)
    tables = [disk.read_table(folder)["shared"]["model"] for folder in checkpoints(tmp_path).paths()]
    assert len({table["quantizer.codes"] for table in tables}) == len(tables) == 2
    assert len({table["encoder.conv_out.weight"] for table in tables}) == 1
    named = {f"shared-{key}.safetensors" for table in tables for key in table.values()}
    folders = checkpoints(tmp_path).paths()
    named |= {f"shared-{key}.safetensors" for each in folders for key in disk.shared_of(disk.read_table(each))}
    assert {file.name for file in (tmp_path / "checkpoints").glob("shared-*")} == named
    other = make_state(EmaConfig(codebook_size=64, code_dim=8), seed=1)
    other.networks["model"].encoder.requires_grad_(False)
    other.optimizers["optimizer"] = make_optimizer(TrainConfig(), list(other.networks["model"].parameters()))
    other.resume(tmp_path)
    assert same(state, other)


def test_second_save_of_a_step_writes_nothing(tmp_path: Path, make_state: Make) -> None:
    state = saved(make_state(), tmp_path, 5)
    (folder,) = checkpoints(tmp_path).paths()
    before = folder.stat().st_ino
    state.save(tmp_path)
    assert folder.stat().st_ino == before
    other = make_state()
    other.resume(tmp_path)
    other.save(tmp_path)
    assert folder.stat().st_ino == before


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        pytest.param(damage, name, marks=pytest.mark.slow if damage != "flip" and name not in NAMES[:2] else [])
        for damage in ("flip", "cut", "delete")
        for name in NAMES
    ],
)
def test_damaged_checkpoint_is_skipped_and_reported(tmp_path: Path, make_state: Make, name: str, damage: str) -> None:
    state = saved(make_state(), tmp_path, 5)
    before = {key: value.clone() for key, value in state_tensors(state).items()}
    saved(state, tmp_path, 10)
    file = checkpoints(tmp_path).paths()[-1] / name
    if damage == "flip":
        flip(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1] if name != "state.json" else file.read_bytes()[:-3])
    else:
        file.unlink()
    other = make_state(seed=1)
    assert other.resume(tmp_path)
    assert other.step == 5
    assert all(torch.equal(value, before[key]) for key, value in state_tensors(other).items())
    (line,) = other.damaged
    assert line.startswith("step-00000010: ")
    assert name in line
    saved(other, tmp_path, 8)  # the damaged one is deleted
    assert steps_of(tmp_path) == [5, 8]


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_start(tmp_path: Path, make_state: Make) -> None:
    saved(make_state(), tmp_path, 5, 10)
    (shared,) = (tmp_path / "checkpoints").glob("shared-*")
    flip(shared)
    with pytest.raises(ArtifactError, match=r"every checkpoint in .* is damaged; step-00000010: shared-.* is damaged"):
        make_state().resume(tmp_path)
    assert steps_of(tmp_path) == [5, 10]
    assert shared.exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 16}, "model has encoder.conv_in.weight as float32 [8, 3, 3, 3], this run as float32 [16, 3, 3, 3]"),
        ({"decay": 0.0}, "it has a part ema, which this run does not have"),
        ({"adversarial": False}, "it has a part discriminator, which this run does not have"),
        ({"quantizer": EmaConfig(codebook_size=64, code_dim=16)}, "model has no tensor quantizer.counts"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, make_state: Make, other: dict[str, object], message: str
) -> None:
    saved(make_state(), tmp_path, 5)
    with pytest.raises(ArtifactError) as refusal:
        make_state(**other).resume(tmp_path)  # type: ignore[arg-type]
    assert f"step-00000005 is not a checkpoint of this run: {message}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_moments_of_other_parameters_are_refused(tmp_path: Path, make_state: Make) -> None:
    saved(make_state(), tmp_path, 5)
    state = make_state()
    state.optimizers["optimizer"] = make_optimizer(TrainConfig(), list(state.networks["model"].parameters())[1:])
    with pytest.raises(ArtifactError, match=r"optimizer has 0\.exp_avg as float32"):
        state.resume(tmp_path)


def test_unused_discriminator_is_not_saved(tmp_path: Path, make_state: Make) -> None:
    state = saved(make_state(adversarial=False), tmp_path, 5)
    assert not list(checkpoints(tmp_path).paths()[0].glob("discriminator*"))
    other = make_state(adversarial=False, seed=1)
    other.resume(tmp_path)
    assert same(state, other)
