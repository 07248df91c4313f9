"""All that a training run is, between two steps; `checkpoints` says how that lies on disk.

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
from vqpipe.distributed import on_main
from vqpipe.errors import ArtifactError
from vqpipe.training import checkpoints as disk
from vqpipe.training.checkpoints import Parts, checkpoints
from vqpipe.training.optimizers import WeightEma
from vqpipe.training.running_metrics import RunningMetrics
from vqpipe.training.sharding import gathered, like, load_network

__all__ = ["TrainState", "checkpoints", "seed_step"]

COUNTERS = ("step", "images_seen", "nonfinite_steps", "nonfinite_in_a_row")
"""What of a state is an integer."""
WINDOW = "window"
"""The part of a checkpoint that only those between two rows of the log have."""


@dataclass
class TrainState:
    """Networks and optimizers by part, the weight average, what else is remembered, and how far the run is.

    What is saved is rank 0's; of weights that are sharded among ranks, the whole. Ranks differ in one thing alone, the
    running statistics of batch norms that see a rank's own images: no step reads them, since networks train in
    training mode, so they move no weight. They are published, and rank 0's are what a run that was never cut
    publishes too.
    """

    networks: Mapping[str, nn.Module]
    """The first, "model", is what is averaged and published."""
    optimizers: Mapping[str, Optimizer]
    weight_ema: WeightEma[nn.Module]
    remembered: Mapping[str, nn.Module]
    """What losses remember: LeCam's averages, and mostly nothing."""
    window: RunningMetrics[Any]
    """What the next row of the log is made of."""
    step: int = 0
    images_seen: int = 0
    nonfinite_steps: int = 0
    """Steps skipped so far."""
    nonfinite_in_a_row: int = 0
    """Of these, those right before this step."""
    passed_over: list[str] = field(default_factory=list)
    """After `resume`: the newer checkpoints that are damaged, and what is wrong with each."""
    saved: Path | None = None
    """The checkpoint that holds this state, as soon as there is one."""

    def save(self, run_dir: Path, *, keep_every: int = 0) -> None:
        """Write a checkpoint, whole or not at all; keep the last two and every step that `keep_every` divides.

        Every rank calls it, and waits for rank 0, which writes. Right after another save there is nothing to do.

        Raises:
            ArtifactError: the disk does not take it (on every rank); the checkpoints before are as they were.
        """
        target = disk.folder_of(run_dir, self.step)
        if self.saved != target:
            counters = {name: getattr(self, name) for name in COUNTERS}
            window = self.window.tensors()
            parts = gathered({**self.tensors(), WINDOW: window} if window else self.tensors())
            on_main(lambda: disk.write(run_dir, counters, parts, self.untrained(), keep_every))
            self.saved = target

    def resume(self, run_dir: Path) -> bool:
        """Load the newest whole checkpoint of `run_dir`; False where there is none, and the run starts at step 0.

        Raises:
            ArtifactError: all checkpoints are damaged; or it is another model's: the first tensor unlike is named.
        """
        self.saved, self.passed_over = on_main(lambda: disk.newest(run_dir))
        if self.saved is None:
            return False
        found = disk.read(self.saved)
        parts, expected = dict(found.parts), dict(self.tensors())
        if WINDOW in parts:
            expected[WINDOW] = self.window.forms(parts[WINDOW].keys())
        problem = difference(parts, expected, free_length=WINDOW)
        if problem is None and set(found.counters) != set(COUNTERS):
            problem = f"state.json counts {', '.join(sorted(found.counters))}"
        if problem is not None:
            raise ArtifactError(f"{self.saved} is not a checkpoint of this run: {problem}", "Choose another --out")
        if window := parts.pop(WINDOW, None):
            self.window.load(dict(window))
        self.load(parts)
        for name in COUNTERS:
            setattr(self, name, found.counters[name])
        return True

    def load(self, parts: Parts) -> None:
        """Take over the tensors of a checkpoint, which fit."""
        for part, network in {**self.networks, **self.remembered}.items():
            load_network(network, parts.get(part, {}))
        for part, optimizer in self.optimizers.items():
            load_optimizer(optimizer, parts[part])
        if self.weight_ema.decay > 0:
            load_network(self.weight_ema.network, {**parts["model"], **parts["ema"]})

    def tensors(self) -> Parts:
        """Everything load-bearing, by file. The average's buffers are the model's, so its parameters are enough."""
        parts = {part: dict(network.state_dict()) for part, network in self.networks.items()}
        parts |= {part: optimizer_tensors(optimizer) for part, optimizer in self.optimizers.items()}
        parts |= {part: memory for part, each in self.remembered.items() if (memory := dict(each.state_dict()))}
        if self.weight_ema.decay > 0:
            parts["ema"] = dict(self.weight_ema.network.named_parameters())
        return parts

    def untrained(self) -> dict[str, list[str]]:
        """The names of what no optimizer moves in the model and in its average: buffers, and what is frozen."""
        trained = {name for name, parameter in self.networks["model"].named_parameters() if parameter.requires_grad}
        parts = {part: tensors for part, tensors in self.tensors().items() if part in ("model", "ema")}
        return {part: [name for name in tensors if name not in trained] for part, tensors in parts.items()}

    def published(self) -> dict[str, Tensor]:
        """The weights to publish, whole, on rank 0 (elsewhere, of weights that are sharded, nothing). Every rank calls
        it."""
        return dict(gathered({"model": self.weight_ema.network.state_dict()})["model"])


def difference(found: Parts, expected: Parts, free_length: str = "") -> str | None:
    """The first tensor in which a checkpoint and a run differ by name, type or shape, in words.

    Tensors of the part `free_length` may be longer or shorter if they have two dimensions.
    """
    for part in (*expected, *found):
        if part not in found:
            return f"it has no {part}"
        if part not in expected:
            return f"it has a part {part}, which this run has not"
        for name in (*expected[part], *found[part]):
            if name not in found[part]:
                return f"{part} has no tensor {name}"
            if name not in expected[part]:
                return f"{part} has a tensor {name}, which this run has not"
            free = part == free_length and expected[part][name].ndim == 2
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
        for name, value in (optimizer.state.get(parameter) or untouched(parameter)).items()
    }


def untouched(parameter: Tensor) -> dict[str, Tensor]:
    """What Adam knows of a parameter before its first gradient."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **moments}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Moments get their parameter's memory format, as Adam gives them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: torch.empty_like(value, requires_grad=False).copy_(like(tensors[f"{number}.{name}"], value))
            for name, value in untouched(parameter).items()
        }
        for number, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def seed_step(seed: int, step: int) -> None:
    """Make whatever a network draws during `step` a function of (seed, step, rank)."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + distributed.rank())
