"""Where the time of a long job goes: seconds of the main process by part, and of what runs beside it."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Wall time since it was made, and how much of it each named part took.

    A CUDA device is never waited for on its account: what the device does shows as the time spent waiting for results.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.images = 0
        """Images done, for the rate."""
        self.parts = Counter[str]()
        """part -> seconds of the main process; together no more than `seconds`."""
        self.beside = Counter[str]()
        """part -> seconds of a second thread, which the main process did not wait for."""

    @property
    def seconds(self) -> float:
        """Wall time, up to now or to `stop`."""
        return max((self.ended or time.perf_counter()) - self.began, 1e-9)

    def stop(self) -> None:
        """The job is over."""
        self.ended = time.perf_counter()

    @contextmanager
    def part(self, name: str, *, beside: bool = False) -> Iterator[None]:
        """Count the time of this block under `name`; `beside` from a second thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            (self.beside if beside else self.parts)[name] += time.perf_counter() - began  # type: ignore[assignment]

    def waiting(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, the time until each is there counted under `name`."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def shares(self) -> dict[str, float]:
        """part -> its share of the wall time, 0..1, largest first."""
        return {name: seconds / self.seconds for name, seconds in self.parts.most_common()}
