"""`patches`: the image patches nearest to a code among those that chose it, on a sheet per code.

Shapes: B images of H x W pixels, N ids per image, G groups, K codes per group, C channels, f the downsample factor,
S = 2 f the side of a patch (f even), M patches per code, T tracked codes per group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.analysis.base import (
    NO_GRID,
    codebooks,
    metric_of,
    sample_ids,
    sampling_key,
)
from vqpipe.distributed import gather_objects
from vqpipe.errors import ConfigError
from vqpipe.evaluation.analysis import Analysis, AnalysisInputs
from vqpipe.metrics.resumable import Resumable
from vqpipe.metrics.usage import CodeUsage
from vqpipe.quantizers import CodebookQuantizer, MultiGroupQuantizer, Quantizer, ResidualQuantizer, TokenLayout
from vqpipe.reports import page, pictures
from vqpipe.words import percent

COLUMNS = 3
NEAREST = COLUMNS * COLUMNS
"""Patches of a sheet, M."""
MAX_BYTES = 128 * 2**20
"""Pixels in memory: T is K, or what fits. For f = 16 that is 4,854 codes, for f = 8 19,418."""
NUM_COMMON, NUM_RARE = 12, 4
"""Sheets shown: of the most frequent codes, and of rare ones."""
SHEET_SIDE = 80
"""Minimum side of a patch on a sheet, pixels."""


class Patches(Analysis):
    """A patch is the f x f cell of a token with half a cell around it, mirrored beyond the image.

    Distance is L2 between the latent and the code as the search compares them, for each group in its own channels; so
    each image is encoded a second time. For a residual quantizer only the first depth is used: later ones do not depend
    on the patch alone. The frequent codes are known only at the end, so patches are kept for all codes that fit into
    MAX_BYTES; of a larger codebook T codes drawn by the seed are tracked. Rare codes are the least frequent ones that
    fill a sheet, where there are such.
    """

    name: ClassVar[str] = "patches"
    state_names: ClassVar[tuple[str, ...]] = ("usage", "worst", "kept", "without_layout")

    def __init__(self, inputs: AnalysisInputs) -> None:
        super().__init__(inputs)
        quantizer = inputs.tokenizer.autoencoder.quantizer
        check_single_grid(quantizer)
        codebooks(quantizer)  # raises if no codebook is loaded
        self.groups = num_compared(quantizer)
        self.cell = inputs.tokenizer.downsample_factor
        self.side = self.cell + 2 * (self.cell // 2)
        self.codebook_size = quantizer.codebook_size
        fitting = max(1, MAX_BYTES // (3 * self.side**2 * NEAREST * self.groups))
        self.tracked = sample_ids(self.codebook_size, fitting, inputs.seed)
        self.place = torch.full((self.codebook_size,), -1)
        """int64[K]: the place of each id in `tracked`, -1 for others."""
        self.place[self.tracked] = torch.arange(len(self.tracked))
        self.usage = CodeUsage(self.codebook_size, self.groups, inputs.tokenizer.device)
        self.worst = np.full(self.groups * len(self.tracked), np.inf, dtype=np.float32)
        """By slot (group and tracked code): the largest distance of its M patches."""
        self.kept = PatchSet.empty(self.side)
        self.without_layout = 0

    def slot(self, group: int, code: int) -> int:
        """The slot of a tracked code."""
        return group * len(self.tracked) + int(self.place[code])

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        tokenizer = self.inputs.tokenizer
        layout = self.inputs.layout(originals, ids)
        if layout is None:
            self.without_layout += len(originals)
            return
        (grid,) = layout.split(ids.to(tokenizer.device))
        grid = grid[..., : self.groups]
        self.usage.update(grid.flatten(1))
        with torch.no_grad():
            latent = tokenizer.latent(originals)
            distance = distances(tokenizer.autoencoder.quantizer, latent, ids.to(tokenizer.device), layout)
        image_keys = [int(sampling_key(key)[:15], 16) for key in keys]
        self.keep_nearest(originals.cpu(), grid.cpu(), distance.cpu(), image_keys)

    def keep_nearest(self, originals: Tensor, grid: Tensor, distance: Tensor, image_keys: Sequence[int]) -> None:
        """Keep the M nearest patches of each tracked code: int64[B, h, w, G], float32[B, h, w, G], a key per image."""
        place = torch.where(grid >= 0, self.place[grid.clamp(min=0)], -1)
        slot = (place + torch.arange(self.groups) * len(self.tracked)).numpy()
        nearer = (place.numpy() >= 0) & (distance.numpy() <= self.worst[slot.clip(min=0)])
        image, y, x, group = nearer.nonzero()
        if not len(image):
            return
        found = PatchSet(
            slot[image, y, x, group],
            distance.numpy()[image, y, x, group],
            np.array(image_keys, dtype=np.int64)[image],
            (y * grid.shape[2] + x).astype(np.int64),
            np.stack([image, y, x], axis=1),  # where to cut the pixels of those that are kept
        ).nearest()
        found.pixels = cut(originals, found.pixels, self.cell)
        self.kept = PatchSet.concatenate([self.kept, found]).nearest()
        slots, counts = np.unique(self.kept.slot, return_counts=True)
        last = np.cumsum(counts)[counts == NEAREST] - 1
        self.worst[slots[counts == NEAREST]] = self.kept.distance[last]

    def result(self) -> dict[str, Any]:
        counts = self.usage.merged().counts.cpu()
        without_layout = sum(gather_objects(self.without_layout))
        if not int(counts.sum()):
            return {"not_computed": NO_GRID}
        common, rare = max(1, NUM_COMMON // self.groups), NUM_RARE // self.groups
        shown = [
            (group, int(self.tracked[place]))
            for group in range(self.groups)
            for place in common_and_rare(counts[group][self.tracked], common, rare)
        ]
        slots = np.array([self.slot(*each) for each in shown], dtype=np.int64)
        self.kept = PatchSet.concatenate(gather_objects(self.kept.of(slots))).nearest()
        sheets = []
        for (group, code), slot in zip(shown, slots, strict=True):
            times = int(counts[group, code])
            share = times / int(counts[group].sum())
            near = self.kept.of(np.array([slot])).distance.tolist()
            sheets.append({"group": group, "code": code, "times": times, "share": share, "distances": near})
        return {
            "sheets": sheets,
            "num_watched": len(self.tracked),
            "num_without_layout": without_layout,
            "seed": self.inputs.seed,
        }

    def sections_of(self, result: Mapping[str, Any]) -> list[page.Section]:
        maps = []
        for sheet in result["sheets"]:
            slot = self.slot(sheet["group"], sheet["code"])
            png = code_sheet(self.kept.of(np.array([slot])).pixels)
            name = f"Code {sheet['code']:,}" + (f" of group {sheet['group'] + 1}" if self.groups > 1 else "")
            note = f"{sheet['times']:,} times ({percent(sheet['share'])} of the tokens)"
            maps.append(page.Map(note, png, name, f"Patches of {name}, {note}"))
        some = ""
        if result["num_watched"] < self.codebook_size:
            some = (
                f" Of {self.codebook_size:,} codes {result['num_watched']:,} are tracked, drawn with seed "
                f"{result['seed']}: the patches of all do not fit into memory."
            )
        caption = (
            f"Each sheet shows the {NEAREST} patches nearest to a code among those that chose it: the cell "
            f"of the token with half a cell around it. The most frequent codes, then rare ones.{some}"
        )
        return [page.Maps("Patches of the codes", maps, caption)]


class PatchSet(Resumable):
    """Patches: slot int64[n] (group and tracked code), distance float32[n], image_key int64[n] and cell int64[n] (in
    the image), which decide ties, and pixels uint8[n, 3, S, S]."""

    state_names: ClassVar[tuple[str, ...]] = ("slot", "distance", "image_key", "cell", "pixels")

    def __init__(
        self, slot: np.ndarray, distance: np.ndarray, image_key: np.ndarray, cell: np.ndarray, pixels: np.ndarray
    ) -> None:
        self.slot, self.distance, self.image_key, self.cell, self.pixels = slot, distance, image_key, cell, pixels

    @classmethod
    def empty(cls, side: int) -> "PatchSet":
        """No patches, of S x S pixels."""
        zero = np.zeros(0, dtype=np.int64)
        return cls(zero, zero.astype(np.float32), zero, zero, np.zeros((0, 3, side, side), dtype=np.uint8))

    @classmethod
    def concatenate(cls, parts: Sequence["PatchSet"]) -> "PatchSet":
        """The patches of all parts."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part.arrays() for part in parts), strict=True)))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of the constructor."""
        return self.slot, self.distance, self.image_key, self.cell, self.pixels

    def of(self, slots: np.ndarray) -> "PatchSet":
        """The patches of some slots."""
        kept = np.isin(self.slot, slots)
        return PatchSet(*(array[kept] for array in self.arrays()))

    def nearest(self) -> "PatchSet":
        """The M nearest of each slot, sorted by slot and distance."""
        order = np.lexsort((self.cell, self.image_key, self.distance, self.slot))
        slot = self.slot[order]
        begins = np.append(True, slot[1:] != slot[:-1]).nonzero()[0] if len(slot) else slot
        rank = np.arange(len(slot)) - np.repeat(begins, np.diff(np.append(begins, len(slot))))
        kept = order[rank < NEAREST]
        return PatchSet(*(array[kept] for array in self.arrays()))


