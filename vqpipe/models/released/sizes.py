"""The sizes of networks with VQGAN's levels, read off the shapes of their weights."""

from collections.abc import Callable
from typing import NamedTuple

from vqpipe.errors import WeightsError
from vqpipe.models.released.checkpoint import Weights
from vqpipe.models.vqgan import VqganConfig
from vqpipe.quantizers import QuantizerConfig

RESOLUTION = 256
"""Image side in pixels from which the levels that attend are counted, in every released config of a VQGAN."""


class LevelSizes(NamedTuple):
    """What an encoder's levels tell; field names are those of our configs."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int


def same(name: str) -> str:
    """The released name of a weight that has our name."""
    return name


def level_sizes(weights: Weights, released: Callable[[str], str] = same) -> LevelSizes:
    """The sizes of an encoder; `released` gives the file's name of one of our modules.

    Raises:
        WeightsError: a weight that tells a size is absent, or sizes are no multiples of the first.
    """
    levels = range(weights.count(released("encoder.down.")))
    base = weights.shape(released("encoder.conv_in.weight"), 4)[0]
    widths = [weights.shape(released(f"encoder.down.{level}.block.0.conv1.weight"), 4)[0] for level in levels]
    if any(width % base for width in widths):
        raise WeightsError(f"{weights.source}: levels of {widths} channels are not multiples of {base}")
    blocks = weights.count(released("encoder.down.0.block."))
    return LevelSizes(base, tuple(width // base for width in widths), blocks)


def vqgan_config(weights: Weights, quantizer: QuantizerConfig, released: Callable[[str], str] = same) -> VqganConfig:
    """The VQGAN whose weights these are.

    Raises:
        WeightsError: as `level_sizes`.
    """
    sizes = level_sizes(weights, released)
    levels = range(len(sizes.channel_multipliers))
    attend = [level for level in levels if weights.under(released(f"encoder.down.{level}.attn."))]
    return VqganConfig(
        quantizer=quantizer,
        **sizes._asdict(),
        attention_resolutions=tuple(RESOLUTION // 2**level for level in attend),
        z_channels=weights.shape("quant_conv.weight", 4)[1],
        resolution=RESOLUTION,
    )
