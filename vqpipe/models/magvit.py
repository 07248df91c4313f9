"""The convolutional encoder and decoder of Open-MAGVIT2, an open MAGVIT-v2 for images.

Luo et al. 2024, "Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-Regressive Visual Generation", after
Yu et al. 2023, "Language Model Beats Diffusion". Names of modules are the released ones, so that its weights load as
they are; sizes are its code's.

Shapes: B images of H x W pixels, N channels, Z channels between networks and quantizer, h x w positions.

Worth knowing:
- no attention anywhere; as many residual blocks in the middle as at a level, and as many in the decoder as in the
  encoder;
- 3x3 convolutions of residual blocks have no bias, and a block that changes channels has a 1x1 convolution beside it;
- the decoder reads the codes twice: as its input, and at the head of each level as the style of an adaptive norm;
- the decoder's sides double by depth-to-space in TensorFlow's channel order, which `F.pixel_shuffle` does not follow;
- there is no quant_conv: the encoder's last convolution makes the latent.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig
from vqpipe.models.vqgan import ResidualBlock, conv3x3, group_norm
from vqpipe.quantizers import QuantizerConfig, build_quantizer

STYLE_EPS = 1e-6
"""Added to the codes' variance under its root, as released."""


@dataclass(frozen=True, kw_only=True)
class MagvitConfig(AutoencoderConfig):
    """The Open-MAGVIT2 backbone; the defaults are its f16. Its f8, of 128 pixels: channel_multipliers (1, 2, 2, 4)."""

    kind: ClassVar[str] = "magvit"

    quant_conv: Literal["full", "grouped", "none"] = "none"
    """Absent as released; the matched start needs one."""
    base_channels: int = 128
    """Channels of the highest resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level in units of `base_channels`; each level but the last halves the sides."""
    num_res_blocks: int = 4
    """Residual blocks at a level and in the middle, of the encoder and of the decoder."""
    z_channels: int = 0
    """Channels between the two networks and the quantizer; 0: the quantizer's, the only ones without a quant_conv."""

    def __post_init__(self) -> None:
        sizes = [self.base_channels, self.num_res_blocks]
        if not self.channel_multipliers or min(*sizes, *self.channel_multipliers) < 1 or self.z_channels < 0:
            raise ConfigError("every size in [model] must be at least 1", "See the preset open-magvit2-f16")

    @property
    def downsample_factor(self) -> int:
        """Image side / latent side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def channels(self, level: int) -> int:
        return self.base_channels * self.channel_multipliers[level]


class Magvit(Autoencoder):
    """Open-MAGVIT2's networks with any quantizer; its own is `lfq` with 18 bits."""

    config_class = MagvitConfig
    decoder: "Decoder"

    def __init__(self, config: MagvitConfig) -> None:
        z_channels = config.z_channels or latent_dim_of(config.quantizer)
        super().__init__(
            config,
            Encoder(config, z_channels),
            Decoder(config, z_channels),
            encoder_channels=z_channels,
            downsample_factor=config.downsample_factor,
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight


def latent_dim_of(config: QuantizerConfig) -> int:
    """Channels of the latent that a quantizer takes, from a copy of it without memory."""
    with torch.device("meta"):
        return build_quantizer(config).latent_dim


class Encoder(nn.Module):
    """Images float[B, 3, H, W] -> float[B, Z, H/f, W/f]."""

    def __init__(self, config: MagvitConfig, z_channels: int) -> None:
        super().__init__()
        levels = range(len(config.channel_multipliers))
        channels = config.base_channels
        self.conv_in = conv3x3(3, channels, bias=False)
        self.down = nn.ModuleList()
        for level in levels:
            blocks = [channels, *[config.channels(level)] * config.num_res_blocks]
            channels = blocks[-1]
            halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if level != levels[-1] else None
            self.down.append(Level(blocks, downsample=halve))
        self.mid_block = residual_blocks([channels] * (config.num_res_blocks + 1))
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """float[B, Z, h, w] -> images float[B, 3, h*f, w*f]. `up.0` is the highest resolution, run last."""

    def __init__(self, config: MagvitConfig, z_channels: int) -> None:
        super().__init__()
        levels = range(len(config.channel_multipliers))
        channels = config.channels(levels[-1])
        self.conv_in = conv3x3(z_channels, channels)
        self.mid_block = residual_blocks([channels] * (config.num_res_blocks + 1))
        adaptive, up = [], []
        for level in reversed(levels):
            adaptive.append(AdaptiveGroupNorm(z_channels, channels))
            blocks = [channels, *[config.channels(level)] * config.num_res_blocks]
            channels = blocks[-1]
            up.append(Level(blocks, upsample=Upsample(channels) if level != 0 else None))
        self.adaptive = nn.ModuleList(reversed(adaptive))
        self.up = nn.ModuleList(reversed(up))
        self.norm_out = group_norm(channels)
        self.conv_out = conv3x3(channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for adaptive, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = level(adaptive(x, z))
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution."""

    def __init__(
        self, channels: list[int], downsample: nn.Module | None = None, upsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = residual_blocks(channels)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class AdaptiveGroupNorm(nn.Module):
    """Normalised x, scaled and shifted per image by the spread and the mean of its codes.

    gamma(sqrt(var(codes) + eps)) * norm(x) + beta(mean(codes)), with variance and mean over the positions of each
    channel; the variance divides by h * w - 1, as released.
    """

    def __init__(self, z_channels: int, channels: int) -> None:
        super().__init__()
        plain = group_norm(channels)
        self.gn = nn.GroupNorm(plain.num_groups, channels, eps=plain.eps, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        positions = codes.flatten(2)
        # A single position has no spread: 0 there, where dividing by 1 - 1 would give NaN.
        variance = positions.var(dim=2, correction=min(1, positions.shape[2] - 1))
        scale = self.gamma((variance + STYLE_EPS).sqrt())
        shift = self.beta(positions.mean(dim=2))
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class Upsample(nn.Module):
    """A convolution to four times the channels, then depth-to-space: sides double."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv1(x))


def depth_to_space(x: Tensor) -> Tensor:
    """float[B, 4 * N, h, w] -> float[B, N, 2h, 2w], channel (2 * row + column) * N + n going to pixel (row, column).

    That is TensorFlow's order, ONNX's "DCR"; `F.pixel_shuffle` wants the four places of a channel side by side.
    """
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


def residual_blocks(channels: list[int]) -> nn.Sequential:
    """A block from each width to the next, its convolutions without biases."""
    return nn.Sequential(*(ResidualBlock(before, after, bias=False) for before, after in pairwise(channels)))
