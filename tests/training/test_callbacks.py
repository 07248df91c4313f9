"""Callbacks: the log on disk, the texts of the progress display, and what passes from one callback to the others."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqpipe.data.images import open_images
from vqpipe.errors import ArtifactError
from vqpipe.files import read_rows
from vqpipe.progress import Silent
from vqpipe.training.callbacks import (
    Callback,
    CallbackList,
    MetricsLog,
    ProgressCallback,
    SkippedImages,
    details,
    summary,
)
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TrainConfig
from vqpipe.training.running_metrics import Row


def state_at(step: int, damaged: Sequence[str] = ()) -> TrainState:
    """The part of a state that callbacks read."""
    state = TrainState.__new__(TrainState)
    state.step, state.images_seen, state.damaged = step, 4 * step, list(damaged)
    return state


def started(path: Path, step: int = 0) -> MetricsLog:
    log = MetricsLog(path)
    log.on_start(state_at(step))
    return log


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def test_no_callback_takes_back_the_stop_of_another(tmp_path: Path, draw_folder: Callable[..., Path]) -> None:
    state = state_at(3)
    state.newly_skipped, state.skipped, state.stop = {}, {}, False
    images = open_images(draw_folder(tmp_path / "images", 2, side=16))
    skipped = SkippedImages(SimpleNamespace(path=tmp_path), images, 0.5, Silent())  # type: ignore[arg-type]
    skipped.state = state
    state.stop = True
    skipped.on_log({})
    assert state.stop


def test_logged_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = started(path)
    rows = [{"step": step, "psnr": 20.0 + step} for step in (5, 10)]
    for row in rows:
        log.on_log(row)
    assert read_rows(path) == rows == log.rows
    assert path.read_text().count("\n") == 2
    assert read_rows(tmp_path / "nothing") == []


def test_resumed_run_drops_rows_that_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 5}, {"step": 10}, {"step": 10, "valid/psnr": 21.0}, {"step": 15}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "ps')  # killed while writing
    assert steps(path) == [5, 10, 10, 15]
    log = started(path, 12)
    assert steps(path) == [5, 10, 10]
    log.on_log({"step": 15})
    assert steps(path) == [5, 10, 10, 15]


def test_damaged_row_that_no_kill_leaves_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 1\n{"step": 15}\n')
    with pytest.raises(ArtifactError, match=r"line 2 of .*metrics\.jsonl is damaged\. Restore the file"):
        started(path, 15)


def test_kill_while_dropping_rows_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        started(path, 5)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'


def test_full_disk_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.symlink_to("/dev/full")
    with pytest.raises(ArtifactError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.on_log({"step": 1})


def test_latest_is_the_last_finite_number(tmp_path: Path) -> None:
    log = started(tmp_path / "metrics.jsonl")
    log.rows = [{"step": 1, "psnr": 10.0}, {"step": 2, "psnr": 12.5}, {"step": 3, "psnr": float("nan")}]
    assert log.latest("psnr") == 12.5
    assert log.latest("psnr", step=1) == 10.0
    assert log.latest("valid/psnr") is None


class Producer(Callback):
    """Returns an image and a validation."""

    def on_sample(self, step: int, network: Any) -> Mapping[str, bytes]:
        return {"grid": b"png"}

    def on_validate(self, step: int, network: Any) -> Row:
        return {"valid/psnr": 20.0}


class Consumer(Callback):
    """Records rows and images."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.images: list[tuple[int, Mapping[str, bytes]]] = []

    def on_log(self, row: Row) -> None:
        self.rows.append(row)

    def on_images(self, step: int, images: Mapping[str, bytes]) -> None:
        self.images.append((step, images))


