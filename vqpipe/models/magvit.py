"""The convolutional encoder and decoder of Open-MAGVIT2, an open MAGVIT-v2 for images.

Luo et al. 2024, "Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-Regressive Visual Generation", after
Yu et al. 2023, "Language Model Beats Diffusion". Sizes and module names are those of the released code, so the released
weights load unchanged.

Shapes: B images of H x W pixels, N channels, Z channels between networks and quantizer, h x w positions.

Notes:
- no attention; the same number of residual blocks in the middle and at each level, in encoder and decoder;
- convolutions of residual blocks have no bias, and a block that changes channels has a 1x1 convolution as shortcut;
- the decoder uses the codes twice: as input, and as the style of an adaptive norm at the start of each level;
- the decoder upsamples by depth-to-space in the channel order of TensorFlow, not of `F.pixel_shuffle`;
- there is no quant_conv: the last convolution of the encoder outputs the latent.

SimVQ, DimVQ, WeTok, BitDance and GSQ use these networks too, some with other norms and blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import added, check_range
from vqpipe.models.autoencoder import Autoencoder
from vqpipe.models.vqgan import Level, LevelsConfig, conv3x3, group_norm, residual_blocks
from vqpipe.quantizers import QuantizerConfig, build_quantizer

STYLE_EPS = 1e-6
"""Added to the variance of the codes before the square root, as released."""


@dataclass(frozen=True, kw_only=True)
class MagvitConfig(LevelsConfig):
    """The Open-MAGVIT2 backbone; the defaults are its f16. Its f8, for 128 pixels: channel_multipliers (1, 2, 2, 4)."""

    kind: ClassVar[str] = "magvit"

    quant_conv: Literal["full", "grouped", "none"] = "none"
    """"none" as released; `train.whiten_init` needs one."""
    num_res_blocks: int = 4
    """Residual blocks per level and in the middle, in encoder and decoder."""
    z_channels: int = 0
    """Channels between the networks and the quantizer; 0: those of the quantizer, required without a quant_conv."""
    adaptive_norm: bool = added(True)
    """Whether each level of the decoder starts with an adaptive norm; false in SimVQ and DimVQ."""
    norm: Literal["group", "batch"] = added("group")
    """The other norms: "group" in 32 groups, or "batch" in DimVQ's tokenizer of 65,536 codes."""
    norm_eps: float = added(1e-6)
    """Added to the variance in these norms; 1e-5 in GSQ."""
    conv_bias: bool = added(False)
    """Whether the first convolution and those of residual blocks have a bias; true in GSQ."""
    extra_blocks: bool = added(False)
    """Whether a level that changes the channels has one residual block more; true in GSQ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model", "[1, inf)", "num_res_blocks")
        check_range(self, "model", "[0, inf)", "z_channels")
        check_range(self, "model", "(0, inf)", "norm_eps")

    def block_widths(self, before: int, level: int) -> list[int]:
        """Channels before and after each residual block of this level, whose input has `before` channels."""
        after = self.channels(level)
        return [before] + [after] * (self.num_res_blocks + (self.extra_blocks and after != before))

    def make_norm(self, channels: int) -> nn.Module:
        """A norm of this kind."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels, eps=self.norm_eps)
        return group_norm(channels, eps=self.norm_eps)

    def make_blocks(self, channels: Sequence[int]) -> list[nn.Module]:
        """A residual block from each width to the next."""
        return residual_blocks(channels, self.conv_bias, self.make_norm)


class Magvit(Autoencoder):
    """The networks of Open-MAGVIT2 with any quantizer; released with `lfq` of 18 bits."""

    config_class = MagvitConfig
    decoder: "Decoder"

    def __init__(self, config: MagvitConfig) -> None:
        z_channels = config.z_channels or latent_dim_of(config.quantizer)
        super().__init__(config, Encoder(config, z_channels), Decoder(config, z_channels), z_channels)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight


def latent_dim_of(config: QuantizerConfig) -> int:
    """The `latent_dim` of a quantizer, from an instance on the meta device."""
    with torch.device("meta"):
        return build_quantizer(config).latent_dim


class Encoder(nn.Module):
    """Encodes images float[B, 3, H, W] to float[B, Z, H/f, W/f]."""

    def __init__(self, config: MagvitConfig, z_channels: int) -> None:
        super().__init__()
        levels = range(len(config.channel_multipliers))
        channels = config.base_channels
        self.conv_in = conv3x3(3, channels, bias=config.conv_bias)
        self.down = nn.ModuleList()
        for level in levels:
            widths = config.block_widths(channels, level)
            channels = widths[-1]
            halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if level != levels[-1] else None
            self.down.append(Level(widths, downsample=halve, make_blocks=config.make_blocks))
        self.mid_block = nn.Sequential(*config.make_blocks([channels] * (config.num_res_blocks + 1)))
        self.norm_out = config.make_norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Decodes float[B, Z, h, w] to images float[B, 3, h*f, w*f]. `up.0`, the highest resolution, runs last."""

    def __init__(self, config: MagvitConfig, z_channels: int) -> None:
        super().__init__()
        levels = range(len(config.channel_multipliers))
        channels = config.channels(levels[-1])
        self.conv_in = conv3x3(z_channels, channels)
        self.mid_block = nn.Sequential(*config.make_blocks([channels] * (config.num_res_blocks + 1)))
        adaptive, up = [], []
        for level in reversed(levels):
            if config.adaptive_norm:
                adaptive.append(AdaptiveGroupNorm(z_channels, channels))
            widths = config.block_widths(channels, level)
            channels = widths[-1]
            double = Upsample(channels) if level != 0 else None  # before the blocks, to keep the initial weights
            up.append(Level(widths, upsample=double, make_blocks=config.make_blocks))
        self.adaptive = nn.ModuleList(reversed(adaptive))
        self.up = nn.ModuleList(reversed(up))
        self.norm_out = config.make_norm(channels)
        self.conv_out = conv3x3(channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for number, level in reversed(list(enumerate(self.up))):
            x = level(self.adaptive[number](x, z) if self.adaptive else x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AdaptiveGroupNorm(nn.Module):
    """Group norm of x with a scale and a shift per image from the standard deviation and the mean of its codes.

    gamma(sqrt(var(codes) + eps)) * norm(x) + beta(mean(codes)), with variance and mean over the positions of each
    channel; the variance divides by h * w - 1, as released.
    """

    def __init__(self, z_channels: int, channels: int) -> None:
        super().__init__()
        self.gn = group_norm(channels, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        positions = codes.flatten(2)
        # The variance of a single position is 0; the division by 1 - 1 would give NaN.
        variance = positions.var(dim=2, correction=min(1, positions.shape[2] - 1))
        scale = self.gamma((variance + STYLE_EPS).sqrt())
        shift = self.beta(positions.mean(dim=2))
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class Upsample(nn.Module):
    """A convolution to four times the channels, then depth-to-space: doubles the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv1(x))


def depth_to_space(x: Tensor) -> Tensor:
    """Map float[B, 4 * N, h, w] to float[B, N, 2h, 2w], with channel (2 * row + column) * N + n at pixel (row, column).

    This is the order of TensorFlow ("DCR" in ONNX); `F.pixel_shuffle` has n * 4 + 2 * row + column ("CRD").
    """
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)
