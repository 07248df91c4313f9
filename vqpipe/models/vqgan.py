"""The convolutional encoder and decoder of VQGAN, as VQGAN-LC trains them.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", with the sizes of VQGAN-LC's released
code. Names of modules are the released ones, so that its weights load as they are.

Shapes: B images of H x W pixels, N channels, h x w positions.

Worth knowing:
- attention sits at the levels whose side is in `attention_resolutions`, counted down from the configured
  `resolution` and not from the image at hand: f16 has it at its last level, f8 nowhere but in the middle;
- the decoder has one residual block more at each level than the encoder;
- a stride-2 convolution pads right and bottom only;
- no tanh at the end: images leave the decoder unclamped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class VqganConfig(AutoencoderConfig):
    """The VQGAN backbone; the defaults are the papers' f16. f8: channel_multipliers (1, 2, 2, 4)."""

    kind: ClassVar[str] = "vqgan"

    base_channels: int = 128
    """Channels of the highest resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level in units of `base_channels`; each level but the last halves the sides."""
    num_res_blocks: int = 2
    """Residual blocks at a level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Sides, in cells at `resolution`, of the levels that attend."""
    z_channels: int = 256
    """Channels between the two networks and their 1x1 convolutions."""
    resolution: int = 256
    """Image side in pixels that the levels' sides are counted from; images of any size pass."""
    patch_size: int = 1
    """Pixels on a side folded into the channels of the first and last convolution. 1 as in the papers; with 4 a network
    trains on a CPU, where levels at full resolution would take nine tenths of the time."""

    def __post_init__(self) -> None:
        sizes = [self.base_channels, self.num_res_blocks, self.z_channels, self.resolution, self.patch_size]
        if not self.channel_multipliers or min(*sizes, *self.channel_multipliers) < 1:
            raise ConfigError("every size in [model] must be at least 1", "See the preset vqgan-lc-f16-100k")

    @property
    def downsample_factor(self) -> int:
        """Image side / latent side."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    def channels(self, level: int) -> int:
        return self.base_channels * self.channel_multipliers[level]

    def attends(self, level: int) -> bool:
        return self.resolution // (self.patch_size * 2**level) in self.attention_resolutions


class Vqgan(Autoencoder):
    """VQGAN with any quantizer."""

    config_class = VqganConfig
    decoder: "Decoder"

    def __init__(self, config: VqganConfig) -> None:
        super().__init__(
            config,
            Encoder(config),
            Decoder(config),
            encoder_channels=config.z_channels,
            downsample_factor=config.downsample_factor,
        )

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight


class Encoder(nn.Module):
    """Images float[B, 3, H, W] -> float[B, z_channels, H/f, W/f]."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        levels = range(len(config.channel_multipliers))
        self.patch_size = config.patch_size
        self.conv_in = conv3x3(3 * config.patch_size**2, config.base_channels)
        self.down = nn.ModuleList()
        channels = config.base_channels
        for level in levels:
            blocks = [channels, *[config.channels(level)] * config.num_res_blocks]
            channels = blocks[-1]
            resample = Downsample(channels) if level != levels[-1] else None
            self.down.append(Level(blocks, config.attends(level), downsample=resample))
        self.mid = Middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = conv3x3(channels, config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(images, self.patch_size))
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """float[B, z_channels, h, w] -> images float[B, 3, h*f, w*f]. `up.0` is the highest resolution, run last."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        levels = range(len(config.channel_multipliers))
        channels = config.channels(levels[-1])
        self.conv_in = conv3x3(config.z_channels, channels)
        self.mid = Middle(channels)
        up = []
        for level in reversed(levels):
            blocks = [channels, *[config.channels(level)] * (config.num_res_blocks + 1)]
            channels = blocks[-1]
            resample = Upsample(channels) if level != 0 else None
            up.append(Level(blocks, config.attends(level), upsample=resample))
        self.up = nn.ModuleList(reversed(up))
        self.norm_out = group_norm(channels)
        self.conv_out = conv3x3(channels, 3 * config.patch_size**2)
        self.patch_size = config.patch_size

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(silu(self.norm_out(x))), self.patch_size)


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention where the level attends, then a change of resolution."""

    def __init__(
        self,
        channels: Sequence[int],
        attends: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(before, after) for before, after in pairwise(channels))
        self.attn = nn.ModuleList(Attention(after) for after in channels[1:] if attends)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """x + (norm, SiLU, conv3x3) twice; a 1x1 convolution on x where the channels change."""

    def __init__(self, before: int, after: int, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = conv3x3(before, after, bias)
        self.norm2 = group_norm(after)
        self.conv2 = conv3x3(after, after, bias)
        self.nin_shortcut = nn.Conv2d(before, after, 1, bias=bias) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(silu(self.norm1(x)))
        residual = silu(self.norm2(residual))  # a name of its own would keep what went into the norm
        residual = self.conv2(residual)
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        if torch.is_grad_enabled() or residual.dtype != shortcut.dtype:  # under autocast the sum takes the wider type
            return residual + shortcut
        return residual.add_(shortcut)


class Attention(nn.Module):
    """x + single-head self-attention over the h*w positions, scale N^-0.5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).reshape_as(x))


class Downsample(nn.Module):
    """Stride-2 convolution, zeros padded right and bottom: sides halve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: sides double."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def silu(fresh: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs. Without gradients it is written over: the same bits, and one
    activation less at the peak, which is a fifth of it in a tile at full resolution."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


def conv3x3(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


def group_norm(channels: int) -> nn.GroupNorm:
    """The papers' 32 groups; in a network too narrow for them, as many as divide both 32 and its channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
