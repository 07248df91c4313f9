"""Where else a run's numbers and pictures go, beside `metrics.jsonl`: TensorBoard, Weights & Biases.

Both are optional extras, and both go on in the same log when a run is resumed. A new one is a class with the three
methods of `Logger`, and its name in LOGGERS.
"""

import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vqpipe.config import nearest_name
from vqpipe.errors import ConfigError
from vqpipe.files import write_json
from vqpipe.training.history import Row


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run that a logger is opened for."""

    name: str
    folder: Path
    """Where logs are written; it outlives the run."""
    notes: Path
    """The run's own folder, for what a logger has to know when the run is resumed."""
    settings: dict[str, Any]
    """The sections of its preset."""
    resumed_at: int
    """The step it goes on from; 0 for a new one."""
    earlier: Sequence[Row] = ()
    """What it has logged up to there."""


class Logger(Protocol):
    """Takes in what a run logs."""

    def log(self, row: Row) -> None:
        """Take in a row of `metrics.jsonl`: numbers by name, at `row["step"]`."""

    def show(self, step: int, name: str, png: bytes) -> None:
        """Take in a picture, as a PNG file."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files in `<folder>/tensorboard`, for `tensorboard --logdir`.

    A resumed run hides what it will log again. A run that has rows and no event files yet writes those rows first.
    """

    def __init__(self, run: Run) -> None:
        needed("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        place = run.folder / "tensorboard"
        fresh = not any(place.glob("events.*"))
        self.writer = SummaryWriter(str(place), purge_step=None if fresh else run.resumed_at + 1)
        if fresh:
            self.writer.add_text("settings", f"```\n{json.dumps(run.settings, indent=2)}\n```")
            for row in run.earlier:
                self.log(row)

    def log(self, row: Row) -> None:
        for name, value in numbers(row):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a killed run keeps what it logged

    def show(self, step: int, name: str, png: bytes) -> None:
        self.writer.add_image(name, np.array(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run at Weights & Biases; with WANDB_MODE=offline in `<folder>/wandb`, for `wandb sync`.

    `<notes>/wandb.json` holds its id and the last step sent of each kind of row: a resumed run sends what was not sent
    yet, and nothing twice.
    """

    def __init__(self, run: Run) -> None:
        wandb = needed("wandb")
        self.notes = run.notes / "wandb.json"
        known = json.loads(self.notes.read_text(encoding="utf-8")) if self.notes.is_file() else {}
        self.id: str = known.get("id") or secrets.token_hex(4)
        self.sent: dict[str, int] = known.get("sent", {})
        self.note()  # now: a run that dies while it connects has its id all the same
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "vqpipe"),
                name=run.name,
                id=self.id,
                resume="allow",
                dir=str(run.folder),
                config=run.settings,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb did not start: {' '.join(str(error).split())[:160] or type(error).__name__}",
                "Run wandb login, or set WANDB_MODE=offline and wandb sync the run later",
            ) from None
        self.picture = wandb.Image
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for row in run.earlier:
            self.log(row)

    def log(self, row: Row) -> None:
        kind = "validation" if any(name.startswith("valid/") for name in row) else "training"
        self.send(kind, row["step"], dict(numbers(row)))

    def show(self, step: int, name: str, png: bytes) -> None:
        self.send(name, step, {name: self.picture(Image.open(io.BytesIO(png)))})

    def close(self) -> None:
        self.run.finish()

    def send(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row of its kind, unless it was sent before the run was cut."""
        if step > self.sent.get(kind, -1):
            self.run.log({"step": step, **values})
            self.sent[kind] = step
            self.note()

    def note(self) -> None:
        write_json(self.notes, {"id": self.id, "sent": self.sent})


LOGGERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_loggers(names: Sequence[str]) -> None:
    """Raise a ConfigError unless each of `names` is a logger whose package is installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"there is no logger {name!r}", nearest_name(name, LOGGERS))
        needed(name)


def needed(package: str) -> ModuleType:
    """The optional package, imported, or a ConfigError that says how to get it."""
    try:
        return import_module(package)
    except ImportError as error:
        missing = "is not installed" if error.name == package else f"cannot be imported ({error})"
        raise ConfigError(
            f"--log {package}: the package {package} {missing}", f"Install the extra: pip install 'vqpipe[{package}]'"
        ) from None


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """What of a row can be drawn: every finite number but the step."""
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float) and math.isfinite(value):
            yield name, value
