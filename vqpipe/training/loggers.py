"""Callbacks that also send a run's numbers and images to TensorBoard or Weights & Biases.

Both are optional extras, and both continue the same log when a run is resumed. A new one is a subclass of `Logger` and
its name in LOGGERS.
"""

import io
import json
import math
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from vqpipe import distributed
from vqpipe.config import nearest_name
from vqpipe.errors import ConfigError
from vqpipe.files import write_json
from vqpipe.training.callbacks import Callback, MetricsLog
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.running_metrics import Row


class Logger(Callback, ABC):
    """A logger of the run that publishes `out`; rank 0 logs.

    Logs lie in `<out>.logs`, beside what is published: they keep their place when the draft is renamed.

    Args:
        run_dir: the run's own folder, for what is needed to continue the log when the run is resumed.
        settings: the sections of the preset.
        metrics: the rows logged so far; called before this callback.
    """

    def __init__(self, out: Path, run_dir: Path, settings: Mapping[str, Any], metrics: MetricsLog) -> None:
        self.name, self.folder = out.name, out.with_name(f"{out.name}.logs")
        self.run_dir, self.settings, self.metrics = run_dir, dict(settings), metrics
        self.connected = False

    def on_start(self, state: TrainState) -> None:
        if distributed.is_main():
            self.connect(state.step)
            self.connected = True

    def on_end(self) -> None:
        if self.connected:
            self.close()

    def on_log(self, row: Row) -> None:
        if self.connected:
            self.log(row)

    def on_images(self, step: int, images: Mapping[str, bytes]) -> None:
        for name, png in images.items() if self.connected else ():
            self.log_image(step, name, Image.open(io.BytesIO(png)).convert("RGB"))

    @abstractmethod
    def connect(self, step: int) -> None:
        """Open the log of a run that starts or resumes at `step`."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Log the numbers of a row, at `row["step"]`."""

    @abstractmethod
    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Log an image."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered."""


class TensorBoard(Logger):
    """Event files in `<out>.logs/tensorboard`, for `tensorboard --logdir`.

    A resumed run hides what it will log again. A run that has rows and no event files yet writes those rows first.
    """

    def connect(self, step: int) -> None:
        import_extra("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard"
        fresh = not any(folder.glob("events.*"))
        self.writer = SummaryWriter(str(folder), purge_step=None if fresh else step + 1)
        if fresh:
            self.writer.add_text("settings", f"```\n{json.dumps(self.settings, indent=2)}\n```")
            for row in self.metrics.rows:
                self.log(row)

    def log(self, row: Row) -> None:
        for name, value in finite_numbers(row):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a killed run keeps what it logged

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, np.array(image), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb(Logger):
    """A run at Weights & Biases; with WANDB_MODE=offline in `<out>.logs/wandb`, for `wandb sync`.

    `<run_dir>/wandb.json` holds its id and the last step sent of each kind of row: a resumed run sends what was not
    sent yet, and nothing twice.
    """

    def connect(self, step: int) -> None:
        wandb = import_extra("wandb")
        self.notes = self.run_dir / "wandb.json"
        known = json.loads(self.notes.read_text(encoding="utf-8")) if self.notes.is_file() else {}
        self.id: str = known.get("id") or secrets.token_hex(4)
        self.sent: dict[str, int] = known.get("sent", {})
        self.save_notes()  # before connecting: a run that dies while it connects keeps its id
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "vqpipe"),
                name=self.name,
                id=self.id,
                resume="allow",
                dir=str(self.folder),
                config=self.settings,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb did not start: {' '.join(str(error).split())[:160] or type(error).__name__}",
                "Run wandb login, or set WANDB_MODE=offline and wandb sync the run later",
            ) from None
        self.image_class = wandb.Image
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for row in self.metrics.rows:
            self.log(row)

    def log(self, row: Row) -> None:
        kind = "validation" if any(name.startswith("valid/") for name in row) else "training"
        self.send(kind, row["step"], dict(finite_numbers(row)))

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.send(name, step, {name: self.image_class(image)})

    def close(self) -> None:
        self.run.finish()

    def send(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Log one row of its kind, unless it was sent before the run was interrupted."""
        if step > self.sent.get(kind, -1):
            self.run.log({"step": step, **values})
            self.sent[kind] = step
            self.save_notes()

    def save_notes(self) -> None:
        write_json(self.notes, {"id": self.id, "sent": self.sent})


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def installed_loggers(names: Sequence[str] | None) -> list[str]:
    """Return each name once, or raise a ConfigError for one that is unknown or whose package is not installed."""
    unique = list(dict.fromkeys(names or ()))
    for name in unique:
        if name not in LOGGERS:
            raise ConfigError(f"there is no logger {name!r}", nearest_name(name, LOGGERS))
        import_extra(name)
    return unique


def import_extra(package: str) -> ModuleType:
    """Import an optional package, or raise a ConfigError with the command that installs it."""
    try:
        return import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            what, hint = "is not installed", f"Install the extra: pip install 'vqpipe[{package}]'"
        else:
            what, hint = f"is installed, but cannot be imported ({error})", "Repair it, or leave out --log"
        raise ConfigError(f"--log {package}: the package {package} {what}", hint) from None


def finite_numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The finite numbers of a row, without its step."""
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float) and math.isfinite(value):
            yield name, value
