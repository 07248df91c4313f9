"""The encoder and decoder of UniTok: convolutions at high resolution, a transformer at 1/16 of it.

Ma et al. 2025, "UniTok: A Unified Tokenizer for Visual Generation and Understanding". The encoder is ViTamin-L (Chen et
al. 2024, "Designing Scalable Vision Models in the Vision-Language Era") without its pooling and its head; the decoder
has the same transformer and the stages of convolutions in reverse order. Modules of the networks have the released
names, except those in front of the transformer and the projections.

Shapes: B images of H x W pixels, N channels, h x w positions, T = h * w, D channels of the transformer, C channels of
the latent.

Notes:
- no positional embedding: only the convolutions tell positions apart, so images of any size can be encoded;
- the MLP of a block has a norm of its own, after the norm of the block;
- the latent is projected by attention: from D channels to C by averaging D / C heads of C channels;
- attention covers all positions, so the ids of a tile depend on its extent;
- no tanh at the end: the output of the decoder is not clamped.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.models.autoencoder import Autoencoder, AutoencoderConfig
from vqpipe.models.magvit import latent_dim_of
from vqpipe.models.vqgan import Upsample

HEAD_CHANNELS = 64
"""Channels per head of the transformer."""
NORM_EPS = 1e-6
"""Added to the variance in all norms but those of the projections, which have PyTorch's 1e-5."""


@dataclass(frozen=True, kw_only=True)
class VitaminConfig(AutoencoderConfig):
    """The ViTamin backbone, f16; the defaults are UniTok's."""

    kind: ClassVar[str] = "vitamin"

    quant_conv: Literal["full", "grouped", "none"] = "none"
    """"none" as released: the networks end and begin with a projection; `train.whiten_init` needs a quant_conv."""
    widths: tuple[int, int] = (160, 320)
    """Channels of the convolutions: of the stem and the first stage, and of the second."""
    encoder_depths: tuple[int, int] = (2, 4)
    """Blocks of the first stage, at 1/4 of the image side, and of the second, at 1/8."""
    decoder_depths: tuple[int, int] = (4, 2)
    """Blocks of the decoder, from 1/8 to 1/4 of the image side, and from 1/4 to 1/2."""
    transformer_width: int = 1024
    """D, a multiple of the 64 channels of a head and of the channels of the latent."""
    transformer_depth: int = 31
    """Blocks of the transformer, in encoder and decoder."""
    mlp_width: int = 2048
    """Hidden channels of the MLP of a block."""

    @property
    def downsample_factor(self) -> int:
        return 16

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("widths", "encoder_depths", "decoder_depths", "transformer_width", "transformer_depth", "mlp_width")
        check_range(self, "model", "[1, inf)", *sizes)
        if self.transformer_width % HEAD_CHANNELS:
            raise ConfigError(
                f"model.transformer_width = {self.transformer_width} is not a multiple of {HEAD_CHANNELS}",
                "Heads have 64 channels",
            )


class Vitamin(Autoencoder):
    """ViTamin with any quantizer; released with `multi_group` of eight `vq`, as UniTok."""

    config_class = VitaminConfig
    decoder: "Decoder"

    def __init__(self, config: VitaminConfig) -> None:
        latent_dim = latent_dim_of(config.quantizer)
        if config.transformer_width % latent_dim:
            raise ConfigError(
                f"model.transformer_width = {config.transformer_width} is not a multiple of the {latent_dim} channels "
                "of the latent",
                "Change it, or the channels of the codes",
            )
        super().__init__(config, Encoder(config, latent_dim), Decoder(config, latent_dim), latent_dim)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.up_conv4.conv2.weight


