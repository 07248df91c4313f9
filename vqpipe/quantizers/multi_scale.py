"""`multi_scale`: residual quantization over grids of increasing resolution, the quantizer of VAR.

Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", section 3.2.
Shapes: B images, C channels, h x w positions of the latent, S scales, K codes.

VAR released networks, weights and the quantizer's forward pass with its losses (models/quant.py), but no training code.
From it: the order of the steps, the two losses and their mean over scales, phi, and the assignment of phis to scales.
Not released, and our choice: the initialization of codes and phi, and the grids for other latent sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import CodebookConfig, Quantized, straight_through, to_rows
from vqpipe.quantizers.layout import TokenLayout
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(CodebookConfig):
    """One codebook for grids of several sizes; the defaults are VAR's, 680 tokens for an image of 256 pixels."""

    kind: ClassVar[str] = "multi_scale"

    codebook_size: int = 4096
    """K, codes shared by all scales."""
    code_dim: int = 32
    """Channels of a code."""
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Sides of the grids for a latent of the last side; scaled in proportion for latents of another size."""
    num_phis: int = 4
    """Number of convolutions phi, shared by neighboring scales."""
    phi_ratio: float = 0.5
    """r in phi(x) = (1 - r) x + r conv(x), in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or self.scales[0] < 1 or list(self.scales) != sorted(set(self.scales)):
            raise ConfigError(
                f"scales = {list(self.scales)} should grow, from 1 or more",
                "VAR's are 1, 2, 3, 4, 5, 6, 8, 10, 13, 16 at 256 pixels",
            )
        check_range(self, "model.quantizer", "[1, inf)", "num_phis")
        check_range(self, "model.quantizer", "[0, 1]", "phi_ratio")
        if self.normalize:
            raise ConfigError(
                "the multi_scale quantizer sums its codes, so they cannot be unit vectors",
                "Set model.quantizer.normalize = false; metric = cosine compares on the unit sphere, VAR's using_znorm",
            )


class MultiScaleQuantizer(VectorQuantizer):
    """Quantizes the latent coarse to fine, at each scale the residual of the coarser ones (Algorithms 1 and 2).

    At each scale the residual is averaged to the grid of the scale and replaced by its nearest codes. These are
    upsampled to h x w by bicubic interpolation, passed through a convolution phi, added to the sum, and subtracted from
    the residual. "commitment" and "codebook" are means over the scales of |latent - partial sum|^2, so that coarse
    scales learn the most important information. "codebook" trains codes and phi; the decoder's gradient does not.

    The first scales alone decode to a coarser image: a scale whose ids are all negative adds zero.
    """

    config_class = MultiScaleConfig
    sums_codes = True

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(config)
        self.scales, self.phi_ratio = config.scales, config.phi_ratio
        convs = [nn.Conv2d(config.code_dim, config.code_dim, 3) for _ in range(config.num_phis)]
        # One tensor for all phi: small latents do not use them all, and DistributedDataParallel needs every gradient.
        self.phi_weights = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
        self.phi_biases = nn.Parameter(torch.zeros(config.num_phis, config.code_dim))

    def layout(self, height: int, width: int) -> TokenLayout:
        """The scales in proportion to the last one, rounded, at least 1, without duplicates; the last is the latent's.

        VAR's code for 512 pixels has 1, 2, 3, 4, 6, 9, 13, 18, 24, 32 instead, not in proportion to those for 256.
        """
        last = self.scales[-1]
        sides = [(max(1, round(height * side / last)), max(1, round(width * side / last))) for side in self.scales]
        return TokenLayout(tuple(dict.fromkeys(sides)))

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            layout = self.layout(*latent.shape[2:])
            residual, total = latent.detach(), torch.zeros_like(latent)
            ids, terms = [], []
            for scale, grid in enumerate(layout.grids):
                nearest_ids = nearest(
                    to_rows(F.interpolate(residual, grid, mode="area")),
                    self.codebook(),
                    self.metric,
                    check=not self.training,
                )
                ids.append(nearest_ids.view(latent.shape[0], *grid))
                codes = self.upsample(self.embed(ids[-1]), scale, layout)
                residual, total = residual - codes.detach(), total + codes
                terms.append(self.losses(latent, total))
            losses = {name: torch.stack([term[name] for term in terms]).mean() for name in self.loss_names}
            return Quantized(straight_through(latent, total), layout.join(ids), losses)

    def combine(self, codes: Tensor, layout: TokenLayout) -> Tensor:
        """The sum of the upsampled scales; a scale of an image whose codes are all zero adds zero."""
        total = torch.zeros(codes.shape[0], self.latent_dim, *layout.grids[-1], device=codes.device)
        for scale, grid in enumerate(layout.split(codes)):
            total = total + self.upsample(grid.squeeze(3), scale, layout)
        return total

    @torch.no_grad()
    def standardize_codebook(self) -> None:
        """Standardize the codes, and make each phi the identity."""
        super().standardize_codebook()
        for weight in self.phi_weights:
            nn.init.dirac_(weight)
        self.phi_biases.zero_()

    def upsample(self, codes: Tensor, scale: int, layout: TokenLayout) -> Tensor:
        """Return the summand float32[B, C, h, w] of one scale from its codes float32[B, h_s, w_s, C]."""
        given = codes.any(dim=3).any(dim=2).any(dim=1)
        codes = codes.permute(0, 3, 1, 2).contiguous()
        if codes.shape[2:] != layout.grids[-1]:
            codes = F.interpolate(codes, layout.grids[-1], mode="bicubic")
        phi = phi_index(scale, len(layout.grids), len(self.phi_weights))
        with full_float32_convolution(), torch.autocast(codes.device.type, enabled=False):
            convolved = F.conv2d(codes, self.phi_weights[phi], self.phi_biases[phi], padding=1)
        return codes.lerp(convolved, self.phi_ratio) * given.view(-1, 1, 1, 1)


def phi_index(scale: int, num_scales: int, num_phis: int) -> int:
    """The phi of a scale: the one whose tick in (0, 1) is nearest to scale / (num_scales - 1), as released.

    It must be computed by NumPy: with VAR's ten scales there are two ties, which its rounding breaks.
    """
    margin = (1 / 3 if num_phis == 4 else 1 / 2) / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return int(np.abs(ticks - scale / max(num_scales - 1, 1)).argmin())


@contextmanager
def full_float32_convolution() -> Iterator[None]:
    """Disable TF32, which would give sums of codes relative errors of 1e-3."""
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # missing in torch's stubs
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before
