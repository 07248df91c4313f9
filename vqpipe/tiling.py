"""Images of any size through a network made for small ones: padded, cut into overlapping tiles, blended.

Memory beside the network's own is that of the image twice (8 bits: what goes in, what comes out) and one row of tiles
in float32, 16 bytes a pixel of it. The network sees one tile at a time.

H x W pixels, f the downsample factor, T the side of a tile, N ids of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqpipe.errors import ConfigError

TILE = 512
"""Largest side, pixels, that goes through the network at once."""
OVERLAP = 64
"""Pixels that neighbouring tiles share and blend over."""


class AnyAutoencoder(Protocol):
    """What a Tokenizer and a ContinuousAutoencoder have in common here."""

    @property
    def codebook_size(self) -> int | None: ...

    @property
    def downsample_factor(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor: ...

    def decode_float(self, code: Tensor, image_size: tuple[int, int], /, groups: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class AnySize:
    """An image that went through, and its tokens."""

    image: Tensor
    """uint8[3, H, W], or float32 of about [-1, 1] where that was asked, on the CPU."""
    ids: list[Tensor] | None
    """int64[N] of each tile on the CPU, tiles row by row; None where latents are continuous. Where there are several
    tiles, their overlaps are encoded more than once."""


def reconstruct_any_size(
    autoencoder: AnyAutoencoder,
    image: Tensor,
    *,
    groups: int | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
    rounded: bool = True,
) -> AnySize:
    """uint8[3, H, W] -> its reconstruction at the same size.

    Not `rounded`, tiles are blended as the network leaves them, and whoever measures rounds once, in their own way; for
    that the whole image is held in float32, 12 bytes a pixel.

    The image is padded to multiples of f by mirroring (by repeating the edge where it is too small to mirror) and cut
    back. Beyond T pixels a side (T rounded down to a multiple of f) it goes through in tiles, blended linearly over
    `overlap` pixels. A network with attention or normalisation over the whole latent then sees each tile alone: that is
    another reconstruction than in one piece.

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
    band = torch.zeros(4, bands[0][1], len(columns))  # three colours times weight, and the weight
    for (top, bottom), after in zip(bands, [start for start, _ in bands[1:]] + [len(rows)], strict=True):
        for left, right in spans(len(columns), tile, overlap):
            piece = image[:, rows[top:bottom, None], columns[None, left:right]]
            code = autoencoder.encode(piece[None])
            again = decode(code, (bottom - top, right - left), groups=groups)[0].cpu()
            share = torch.outer(ramp(bottom - top, overlap), ramp(right - left, overlap))
            band[:3, :, left:right] += again * share
            band[3, :, left:right] += share
            if ids is not None:
                ids.append(code[0].cpu())
        whole = band[:3, : after - top] / band[3, : after - top]
        whole = whole.round().clamp(0, 255) if rounded else whole
        result[:, top:after] = whole[:, : height - top, :width].to(result.dtype)
        band[:, : bottom - after] = band[:, after - top :].clone()  # rows that the next tiles share
        band[:, bottom - after :] = 0
    return AnySize(result, ids)


def check_tile(tile: int, overlap: int, factor: int) -> int:
    """`tile` rounded down to a multiple of the downsample factor; a ConfigError where it cannot be."""
    if tile < factor:
        raise ConfigError(f"tiles of {tile} pixels are smaller than the downsample factor {factor}", "Use larger ones")
    tile = tile // factor * factor
    if not 0 <= overlap < tile:
        raise ConfigError(f"an overlap of {overlap} pixels does not fit tiles of {tile}", "Use an eighth of the tile")
    return tile


def mirrored(length: int, factor: int) -> Tensor:
    """int64[n]: which row (or column) stands at each place of a side of `length` padded to a multiple of `factor`."""
    padding = -length % factor
    extra = torch.arange(padding)
    extra = length - 2 - extra if padding < length else torch.full_like(extra, length - 1)
    return torch.cat([torch.arange(length), extra])


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Pieces [start, stop) of at most `tile` that cover `length`, neighbours sharing at least `overlap`."""
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += tile - overlap
    yield max(0, length - tile), length


def ramp(length: int, overlap: int) -> Tensor:
    """Weight of each row of a tile: 1 inside, falling towards both ends over `overlap` pixels, never 0."""
    distance = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
