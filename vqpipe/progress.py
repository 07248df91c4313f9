"""Progress of a long job: the one protocol between jobs of the library and their display.

The commands pass a progress bar (`stages.console`); `SILENT`, the default everywhere, displays nothing.
"""

from collections.abc import Sequence
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
