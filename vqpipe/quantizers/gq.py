"""`gq`: a Gaussian VAE, quantized after training by a codebook of Gaussian noise.

Xu et al. 2025, "Vector Quantization using Gaussian Variational Autoencoder" (arXiv 2512.06609).
Shapes: B images, D channels of a code, h x w positions, N = B * h * w vectors, K codes.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from vqpipe import distributed
from vqpipe.config import check_range
from vqpipe.quantizers.base import (
    Quantized,
    Quantizer,
    QuantizerConfig,
    by_image,
    check_finite,
    check_ids,
    straight_through,
    to_rows,
)
from vqpipe.quantizers.ibq import most_similar

LOG_VARIANCE_RANGE = (-30.0, 20.0)
FACTOR = 1.01
"""Change of the weights of the rate per step."""
WEIGHT_RANGE = (1e-3, 1e3)
BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True, kw_only=True)
class GqConfig(QuantizerConfig):
    """K codes of D channels; the latent has 2 D: means, then log-variances."""

    kind: ClassVar[str] = "gq"

    codebook_size: int = 65536
    """K, codes of one id."""
    code_dim: int = 16
    """D, channels of a code."""
    tolerance: float = 0.5
    """Bits around log2 K within which the rate of a vector has the weight 1."""
    codebook_seed: int = 42
    """Seed of the scrambled Sobol sequence that the codes are made from."""

    def __post_init__(self) -> None:
        check_range(self, "model.quantizer", "[2, inf)", "codebook_size")
        check_range(self, "model.quantizer", f"[1, {SobolEngine.MAXDIM}]", "code_dim")
        check_range(self, "model.quantizer", "[0, inf)", "tolerance")
        check_range(self, "model.quantizer", f"[{-(2**63)}, {2**64})", "codebook_seed")


class Posterior(NamedTuple):
    """The Gaussian of each latent vector."""

    mean: Tensor
    """float32[B, D, h, w]."""
    log_variance: Tensor
    """float32[B, D, h, w]."""

    @property
    def std(self) -> Tensor:
        return (0.5 * self.log_variance).exp()


class GaussianQuantizer(Quantizer):
    """In training a VAE: codes are samples mean + std * noise, and the loss "rate" keeps the rate of each vector, its
    divergence from N(0, 1), near log2 K bits. In evaluation, the id of a vector is the code c of the largest

        sum over channels of log N(c; mean, std) - log N(c; 0, 1)

    Codes are N(0, 1) numbers, made by the normal quantile function from a scrambled Sobol sequence; they are computed,
    and not stored with the weights. The latent's second half, the log-variances, has no place in the decoder: codes are
    zero there.

    "rate" is w x bits, averaged over vectors, times a factor: w = 1 within `tolerance` of log2 K bits, `largest` above,
    `smallest` below. `update` moves the factor by 1.01 up where the mean rate is above log2 K and down where it is
    below; `largest` up while any vector is above, else down to 1; `smallest` down while any vector is below, else up to
    1. Its weight in the authors' objective is 0.1, for sums over an image. Their code updates these numbers from the
    vectors of one rank, in the forward pass; here they come from all ranks, after the step.
    """

    config_class = GqConfig
    loss_names = ("rate",)
    codes: Tensor
    weights: Tensor
    """float32[3]: factor, largest, smallest."""

    def __init__(self, config: GqConfig) -> None:
        super().__init__(config, codebook_size=config.codebook_size, latent_dim=2 * config.code_dim)
        self.code_dim, self.tolerance = config.code_dim, config.tolerance
        self.bits = math.log2(config.codebook_size)
        codes = gaussian_codes(config.codebook_size, config.code_dim, config.codebook_seed)
        # On the CPU also where the network is built on the meta device: loading weights does not fill it.
        self.register_buffer("codes", torch.tensor(codes, device="cpu"), persistent=False)
        self.register_buffer("weights", torch.ones(3))

    def forward(self, latent: Tensor) -> Quantized:
        if not self.training:
            check_finite(latent)
        with torch.autocast(latent.device.type, enabled=False):
            posterior = self.posterior(latent.float())
            ids = by_image(self.search(posterior), latent)
            if self.training:
                codes = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            else:
                chosen = self.codes[ids].transpose(1, 2).reshape_as(posterior.mean)
                codes = straight_through(posterior.mean, chosen)
            # The log-variances enter as 0 * x, so that NaN in them stays visible.
            codes = torch.cat([codes, 0.0 * posterior.log_variance], dim=1)
            return Quantized(codes, ids, {"rate": self.weighted_rate(rate(posterior))})

    def posterior(self, latent: Tensor) -> Posterior:
        """The Gaussian of each vector of float32[B, 2 D, h, w]."""
        mean, log_variance = latent.chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    @torch.no_grad()
    def search(self, posterior: Posterior) -> Tensor:
        """The id of each vector, int64[N].

        Up to a constant of the vector, the sum is <c^2, (1 - 1 / var) / 2> + <c, mean / var>: an inner product of 2 D
        numbers, for which the exact search is used.
        """
        precision = to_rows((-posterior.log_variance).exp())
        queries = torch.cat([(1 - precision) / 2, to_rows(posterior.mean) * precision], dim=1)
        queries = queries / queries.norm(dim=1, keepdim=True).clamp(min=1e-30)  # the ranking stays, in float32's range
        return most_similar(queries, torch.cat([self.codes.square(), self.codes], dim=1), check=not self.training)

    def weighted_rate(self, bits: Tensor) -> Tensor:
        """The loss, for the rates float32[B, h, w] in bits."""
        factor, largest, smallest = self.weights
        weight = torch.where(bits > self.bits + self.tolerance, largest, 1.0)
        weight = torch.where(bits < self.bits - self.tolerance, smallest, weight)
        return factor * (weight * bits).mean()

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        bits = rate(self.posterior(latent.float()))
        kept = ids.view_as(bits) >= 0
        above, below = bits > self.bits + self.tolerance, bits < self.bits - self.tolerance
        parts = (bits.masked_fill(~kept, 0.0), kept, above & kept, below & kept)
        total, count, above, below = distributed.all_reduce_sum(torch.stack([part.sum() for part in parts]))
        up = torch.stack([total > self.bits * count, above > 0, below == 0])
        moved = self.weights * torch.where(up, FACTOR, 1 / FACTOR).masked_fill(count == 0, 1.0)
        low = moved.new_tensor([0.0, 1.0, WEIGHT_RANGE[0]])
        high = moved.new_tensor([math.inf, WEIGHT_RANGE[1], 1.0])
        self.weights.copy_(torch.minimum(torch.maximum(moved, low), high))

    def token_codes(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.codebook_size)
        return self.codebook()[ids.clamp(min=0)] * (ids >= 0).unsqueeze(-1)

    def codebook(self) -> Tensor:
        return torch.cat([self.codes, torch.zeros_like(self.codes)], dim=1)


def rate(posterior: Posterior) -> Tensor:
    """The divergence of each vector's Gaussian from N(0, 1) in bits, float32[B, h, w]."""
    mean, log_variance = posterior
    nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return BITS_PER_NAT * nats.sum(1)


@cache
def gaussian_codes(size: int, dim: int, seed: int) -> np.ndarray:
    """float32[size, dim] normal numbers: the quantiles of a scrambled Sobol sequence."""
    with torch.device("cpu"):  # where the sequence is defined
        uniform = SobolEngine(dim, scramble=True, seed=seed).draw(size, dtype=torch.float64)
        codes: np.ndarray = torch.special.ndtri(uniform.clamp(2.0**-32, 1 - 2.0**-32)).float().numpy()
    return codes
