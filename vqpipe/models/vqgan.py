"""The convolutional encoder and decoder of VQGAN, as used by VQGAN-LC.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", with the sizes of VQGAN-LC's released
code. Modules have the released names, so the released weights load unchanged.

Shapes: B images of H x W pixels, N channels, h x w positions.

Notes:
- levels have attention if their side for images of `resolution` pixels is in `attention_resolutions`, whatever the
  actual image size: f16 at its last level, f8 at none; the middle always has attention;
- the decoder has one residual block more per level than the encoder;
- stride-2 convolutions pad right and bottom only;
- no tanh at the end: the output of the decoder is not clamped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(AutoencoderConfig):
    """The levels of VQGAN and of Open-MAGVIT2; level 0 has the highest resolution."""

    base_channels: int = 128
    """Channels of the highest resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level relative to `base_channels`; each level but the last halves the resolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model", "[1, inf)", "base_channels", "channel_multipliers")
        if not self.channel_multipliers:
            raise ConfigError("model.channel_multipliers names no level", "Give a number for each level")

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    def channels(self, level: int) -> int:
        return self.base_channels * self.channel_multipliers[level]


@dataclass(frozen=True, kw_only=True)
class VqganConfig(LevelsConfig):
    """The VQGAN backbone; the defaults are the papers' f16. f8: channel_multipliers (1, 2, 2, 4)."""

    kind: ClassVar[str] = "vqgan"

    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Sides, in positions at `resolution`, of the levels with attention."""
    z_channels: int = 256
    """Channels between the two networks and their 1x1 convolutions."""
    resolution: int = 256
    """Image side in pixels to which `attention_resolutions` refers; images of any size are accepted."""
    patch_size: int = 1
    """Side of the patches that are folded into the channels of the first and last convolution. 1 as in the papers; 4 is
    fast enough to train on a CPU, where levels at full resolution would take 90 % of the time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model", "[1, inf)", "num_res_blocks", "z_channels", "resolution", "patch_size")

    @property
    def downsample_factor(self) -> int:
        return self.patch_size * super().downsample_factor

    def attends(self, level: int) -> bool:
        return self.resolution // (self.patch_size * 2**level) in self.attention_resolutions


class Vqgan(Autoencoder):
    """VQGAN with any quantizer."""

    config_class = VqganConfig
    decoder: "Decoder"

    def __init__(self, config: VqganConfig) -> None:
        super().__init__(config, Encoder(config), Decoder(config), config.z_channels)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight


class Encoder(nn.Module):
    """Encodes images float[B, 3, H, W] to float[B, z_channels, H/f, W/f]."""

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
    """Decodes float[B, z_channels, h, w] to images float[B, 3, h*f, w*f]. `up.0`, the highest resolution, runs last."""

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
            resample = Upsample(channels, channels) if level != 0 else None
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


def residual_blocks(
    channels: Sequence[int], bias: bool = True, make_norm: Callable[[int], nn.Module] | None = None
) -> list[nn.Module]:
    """A residual block from each width to the next."""
    return [ResidualBlock(before, after, bias, make_norm) for before, after in pairwise(channels)]


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if `attends`, then a change of resolution."""

    def __init__(
        self,
        channels: Sequence[int],
        attends: bool = False,
        *,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
        make_blocks: Callable[[Sequence[int]], list[nn.Module]] = residual_blocks,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(make_blocks(channels))
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

    def __init__(
        self, before: int, after: int, bias: bool = True, make_norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        make_norm = make_norm or group_norm
        self.norm1 = make_norm(before)
        self.conv1 = conv3x3(before, after, bias)
        self.norm2 = make_norm(after)
        self.conv2 = conv3x3(after, after, bias)
        self.nin_shortcut = nn.Conv2d(before, after, 1, bias=bias) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(silu(self.norm1(x)))
        residual = silu(self.norm2(residual))  # reuse the name, to free the input of the norm
        residual = self.conv2(residual)
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        if torch.is_grad_enabled() or residual.dtype != shortcut.dtype:  # under autocast the sum has the wider type
            return residual + shortcut
        return residual.add_(shortcut)


class Attention(nn.Module):
    """x + single-head self-attention over the h*w positions, with scale N^-0.5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # float[B, 1, h*w, N], whose channels are adjacent in memory: PyTorch's kernels without a matrix of all pairs of
        # positions take no other input.
        q, k, v = (rows(conv(normed)).unsqueeze(1) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(mixed.transpose(1, 2).reshape_as(x))


def rows(x: Tensor) -> Tensor:
    """float[B, N, h, w] -> float[B, h*w, N], contiguous."""
    return x.flatten(2).transpose(1, 2).contiguous()


class Downsample(nn.Module):
    """Stride-2 convolution with zero padding right and bottom: halves the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a convolution: doubles the resolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = conv3x3(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that is not used afterwards: in place without gradients, which gives the same values and saves a
    fifth of the peak memory of a tile at full resolution."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def conv3x3(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


class GroupNorm(nn.GroupNorm):
    """torch's group norm, also of a single value: nn.GroupNorm is an error for one image, one position and one channel
    per group, though not for two such images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


def group_norm(channels: int, affine: bool = True, eps: float = 1e-6) -> GroupNorm:
    """Group norm with 32 groups, as in the papers, or the largest divisor of 32 that divides the channels."""
    return GroupNorm(math.gcd(32, channels), channels, eps=eps, affine=affine)
