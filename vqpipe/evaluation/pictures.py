"""The pictures of a report, selected during the pass: evenly spread over the set, and those of the lowest and highest
PSNR."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from torch import Tensor

from vqpipe.data.transforms import to_uint8
from vqpipe.distributed import gather_objects
from vqpipe.metrics.resumable import Resumable, State
from vqpipe.reports.pictures import ImagePair, to_png

NUM_WITH_PREFIXES, NUM_PREFIXES = 3, 6
"""How many of the pictures spread over the set have reconstructions from the first k groups, and of how many k at most,
all groups included."""
Scored = tuple[float, int, ImagePair]
"""PSNR, position in the set, and the picture."""


class SelectedPictures(Resumable):
    """Selects pictures of a set of `num_images`.

    Args:
        num_spread: how many are spread evenly over the set.
        num_extremes: how many of the lowest PSNR, and how many of the highest. Ties go to the earlier position, so the
            selection does not depend on the sharding.
    """

    def __init__(self, num_images: int, num_spread: int, num_extremes: int) -> None:
        self.positions = {number * num_images // num_spread for number in range(num_spread)}
        self.with_prefixes = set(sorted(self.positions)[:: -(-len(self.positions) // NUM_WITH_PREFIXES) or 1])
        self.num_extremes = num_extremes
        self.spread: list[ImagePair] = []
        self.lowest: list[Scored] = []
        """The lowest first."""
        self.highest: list[Scored] = []
        """The highest first."""

    def update(
        self,
        keys: Sequence[str],
        positions: Sequence[int],
        originals: Tensor,
        reconstructions: Tensor,
        psnr: Sequence[float],
        prefixes: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Consider two uint8[B, 3, H, W] tensors, with the images' names and their positions in the set.

        Args:
            prefixes: for each k < G the reconstructions from the first k groups, as those from all groups.
        """
        shown = spread_prefixes(list(prefixes or {}))
        for i, (position, score) in enumerate(zip(positions, psnr, strict=True)):
            chosen = (score, position)
            lowest = sorted([*(row[:2] for row in self.lowest), chosen])[: self.num_extremes]
            highest = sorted([*(row[:2] for row in self.highest), chosen], key=descending_key)[: self.num_extremes]
            if position not in self.positions and chosen not in lowest and chosen not in highest:
                continue
            finite = score if score < float("inf") else None  # infinite for equal images
            picture = ImagePair(keys[i], to_png(originals[i]), to_png(reconstructions[i]), finite)
            if position in self.positions:
                some = shown if position in self.with_prefixes else []
                pngs = tuple((k, to_png(to_uint8((prefixes or {})[k][i]))) for k in some)
                self.spread.append(replace(picture, prefixes=pngs))
            if chosen in lowest:
                self.lowest = sorted([*self.lowest, (*chosen, picture)], key=ascending_key)[: self.num_extremes]
            if chosen in highest:
                self.highest = sorted([*self.highest, (*chosen, picture)], key=descending_key)[: self.num_extremes]

    def state(self) -> State:
        rows = {side: [(*row[:2], *astuple(row[2])) for row in getattr(self, side)] for side in ("lowest", "highest")}
        return {"spread": [astuple(shown) for shown in self.spread], **rows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.spread = [from_row(shown) for shown in state["spread"]]
        for side in ("lowest", "highest"):
            setattr(self, side, [(score, position, from_row(shown)) for score, position, *shown in state[side]])

    def selected(self) -> list[ImagePair]:
        """Those of all ranks: the spread ones in the set's order, then the worst and the best, from the first on."""
        scores = gather_objects(([row[:2] for row in self.lowest], [row[:2] for row in self.highest]))
        lowest = sorted(row for part in scores for row in part[0])[: self.num_extremes]
        highest = sorted((row for part in scores for row in part[1]), key=descending_key)[: self.num_extremes]
        parts = gather_objects(
            (
                self.spread,
                [row for row in self.lowest if row[:2] in lowest],
                [row for row in self.highest if row[:2] in highest],
            )
        )
        worst = sorted((row for part in parts for row in part[1]), key=ascending_key)
        best = sorted((row for part in parts for row in part[2]), key=descending_key)
        return [
            *(shown for part in parts for shown in part[0]),
            *(replace(row[2], why="worst") for row in worst),
            *(replace(row[2], why="best") for row in best),
        ]


def spread_prefixes(prefixes: Sequence[int]) -> list[int]:
    """Of k = 1..G - 1 those to show beside G: all, or NUM_PREFIXES - 1 at even intervals from 1 on."""
    if len(prefixes) < NUM_PREFIXES:
        return list(prefixes)
    return [prefixes[number * len(prefixes) // (NUM_PREFIXES - 1)] for number in range(NUM_PREFIXES - 1)]


def from_row(row: Sequence[Any]) -> ImagePair:
    """A picture from a saved state, whose tuples have become lists."""
    pair = ImagePair(*row)
    return replace(pair, prefixes=tuple((k, png) for k, png in pair.prefixes))


def ascending_key(row: Sequence[Any]) -> tuple[float, int]:
    return row[0], row[1]


def descending_key(row: Sequence[Any]) -> tuple[float, int]:
    return -row[0], row[1]
