"""`fsq`: finite scalar quantization, every channel bounded and rounded to one of a few levels.

Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3.1 and the code of appendix A.1;
iFSQ (arXiv 2601.17124): another bound.
Shapes: B images, C channels of L_1, ..., L_C levels, h x w positions.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vqpipe.config import added
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import GridQuantizer, Quantized, QuantizerConfig, straight_through

EPSILON = 1e-3
"""Relative margin at the outermost levels, as in the paper's code, so that rounding never exceeds them."""


@dataclass(frozen=True, kw_only=True)
class FsqConfig(QuantizerConfig):
    """An implicit grid of L_1 * ... * L_C codes."""

    kind: ClassVar[str] = "fsq"

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Number of values of each channel. The paper recommends 5 or more: (8, 5, 5, 5) for 2^10 codes,
    (8, 8, 8, 5, 5, 5) for 2^16. With 2 levels the intervals are unequal: a latent above -1.56 takes the upper one."""

    bound: Literal["tanh", "sigmoid"] = added("tanh")
    """How a channel is bounded: "tanh" as in FSQ, or "sigmoid", (2 sigmoid(1.6 z) - 1) (L - 1) / 2, as in iFSQ, which
    makes a normal latent nearly uniform; it needs odd levels. Its authors find about 4 bits per channel best:
    (17, 17, 17, 17) at f16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels or min(self.levels) < 2:
            raise ConfigError(f"levels = {list(self.levels)} should be one or more numbers of at least 2")
        if self.bound == "sigmoid" and not all(level % 2 for level in self.levels):
            raise ConfigError(f"levels = {list(self.levels)} with bound = sigmoid should be odd")
        if self.codebook_size >= 2**63:
            raise ConfigError(f"levels = {list(self.levels)} make more codes than int64 ids can number")

    @property
    def codebook_size(self) -> int:
        """The product of the levels."""
        return math.prod(self.levels)


class FiniteScalarQuantizer(GridQuantizer):
    """Channel i becomes round(bound(z_i)) / floor(L_i / 2), in [-1, 1]; the rounded value is one of L_i integers.

    An id is a mixed-radix number with one digit of base L_i per channel, the first channel lowest. There are no weights
    and no losses. The gradient passes straight through the rounding but not through `bound`, so it vanishes for large
    latents.
    """

    config_class = FsqConfig

    def __init__(self, config: FsqConfig) -> None:
        super().__init__(config, codebook_size=config.codebook_size, latent_dim=len(config.levels))
        self.levels, self.bound = config.levels, {"tanh": tanh_bound, "sigmoid": sigmoid_bound}[config.bound]

    def quantize(self, latent: Tensor) -> Quantized:
        levels = self.levels_tensor(latent.device)
        half = levels // 2
        bounded = self.bound(latent.permute(0, 2, 3, 1), levels)
        rounded = bounded.round()
        ids = ((rounded.long() + half) * radix(levels)).sum(-1).flatten(1)
        codes = straight_through(bounded / half, rounded / half)
        return Quantized(codes.permute(0, 3, 1, 2).contiguous(), ids, {})

    def embed(self, ids: Tensor) -> Tensor:
        levels = self.levels_tensor(ids.device)
        half = levels // 2
        return (ids // radix(levels) % levels - half) / half

    def levels_tensor(self, device: torch.device) -> Tensor:
        """The levels as int64[C]; not a buffer, so they are not saved with the weights."""
        return torch.tensor(self.levels, device=device)


def tanh_bound(latent: Tensor, levels: Tensor) -> Tensor:
    """Bound float[..., C] by tanh to about -L/2 to L/2, so that rounding gives `levels` (int64[C]) values.

    An odd L has the values -(L-1)/2 to (L-1)/2. An even L has one more value below 0 than above, so its interval is
    shifted down by one half, and the latent up by about as much, which keeps 0 near 0. That shift is tan(1/2 / radius)
    in the paper's code, which we follow; the exact one is artanh(1/2 / radius) (0.1440 both for L = 8).
    """
    radius = (levels - 1) * (1 - EPSILON) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return torch.tanh(latent + torch.tan(offset / radius)) * radius - offset


def sigmoid_bound(latent: Tensor, levels: Tensor) -> Tensor:
    """Bound float[..., C] by a sigmoid to (-(L - 1) / 2, (L - 1) / 2), for odd L: iFSQ."""
    return torch.tanh(0.8 * latent) * ((levels - 1) / 2)  # 2 sigmoid(1.6 z) - 1 = tanh(0.8 z)


def radix(levels: Tensor) -> Tensor:
    """The place value of each digit: int64[C] levels -> (1, L_1, L_1 L_2, ...)."""
    return levels.cumprod(0) // levels
