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
Ranked = tuple[float, int, ImagePair]
"""Rank (PSNR, or minus that; the lowest first), position in the set, and the picture."""


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
        self.extremes: dict[str, list[Ranked]] = {"worst": [], "best": []}
        """In the order of their ranks."""

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
            places = {"worst": (score, position), "best": (-score, position)}
            kept = [why for why, place in places.items() if place in self.first([*self.extremes[why], place])]
            if position not in self.positions and not kept:
                continue
            finite = score if score < float("inf") else None  # infinite for equal images
            picture = ImagePair(keys[i], to_png(originals[i]), to_png(reconstructions[i]), finite)
            if position in self.positions:
                some = shown if position in self.with_prefixes else []
                pngs = tuple((k, to_png(to_uint8((prefixes or {})[k][i]))) for k in some)
                self.spread.append(replace(picture, prefixes=pngs))
            for why in kept:
                self.extremes[why] = self.first([*self.extremes[why], (*places[why], picture)])

    def first(self, rows: Sequence[Any]) -> list[Any]:
        """The first of these, by rank and position."""
        return sorted(rows, key=lambda row: row[:2])[: self.num_extremes]

    def state(self) -> State:
        extremes = {why: [(*row[:2], astuple(row[2])) for row in rows] for why, rows in self.extremes.items()}
        return {"spread": [astuple(shown) for shown in self.spread], **extremes}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.spread = [from_row(shown) for shown in state["spread"]]
        self.extremes = {
            why: [(rank, position, from_row(shown)) for rank, position, shown in state[why]] for why in self.extremes
        }

    def selected(self) -> list[ImagePair]:
        """Those of all ranks: the spread ones in the set's order, then the worst and the best, from the first on."""
        parts = gather_objects((self.spread, self.extremes))
        shown = [each for spread, _ in parts for each in spread]
        for why in self.extremes:
            rows = self.first([row for _, extremes in parts for row in extremes[why]])
            shown += [replace(picture, why=why) for _, _, picture in rows]
        return shown


def spread_prefixes(prefixes: Sequence[int]) -> list[int]:
    """Of k = 1..G - 1 those to show beside G: all, or NUM_PREFIXES - 1 at even intervals from 1 on."""
    if len(prefixes) < NUM_PREFIXES:
        return list(prefixes)
    return [prefixes[number * len(prefixes) // (NUM_PREFIXES - 1)] for number in range(NUM_PREFIXES - 1)]


def from_row(row: Sequence[Any]) -> ImagePair:
    """A picture from a saved state, whose tuples have become lists."""
    pair = ImagePair(*row)
    return replace(pair, prefixes=tuple((k, png) for k, png in pair.prefixes))
