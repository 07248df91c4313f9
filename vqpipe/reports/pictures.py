"""Images as PNG: reconstructions beside originals, error maps, codebook maps, and galleries for a page.

Shapes: N images, H x W pixels, G groups, K codes per group.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqpipe.errors import DataError
from vqpipe.metrics.distortion import mean_squared_error, psnr_of
from vqpipe.reports import page
from vqpipe.reports.page import GAP

ERROR_PEAK = 64
"""The error, a mean absolute difference of R, G and B in 0..255, that an error map shows in its brightest color."""
UNUSED = (22, 26, 34)
"""Color of a code that was never chosen."""
MIN_FONT, MAX_FONT = 10, 48
"""Size of labels on a sheet, pixels: what fits into a column, between these."""
MAX_PREFIX_SIDE = 512
"""The same for reconstructions from the first k groups, of which there are many."""
MAX_SIDE = 1024
"""Pixels. Of larger images a page shows the center at full resolution: scaling down would hide the errors."""
MAX_BYTES = 24 * 2**20
"""PNG bytes of all images on a page, before base64, which adds a third."""
ERROR_CAPTION = f"Error: mean over R, G and B, from black (none) to the brightest color ({ERROR_PEAK} of 255 and more)."
GALLERIES = {
    "spread": ("Originals and reconstructions", "Images at even intervals over the set, chosen before measuring."),
    "worst": ("The worst images", "The images with the lowest PSNR, lowest first."),
    "best": ("The best images", "The images with the highest PSNR, highest first."),
}
"""Reason of an `ImagePair` -> title and caption of its section."""


@dataclass(frozen=True)
class ImagePair:
    """An image of a report and its reconstruction, as PNG files."""

    name: str
    original: bytes
    reconstruction: bytes
    psnr: float | None = None
    why: Literal["spread", "worst", "best"] = "spread"
    """Chosen at an even interval over the set, or for its PSNR."""
    prefixes: Sequence[tuple[int, bytes]] = ()
    """(k, reconstruction from the first k groups) for some k < G; a report does not keep them, its page shows them."""


class PictureBudget:
    """The bytes of pictures that a page may still take."""

    def __init__(self, num_bytes: int = MAX_BYTES) -> None:
        self.left = num_bytes
        self.omitted = 0

    def take(self, picture: page.Picture) -> bool:
        """Whether it still fits. After the first that does not, all are omitted."""
        size = len(picture.original) + sum(len(version.png) for version in picture.versions)
        if self.omitted or size > self.left:
            self.omitted += 1
            return False
        self.left -= size
        return True

    def note(self, folder: str = "pictures/ beside it") -> str:
        """A sentence on the pictures omitted, if there are any."""
        return f"{self.omitted:,} more would make this file too large: see {folder}." if self.omitted else ""


def galleries(pairs: Sequence[ImagePair]) -> list[page.Section]:
    """Originals, reconstructions and error maps: images at even intervals over the set, the worst, the best."""
    sections: list[page.Section] = []
    budget = PictureBudget()
    for why, (title, which) in GALLERIES.items():
        chosen = [pair for pair in pairs if pair.why == why]
        if why != "spread":
            chosen.sort(key=lambda pair: (pair.psnr is None, pair.psnr), reverse=why == "best")
        if found := error_pictures(chosen, budget):
            which = which if any(pair.why != "spread" for pair in pairs) else ""
            caption = " ".join(filter(None, (which, ERROR_CAPTION, budget.note())))
            sections.append(page.Pictures(title, found, caption))
            budget.omitted = 0
    return sections


def error_pictures(pairs: Sequence[ImagePair], budget: PictureBudget | None = None) -> list[page.Picture]:
    """Each original with its reconstruction and its error map, as far as the budget allows."""
    budget = budget or PictureBudget()
    found = (
        compared(pair.name, pair.original, [page.Version("reconstruction", pair.reconstruction)], decibels(pair.psnr))
        for pair in pairs
    )
    return [picture for picture in found if budget.take(picture)]


def prefix_pictures(pairs: Sequence[ImagePair]) -> list[page.Picture]:
    """Each original with its reconstructions from the first k groups, and the one from all."""
    found = []
    for pair in pairs:
        if not pair.prefixes:
            continue
        original, versions = from_png(pair.original)[None], []
        for label, png in (*((first_groups(k), png) for k, png in pair.prefixes), ("all groups", pair.reconstruction)):
            psnr = float(psnr_of(mean_squared_error(original, from_png(png)[None])))
            note = decibels(psnr if psnr < float("inf") else None)
            versions.append(page.Version(label, crop_center(png, MAX_PREFIX_SIDE), note))
        found.append(page.Picture(pair.name, crop_center(pair.original, MAX_PREFIX_SIDE), versions))
    return found


def shared_pictures(reports: Mapping[str, Sequence[ImagePair]], budget: PictureBudget) -> list[page.Picture]:
    """The originals that every one of several reports shows, each with all their reconstructions."""
    by_original = {name: {pair.original: pair for pair in pairs} for name, pairs in reports.items()}
    found = []
    for original, first in next(iter(by_original.values())).items():
        if all(original in pairs for pairs in by_original.values()):
            pairs = {name: pairs[original] for name, pairs in by_original.items()}
            versions = [page.Version(name, each.reconstruction, decibels(each.psnr)) for name, each in pairs.items()]
            found.append(compared(first.name, original, versions))
    return [picture for picture in found if budget.take(picture)]


def compared(name: str, original: bytes, versions: Sequence[page.Version], note: str = "") -> page.Picture:
    """An original and its versions; of those with a side over MAX_SIDE the center, which the note says. A single
    version is followed by its error map."""
    width, height = page.png_size(original)
    if max(width, height) > MAX_SIDE:
        original, *cut = (crop_center(png, MAX_SIDE) for png in (original, *(version.png for version in versions)))
        versions = [replace(version, png=png) for version, png in zip(versions, cut, strict=True)]
        size = " x ".join(map(str, page.png_size(original)))
        note = ", ".join(filter(None, (note, f"center {size} of {width} x {height} pixels; numbers of the whole")))
    if len(versions) == 1:
        error = error_map(from_png(original), from_png(versions[0].png))
        versions = [*versions, page.Version("error", error)]
    return page.Picture(name, original, versions, note)


def decibels(psnr: float | None) -> str:
    """`22.1 dB`; nothing where it is infinite or was not measured."""
    return "" if psnr is None else f"{psnr:.1f} dB"


def to_png(image: Tensor) -> bytes:
    """uint8[3, H, W] (or uint8[4, H, W] with alpha) -> PNG file; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(png: bytes) -> Tensor:
    """PNG file -> uint8[3, H, W]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1)


def crop_center(png: bytes, max_side: int) -> bytes:
    """The center of a PNG file, at most `max_side` pixels wide and high, as PNG."""
    image = from_png(png)
    height, width = (min(side, max_side) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return to_png(image[:, top : top + height, left : left + width])


def enlarge(images: Tensor, min_side: int) -> Tensor:
    """Scale [..., H, W] by a whole factor, nearest neighbor, until no side is under `min_side`."""
    factor = max(1, math.ceil(min_side / min(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def side_by_side(original: Tensor, *reconstructions: Tensor) -> Tensor:
    """The original and n reconstructions, uint8[3, H, W], from left to right with a white line between two of them ->
    uint8[3, H, (n + 1) W + n gap]."""
    line = torch.full((3, original.shape[1], GAP), 255, dtype=torch.uint8)
    return torch.cat([original.cpu(), *(part for each in reconstructions for part in (line, each.cpu()))], dim=2)


def with_labels(sheet: Tensor, labels: Sequence[str]) -> Tensor:
    """Write a label above each column of a sheet of `side_by_side`, on white: uint8[3, H, W] -> uint8[3, h + H, W]."""
    width = (sheet.shape[2] + GAP) // len(labels) - GAP
    longest = max(ImageFont.load_default(100).getlength(label) for label in labels) / 100
    size = int(min(max((width - 4 * GAP) / longest, MIN_FONT), MAX_FONT))
    strip = Image.new("RGB", (sheet.shape[2], size + 2 * GAP), "white")
    for column, label in enumerate(labels):
        cell = Image.new("RGB", (width, strip.height), "white")  # cuts off what is longer than its column
        ImageDraw.Draw(cell).text((0, GAP), label, fill="black", font=ImageFont.load_default(size))
        strip.paste(cell, (column * (width + GAP), 0))
    return torch.cat([torch.from_numpy(np.array(strip)).permute(2, 0, 1), sheet], dim=1)


def first_groups(k: int | None, note: str = "") -> str:
    """`first 2 groups`, `first 2 groups, 22.1 dB`; `reconstruction` for k = None."""
    name = "reconstruction" if k is None else "first group" if k == 1 else f"first {k} groups"
    return ", ".join(filter(None, (name, note)))


def reconstruction_grid(originals: Tensor, reconstructions: Tensor) -> bytes:
    """Pairs, original left and reconstruction right, in one row: two uint8[N, 3, H, W] tensors -> PNG.

    Raises:
        DataError: no images, or their shapes differ.
    """
    if originals.shape != reconstructions.shape or len(originals) == 0:
        raise DataError(
            f"a grid needs as many originals as reconstructions, got {list(originals.shape)} and "
            f"{list(reconstructions.shape)}"
        )
    pairs = [side_by_side(*pair) for pair in zip(enlarge(originals, 64), enlarge(reconstructions, 64), strict=True)]
    padded = [torch.nn.functional.pad(pair, (GAP, GAP, GAP, GAP), value=255) for pair in pairs]
    return to_png(torch.cat(padded, dim=2))


def contact_sheet(images: Tensor, columns: int = 8) -> bytes:
    """uint8[N, 3, H, W], `columns` per row, with white lines between -> PNG. The end of a last row that is not full is
    transparent.

    Raises:
        DataError: no images.
    """
    if len(images) == 0:
        raise DataError("a contact sheet needs images")
    columns = min(columns, len(images))
    padded = torch.nn.functional.pad(images.cpu(), (0, GAP, 0, GAP), value=255)
    blank = torch.full_like(padded[:1], 255).expand(-len(images) % columns, -1, -1, -1)
    rows = torch.cat([padded, blank]).unflatten(0, (-1, columns))  # [rows, columns, 3, H, W]
    sheet = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    sheet = torch.nn.functional.pad(sheet, (GAP, 0, GAP, 0), value=255)
    if len(blank):
        alpha = torch.full_like(sheet[:1], 255)
        alpha[:, -padded.shape[2] :, -len(blank) * padded.shape[3] :] = 0
        sheet = torch.cat([sheet, alpha])
    return to_png(sheet)


def error_map(original: Tensor, reconstruction: Tensor) -> bytes:
    """Mean absolute error of R, G and B at each pixel, 0 black to ERROR_PEAK bright: two uint8[3, H, W] tensors -> PNG.

    The PNG has a palette of the 256 colors, one byte per pixel: a third of the size.
    """
    error = (original.float() - reconstruction.float()).abs().mean(0).cpu().numpy()
    drawn = Image.fromarray(color_indices(error / ERROR_PEAK))
    drawn.putpalette(color_table("inferno").tobytes())
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return buffer.getvalue()


def codebook_map(counts: Tensor) -> bytes:
    """A pixel per code, row by row in the order of the codebook: int64[G, K] -> PNG, one square per group.

    Dark: never chosen. Brighter: chosen more often (logarithmic). Small codebooks are enlarged.
    """
    num_groups, codebook_size = counts.shape
    side = math.ceil(math.sqrt(codebook_size))
    padded = np.full((num_groups, side * side), -1, dtype=np.int64)
    padded[:, :codebook_size] = counts.cpu().numpy()
    brightness = np.log1p(np.maximum(padded, 0)) / max(math.log1p(int(counts.max())), 1e-9)
    pixels = color_table("plasma")[color_indices(0.35 + 0.65 * brightness)]
    pixels[padded == 0] = UNUSED
    alpha = np.where(padded < 0, 0, 255).astype(np.uint8)[..., None]
    squares = np.concatenate([pixels, alpha], axis=-1).reshape(num_groups, side, side, 4)
    gap = np.zeros((side, max(1, side // 32), 4), dtype=np.uint8)
    parts = [part for square in squares for part in (gap, square)][1:]
    sheet = torch.from_numpy(np.concatenate(parts, axis=1)).permute(2, 0, 1)
    return to_png(enlarge(sheet, 256))


def color_table(name: str) -> np.ndarray:
    """uint8[256, 3]: the colors of a matplotlib color map."""
    return np.ascontiguousarray(colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3])


def color_indices(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 (clipped) -> uint8 rows of a color table."""
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
