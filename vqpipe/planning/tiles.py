"""The memory of reconstructing large images in tiles (`vqpipe.tiling`), compared with what is free."""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqpipe.continuous import ImageAutoencoder
from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError
from vqpipe.planning.trace import Trace
from vqpipe.tiling import check_tile

STEP = 64
"""Sides of tiles that an error proposes are multiples of this."""
MARGIN = 1.2
"""Memory that must be free, relative to the estimate; measured on a CPU, the estimate is 0.99 to 1.19 of the peak."""
PLENTY = 2**14
"""Free bytes per pixel of a tile from which on no estimate is made, which takes seconds."""


def check_memory(
    autoencoder: ImageAutoencoder, sizes: Sequence[tuple[int, int]], tile: int, overlap: int, kept: int = 1
) -> None:
    """Estimate the peak memory of reconstructing images of these (H, W), and compare it with the free memory.

    Args:
        kept: reconstructions of an image that are held at the same time.

    Raises:
        ConfigError: it does not fit; the message names a tile that does, if there is one.
    """
    if not sizes:
        return
    tile = check_tile(tile, overlap, autoencoder.downsample_factor)
    device = autoencoder.device
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "the GPU"
    else:
        images = max(image_bytes(height, width, min(tile, height), kept) for height, width in sizes)
        free, where = available_bytes() - images, "this machine"

    def needed(side: int) -> float:
        return MARGIN * tile_bytes(autoencoder, *largest_tile(sizes, side))

    if math.prod(largest_tile(sizes, tile)) * PLENTY <= free or needed(tile) <= free:
        return
    largest = min(tile, max(map(max, sizes)))
    sides = range(max(STEP, overlap // STEP * STEP + STEP), largest, STEP)
    fitting = bisect.bisect_left(sides, True, key=lambda side: needed(side) > free)
    raise ConfigError(
        f"out of memory: a tile of {largest:,} pixels needs about {needed(tile) / 1e9:,.1f} GB, {where} has "
        f"{max(free, 0) / 1e9:,.1f} GB free",
        f"Use --tile {sides[fitting - 1]}" if fitting else "Use a machine with more memory",
    )


def largest_tile(sizes: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """(height, width) of the tile with the most pixels."""
    return max(((min(tile, height), min(tile, width)) for height, width in sizes), key=math.prod)


def image_bytes(height: int, width: int, tile: int, kept: int) -> int:
    """Memory of an image beside the network: the original, its reconstructions, their sheet and one row of tiles."""
    return 3 * height * width * 2 * (1 + kept) + 16 * tile * width


def tile_bytes(autoencoder: ImageAutoencoder, height: int, width: int) -> int:
    """The peak memory of encoding and decoding one tile, in bytes, beside the weights. The search of the quantizer
    takes little."""
    factor = autoencoder.downsample_factor
    height, width = (-(-side // factor) * factor for side in (height, width))
    network: Any = autoencoder.autoencoder
    device = autoencoder.device
    tracing = Trace(gpu=device.type == "cuda")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), tracing as trace, device:
        getattr(network, "latent", network.encode)(torch.empty(1, 3, height, width))
        network.decode(torch.empty(1, *autoencoder.latent_shape(height, width)))
    return sum(trace.peak.values())
