"""The worst and the best images of a set, kept while it streams by."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from vqpipe.distributed import gather_objects

Kept = TypeVar("Kept")


class Extremes(Generic[Kept]):
    """The k images of the lowest score and the k of the highest, with whatever is kept of each; memory for 2 k of them.

    Ties go to the earlier place, so the choice is the same for any sharding.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.lowest: list[tuple[float, int, Kept]] = []
        """(score, place, kept), the lowest first."""
        self.highest: list[tuple[float, int, Kept]] = []
        """The highest first."""

    def update(self, scores: Sequence[float], places: Sequence[int], keep: Callable[[int], Kept]) -> None:
        """Take in scores and the images' places in the set; `keep(i)` is called where the i-th is worth keeping."""
        for i, (score, place) in enumerate(zip(scores, places, strict=True) if self.k else ()):
            low = len(self.lowest) < self.k or (score, place) < self.lowest[-1][:2]
            high = len(self.highest) < self.k or (-score, place) < (-self.highest[-1][0], self.highest[-1][1])
            if low or high:
                row = (score, place, keep(i))
                if low:
                    self.lowest = sorted([*self.lowest, row], key=lambda kept: kept[:2])[: self.k]
                if high:
                    self.highest = sorted([*self.highest, row], key=lambda kept: (-kept[0], kept[1]))[: self.k]

    def choose(self) -> None:
        """Leave only what is among the k of all ranks, which all call it."""
        pairs = gather_objects(([row[:2] for row in self.lowest], [row[:2] for row in self.highest]))
        lowest = sorted(pair for part in pairs for pair in part[0])[: self.k]
        highest = sorted((pair for part in pairs for pair in part[1]), key=lambda pair: (-pair[0], pair[1]))[: self.k]
        self.lowest = [row for row in self.lowest if row[:2] in lowest]
        self.highest = [row for row in self.highest if row[:2] in highest]