def test_samples_and_validations_reach_every_callback() -> None:
    first, last = Consumer(), Consumer()
    hooks = CallbackList([first, Producer(), last])
    hooks.on_start(state_at(8))
    hooks.on_sample(8, None)
    hooks.on_validate(8, None)
    for consumer in (first, last):
        assert consumer.rows == [{"step": 8, "images_seen": 32, "valid/psnr": 20.0}]
        assert consumer.images == [(8, {"grid": b"png"})]
    CallbackList([last]).on_sample(9, None)
    assert len(last.images) == 1  # no images, no call


ROW = {
    "step": 1200,
    "loss/total": 0.51234,
    "loss/l1": 0.1,
    "psnr": 22.126,
    "utilization": 0.991,
    "perplexity": 812.34,
    "gradient_norm": 0.823,
    "discriminator_gradient_norm": 0.31,
    "nonfinite_steps": 3,
    "learning_rate": 5e-4,
    "images_per_second": 412.3,
    "seconds_per_step": 0.31,
    "data_wait": 0.031,
    "mfu": 0.382,
    "tflops": 377.8,
    "memory_gb": 41.23,
}


class RecordedProgress:
    """Records the calls of a job to its progress display."""

    def __init__(self) -> None:
        self.phase: tuple[Any, ...] = ()
        self.count = 0
        self.text = ""
        self.details: Sequence[tuple[str, str]] = ()
        self.messages: list[str] = []

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        self.phase, self.count = (title, total, unit), done

    def advance(self, count: int = 1) -> None:
        self.count += count

    def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
        self.text, self.details = text, details

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_progress_shows_every_known_number_and_keeps_those_of_the_last_validation() -> None:
    progress = RecordedProgress()
    callback = ProgressCallback(progress, TrainConfig(steps=10_000, log_every=50))
    callback.on_start(state_at(1199, ["step-00001200: model.safetensors is damaged"]))
    callback.on_step_end(state_at(1200))
    callback.on_log({"step": 1000, "images_seen": 8000, "valid/psnr": 21.987, "valid/images": 64})
    callback.on_log(ROW)
    callback.on_skipped_step(1200, ["a", "b", "c", "d"])
    assert (progress.phase, progress.count) == (("train", 10_000, "steps"), 1200)
    assert progress.text == "PSNR 22.13 dB, codes in use 99.1 %, 412 images/s, 3 skipped steps"
    details = dict(progress.details)
    callback.on_log(ROW | {"step": 9_960})
    assert progress.text.endswith("3 skipped steps (of 10 steps)")
    assert details == {
        "loss": "total 0.5123   l1 0.1",
        "training": "PSNR 22.13 dB",
        "validation": "step 1,000   PSNR 21.99 dB",
        "codes": "in use 99.1 %   training perplexity 812.3",
        "gradients": "gradient norm 0.823   discriminator gradient norm 0.31   skipped steps 3   learning rate 0.0005",
        "speed": "throughput 412 images/s   time per step 0.31 s   waiting for images 3 %   MFU 38.2 %"
        "   arithmetic 378 TFLOP/s   memory 41.2 GB",
    }
    assert progress.messages == [
        "resuming at step 1,199",
        "skipped a damaged checkpoint: step-00001200: model.safetensors is damaged",
        "step 1,200: a gradient is not finite, no update (images a, b, c and 1 more)",
    ]


def test_unknown_numbers_are_left_out_of_the_progress() -> None:
    few = {"step": 3, "psnr": 20.0, "utilization": 0.5, "images_per_second": 10.0}
    assert dict(details(few)) == {
        "training": "PSNR 20.00 dB",
        "codes": "in use 50.0 %",
        "speed": "throughput 10 images/s",
    }
    assert summary(few) == "PSNR 20.00 dB, codes in use 50.0 %, 10 images/s"
    assert summary({"loss/total": 1.5}) == "loss 1.5"


def test_progress_shows_the_validation_of_generators_and_classifiers() -> None:
    row = {"valid/total": 2.5, "valid/top1": 0.25, "valid/top5": 0.5, "valid/perplexity": 12.0}
    assert details(row) == [("validation", "loss 2.5   top-1 25.0 %   top-5 50.0 %   perplexity 12.0")]
