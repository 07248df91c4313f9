"""`bsq`: binary spherical quantization, and grouped sign bits: the quantizers of BSQ-ViT, WeTok and BitDance.

Zhao et al. 2024, "Image and Video Tokenization with Binary Spherical Quantization" (arXiv 2406.07548), sections 3, 4;
Zhuang et al. 2025, "WeTok" (arXiv 2508.05599), group-wise quantization.
Shapes: B images, D channels of a position, G groups of b = D / G channels, h x w positions, N = B * h * w vectors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import Quantized, to_rows
from vqpipe.quantizers.lfq import SignConfig, SignQuantizer

EPSILON = 1e-8
"""Added to probabilities inside the logarithm, as released."""


@dataclass(frozen=True, kw_only=True)
class BsqConfig(SignConfig):
    """2^b implicit codes in each of D / b groups. The defaults are BSQ's, at 18 bits.

    WeTok: bits_per_id 8, normalize false, commitment true, entropy_temperature 0.01, entropy_bits 8.
    """

    kind: ClassVar[str] = "bsq"

    bits_per_id: int = 0
    """b, bits of one id, a divisor of D: a position has D / b ids. 0: one id of all D bits, at most 62."""
    normalize: bool = True
    """Scale the latent of a position to unit length; codes are then (+-1, ..., +-1) / sqrt(D). Otherwise the codes are
    corners of a cube, as in LFQ."""
    commitment: bool = False
    """Add the loss "commitment", mean (latent - code)^2. BSQ has none, WeTok weights it by 0.25."""
    entropy_temperature: float = 1.0
    """Temperature of the softmax over codes in the entropy term: 1 in BSQ, 0.01 in WeTok."""
    entropy_bits: int = 9
    """Channels per joint distribution in the batch entropy; the entropies of consecutive groups of channels are summed.
    BSQ's experiments have 9 or 1."""

    def __post_init__(self) -> None:
        if self.code_dim < 1 or self.bits_per_id < 0 or self.code_dim % (self.bits_per_id or self.code_dim):
            raise ConfigError(
                f"bits_per_id = {self.bits_per_id} does not divide code_dim = {self.code_dim}",
                "Use a divisor, or 0 for one id of all bits",
            )
        if self.bits > 62:
            raise ConfigError(f"an id of {self.bits} bits does not fit int64", "Set model.quantizer.bits_per_id")
        super().__post_init__()

    @property
    def bits(self) -> int:
        """b, bits of one id."""
        return self.bits_per_id or self.code_dim


class BinarySphericalQuantizer(SignQuantizer):
    """Each channel becomes +s where it is positive, else -s; s = 1 / sqrt(D) with `normalize`, else 1.

    Channel g b + i is bit i of id g. "entropy" is sample_weight * E[H(p)] - batch_weight * H(E[p]) in nats, with
    p = softmax(2 <z, c> / temperature) over the codes c. It is computed as in `lfq`: the sum of the channels' binary
    entropies, exactly, minus the sum of the entropies of groups of channels. The mean is over the vectors of this rank.

    The released code of BSQ triples the weight of the entropy term at the start of a run, for 2,000 steps; here
    weights are constant. That of WeTok takes the mean of both entropies over its groups, of one E[p] for all; here they
    are summed, as in BSQ, and every group has a mean of its own: with G groups its weight is to be divided by G.
    """

    config_class = BsqConfig
    epsilon = EPSILON

    def __init__(self, config: BsqConfig) -> None:
        super().__init__(config, bits=config.bits, scale=config.code_dim**-0.5 if config.normalize else 1.0)
        self.loss_names = ("commitment", "entropy") if config.commitment else ("entropy",)  # type: ignore[misc]
        self.normalize = config.normalize

    def quantize(self, latent: Tensor) -> Quantized:
        return super().quantize(F.normalize(latent, dim=1) if self.normalize else latent)

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        losses = {"entropy": self.entropy(to_rows(latent))}
        if "commitment" in self.loss_names:
            losses["commitment"] = F.mse_loss(latent, codes)
        return losses
