"""Progress of a long job: the one protocol between jobs of the library and their display, and how often it is saved.

The commands pass a progress bar (`stages.console`); `SILENT`, the default everywhere, displays nothing.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a job. A job may go through several phases, each with a count of its own."""

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        """Begin a phase of `total` units (None: unknown), of which an earlier run has done `done`.

        An empty unit: a phase without a count, such as building a network. It is displayed while it lasts.
        """

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""

    def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
        """Set the short text beside the count, such as a loss, and the (label, text) rows of the table below it."""

    def message(self, text: str) -> None:
        """Print one line for the user."""


class Silent:
    """Displays nothing."""

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
        pass

    def message(self, text: str) -> None:
        pass


SILENT: Progress = Silent()


class Throttle:
    """Limits how often an action that may take long is repeated, by wall-clock time.

    Args:
        first: seconds until the first time.
        every: seconds between the next ones, multiplied by `growth` each time, until `longest`.
        share: the largest share of the whole time that the action may take; longer ones are repeated less often.
        longest_pause: seconds after which the action is repeated whatever its share, but for a longer `every`.
    """

    def __init__(
        self,
        *,
        first: float,
        every: float,
        growth: float = 1.0,
        longest: float = math.inf,
        share: float = 0.02,
        longest_pause: float = math.inf,
    ) -> None:
        self.every, self.growth, self.longest = every, growth, longest
        self.share, self.longest_pause = share, longest_pause
        self.next = time.monotonic() + first

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self.next

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The action, whether it was due or not: the next one is due an interval later."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.next = ended + max(self.every, min((ended - began) / self.share, self.longest_pause))
        self.every = min(self.every * self.growth, self.longest)