def check_single_grid(quantizer: Quantizer) -> None:
    """Raise a ConfigError unless each position of the latent has one vector per group (or first depth) to compare."""
    inner = quantizer.quantizers()[0] if isinstance(quantizer, MultiGroupQuantizer) else quantizer
    if not isinstance(inner, CodebookQuantizer | ResidualQuantizer):
        raise quantizer.unsupported("has no codebook")
    if len(quantizer.layout(2, 2).grids) != 1:
        raise ConfigError("codes stand for cells of several sizes, so they have no patch of one size")


def num_compared(quantizer: Quantizer) -> int:
    """Ids of a position that `distances` uses: all groups, but only the first depth."""
    return 1 if isinstance(quantizer, ResidualQuantizer) else quantizer.num_groups


def distances(quantizer: Quantizer, latent: Tensor, ids: Tensor, layout: TokenLayout) -> Tensor:
    """L2 distance of each latent to its code as the search compares them, of unit vectors under cosine:
    float32[B, C, h, w], int64[B, N] -> float32[B, h, w, G]. For a residual quantizer, of the first depth."""
    (grid,) = layout.split(ids)
    if isinstance(quantizer, MultiGroupQuantizer):
        single = TokenLayout(layout.grids)
        parts = zip(quantizer.split_channels(latent), grid.unbind(-1), strict=True)
        return torch.cat([distances(group, part, own.flatten(1), single) for (group, part), own in parts], dim=-1)
    vectors = quantizer.search_input(latent) if isinstance(quantizer, CodebookQuantizer) else latent.float()
    vectors = vectors.permute(0, 2, 3, 1)
    if metric_of(quantizer) == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    codes = codebooks(quantizer)[0][grid[..., 0].clamp(min=0)]
    return (vectors - codes).norm(dim=-1, keepdim=True)


