"""Reconstruction of images of any size: pad to multiples of the downsample factor, and blend overlapping tiles.

Besides the network, memory holds the 8-bit image and its reconstruction, and one row of tiles in float32 (16
bytes per pixel). The network processes one tile at a time.

Shapes: H x W pixels, f the downsample factor, T the side of a tile, N ids of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqpipe.errors import ConfigError

TILE = 512
"""Default side of tiles, in pixels."""
OVERLAP = 64
"""Default overlap of neighboring tiles, in pixels."""


class ImageAutoencoder(Protocol):
    """The common interface of Tokenizer and ContinuousAutoencoder."""

    @property
    def codebook_size(self) -> int | None: ...

    @property
    def downsample_factor(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor: ...

    def decode_float(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class TiledReconstruction:
    """The reconstruction of an image, and its tokens."""

    image: Tensor
    """uint8[3, H, W], or float32, about [-1, 1], if not `rounded`; on the CPU."""
    ids: list[Tensor] | None
    """int64[N] of each tile, row by row, on the CPU; None for continuous latents. Tiles overlap."""


def reconstruct_any_size(
    autoencoder: ImageAutoencoder,
    image: Tensor,
    *,
    groups: int | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    rounded: bool = True,
) -> TiledReconstruction:
    """Reconstruct uint8[3, H, W] at the same size.

    The image is padded to multiples of f by reflection (by replication if it is too small) and cropped afterwards. If a
    side exceeds T, it is processed in tiles that are blended linearly over `overlap` pixels. With attention or norms
    over the whole latent, the result then differs from that of the whole image.

    Args:
        autoencoder: a Tokenizer or ContinuousAutoencoder.
        image: uint8[3, H, W].
        groups: decode the first `groups` groups only.
        tile: T, rounded down to a multiple of f.
        overlap: pixels shared by neighboring tiles.
        rounded: return uint8; else float32 before rounding, which takes 12 bytes per pixel.

    Raises:
        ConfigError: a tile smaller than f, or an overlap that is not smaller than the tile.
    """
    factor = autoencoder.downsample_factor
    tile = check_tile(tile, overlap, factor)
    height, width = image.shape[1:]
    rows, columns = mirrored(height, factor), mirrored(width, factor)
    result = torch.empty((3, height, width), dtype=torch.uint8 if rounded else torch.float32)
    decode = autoencoder.decode if rounded else autoencoder.decode_float
    ids: list[Tensor] | None = None if autoencoder.codebook_size is None else []
    bands = list(spans(len(rows), tile, overlap))
    band = torch.zeros(4, bands[0][1], len(columns))  # weighted RGB, and the weight
    for (top, bottom), after in zip(bands, [start for start, _ in bands[1:]] + [len(rows)], strict=True):
        for left, right in spans(len(columns), tile, overlap):
            piece = image[:, rows[top:bottom, None], columns[None, left:right]]
            code = autoencoder.encode(piece[None])
            reconstruction = decode(code, (bottom - top, right - left), groups=groups)[0].cpu()
            weight = torch.outer(ramp(bottom - top, overlap), ramp(right - left, overlap))
            band[:3, :, left:right] += reconstruction * weight
            band[3, :, left:right] += weight
            if ids is not None:
                ids.append(code[0].cpu())
        blended = band[:3, : after - top] / band[3, : after - top]
        blended = blended.round().clamp(0, 255) if rounded else blended
        result[:, top:after] = blended[:, : height - top, :width].to(result.dtype)
        band[:, : bottom - after] = band[:, after - top :].clone()  # rows shared with the next tiles
        band[:, bottom - after :] = 0
    return TiledReconstruction(result, ids)


def check_tile(tile: int, overlap: int, factor: int) -> int:
    """Round `tile` down to a multiple of the downsample factor.

    Raises:
        ConfigError: the tile or the overlap is out of range.
    """
    if tile < factor:
        raise ConfigError(f"tiles of {tile} pixels are smaller than the downsample factor {factor}", "Use larger ones")
    tile = tile // factor * factor
    if not 0 <= overlap < tile:
        raise ConfigError(f"an overlap of {overlap} pixels does not fit tiles of {tile}", "Use an eighth of the tile")
    return tile


def mirrored(length: int, factor: int) -> Tensor:
    """Indices int64[n] that pad a side of `length` to a multiple of `factor` by reflection, else by replication."""
    padding = -length % factor
    extra = torch.arange(padding)
    extra = length - 2 - extra if padding < length else torch.full_like(extra, length - 1)
    return torch.cat([torch.arange(length), extra])


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Intervals [start, stop) of at most `tile` that cover `length`, where neighbors share at least `overlap`."""
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += tile - overlap
    yield max(0, length - tile), length


def ramp(length: int, overlap: int) -> Tensor:
    """Blend weight of each row of a tile: 1 inside, decreasing linearly over `overlap` pixels at both ends, never 0."""
    distance = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
