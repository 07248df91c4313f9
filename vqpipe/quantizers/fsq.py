"""`fsq`: finite scalar quantization, every channel squashed and rounded to one of a few levels.

Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3.1 and the code of appendix A.1.
Shapes: B images, C channels of L_1, ..., L_C levels, h x w positions.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import (
    Quantized,
    Quantizer,
    QuantizerConfig,
    TokenLayout,
    check_finite,
    check_ids,
    straight_through,
)

EPSILON = 1e-3
"""Share by which the outermost levels are drawn in, as in the paper's code, so that rounding never leaves them."""


@dataclass(frozen=True, kw_only=True)
class FsqConfig(QuantizerConfig):
    """A grid of L_1 * ... * L_C codes without a table."""

    kind: ClassVar[str] = "fsq"

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """How many values each channel rounds to. The paper advises 5 or more each: (8, 5, 5, 5) for 2^10 codes,
    (8, 8, 8, 5, 5, 5) for 2^16. Two are lopsided: the lower one starts at -1.56."""

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ConfigError(f"levels = {list(self.levels)} should be one or more numbers of at least 2")
        if self.codebook_size >= 2**63:
            raise ConfigError(f"levels = {list(self.levels)} make more codes than int64 ids can tell apart")

    @property
    def codebook_size(self) -> int:
        """The product of the levels."""
        return math.prod(self.levels)


class FiniteScalarQuantizer(Quantizer):
    """Channel i becomes round(bound(z_i)), one of L_i whole numbers around 0, over floor(L_i / 2): in [-1, 1].

    An id is a number whose digits are the channels, in base L_i, the first channel's digit the lowest. Nothing is
    learned here and there is no loss; the gradient skips the rounding but not `bound`, so latents far out hear little.
    """

    config_class = FsqConfig

    def __init__(self, config: FsqConfig) -> None:
        super().__init__(config, codebook_size=config.codebook_size, latent_dim=len(config.levels))
        self.levels = config.levels

    def forward(self, latent: Tensor) -> Quantized:
        if not self.training:
            check_finite(latent)
        with torch.autocast(latent.device.type, enabled=False):
            levels = self.levels_on(latent.device)
            half = levels // 2
            bounded = bound(latent.float().permute(0, 2, 3, 1), levels)
            rounded = bounded.round()
            ids = ((rounded.long() + half) * radix(levels)).sum(-1).flatten(1)
            codes = straight_through(bounded / half, rounded / half)
            return Quantized(codes.permute(0, 3, 1, 2).contiguous(), ids, {})

    def lookup(self, ids: Tensor, layout: TokenLayout) -> Tensor:
        check_ids(ids, self.codebook_size)
        (grid,) = layout.split(ids)
        levels = self.levels_on(ids.device)
        half = levels // 2
        digits = grid // radix(levels) % levels  # [B, h, w, 1] against [C]
        codes = ((digits - half) / half).masked_fill(grid < 0, 0.0)
        return codes.permute(0, 3, 1, 2).contiguous()

    def levels_on(self, device: torch.device) -> Tensor:
        """The levels as int64[C]: no buffer, since they are the config's and no weights."""
        return torch.tensor(self.levels, device=device)


def bound(latent: Tensor, levels: Tensor) -> Tensor:
    """Squash float[..., C] so that rounding gives `levels` (int64[C]) values: about -L/2 to L/2, by tanh.

    An odd L has values -(L-1)/2 to (L-1)/2. An even one has a value more below 0 than above, so its interval is moved
    down by half a step, and the latent up by about as much, which keeps 0 near 0. That shift is tan(1/2 / radius) in
    the paper's code, which we follow; the exact one is the inverse of tanh (0.1440 both for L = 8).
    """
    radius = (levels - 1) * (1 - EPSILON) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return torch.tanh(latent + torch.tan(offset / radius)) * radius - offset


def radix(levels: Tensor) -> Tensor:
    """What a unit of each digit weighs: int64[C] levels -> (1, L_1, L_1 L_2, ...)."""
    return levels.cumprod(0) // levels
