"""The state of a training run between two steps, and its checkpoints: `<run>/checkpoints/step-00012000`.

There is no random-number state to save: every random choice of a run is a function of (seed, step or sample).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqpipe import distributed
from vqpipe.artifacts import states
from vqpipe.artifacts.states import Parts, States
from vqpipe.errors import ArtifactError
from vqpipe.training.networks import gathered, load_whole, sharded_like
from vqpipe.training.optim import WeightEma
from vqpipe.training.running_metrics import RunningMetrics

COUNTERS = ("images_seen", "nonfinite_steps", "nonfinite_in_a_row")
"""The integers of a state, besides its step."""
SKIPPED = "skipped"
"""The examples found so far that cannot be used; absent from a checkpoint without any."""
METRICS = "metrics"
"""The part of a checkpoint with the running metrics; absent from one that was saved right after a row of the log."""


def checkpoints(run_dir: Path) -> States:
    """The checkpoints of a run. Settings are checked by the run's artifact, so checkpoints store no digest of them."""
    return States(run_dir / "checkpoints")


@dataclass
class TrainState:
    """Networks and optimizers by part, the weight average, running metrics, and counters.

    Checkpoints store rank 0's state and full (unsharded) weights. Only running statistics of batch norms may differ
    between ranks; training does not read them, and rank 0's are published.
    """

    networks: Mapping[str, nn.Module]
    """The first, "model", is averaged and published."""
    optimizers: Mapping[str, Optimizer]
    weight_ema: WeightEma[nn.Module]
    auxiliary: Mapping[str, nn.Module]
    """Modules that do not train and have a state: the objective with LeCam's averages."""
    metrics: RunningMetrics[Any]
    step: int = 0
    images_seen: int = 0
    nonfinite_steps: int = 0
    """Steps skipped so far."""
    nonfinite_in_a_row: int = 0
    """Skipped steps right before this one."""
    skipped: dict[int, str] = field(default_factory=dict)
    """The examples found so far that cannot be used, position -> reason: those of all ranks up to the last
    `share_skipped`."""
    newly_skipped: dict[int, str] = field(default_factory=dict)
    """Those that this rank has found since."""
    stop: bool = False
    """Set by a callback, on every rank alike: the run ends after this step, with a checkpoint."""
    damaged: list[str] = field(default_factory=list)
    """After `resume`: for each newer checkpoint that is damaged, what is wrong with it."""
    saved: Path | None = None
    """The checkpoint of this state, once it is saved."""

    def save(self, run_dir: Path, *, keep_every: int = 0) -> None:
        """Write a checkpoint, whole or not at all; keep the last two and every step that `keep_every` divides.

        Every rank calls it, and waits for rank 0, which writes. A second call for the same step does nothing.

        Raises:
            ArtifactError: it cannot be written (disk full or read-only), raised on every rank; the checkpoints before
                are as they were.
        """
        disk = checkpoints(run_dir)
        if self.saved == disk.path(self.step):
            return
        self.share_skipped()
        values: dict[str, Any] = {name: getattr(self, name) for name in COUNTERS}
        if self.skipped:
            values[SKIPPED] = {str(i): reason for i, reason in sorted(self.skipped.items())}
        metrics = self.metrics.state()
        parts = gathered({**self.tensors(), METRICS: metrics} if metrics else self.tensors())
        unchanging = self.not_optimized()
        distributed.on_main(lambda: disk.save(self.step, parts, values, unchanging=unchanging, keep_every=keep_every))
        self.saved = disk.path(self.step)

    def add_skipped(self, found: Mapping[int, str]) -> None:
        """Add the examples of a batch that cannot be used."""
        self.newly_skipped |= {i: reason for i, reason in found.items() if i not in self.skipped}

    def share_skipped(self) -> None:
        """Share what the ranks have found. Every rank calls it."""
        for part in distributed.gather_objects(self.newly_skipped):
            self.skipped |= part
        self.newly_skipped = {}

    def resume(self, run_dir: Path) -> bool:
        """Load the newest whole checkpoint of `run_dir`; False where there is none, and the run starts at step 0.

        Raises:
            ArtifactError: all checkpoints are damaged; or it is another model's: the first differing tensor is named.
        """
        disk = checkpoints(run_dir)
        self.saved, self.damaged = distributed.on_main(disk.newest)
        if self.saved is None:
            if self.damaged:
                raise ArtifactError(
                    f"every checkpoint in {disk.folder} is damaged; {self.damaged[0]}",
                    "Restore that folder from a copy, or delete it to start again at step 0",
                )
            return False
        found = states.read(self.saved)
        parts, expected = dict(found.parts), dict(self.tensors())
        if METRICS in parts:
            expected[METRICS] = self.metrics.state_like(parts[METRICS].keys())
        problem = mismatch(parts, expected, variable_rows_part=METRICS)
        if problem is None and set(found.values) - {SKIPPED} != set(COUNTERS):
            problem = f"state.json has the counters {', '.join(sorted(found.values))}"
        if problem is not None:
            raise ArtifactError(f"{self.saved} is not a checkpoint of this run: {problem}", "Choose another --out")
        if metrics := parts.pop(METRICS, None):
            self.metrics.load(dict(metrics))
        self.load(parts)
        self.step = found.step
        for name in COUNTERS:
            setattr(self, name, found.values[name])
        self.skipped = {int(i): reason for i, reason in found.values.get(SKIPPED, {}).items()}
        return True

    def load(self, parts: Parts) -> None:
        """Load the tensors of a checkpoint whose names and shapes were checked."""
        for part, network in {**self.networks, **self.auxiliary}.items():
            load_whole(network, parts.get(part, {}))
        for part, optimizer in self.optimizers.items():
            load_optimizer(optimizer, parts[part])
        if self.weight_ema.decay > 0:
            load_whole(self.weight_ema.network, {**parts["model"], **parts["ema"]})

    def tensors(self) -> Parts:
        """Every tensor of the state, by part. The average's buffers are the model's, so its parameters are enough."""
        parts = {part: dict(network.state_dict()) for part, network in self.networks.items()}
        parts |= {part: optimizer_tensors(optimizer) for part, optimizer in self.optimizers.items()}
        parts |= {part: buffers for part, each in self.auxiliary.items() if (buffers := dict(each.state_dict()))}
        if self.weight_ema.decay > 0:
            parts["ema"] = dict(self.weight_ema.network.named_parameters())
        return parts

    def not_optimized(self) -> dict[str, list[str]]:
        """The names of tensors of the model and its average that no optimizer moves: buffers, and frozen weights."""
        trained = {name for name, parameter in self.networks["model"].named_parameters() if parameter.requires_grad}
        parts = {part: tensors for part, tensors in self.tensors().items() if part in ("model", "ema")}
        return {part: [name for name in tensors if name not in trained] for part, tensors in parts.items()}

    def published(self) -> dict[str, Tensor]:
        """The weights to publish, whole, on rank 0 (of sharded weights nothing elsewhere). Every rank calls it."""
        return dict(gathered({"model": self.weight_ema.network.state_dict()})["model"])