class Encoder(nn.Module):
    """Encodes images float[B, 3, H, W] to float[B, C, H/16, W/16]."""

    def __init__(self, config: VitaminConfig, latent_dim: int) -> None:
        super().__init__()
        first, second = config.widths
        width = config.transformer_width
        self.stem = Stem(first)
        self.stages = nn.ModuleList(
            [
                conv_blocks(first, first, config.encoder_depths[0], "down"),
                conv_blocks(first, second, config.encoder_depths[1], "down"),
            ]
        )
        self.pool = Pool(second, width)
        self.blocks = transformer(config)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.project = Projection(width, latent_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        x = self.pool(x)
        tokens = self.norm(self.blocks(to_tokens(x)))
        return to_map(self.project(tokens), x.shape[2])


class Decoder(nn.Module):
    """Decodes float[B, C, h, w] to images float[B, 3, 16h, 16w]."""

    def __init__(self, config: VitaminConfig, latent_dim: int) -> None:
        super().__init__()
        first, second = config.widths
        width = config.transformer_width
        self.project = Projection(latent_dim, width)
        self.blocks = transformer(config)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.up_conv1 = Upsample(width, second)
        self.up_conv2 = conv_blocks(second, second, config.decoder_depths[0], "up")
        self.up_conv3 = conv_blocks(second, first, config.decoder_depths[1], "up")
        self.up_conv4 = InverseStem(first)

    def forward(self, latent: Tensor) -> Tensor:
        tokens = self.norm(self.blocks(self.project(to_tokens(latent))))
        x = self.up_conv1(to_map(tokens, latent.shape[2]))
        return self.up_conv4(self.up_conv3(self.up_conv2(x)))


def to_tokens(x: Tensor) -> Tensor:
    """float[B, N, h, w] -> float[B, T, N]."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, height: int) -> Tensor:
    """float[B, T, N] -> float[B, N, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each position of float[B, N, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """The first convolutions: images float[B, 3, H, W] to float[B, N, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm1 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(images))))


class InverseStem(nn.Module):
    """The last convolutions: float[B, N, H/2, W/2] to images float[B, 3, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Upsample(channels, channels)
        self.norm1 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(x))))


class Pool(nn.Module):
    """A norm and a strided convolution: halves the resolution in front of the transformer."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(before)
        self.proj = nn.Conv2d(before, after, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))


class Downsample(nn.Module):
    """The shortcut of a block that halves the resolution: a mean of 3x3 pixels, a 1x1 convolution if N changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.expand = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False))


class ConvBlock(nn.Module):
    """An inverted bottleneck with a depthwise convolution (MBConv) and a layer norm, on float[B, N, h, w]."""

    def __init__(self, before: int, after: int, resample: Literal["", "down", "up"]) -> None:
        super().__init__()
        hidden = 4 * after
        shortcuts = {"": nn.Identity, "down": Downsample, "up": Upsample}
        self.shortcut = shortcuts[resample](before, after)
        self.pre_norm = ChannelNorm(before)
        self.conv1_1x1 = nn.Conv2d(before, hidden, 1)
        self.up = Upsample(hidden, hidden) if resample == "up" else nn.Identity()
        stride = 2 if resample == "down" else 1
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv1_1x1(self.pre_norm(x)))
        y = F.gelu(self.conv2_kxk(self.up(y)))
        return self.conv3_1x1(y) + self.shortcut(x)


def conv_blocks(before: int, after: int, depth: int, resample: Literal["down", "up"]) -> nn.Sequential:
    """`depth` blocks, of which the first changes the resolution and the channels."""
    later = (ConvBlock(after, after, "") for _ in range(depth - 1))
    return nn.Sequential(ConvBlock(before, after, resample), *later)


def transformer(config: VitaminConfig) -> nn.Sequential:
    """The blocks of the transformer, for float[B, T, D]."""
    width, depth = config.transformer_width, config.transformer_depth
    return nn.Sequential(*(TransformerBlock(width, config.mlp_width) for _ in range(depth)))


class TransformerBlock(nn.Module):
    """Attention and an MLP, each after a norm and with a shortcut, for float[B, T, D]."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attn = Attention(width, width, HEAD_CHANNELS)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.mlp = GatedMlp(width, mlp_width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Self-attention over all positions, float[B, T, before] -> float[B, T, after].

    The outputs of the heads are concatenated, or averaged where `after` is smaller than `before`.
    """

    def __init__(self, before: int, after: int, head_channels: int) -> None:
        super().__init__()
        hidden = max(before, after)
        self.num_heads = hidden // head_channels
        self.average = after < before
        self.qkv = nn.Linear(before, 3 * hidden)
        self.proj = nn.Linear(after, after)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # float[B, heads, T, channels] each
        heads = F.scaled_dot_product_attention(query, key, value)
        return self.proj(heads.mean(1) if self.average else heads.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """An MLP with a product of two hidden layers (GEGLU, Shazeer 2020) and a norm before them, for float[B, T, N]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, NORM_EPS)
        self.w0 = nn.Linear(channels, hidden)
        self.w1 = nn.Linear(channels, hidden)
        self.w2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class Projection(nn.Module):
    """The attention projection between transformer and latent (section 3.3), float[B, T, before] -> [B, T, after]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(before)
        self.attn = Attention(before, after, min(before, after))
        self.norm3 = nn.LayerNorm(before)
        self.proj = nn.Linear(before, after)
        self.norm2 = nn.LayerNorm(after)
        self.mlp = GatedMlp(after, 2 * after)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.proj(self.norm3(tokens)) + self.attn(self.norm1(tokens))
        return x + self.mlp(self.norm2(x))
