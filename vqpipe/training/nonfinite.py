"""Skipped steps: a loss or gradient of a network was not finite, so its weights did not move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqpipe.errors import NumericError
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.networks import batch_norms
from vqpipe.words import first_names


@dataclass
class Pending:
    """A step whose flag is being copied from the GPU asynchronously."""

    step: int
    keys: Sequence[str]
    flag: Tensor
    arrived: torch.cuda.Event | None


class BatchNormStatistics:
    """Running statistics of batch norms, which a forward pass changes: restored where the step is skipped."""

    def __init__(self, *networks: nn.Module) -> None:
        self.norms = batch_norms(*networks)
        self.before: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        """Mean and variance of each batch norm."""
        both = ((norm.running_mean, norm.running_var) for norm in self.norms)
        return [tensor for pair in both for tensor in pair if tensor is not None]

    def remember(self) -> None:
        """Copy them before a step."""
        self.before = [tensor.clone() for tensor in self.tensors()]

    def restore(self, skipped: Tensor) -> None:
        """Put the copies back after the step where it was `skipped`, a bool scalar on the device."""
        for tensor, before in zip(self.tensors(), self.before, strict=True):
            tensor.copy_(torch.where(skipped, before, tensor))


class NonfiniteSteps:
    """Counts skipped steps in the state, and ends a run in which too many follow one another.

    On a GPU a step's flag is read while the next step runs, so that no step waits for it.
    """

    def __init__(self, state: TrainState, limit: int, on_skipped: Callable[[int, Sequence[str]], None]) -> None:
        self.state, self.limit, self.on_skipped = state, limit, on_skipped
        self.pending: Pending | None = None

    def add(self, step: int, skipped: Tensor, keys: Sequence[str]) -> None:
        """Add the flag of `step`, a bool scalar equal on all ranks, and the keys of its images on this rank.

        Raises:
            NumericError: `limit` steps in a row were skipped.
        """
        self.flush()
        flag, arrived = skipped.to("cpu", non_blocking=True), None
        if skipped.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(skipped.device))
        self.pending = Pending(step, keys, flag, arrived)
        if arrived is None:
            self.flush()

    def flush(self) -> None:
        """Count the last step added; called before the state is saved."""
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
        self.on_skipped(last.step, last.keys)
        if state.nonfinite_in_a_row >= self.limit:
            raise NumericError(
                f"{state.nonfinite_in_a_row} steps in a row gave no finite gradient; the last was step {last.step},"
                f" images {first_names(last.keys)}",
                "The network did not move in them. Lower train.learning_rate, set train.clip_norm, or use"
                " train.precision=fp32, and choose another --out: a run is resumed only with its own settings",
            )
