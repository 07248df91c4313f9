"""The pictures of a report, chosen while the images stream by: spread evenly over the set, the worst and the best."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from torch import Tensor

from vqpipe.distributed import gather_objects
from vqpipe.metrics.extremes import Extremes
from vqpipe.metrics.state import Accumulator, State
from vqpipe.reports.pictures import ImagePair, to_png


class ChosenPictures(Accumulator):
    """Pictures of a set of `num_images`: `num_spread` of them spread evenly, and `num_extremes` of the lowest and of
    the highest PSNR; memory for these alone."""

    def __init__(self, num_images: int, num_spread: int, num_extremes: int) -> None:
        self.places = {number * num_images // num_spread for number in range(num_spread)}
        self.spread: list[ImagePair] = []
        self.extremes: Extremes[ImagePair] = Extremes(num_extremes)

    def update(
        self, keys: Sequence[str], places: Sequence[int], originals: Tensor, again: Tensor, psnr: Sequence[float]
    ) -> None:
        """Take in uint8[B, 3, H, W] twice, with the images' names and their places in the set."""
        for i, place in enumerate(places):
            if place in self.places:
                self.spread.append(picture(keys[i], originals[i], again[i], psnr[i]))
        self.extremes.update(psnr, places, lambda i: picture(keys[i], originals[i], again[i], psnr[i]))

    def state(self) -> State:
        extremes = {"lowest": self.extremes.lowest, "highest": self.extremes.highest}
        rows = {side: [(*row[:2], *astuple(row[2])) for row in kept] for side, kept in extremes.items()}
        return {"spread": [astuple(shown) for shown in self.spread], **rows}

    def load(self, state: Mapping[str, Any]) -> None:
        self.spread = [ImagePair(*shown) for shown in state["spread"]]
        sides = ("lowest", "highest")
        lowest, highest = ([(score, at, ImagePair(*shown)) for score, at, *shown in state[side]] for side in sides)
        self.extremes.lowest, self.extremes.highest = lowest, highest

    def result(self) -> list[ImagePair]:
        """What is shown, of all ranks, which all call it: in the set's order, then the worst and the best, from the
        first on."""
        self.extremes.choose()
        parts = gather_objects((self.spread, self.extremes.lowest, self.extremes.highest))
        spread = [shown for part in parts for shown in part[0]]
        worst = sorted((row for part in parts for row in part[1]), key=lambda row: row[:2])
        best = sorted((row for part in parts for row in part[2]), key=lambda row: (-row[0], row[1]))
        return [
            *spread,
            *(replace(row[2], why="worst") for row in worst),
            *(replace(row[2], why="best") for row in best),
        ]


def picture(name: str, original: Tensor, again: Tensor, psnr: float) -> ImagePair:
    """uint8[3, H, W] twice; an infinite PSNR (equal images) is left out."""
    return ImagePair(name, to_png(original), to_png(again), psnr if psnr < float("inf") else None)
