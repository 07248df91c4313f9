"""`patches`: what a code looks like: the pieces of images that chose it with the least distance, on a sheet a code.

Letters: B images of H x W pixels, N ids an image, G groups, K codes a group, f the downsample factor, S = 2 f the side
of a piece (f even), M pieces a code, T codes a group that are watched.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.analysis import codes
from vqpipe.analysis.base import Analysis, Subject, left_out, lot
from vqpipe.analysis.embedding import drawn
from vqpipe.distributed import gather_objects
from vqpipe.metrics.metric import Metric
from vqpipe.metrics.usage import CodeUsage
from vqpipe.reports import page, pictures

COLUMNS = 3
NEAREST = COLUMNS * COLUMNS
"""Pieces of a sheet, M."""
MOST_BYTES = 128 * 2**20
"""Pixels that are kept: T is K, or what fits. With f = 16 that are 4,854 codes, with f = 8 19,418."""
NUM_COMMON, NUM_RARE = 12, 4
"""Sheets shown: of the codes chosen most often, and of rare ones."""
SHEET_SIDE = 80
"""Least side of a piece on a sheet, pixels."""


class Patches(Analysis):
    """A piece is a token's cell of f x f pixels and half a cell around it, mirrored beyond the image.

    Distance is L2 between the latent and the code as the search compares them, each group by its own channels; for that
    every image is encoded a second time. Of a residual quantizer the first depth is looked at: later ones do not choose
    by what is seen. Which codes come often is known only at the end, so pieces are kept for all codes that fit
    MOST_BYTES; of a larger codebook T codes drawn by the seed are watched, and the sheets are theirs. Rare codes are
    those chosen least, but often enough to fill a sheet, where there are such.
    """

    name: ClassVar[str] = "patches"
    state_names: ClassVar[tuple[str, ...]] = ("usage", "worst", "kept", "without_layout")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        quantizer = subject.tokenizer.autoencoder.quantizer
        codes.check_single_grid(quantizer)
        codes.codebooks(quantizer)  # no codebook loaded is an error now, not later
        self.groups = codes.compared_groups(quantizer)
        self.cell = subject.tokenizer.downsample_factor
        self.side = self.cell + 2 * (self.cell // 2)
        self.codebook_size = quantizer.codebook_size
        fitting = max(1, MOST_BYTES // (3 * self.side**2 * NEAREST * self.groups))
        self.watched = drawn(self.codebook_size, fitting, subject.seed)
        self.row = torch.full((self.codebook_size,), -1).index_copy(
            0, self.watched, torch.arange(len(self.watched))
        )  # id -> its place among the watched, -1 for others
        self.usage = CodeUsage(self.codebook_size, self.groups, subject.tokenizer.device)
        self.worst = np.full(self.groups * len(self.watched), np.inf, dtype=np.float32)
        """By group and watched code: the distance that the next piece must beat."""
        self.kept = Pieces.none(self.side)
        self.without_layout = 0

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        tokenizer = self.subject.tokenizer
        layout = self.subject.layout(originals, ids)
        if layout is None:
            self.without_layout += len(originals)
            return
        (grid,) = layout.split(ids.to(tokenizer.device))
        grid = grid[..., : self.groups]
        self.usage.update(grid.flatten(1))
        with torch.no_grad():
            latent = tokenizer.latent(originals)
            far = codes.distances(tokenizer.autoencoder.quantizer, latent, ids.to(tokenizer.device), layout)
        self._take(originals.cpu(), grid.cpu(), far.cpu(), [int(lot(key)[:15], 16) for key in keys])

    def _take(self, originals: Tensor, grid: Tensor, far: Tensor, lots: Sequence[int]) -> None:
        """Keep the M nearest pieces of each watched code: int64[B, h, w, G], float32[B, h, w, G], a number an image."""
        row = torch.where(grid >= 0, self.row[grid.clamp(min=0)], -1)
        slot = (row + torch.arange(self.groups) * len(self.watched)).numpy()
        nearer = (row.numpy() >= 0) & (far.numpy() <= self.worst[slot.clip(min=0)])
        image, y, x, group = nearer.nonzero()
        if not len(image):
            return
        width = grid.shape[2]
        found = Pieces(
            slot[image, y, x, group],
            far.numpy()[image, y, x, group],
            np.array(lots, dtype=np.int64)[image],
            (y * width + x).astype(np.int64),
            np.stack([image, y, x], axis=1),
        ).nearest()
        pixels = cut(originals, found.pixels, self.cell)
        self.kept = Pieces.join([self.kept, found.with_pixels(pixels)]).nearest()
        slots, counts = np.unique(self.kept.slot, return_counts=True)
        full = np.cumsum(counts)[counts == NEAREST] - 1
        self.worst[slots[counts == NEAREST]] = self.kept.distance[full]

    def result(self) -> dict[str, Any]:
        counts = self.usage.merged().counts.cpu()
        without = sum(gather_objects(self.without_layout))
        if not int(counts.sum()):
            return {"not_computed": "no image whose tokens lie on a grid of its own size (padded, or in tiles)"}
        chosen = [choose(counts[group][self.watched], share) for group, share in enumerate(shares(self.groups))]
        slots = [group * len(self.watched) + place for group, places in enumerate(chosen) for place in places]
        parts = gather_objects(self.kept.of(np.array(slots, dtype=np.int64)))
        self.kept = Pieces.join(parts).nearest()
        sheets = []
        for slot in slots:
            group, place = divmod(slot, len(self.watched))
            code = int(self.watched[place])
            times = int(counts[group, code])
            near = self.kept.of(np.array([slot])).distance.tolist()
            share = times / int(counts[group].sum())
            sheets.append({"group": group, "code": code, "times": times, "share": share, "distances": near})
        return {
            "sheets": sheets,
            "num_watched": len(self.watched),
            "num_without_layout": without,
            "seed": self.subject.seed,
        }

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        if "not_computed" in result:
            return left_out(self.name, result)
        maps = []
        for sheet in result["sheets"]:
            slot = sheet["group"] * len(self.watched) + int(self.row[sheet["code"]])
            png = contact_sheet(self.kept.of(np.array([slot])).pixels)
            name = f"code {sheet['code']:,}" + (f" of group {sheet['group'] + 1}" if self.groups > 1 else "")
            headline = f"{name[0].upper()}{name[1:]}"
            note = f"{sheet['times']:,} times ({sheet['share']:.2%} of the tokens)"
            maps.append(page.Map(note, pictures.data_uri(png), headline, f"What chose {name}, {note}"))
        some = ""
        if result["num_watched"] < self.codebook_size:
            some = (
                f" Of {self.codebook_size:,} codes {result['num_watched']:,} were watched, drawn with seed "
                f"{result['seed']}: pieces of all would not fit."
            )
        caption = (
            f"Each sheet is one code: the {NEAREST} pieces of images that chose it from the least distance, nearest "
            f"first; the token's own cell with half a cell around it. The codes chosen most, then rare ones.{some}"
        )
        return [page.Maps("What codes look like", maps, caption)]


class Pieces(Metric):
    """Pieces of images: slot int64[n] (group and watched code), distance float32[n], lot int64[n] and place int64[n]
    of the cell in its image, which settle ties, and pixels uint8[n, 3, S, S]."""

    state_names: ClassVar[tuple[str, ...]] = ("slot", "distance", "lots", "place", "pixels")

    def __init__(
        self, slot: np.ndarray, distance: np.ndarray, lots: np.ndarray, place: np.ndarray, pixels: np.ndarray
    ) -> None:
        self.slot, self.distance, self.lots, self.place, self.pixels = slot, distance, lots, place, pixels

    @classmethod
    def none(cls, side: int) -> "Pieces":
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty.astype(np.float32), empty, empty, np.zeros((0, 3, side, side), dtype=np.uint8))

    @classmethod
    def join(cls, parts: Sequence["Pieces"]) -> "Pieces":
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part.arrays() for part in parts), strict=True)))

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.slot, self.distance, self.lots, self.place, self.pixels

    def with_pixels(self, pixels: np.ndarray) -> "Pieces":
        return Pieces(self.slot, self.distance, self.lots, self.place, pixels)

    def of(self, slots: np.ndarray) -> "Pieces":
        """Those of some slots, in their order."""
        kept = np.isin(self.slot, slots)
        return Pieces(*(array[kept] for array in self.arrays()))

    def nearest(self) -> "Pieces":
        """The M nearest of each slot, sorted by slot and distance."""
        order = np.lexsort((self.place, self.lots, self.distance, self.slot))
        slot = self.slot[order]
        begins = np.append(True, slot[1:] != slot[:-1]).nonzero()[0] if len(slot) else slot
        rank = np.arange(len(slot)) - np.repeat(begins, np.diff(np.append(begins, len(slot))))
        kept = order[rank < NEAREST]
        return Pieces(*(array[kept] for array in self.arrays()))


def cut(images: Tensor, cells: np.ndarray, cell: int) -> np.ndarray:
    """uint8[B, 3, H, W] and int64[n, 3] of image, row and column of a cell -> uint8[n, 3, S, S] around each."""
    margin = cell // 2
    padded = F.pad(images.float(), (margin,) * 4, mode="reflect").to(torch.uint8).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (cell + 2 * margin,) * 2, axis=(2, 3))
    image, y, x = cells.T
    return windows[image, :, y * cell, x * cell]


def shares(groups: int) -> list[tuple[int, int]]:
    """How many common and rare codes each group shows: at least one common."""
    return [(max(1, NUM_COMMON // groups), NUM_RARE // groups)] * groups


def choose(times: Tensor, share: tuple[int, int]) -> list[int]:
    """int64[T] -> places of the most chosen and of rare ones, none twice, none that was never chosen."""
    order = times.argsort(descending=True, stable=True).tolist()
    used = [place for place in order if times[place] > 0]
    common, rest = used[: share[0]], used[share[0] :]
    filling = [place for place in rest if times[place] >= NEAREST] or rest
    return common + filling[max(0, len(filling) - share[1]) :] if share[1] else common


def contact_sheet(pixels: np.ndarray) -> bytes:
    """uint8[n, 3, S, S] -> PNG of M pieces, row by row, transparent where there are fewer."""
    pieces = pictures.enlarge(torch.from_numpy(pixels), SHEET_SIDE)
    side = pieces.shape[-1]
    step = side + pictures.GAP
    sheet = torch.zeros(4, COLUMNS * step - pictures.GAP, COLUMNS * step - pictures.GAP, dtype=torch.uint8)
    for number, piece in enumerate(pieces):
        y, x = (step * place for place in divmod(number, COLUMNS))
        sheet[:3, y : y + side, x : x + side] = piece
        sheet[3, y : y + side, x : x + side] = 255
    return pictures.to_png(sheet)
