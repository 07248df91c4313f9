"""Reconstruction of images of any size: pad to multiples of the downsample factor, and blend overlapping tiles.

Besides the network, memory holds the 8-bit image and its reconstruction, and one row of tiles in float32 (16
bytes per pixel). The network processes one tile at a time; `check_memory` estimates whether one fits.

Shapes: H x W pixels, f the downsample factor, T the side of a tile, N ids of a tile.
"""

import bisect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError

TILE = 512
"""Default side of tiles, in pixels."""
OVERLAP = 64
"""Default overlap of neighboring tiles, in pixels."""
STEP = 64
"""Sides of tiles that an error proposes are multiples of this."""
MARGIN = 1.2
"""Memory that must be free, relative to the estimate; measured on a CPU, the estimate is 0.73 to 1.03 of the peak."""
PLENTY = 2**14
"""Free bytes per pixel of a tile from which on no estimate is made, which takes seconds the first time."""


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
class NormStatistics:
    """Mean and variance of each group of a group norm: float32[G] each."""

    mean: Tensor
    variance: Tensor


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
    shared_norms: bool = False,
    on_tile: Callable[[], None] = lambda: None,
) -> TiledReconstruction:
    """Reconstruct uint8[3, H, W] at the same size.

    The image is padded to multiples of f by reflection (by replication if it is too small) and cropped afterwards. If a
    side exceeds T, it is processed in tiles that are blended linearly over `overlap` pixels. With attention or norms
    over the whole latent, the result then differs from that of the whole image, and brightness and color may change
    from tile to tile.

    With `shared_norms`, every tile is normalized by the same statistics. In a first pass the network processes the
    whole image, scaled down to the area of one tile, and the mean and variance of each group of each group norm are
    recorded; the second pass processes the tiles with them. RMS difference from the untiled reconstruction, in levels
    of 255, of a synthetic image of 512 x 512 pixels in tiles of 128 with an overlap of 16:

    | statistics of the group norms                        | VQGAN-LC f8, 24 norms | TAEF2, 6 norms |
    |------------------------------------------------------|-----------------------|----------------|
    | of each tile                                         | 9.5                   | 7.0            |
    | over all tiles, one sweep before                     | 7.2                   | 5.1            |
    | over all tiles, layer after layer (a sweep per norm) | 4.4                   | 3.8            |
    | of the image scaled down, as here                    | 4.8                   | 4.1            |

    One sweep is worse because the statistics of a layer depend on those of the layers before it. What remains is the
    attention, which sees one tile.

    Args:
        autoencoder: a Tokenizer or ContinuousAutoencoder.
        image: uint8[3, H, W].
        groups: decode the first `groups` groups only.
        tile: T, rounded down to a multiple of f.
        overlap: pixels shared by neighboring tiles.
        rounded: return uint8; else float32 before rounding, which takes 12 bytes per pixel.
        shared_norms: normalize all tiles of an image by the same statistics; without effect on an image of one tile.
        on_tile: called after each tile.

    Raises:
        ConfigError: a tile smaller than f, an overlap that is not smaller than the tile, or `shared_norms` for a
            network without group norms.
    """
    factor = autoencoder.downsample_factor
    tile = check_tile(tile, overlap, factor)
    height, width = image.shape[1:]
    rows, columns = mirrored(height, factor), mirrored(width, factor)
    if shared_norms and max(len(rows), len(columns)) > tile:
        with fixed_norms(autoencoder, norm_statistics(autoencoder, image, tile, groups)):
            return reconstruct_any_size(
                autoencoder, image, groups=groups, tile=tile, overlap=overlap, rounded=rounded, on_tile=on_tile
            )
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
            on_tile()
        blended = band[:3, : after - top] / band[3, : after - top]
        blended = blended.round().clamp(0, 255) if rounded else blended
        result[:, top:after] = blended[:, : height - top, :width].to(result.dtype)
        band[:, : bottom - after] = band[:, after - top :].clone()  # rows shared with the next tiles
        band[:, bottom - after :] = 0
    return TiledReconstruction(result, ids)


def norm_statistics(
    autoencoder: ImageAutoencoder, image: Tensor, tile: int, groups: int | None = None
) -> dict[nn.GroupNorm, NormStatistics]:
    """The statistics of each group norm for uint8[3, H, W], scaled down to the area of one tile, and decoded from the
    first `groups` groups.

    Raises:
        ConfigError: the network has no group norms.
    """
    factor = autoencoder.downsample_factor
    scale = tile / math.sqrt(image.shape[1] * image.shape[2])
    height, width = (max(round(side * scale) // factor, 1) * factor for side in image.shape[1:])
    small = F.interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)
    norms = check_norms(autoencoder)
    found: dict[nn.GroupNorm, NormStatistics] = {}
    hooks = [norm.register_forward_pre_hook(partial(record_statistics, found)) for norm in norms]
    try:
        code = autoencoder.encode(small.round().clamp(0, 255).to(torch.uint8))
        autoencoder.decode_float(code, (height, width), groups=groups)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def record_statistics(
    found: dict[nn.GroupNorm, NormStatistics], norm: nn.GroupNorm, inputs: tuple[Tensor, ...]
) -> None:
    """Store the statistics of the input of a norm, float[1, C, ...], in `found`."""
    variance, mean = torch.var_mean(inputs[0].float().reshape(norm.num_groups, -1), dim=1, correction=0)
    found[norm] = NormStatistics(mean, variance)


@contextmanager
def fixed_norms(autoencoder: ImageAutoencoder, found: dict[nn.GroupNorm, NormStatistics]) -> Iterator[None]:
    """Normalize by these statistics within the block."""
    for norm, statistics in found.items():
        norm.forward = partial(normalize, norm, statistics)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in found:
            del norm.forward  # that of the class again


def normalize(norm: nn.GroupNorm, statistics: NormStatistics, x: Tensor) -> Tensor:
    """The group norm of x, float[B, C, ...], with given statistics."""
    channels = norm.num_channels // norm.num_groups
    mean, variance = (value.repeat_interleave(channels).to(x.dtype) for value in (statistics.mean, statistics.variance))
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)


