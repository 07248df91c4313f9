"""All that a training run is, between two steps; `checkpoints` says how that lies on disk.

There is no random-number state to save: every random choice of a run is a function of (seed, step or sample).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqpipe import distributed
from vqpipe.errors import ArtifactError, VqpipeError
from vqpipe.models.autoencoder import Autoencoder
from vqpipe.training import checkpoints as disk
from vqpipe.training.checkpoints import Parts, checkpoints
from vqpipe.training.optimizers import WeightEma

__all__ = ["TrainState", "checkpoints", "seed_step"]

COUNTERS = ("step", "images_seen", "bad_steps")
"""What of a state is an integer."""

Answer = TypeVar("Answer")


@dataclass
class TrainState:
    """Both networks, both optimizers, the weight average, and how far the run is.

    What is saved is rank 0's. Ranks differ in one thing alone, the running statistics of batch norms that see a rank's
    own images: no step reads them, since both networks train in training mode, so they move no weight. They are
    published, and rank 0's are what a run that was never cut publishes too.
    """

    model: Autoencoder
    discriminator: nn.Module
    optimizer: Optimizer
    discriminator_optimizer: Optimizer
    weight_ema: WeightEma[Autoencoder]
    step: int = 0
    images_seen: int = 0
    bad_steps: int = 0
    """Steps skipped so far."""
    objective: nn.Module = field(default_factory=nn.Module)
    """What the losses remember: LeCam's averages, and mostly nothing."""
    adversarial: bool = True
    """Whether the discriminator takes part in this run; where not, nothing of it is saved."""
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
            on_main(lambda: disk.write(run_dir, counters, self.tensors(), self.untrained(), keep_every))
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
        problem = difference(found.parts, self.tensors())
        if problem is None and set(found.counters) != set(COUNTERS):
            problem = f"state.json counts {', '.join(sorted(found.counters))}"
        if problem is not None:
            raise ArtifactError(f"{self.saved} is not a checkpoint of this run: {problem}", "Choose another --out")
        parts = found.parts
        self.model.load_state_dict(parts["model"])
        load_optimizer(self.optimizer, parts["optimizer"])
        if self.adversarial:
            self.discriminator.load_state_dict(parts["discriminator"])
            load_optimizer(self.discriminator_optimizer, parts["discriminator_optimizer"])
        if "objective" in parts:
            self.objective.load_state_dict(parts["objective"])
        if self.weight_ema.decay > 0:
            self.weight_ema.network.load_state_dict({**parts["model"], **parts["ema"]})
        for name in COUNTERS:
            setattr(self, name, found.counters[name])
        return True

    def tensors(self) -> Parts:
        """Everything load-bearing, by file. The average's buffers are the model's, so its parameters are enough."""
        parts = {"model": dict(self.model.state_dict()), "optimizer": optimizer_tensors(self.optimizer)}
        if self.adversarial:
            parts["discriminator"] = dict(self.discriminator.state_dict())
            parts["discriminator_optimizer"] = optimizer_tensors(self.discriminator_optimizer)
        if remembered := self.objective.state_dict():
            parts["objective"] = remembered
        if self.weight_ema.decay > 0:
            parts["ema"] = dict(self.weight_ema.network.named_parameters())
        return parts

    def untrained(self) -> dict[str, list[str]]:
        """The names of what no optimizer moves in the model and in its average: buffers, and what is frozen."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        parts = {part: tensors for part, tensors in self.tensors().items() if part in ("model", "ema")}
        return {part: [name for name in tensors if name not in trained] for part, tensors in parts.items()}


def on_main(action: Callable[[], Answer]) -> Answer:
    """What `action` returns on rank 0, or the VqpipeError that it raises there, on every rank."""
    answer: Answer | None = None
    error: VqpipeError | None = None
    if distributed.is_main():
        try:
            answer = action()
        except VqpipeError as raised:
            error = raised
    answer, error = distributed.broadcast_object((answer, error))
    if error is not None:
        raise error
    return answer


def difference(found: Parts, expected: Parts) -> str | None:
    """The first tensor in which a checkpoint and a run differ by name, type or shape, in words."""
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
            saved, own = (f"{t[part][name].dtype} {list(t[part][name].shape)}" for t in (found, expected))
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
            name: torch.empty_like(value, requires_grad=False).copy_(tensors[f"{number}.{name}"])
            for name, value in untouched(parameter).items()
        }
        for number, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def seed_step(seed: int, step: int) -> None:
    """Make whatever a network draws during `step` a function of (seed, step, rank)."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + distributed.rank())