def cut(images: Tensor, cells: np.ndarray, cell: int) -> np.ndarray:
    """uint8[B, 3, H, W] and int64[n, 3] of image, row and column of a cell -> uint8[n, 3, S, S] around each."""
    margin = cell // 2
    padded = F.pad(images.float(), (margin,) * 4, mode="reflect").to(torch.uint8).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (cell + 2 * margin,) * 2, axis=(2, 3))
    image, y, x = cells.T
    return windows[image, :, y * cell, x * cell]


def common_and_rare(times: Tensor, num_common: int, num_rare: int) -> list[int]:
    """int64[T] -> the places of the most frequent codes and of rare ones that were chosen, each once."""
    order = times.argsort(descending=True, stable=True).tolist()
    used = [place for place in order if times[place] > 0]
    common, others = used[:num_common], used[num_common:]
    filling = [place for place in others if times[place] >= NEAREST] or others
    return common + filling[max(0, len(filling) - num_rare) :] if num_rare else common


def code_sheet(pixels: np.ndarray) -> bytes:
    """uint8[n, 3, S, S] -> PNG of M patches, row by row, transparent where there are fewer."""
    patches = pictures.enlarge(torch.from_numpy(pixels), SHEET_SIDE)
    side = patches.shape[-1]
    step = side + page.GAP
    sheet = torch.zeros(4, COLUMNS * step - page.GAP, COLUMNS * step - page.GAP, dtype=torch.uint8)
    for number, patch in enumerate(patches):
        y, x = (step * place for place in divmod(number, COLUMNS))
        sheet[:3, y : y + side, x : x + side] = patch
        sheet[3, y : y + side, x : x + side] = 255
    return pictures.to_png(sheet)