def check_norms(autoencoder: ImageAutoencoder) -> list[nn.GroupNorm]:
    """The group norms of the network.

    Raises:
        ConfigError: it has none.
    """
    norms = [module for module in network_of(autoencoder).modules() if isinstance(module, nn.GroupNorm)]
    if not norms:
        raise ConfigError(
            "this tokenizer has no group norms, which could share their statistics between tiles",
            "Omit --shared-norms",
        )
    return norms


def network_of(autoencoder: Any) -> nn.Module:
    """The network of a Tokenizer or of a ContinuousAutoencoder."""
    network: nn.Module = getattr(autoencoder, "network", None) or autoencoder.autoencoder
    return network


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
    device = network_device(autoencoder)
    images = max(image_bytes(height, width, min(tile, height), kept) for height, width in sizes)
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "the GPU"
    else:
        free, where = available_bytes() - images, "this machine"

    def needed(side: int) -> float:
        height, width = largest_tile(sizes, side)
        return MARGIN * tile_bytes(autoencoder, height, width)

    if math.prod(largest_tile(sizes, tile)) * PLENTY <= free or needed(tile) <= free:
        return
    largest = min(tile, max(map(max, sizes)))
    sides = range(max(STEP, overlap // STEP * STEP + STEP), largest, STEP)
    fitting = bisect_fitting(sides, lambda side: needed(side) <= free)
    raise ConfigError(
        f"out of memory: a tile of {largest:,} pixels needs about {needed(tile) / 1e9:,.1f} GB, {where} has "
        f"{max(free, 0) / 1e9:,.1f} GB free",
        "Use a machine with more memory" if fitting is None else f"Use --tile {fitting}",
    )


def largest_tile(sizes: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """(height, width) of the tile with the most pixels."""
    return max(((min(tile, height), min(tile, width)) for height, width in sizes), key=math.prod)


def bisect_fitting(sides: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest side that fits, where all smaller ones fit as well; None if none does."""
    place = bisect.bisect_left(sides, True, key=lambda side: not fits(side))
    return sides[place - 1] if place else None


def network_device(autoencoder: ImageAutoencoder) -> torch.device:
    return next(network_of(autoencoder).parameters()).device


def image_bytes(height: int, width: int, tile: int, kept: int) -> int:
    """Memory of an image beside the network: the original, its reconstructions, their sheet and one row of tiles."""
    return 3 * height * width * 2 * (1 + kept) + 16 * tile * width


def tile_bytes(autoencoder: Any, height: int, width: int) -> int:
    """The peak memory of encoding and decoding one tile, in bytes, beside the weights.

    The network runs on the meta device, which computes shapes alone, while `PeakMemory` counts. Memory is not linear in
    the pixels: attention takes the square of the number of positions. The search of the quantizer takes little.
    """
    factor = autoencoder.downsample_factor
    height, width = (-(-side // factor) * factor for side in (height, width))
    network = network_of(autoencoder)
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*network.named_parameters(prefix="network"), *network.named_buffers(prefix="network"))
    }
    image = torch.empty(1, 3, height, width, device="meta")
    latent = torch.empty(1, *autoencoder.latent_shape(height, width), device="meta")
    with torch.no_grad(), PeakMemory() as memory:
        torch.func.functional_call(RoundTrip(network), tensors, (image, latent))
    return memory.peak


class RoundTrip(nn.Module):
    """Both directions of a network in one module, for `torch.func.functional_call`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, image: Tensor, latent: Tensor) -> None:
        getattr(self.network, "latent", self.network.encode)(image)
        self.network.decode(latent)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that exist at the same time, as operations make and free them.

    A convolution counts its input and output twice: on the CPU they are copied to another layout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {storage_of(value) for value in args if isinstance(value, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and (key := storage_of(tensor)) not in given | self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, key, storage.nbytes())
        copies = 0
        if "convolution" in str(function):
            copies = sum(value.nbytes for value in (args[0], result))
        self.peak = max(self.peak, self.live + copies)
        return result

    def free(self, key: int, num_bytes: int) -> None:
        """A tensor's memory is given back."""
        self.known.discard(key)
        self.live -= num_bytes


def storage_of(tensor: Tensor) -> int:
    """A number that tensors with the same memory share."""
    return tensor.untyped_storage()._cdata


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


def num_tiles(height: int, width: int, tile: int, overlap: int, factor: int) -> int:
    """Tiles in which `reconstruct_any_size` processes an image of H x W pixels; 1: the whole image at once."""
    tile = check_tile(tile, overlap, factor)
    rows, columns = (list(spans(len(mirrored(side, factor)), tile, overlap)) for side in (height, width))
    return len(rows) * len(columns)


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
