"""Who hears of a training run while it goes on."""

from typing import Any, Protocol

from vqpipe.training.history import Row
from vqpipe.training.state import TrainState


class Listener(Protocol):
    """The loop's callbacks, on every rank.

    `network` is always the weight average, which is what will be published.
    """

    def start(self, state: TrainState) -> None:
        """The run begins, or goes on from a checkpoint."""

    def log(self, row: Row) -> None:
        """A row of the log, every `log_every` steps and at the end."""

    def look(self, step: int, network: Any) -> None:
        """Time for pictures, every `sample_every` steps and at the end."""

    def validate(self, step: int, network: Any) -> None:
        """Time to look at held-out images, every `validate_every` steps and at the end."""

    def bad(self, step: int, keys: list[str]) -> None:
        """`step` was skipped; this rank saw these images in it."""

    def advance(self, state: TrainState) -> None:
        """A step is done; saving it, where that is due, comes next."""


class Silence:
    """Hears nothing; a subclass defines what it wants to hear."""

    def start(self, state: TrainState) -> None:
        pass

    def log(self, row: Row) -> None:
        pass

    def look(self, step: int, network: Any) -> None:
        pass

    def validate(self, step: int, network: Any) -> None:
        pass

    def bad(self, step: int, keys: list[str]) -> None:
        pass

    def advance(self, state: TrainState) -> None:
        pass