def mismatch(found: Parts, expected: Parts, variable_rows_part: str = "") -> str | None:
    """The first tensor in which a checkpoint and a run differ by name, type or shape, in words.

    The first dimension of 2-D tensors in the part `variable_rows_part` is not compared.
    """
    for part in (*expected, *found):
        if part not in found:
            return f"it has no {part}"
        if part not in expected:
            return f"it has a part {part}, which this run does not have"
        for name in (*expected[part], *found[part]):
            if name not in found[part]:
                return f"{part} has no tensor {name}"
            if name not in expected[part]:
                return f"{part} has a tensor {name}, which this run does not have"
            free = part == variable_rows_part and expected[part][name].ndim == 2
            saved, own = (f"{t[part][name].dtype} {list(t[part][name].shape[free:])}" for t in (found, expected))
            if saved != own:
                return f"{part} has {name} as {saved}, this run as {own}".replace("torch.", "")
    return None


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Adam's moments as `<parameter's number>.<name>`; its settings come from the config, not from here.

    A parameter without a gradient so far has zeros, with which Adam starts, so that the names are always the same.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {
        f"{number}.{name}": value
        for number, parameter in enumerate(parameters)
        for name, value in (optimizer.state.get(parameter) or initial_moments(parameter)).items()
    }


def initial_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter before its first gradient."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **moments}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Moments get their parameter's memory format, as Adam gives them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: torch.empty_like(value, requires_grad=False).copy_(sharded_like(tensors[f"{number}.{name}"], value))
            for name, value in initial_moments(parameter).items()
        }
        for number, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
