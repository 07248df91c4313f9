"""The autoencoder with a quantizer: image -> latent -> codes -> image.

Shapes: B images of H x W pixels, Z encoder channels, C latent channels, h x w positions, f the downsample factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vqpipe.config import check_choices, class_for
from vqpipe.distributed import all_reduce_sum
from vqpipe.errors import ConfigError, DataError
from vqpipe.image_size import in_pixels
from vqpipe.quantizers import Quantized, QuantizerConfig, build_quantizer

IMAGES_PER_CHUNK = 16
"""Images encoded at a time by `whiten_init`, to bound its memory."""
MIN_VARIANCE = 1e-8
"""Smallest variance of a latent direction, relative to the largest."""
ROUNDING = 1e-12
"""Latents whose largest variance, relative to the square of their mean, is not above this differ by rounding only."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Section [model]; `kind` selects the backbone."""

    kind: ClassVar[str]

    quantizer: QuantizerConfig
    """Section [model.quantizer]."""
    quant_conv: Literal["full", "grouped", "none"] = "full"
    """The convolutions between the networks and the quantizer: "full" over all channels (VQGAN), "grouped" by the
    groups of the quantizer (MGVQ), "none" if the encoder outputs the latent (Open-MAGVIT2)."""
    quant_conv_kernel: Literal[1, 3] = 1
    """Kernel size of these convolutions: 3 in VAR's released tokenizer, 1 in all others."""

    def __post_init__(self) -> None:
        check_choices(self, "model")

    @property
    def downsample_factor(self) -> int:
        """f, image side / latent side."""
        raise NotImplementedError


class Reconstruction(NamedTuple):
    """The output of `Autoencoder.forward`."""

    images: Tensor
    """float[B, 3, H, W], about [-1, 1], not clamped."""
    latent: Tensor
    """float[B, C, h, w], before quantization."""
    quantized: Quantized


class Autoencoder(nn.Module, ABC):
    """Encoder, quant_conv, quantizer, post_quant_conv, decoder.

    A subclass sets `config_class`, which registers it, and builds the encoder and the decoder.
    """

    config_class: ClassVar[type[AutoencoderConfig]]

    def __init__(
        self, config: AutoencoderConfig, encoder: nn.Module, decoder: nn.Module, encoder_channels: int
    ) -> None:
        super().__init__()
        self.config = config
        self.downsample_factor = config.downsample_factor
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = build_quantizer(config.quantizer)
        self.quant_conv = self.make_quant_conv(encoder_channels, self.quantizer.latent_dim)
        self.post_quant_conv = self.make_quant_conv(self.quantizer.latent_dim, encoder_channels)

    def make_quant_conv(self, before: int, after: int) -> nn.Module:
        """One of the two convolutions around the quantizer, by `config.quant_conv`."""
        if self.config.quant_conv == "none":
            if before != after:
                raise ConfigError(
                    f"without a quant_conv, the {before} and {after} channels of encoder and quantizer must be equal",
                    "Make the two equal, or set model.quant_conv = full",
                )
            return nn.Identity()
        groups = self.quantizer.channel_groups if self.config.quant_conv == "grouped" else 1
        if before % groups or after % groups:
            raise ConfigError(
                f"{before} channels of the networks are not divisible into {groups} groups",
                "Set model.quant_conv = full",
            )
        kernel = self.config.quant_conv_kernel
        return nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups)

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, used by the adaptive GAN weight."""

    def latent(self, images: Tensor) -> Tensor:
        """Encode float[B, 3, H, W] in [-1, 1] to the input of the quantizer, float[B, C, H/f, W/f].

        Raises:
            DataError: an image side is not a multiple of the downsample factor.
        """
        height, width = images.shape[-2:]
        if height % self.downsample_factor or width % self.downsample_factor:
            raise DataError(
                f"images of {in_pixels(height, width)} are not divisible into cells of {self.downsample_factor}",
                "Crop or resize them so that both sides do",
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Quantized:
        """Encode float[B, 3, H, W] in [-1, 1] to codes, ids and quantizer losses."""
        return self.quantizer(self.latent(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes float[B, C, h, w] of any type to images float[B, 3, H, W], about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(codes.to(self.last_layer.dtype)))

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantize and decode float[B, 3, H, W] in [-1, 1]; one call for DistributedDataParallel."""
        latent = self.latent(images)
        quantized = self.quantizer(latent)
        return Reconstruction(self.decode(quantized.codes), latent, quantized)

    @torch.no_grad()
    def whiten_init(self, images: Tensor) -> None:
        """Whiten the latents of real images and standardize the codebook, once before the first training step.

        The mean and the ZCA whitening of the latents are folded into `quant_conv`, so that their covariance over
        `images` (of all ranks) becomes the identity; a grouped `quant_conv` is whitened per group. The codebook is
        centered and scaled to unit variance. Not in the papers, and off in their presets.

        Args:
            images: float[B, 3, H, W] in [-1, 1], a hundred or more.

        Raises:
            DataError: too few latent vectors to estimate a covariance, or all of them are equal.
            ConfigError: the model has no quant_conv.
        """
        conv = self.quant_conv
        if not isinstance(conv, nn.Conv2d):
            raise ConfigError("train.whiten_init needs a quant_conv", "Set train.whiten_init = false")
        assert conv.bias is not None
        mean, covariance = self.latent_moments(images)
        rows = len(mean) // conv.groups
        for group in range(0, len(mean), rows):
            block = slice(group, group + rows)
            variances, directions = torch.linalg.eigh(covariance[block, block])
            if variances[-1] <= ROUNDING * mean[block].square().sum():
                raise DataError(
                    "the latents of the first images are all equal, so they cannot be whitened",
                    "Check that the images differ, or set train.whiten_init = false",
                )
            variances = variances.clamp(min=MIN_VARIANCE * float(variances[-1]))
            whitening = directions @ torch.diag(variances.rsqrt()) @ directions.T
            weight, bias = conv.weight[block], conv.bias[block]
            weight.copy_((whitening @ weight.double().view(rows, -1)).view_as(weight))
            bias.copy_(whitening @ (bias.double() - mean[block]))
        self.quantizer.standardize_codebook()

    def latent_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean float64[C] and covariance float64[C, C] of the latent vectors of `images`, over all ranks, which may
        have the same images."""
        total = torch.zeros(1 + self.quantizer.latent_dim, 1 + self.quantizer.latent_dim, dtype=torch.float64)
        total = total.to(images.device)
        for part in images.split(IMAGES_PER_CHUNK):
            vectors = self.latent(part).double().transpose(0, 1).flatten(1).T
            vectors = torch.cat([torch.ones_like(vectors[:, :1]), vectors], dim=1)
            total += vectors.T @ vectors  # count, sums and products
        count = int(total[0, 0])
        if count < 2 * len(total):
            raise DataError(
                f"{count} latent vectors are too few to whiten {len(total) - 1} channels",
                "Set train.whiten_images to more images, or use larger ones",
            )
        all_reduce_sum(total)
        total /= total[0, 0].clone()
        mean = total[0, 1:]
        return mean, total[1:, 1:] - mean.outer(mean)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the autoencoder of `config`, with initial weights."""
    return class_for(Autoencoder, config)(config)  # type: ignore[type-abstract, call-arg]  # a subclass takes its config alone
