"""The encoder and decoder of MGVQ: residual convolutions at high resolution, linear attention at low resolution.

Jia et al. 2025, "MGVQ: Could VQ-VAE Beat VAE?". The paper describes a convolutional backbone following VQGAN; its
released code uses that of DC-AE (Chen et al. 2024, "Deep Compression Autoencoder for Efficient High-Resolution
Diffusion Models") with the blocks of EfficientViT (Cai et al. 2023). We follow the code. Modules have the released
names, so the released weights load unchanged.

Shapes: B images of H x W pixels, N channels, h x w positions, T = h * w, heads of D = 32 channels.

Notes:
- stage i has resolution H / 2^i; stage 0 is empty, `project_in` and `project_out` change its resolution;
- a change of resolution or channels has a shortcut without weights: repeated or averaged channels;
- no block starts with a norm, and no norm sits between a residual block's two convolutions;
- norms are RMS norms with bias and activations SiLU, except BatchNorm and ReLU in the residual blocks of the decoder,
  and ReLU before its last convolution;
- attention covers all positions, so it is computed in float32, and the ids of a tile depend on its extent;
- no tanh at the end: the output of the decoder is not clamped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig

HEAD_CHANNELS = 32
"""D, channels per head of the linear attention."""
NORM_EPS = 1e-5
"""Added to the mean square in the RMS norm."""
ATTENTION_EPS = 1e-15
"""Added to the sum of attention weights of a position, which can be 0."""


@dataclass(frozen=True, kw_only=True)
class DcaeConfig(AutoencoderConfig):
    """The DC-AE backbone; the defaults are MGVQ's f16. f8 has one stage less, f32 an additional one of (1024, 2, 2)."""

    kind: ClassVar[str] = "dcae"

    quant_conv: Literal["full", "grouped", "none"] = "grouped"
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024)
    """Channels of each stage. The first has no effect, as stage 0 is empty; it is there as in the released configs, so
    that index i is stage i in `widths` and in both depths."""
    encoder_depths: tuple[int, ...] = (0, 4, 8, 2, 2)
    """Blocks of each stage of the encoder; 0 in stage 0."""
    decoder_depths: tuple[int, ...] = (0, 5, 10, 2, 2)
    """Blocks of each stage of the decoder; 0 in stage 0."""
    attention_from: int = 3
    """The first stage with EfficientViT blocks; earlier ones have residual blocks. `len(widths)`: no attention."""
    latent_channels: int = 32
    """Channels between the two networks and their 1x1 convolutions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = range(1, len(self.widths))
        if not stages or not len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths):
            raise ConfigError(
                "model.widths, encoder_depths and decoder_depths should have one entry for each of two or more stages",
                "See the preset mgvq-f16-g4",
            )
        for depths in (self.encoder_depths, self.decoder_depths):
            if depths[0] != 0 or min(depths[1:]) < 1:
                raise ConfigError(
                    f"depths {list(depths)} should be 0 in stage 0 and at least 1 in every other",
                    "See the preset mgvq-f16-g4",
                )
        check_range(self, "model", "[1, inf)", "attention_from", "latent_channels")
        if min(self.widths[1:]) < 1:
            raise ConfigError(f"model.widths = {list(self.widths)}", "They must be at least 1 from the second on")
        for stage in stages:
            unit = HEAD_CHANNELS if self.attends(stage) else 4
            if self.widths[stage] % unit:
                raise ConfigError(
                    f"stage {stage} has {self.widths[stage]} channels, not a multiple of {unit}",
                    "Change model.widths, or let attention start at a later stage: model.attention_from",
                )
        for width, deeper in pairwise(self.widths[1:]):
            if 4 * width % deeper:
                raise ConfigError(
                    f"four times {width} channels are not a multiple of the {deeper} of the next stage",
                    "Double the width from stage to stage, or keep it",
                )
        if self.widths[-1] % self.latent_channels:
            raise ConfigError(
                f"the last stage's {self.widths[-1]} channels are not a multiple of {self.latent_channels}",
                "Set model.latent_channels to a divisor of the last of model.widths",
            )

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def attends(self, stage: int) -> bool:
        """Whether this stage has EfficientViT blocks."""
        return stage >= self.attention_from


class Dcae(Autoencoder):
    """DC-AE with any quantizer; with `multi_group`, MGVQ."""

    config_class = DcaeConfig
    decoder: "Decoder"

    def __init__(self, config: DcaeConfig) -> None:
        super().__init__(config, Encoder(config), Decoder(config), config.latent_channels)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.get_parameter("project_out.op_list.2.conv.conv.weight")


class Encoder(nn.Module):
    """Encodes images float[B, 3, H, W] to float[B, latent_channels, H/f, W/f]."""

    def __init__(self, config: DcaeConfig) -> None:
        super().__init__()
        widths, depths = config.widths, config.encoder_depths
        self.project_in = ConvUnshuffle(3, widths[1])
        self.stages = nn.ModuleList([Chain([])])
        for stage in range(1, len(widths)):
            ops = blocks(config, stage, depths[stage], RmsNorm, nn.SiLU)
            if stage + 1 < len(widths):
                after = widths[stage + 1]
                ops.append(Residual(ConvUnshuffle(widths[stage], after), AverageChannels(after, factor=2)))
            self.stages.append(Chain(ops))
        to_latent = Conv(widths[-1], config.latent_channels, 3)
        self.project_out = Residual(Chain([to_latent]), AverageChannels(config.latent_channels))

    def forward(self, images: Tensor) -> Tensor:
        x = self.project_in(images)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    """Decodes float[B, latent_channels, h, w] to images float[B, 3, h*f, w*f]. `stages.1`, the largest, runs last."""

    def __init__(self, config: DcaeConfig) -> None:
        super().__init__()
        widths, depths = config.widths, config.decoder_depths
        self.project_in = Residual(Conv(config.latent_channels, widths[-1], 3), RepeatChannels(widths[-1]))
        self.stages = nn.ModuleList([Chain([])])
        for stage in range(1, len(widths)):
            ops = blocks(config, stage, depths[stage], nn.BatchNorm2d, nn.ReLU)
            if stage + 1 < len(widths):
                after = widths[stage]
                ops.insert(0, Residual(ConvShuffle(widths[stage + 1], after), RepeatChannels(after, factor=2)))
            self.stages.append(Chain(ops))
        self.project_out = Chain([RmsNorm(widths[1]), nn.ReLU(), ConvShuffle(widths[1], 3)])

    def forward(self, z: Tensor) -> Tensor:
        x = self.project_in(z)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


def blocks(
    config: DcaeConfig,
    stage: int,
    depth: int,
    norm: Callable[[int], nn.Module],
    activation: Callable[[], nn.Module],
) -> list[nn.Module]:
    """The blocks of a stage: EfficientViT blocks if it attends, else residual blocks with this norm and activation."""
    width = config.widths[stage]
    if config.attends(stage):
        return [EfficientVitBlock(width) for _ in range(depth)]
    return [Residual(ConvPair(width, norm(width), activation())) for _ in range(depth)]


class Chain(nn.Module):
    """A sequence of operations, named as released; empty in stage 0."""

    def __init__(self, ops: Sequence[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class Residual(nn.Module):
    """main(x) + shortcut(x)."""

    def __init__(self, main: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class AverageChannels(nn.Module):
    """Folds cells of factor x factor positions into channels, then averages groups of consecutive channels."""

    def __init__(self, channels: int, factor: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.factor).unflatten(1, (self.channels, -1)).mean(2)


class RepeatChannels(nn.Module):
    """Repeats every channel, then unfolds channels to cells of factor x factor positions."""

    def __init__(self, channels: int, factor: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        repeats = self.channels * self.factor**2 // x.shape[1]
        return F.pixel_shuffle(x.repeat_interleave(repeats, dim=1), self.factor)


class ConvUnshuffle(nn.Module):
    """A convolution to a quarter of the channels, then pixel_unshuffle: halves the resolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = Conv(before, after // 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class ConvShuffle(nn.Module):
    """A convolution to four times the channels, then pixel_shuffle: doubles the resolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = Conv(before, 4 * after, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class ConvPair(nn.Module):
    """Convolution, activation, convolution, norm: the main branch of a residual block."""

    def __init__(self, width: int, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = Conv(width, width, 3, activation=activation)
        self.conv2 = Conv(width, width, 3, bias=False, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class EfficientVitBlock(nn.Module):
    """x + linear attention over all positions, then x + a gated convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(width))
        self.local_module = Residual(GatedConv(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class LinearAttention(nn.Module):
    """Multi-head attention with ReLU instead of softmax, in float32 under any autocast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = Conv(width, 3 * width, 1, bias=False)
        self.proj = Conv(width, width, 1, bias=False, norm=RmsNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            heads = qkv.float().flatten(2).unflatten(1, (-1, 3 * HEAD_CHANNELS))  # q, k, v side by side in each head
            q, k, v = heads.chunk(3, dim=2)
            mixed = relu_attention(F.relu(q), F.relu(k), v)
        return self.proj(mixed.reshape_as(x).to(qkv.dtype))


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Average the values with the weights q . k, normalized over positions.

    For T > D it computes the D x D products of keys and values first, otherwise the T x T weights; the two orders
    differ by rounding only.

    Args:
        q, k, v: float[B, heads, D, T]; q and k are not negative.
    """
    if q.shape[-1] > HEAD_CHANNELS:
        values_and_one = F.pad(v, (0, 0, 0, 1), value=1.0)
        sums = (values_and_one @ k.transpose(-1, -2)) @ q
        return sums[..., :-1, :] / (sums[..., -1:, :] + ATTENTION_EPS)
    weights = k.transpose(-1, -2) @ q
    return v @ (weights / (weights.sum(-2, keepdim=True) + ATTENTION_EPS))


class GatedConv(nn.Module):
    """Pointwise convolution to 8 times the width, depthwise 3x3, gating of one half by the other, pointwise back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inverted_conv = Conv(width, 8 * width, 1, activation=nn.SiLU())
        self.depth_conv = Conv(8 * width, 8 * width, 3, groups=8 * width)
        self.point_conv = Conv(4 * width, width, 1, bias=False, norm=RmsNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        return self.point_conv(x * F.silu(gate))


class Conv(nn.Module):
    """A convolution with same padding, then the norm and the activation, if any."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        *,
        groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class RmsNorm(nn.Module):
    """RMS normalization over the channels of each position, in float32, with weight and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + NORM_EPS)
        return (wide * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)
