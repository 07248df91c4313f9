"""Steps that are skipped: a loss or gradient is not finite, so no weight may move by it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqpipe.errors import NumericError
from vqpipe.training.state import TrainState

NAMED = 3
"""Images of a bad batch that an error names."""


@dataclass
class Pending:
    """A step whose flag may still be on its way from the GPU."""

    step: int
    keys: list[str]
    flag: Tensor
    arrived: torch.cuda.Event | None


class RunningStatistics:
    """Those of batch norms, which a forward pass changes: put back where the step turns out to be skipped."""

    def __init__(self, *networks: nn.Module) -> None:
        self.norms = [
            module
            for network in networks
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        self.before: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        """As they are: a mean and a variance of each."""
        both = ((norm.running_mean, norm.running_var) for norm in self.norms)
        return [tensor for pair in both for tensor in pair if tensor is not None]

    def remember(self) -> None:
        """Before the step."""
        self.before = [tensor.clone() for tensor in self.tensors()]

    def restore(self, bad: Tensor) -> None:
        """After it, where `bad`, a bool scalar on the device."""
        for tensor, before in zip(self.tensors(), self.before, strict=True):
            tensor.copy_(torch.where(bad, before, tensor))


class NonfiniteSteps:
    """Counts skipped steps in the state, tells of each, and ends a run in which too many follow one another.

    On a GPU a step's flag is read while the next step runs, so that no step waits for it.
    """

    def __init__(self, state: TrainState, most: int, on_bad: Callable[[int, list[str]], None]) -> None:
        self.state, self.most, self.on_bad = state, most, on_bad
        self.pending: Pending | None = None

    def note(self, step: int, bad: Tensor, keys: list[str]) -> None:
        """Take in the flag of `step`, a bool scalar that is the same on all ranks, and its images' keys on this rank.

        Raises:
            NumericError: `most` steps in a row were bad.
        """
        self.settle()
        flag, arrived = bad.to("cpu", non_blocking=True), None
        if bad.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(bad.device))
        self.pending = Pending(step, keys, flag, arrived)
        if arrived is None:
            self.settle()

    def settle(self) -> None:
        """Count the last step noted. Before the state is saved, so that it holds all of them."""
        last, self.pending = self.pending, None
        if last is None:
            return
        if last.arrived is not None:
            last.arrived.synchronize()
        if not bool(last.flag):
            self.state.nonfinite_in_a_row = 0
            return
        state = self.state
        state.nonfinite_in_a_row += 1
        state.nonfinite_steps += 1
        self.on_bad(last.step, last.keys)
        if state.nonfinite_in_a_row >= self.most:
            more = len(last.keys) - NAMED
            some = ", ".join(last.keys[:NAMED]) + (f" and {more} more" if more > 0 else "")
            raise NumericError(
                f"{state.nonfinite_in_a_row} steps in a row gave no finite gradient; the last was step {last.step},"
                f" images {some}",
                "No weight moved in them. Lower train.learning_rate, set train.clip_norm, or use"
                " train.precision=fp32, and run again",
            )
