"""Images as PNG: reconstructions beside originals, where they err, and which codes are in use.

Letters: N pictures, H x W pixels, G groups, K codes a group.
"""

import base64
import io
import math

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from vqpipe.errors import DataError

ERROR_PEAK = 64
"""Mean absolute error over R, G and B, in grey levels of 255, that error pictures show in their brightest colour."""
UNUSED = (22, 26, 34)
GAP = 4


def to_png(image: Tensor) -> bytes:
    """uint8[3, H, W] (or uint8[4, H, W] with alpha) -> PNG file."""
    return encode_png(image.permute(1, 2, 0).cpu().numpy())


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8[H, W, 3 or 4] -> PNG file; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(png: bytes) -> Tensor:
    """PNG file -> uint8[3, H, W]."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1)


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height) of a PNG file, pixels; only its head is read."""
    return Image.open(io.BytesIO(png)).size


def cut_middle(png: bytes, most: int) -> bytes:
    """The middle of a PNG file, at most `most` pixels wide and high, as PNG."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    width, height = min(image.width, most), min(image.height, most)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return encode_png(np.asarray(image.crop((left, top, left + width, top + height))))


def data_uri(png: bytes) -> str:
    """A PNG file as a `data:` address, for pages that load nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def enlarge(images: Tensor, smallest_side: int) -> Tensor:
    """Zoom [..., H, W] by a whole factor, nearest neighbour, until no side is under `smallest_side`."""
    factor = max(1, math.ceil(smallest_side / min(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def side_by_side(original: Tensor, reconstruction: Tensor) -> Tensor:
    """uint8[3, H, W] twice -> uint8[3, H, 2 W + gap]: the original left, a white line, the reconstruction right."""
    line = torch.full((3, original.shape[1], GAP), 255, dtype=torch.uint8)
    return torch.cat([original.cpu(), line, reconstruction.cpu()], dim=2)


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, columns: int = 4) -> bytes:
    """Pairs, original left and reconstruction right, `columns` pairs a row: uint8[N, 3, H, W] twice -> PNG.

    Raises:
        DataError: no pictures, or their shapes differ.
    """
    if originals.shape != reconstructions.shape or len(originals) == 0:
        raise DataError(
            f"a grid needs as many originals as reconstructions, got {list(originals.shape)} and "
            f"{list(reconstructions.shape)}"
        )
    pairs = [side_by_side(*pair) for pair in zip(enlarge(originals, 64), enlarge(reconstructions, 64), strict=True)]
    columns = min(columns, len(pairs))
    blank = torch.full_like(pairs[0], 255)
    pairs += [blank] * (-len(pairs) % columns)
    padded = [torch.nn.functional.pad(pair, (GAP, GAP, GAP, GAP), value=255) for pair in pairs]
    rows = [torch.cat(padded[start : start + columns], dim=2) for start in range(0, len(padded), columns)]
    return to_png(torch.cat(rows, dim=1))


def contact_sheet(images: Tensor, columns: int = 8) -> bytes:
    """uint8[N, 3, H, W], `columns` a row with a white line between -> PNG.

    Raises:
        DataError: no pictures.
    """
    if len(images) == 0:
        raise DataError("a contact sheet needs pictures")
    columns = min(columns, len(images))
    padded = torch.nn.functional.pad(images.cpu(), (0, GAP, 0, GAP), value=255)
    blank = torch.full_like(padded[:1], 255).expand(-len(images) % columns, -1, -1, -1)
    rows = torch.cat([padded, blank]).unflatten(0, (-1, columns))  # [rows, columns, 3, H, W]
    sheet = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return to_png(torch.nn.functional.pad(sheet, (GAP, 0, GAP, 0), value=255))


def error_picture(original: Tensor, reconstruction: Tensor) -> bytes:
    """Where a reconstruction errs: mean absolute error of R, G and B, 0 black to ERROR_PEAK bright, as PNG.

    The PNG has a palette of the 256 colours, one byte a pixel: a third of the size.
    """
    error = (original.float() - reconstruction.float()).abs().mean(0).cpu().numpy()
    drawn = Image.fromarray(places_in_table(error / ERROR_PEAK))
    drawn.putpalette(colour_table("inferno").tobytes())
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return buffer.getvalue()


def codebook_map(counts: Tensor) -> bytes:
    """Every code a pixel of a square, row by row in the codebook's order: int64[G, K] -> PNG, groups side by side.

    Dark: never chosen. Colour: chosen, brighter for more often (logarithmic). Small codebooks are enlarged.
    """
    num_groups, codebook_size = counts.shape
    side = math.ceil(math.sqrt(codebook_size))
    padded = np.full((num_groups, side * side), -1, dtype=np.int64)
    padded[:, :codebook_size] = counts.cpu().numpy()
    brightness = np.log1p(np.maximum(padded, 0)) / max(math.log1p(int(counts.max())), 1e-9)
    pixels = in_colours(0.35 + 0.65 * brightness, "plasma")
    pixels[padded == 0] = UNUSED
    alpha = np.where(padded < 0, 0, 255).astype(np.uint8)[..., None]
    squares = np.concatenate([pixels, alpha], axis=-1).reshape(num_groups, side, side, 4)
    gap = np.zeros((side, max(1, side // 32), 4), dtype=np.uint8)
    parts = [part for square in squares for part in (gap, square)][1:]
    sheet = torch.from_numpy(np.concatenate(parts, axis=1)).permute(2, 0, 1)
    return to_png(enlarge(sheet, 256))


def in_colours(values: np.ndarray, colour_map: str) -> np.ndarray:
    """Numbers in 0..1 (clipped) -> uint8[..., 3] by a matplotlib colour map."""
    return colour_table(colour_map)[places_in_table(values)]


def colour_table(colour_map: str) -> np.ndarray:
    """uint8[256, 3], the colours of a matplotlib colour map from its beginning to its end."""
    return np.ascontiguousarray(colormaps[colour_map](np.linspace(0, 1, 256), bytes=True)[:, :3])


def places_in_table(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 (clipped) -> uint8, rows of a colour table."""
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
