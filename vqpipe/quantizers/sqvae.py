"""`sqvae`: stochastic quantization with a learned width of the posterior that anneals itself.

Takida et al. 2022, "SQ-VAE: Variational Bayes on Discrete Representation with Self-annealed Stochastic Quantization"
(arXiv 2205.07547), Gaussian SQ-VAE (I): one variance for all latents.
Shapes: B images, C channels, h x w positions, N = B * h * w vectors, K codes.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import LOGITS_PER_CHUNK, CodebookConfig, Quantized, by_image, from_rows, to_rows
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest

MIN_TEMPERATURE = 1e-6
"""Of the Gumbel-softmax: below it, logits divided by the temperature may overflow."""


@dataclass(frozen=True, kw_only=True)
class SqvaeConfig(CodebookConfig):
    """A learned codebook with a Gumbel-softmax relaxation in training."""

    kind: ClassVar[str] = "sqvae"

    start_variance: float = 20.0
    """exp of the learned log-variance at the start; the variance is 1 plus it, as released. The authors use larger ones
    for codes with more channels: 20 with 64."""
    temperature_decay: float = 1e-5
    """The temperature of the Gumbel-softmax is exp(-temperature_decay * step)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "l2" or self.normalize:
            raise ConfigError("sqvae compares squared distances of unnormalized vectors", "Leave out metric, normalize")
        check_range(self, "model.quantizer", "(0, inf)", "start_variance")
        check_range(self, "model.quantizer", "[0, inf)", "temperature_decay")


class StochasticQuantizer(VectorQuantizer):
    """The posterior of a latent z over codes c is p = softmax(-|z - c|^2 / (2 v)), with v learned.

    In training the codes are Gumbel-softmax samples from it, mixtures of codes with exact gradients; in evaluation the
    nearest code. The losses are the two parts of the evidence bound that concern the latent, in nats per position:

    - "entropy": mean over positions of sum p log p, the discrete part;
    - "commitment": mean over positions of |z - code|^2 / (2 v), the continuous part.

    With the term objective.log_l2 and both weights 2 / (3 f^2), f the downsample factor, the objective is the paper's
    bound over half the number of pixel values: log(mean squared error) + 2 / (3 f^2) (entropy + commitment). As v falls
    with the error, the posterior sharpens by itself.

    Ids are those of the nearest code in training too. The N x K matrix of p is computed in chunks, twice: its parts are
    recomputed in the backward pass.
    """

    config_class = SqvaeConfig
    loss_names = ("commitment", "entropy")
    steps: Tensor

    def __init__(self, config: SqvaeConfig) -> None:
        super().__init__(config)
        nn.init.normal_(self.codes)
        self.decay = config.temperature_decay
        self.log_variance = nn.Parameter(torch.tensor(math.log(config.start_variance)))
        self.register_buffer("steps", torch.zeros(()))

    def variance(self) -> Tensor:
        """v, a scalar."""
        return 1 + self.log_variance.exp()

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            vectors, codebook = to_rows(latent), self.raw_codebook()
            ids = nearest(vectors, codebook, check=not self.training)
            entropy = {}
            if self.computes_all_losses:
                sampled, entropy["entropy"] = self.sample(vectors, codebook)
            rows = sampled if self.training else self.embed(ids)
            distance = (vectors - rows).square().sum(1).mean() / (2 * self.variance())
            codes = from_rows(rows, latent)
            if not self.training:
                codes = (latent - latent.detach()) + codes
            return Quantized(codes, by_image(ids, latent), {"commitment": distance, **entropy})

    def sample(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Samples from the relaxed posterior, float32[N, C], and the loss "entropy", a scalar."""
        temperature = torch.exp(-self.decay * self.steps).clamp(min=MIN_TEMPERATURE)
        parts, total = [], vectors.new_zeros(())
        for chunk in vectors.split(max(1, LOGITS_PER_CHUNK // len(codebook))):
            part = checkpoint(self.sample_chunk, chunk, codebook, temperature, use_reentrant=False)
            parts.append(part[0])
            total = total + part[1]
        return torch.cat(parts), total / len(vectors)

    def sample_chunk(self, vectors: Tensor, codebook: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Samples float32[n, C] of n vectors, and the sum of their sum p log p."""
        distances = torch.addmm(codebook.square().sum(1), vectors, codebook.T, alpha=-2)  # less |z|^2: p stays
        log_p = (-distances / (2 * self.variance())).log_softmax(1)
        entropy = (log_p.exp() * log_p).sum()
        if not self.training:
            return torch.zeros_like(vectors), entropy
        gumbel = -torch.empty_like(log_p).exponential_().clamp(min=1e-30).log()
        return ((log_p + gumbel) / temperature).softmax(1) @ codebook, entropy

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Count the step, for the temperature."""
        self.steps.add_(1)
