"""TensorBoard and wandb: every row and image is logged once, also by a run that is resumed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vqpipe.errors import ConfigError
from vqpipe.training.callbacks import MetricsLog
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.loggers import Logger, TensorBoard, Wandb, finite_numbers, installed_loggers
from vqpipe.training.running_metrics import Row


def start(kind: type[Logger], folder: Path, resumed_at: int = 0, earlier: Sequence[Row] = ()) -> Logger:
    """A logger of the run `run`, which starts or resumes at a step with these rows."""
    run_dir = folder / "run.partial"
    run_dir.mkdir(exist_ok=True)
    metrics = MetricsLog(run_dir / "metrics.jsonl")
    metrics.rows = list(earlier)
    logger = kind(folder / "run", run_dir, {"train": {"steps": 10}}, metrics)
    state = TrainState.__new__(TrainState)
    state.step = resumed_at
    logger.on_start(state)
    return logger


def row(step: int) -> Row:
    return {"step": step, "psnr": 20.0 + step}


PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
    b"\x00\x00\x00\x0cIDATx\x9cc\xf8\xff\xff?\x00\x05\xfe\x02\xfe\r\xefF\xb8\x00\x00\x00\x00IEND\xaeB`\x82"
)
"""One white pixel."""


class FakeWandb(ModuleType):
    """Records what is logged, by run."""

    class Error(Exception):
        """In place of wandb.Error."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.refuses = False

    def init(self, **given: Any) -> "FakeWandb":
        if self.refuses:
            raise self.Error("No API key configured.\nUse `wandb login`.")
        self.began.append(given)
        return self

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def Image(self, picture: Any) -> tuple[int, int]:
        return picture.size

    def define_metric(self, *names: str, **given: Any) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_continues_the_same_run_and_sends_nothing_twice(tmp_path: Path, wandb: FakeWandb) -> None:
    logger = start(Wandb, tmp_path)
    for step in (2, 4, 6):
        logger.on_log(row(step))
    logger.on_log({"step": 6, "valid/psnr": 21.0})
    logger.on_images(6, {"reconstructions": PNG})
    # Killed, and resumed at step 4: row 6, its validation and its image are logged again, then new ones.
    resumed = start(Wandb, tmp_path, 4, [row(2), row(4)])
    for step in (6, 8):
        resumed.on_log(row(step))
        resumed.on_log({"step": step, "valid/psnr": 21.0})
        resumed.on_images(step, {"reconstructions": PNG})
    resumed.on_end()
    assert [entry["step"] for entry in wandb.logged if "psnr" in entry] == [2, 4, 6, 8]
    assert [entry["step"] for entry in wandb.logged if "valid/psnr" in entry] == [6, 8]
    assert [entry for entry in wandb.logged if "reconstructions" in entry] == [
        {"step": step, "reconstructions": (1, 1)} for step in (6, 8)
    ]
    first, second = wandb.began
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert wandb.finished == 1


def test_wandb_added_to_a_resumed_run_gets_the_earlier_rows(tmp_path: Path, wandb: FakeWandb) -> None:
    start(Wandb, tmp_path, 4, [row(2), row(4)]).on_log(row(6))
    assert [entry["psnr"] for entry in wandb.logged] == [22.0, 24.0, 26.0]


def test_wandb_that_does_not_start_is_a_config_error(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.refuses = True
    with pytest.raises(ConfigError, match=r"wandb did not start: No API key configured.*WANDB_MODE=offline"):
        start(Wandb, tmp_path)


def test_absent_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"--log {package}.*pip install 'vqpipe\[{package}\]'"):
            installed_loggers([package])


def test_a_package_that_is_installed_and_fails_is_not_to_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("import absent_part_of_wandb")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        ConfigError, match=r"wandb is installed, but cannot be imported .*absent_part.*Repair it"
    ) as caught:
        installed_loggers(["wandb"])
    assert "pip install" not in str(caught.value)


def test_only_finite_numbers_are_logged() -> None:
    mixed = {"step": 3, "psnr": 20.0, "loss/total": float("nan"), "note": "text", "nonfinite_steps": 0}
    assert dict(finite_numbers(mixed)) == {"psnr": 20.0, "nonfinite_steps": 0}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = start(TensorBoard, tmp_path, 4, [row(2), row(4)])
    for step in (6, 8):
        logger.on_log(row(step))
        logger.on_images(step, {"reconstructions": PNG})
    # Killed: nothing is closed. Resumed at step 6.
    resumed = start(TensorBoard, tmp_path, 6, [row(2), row(4), row(6)])
    resumed.on_log(row(8) | {"psnr": 99.0})
    resumed.on_end()
    events = EventAccumulator(str(tmp_path / "run.logs" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("psnr")] == [(2, 22), (4, 24), (6, 26), (8, 99)]
    assert [event.step for event in events.Images("reconstructions")] == [6]
