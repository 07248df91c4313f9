"""`regvq`: a learned codebook whose use is drawn to a uniform prior, with partly random ids in training.

Zhang et al. 2023, "Regularized Vector Quantization for Tokenized Image Synthesis" (arXiv 2303.06424).
Shapes: B images, C channels, h x w positions, N = B * h * w vectors, K codes.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import LOGITS_PER_CHUNK, CodebookConfig, Quantized, by_image, to_rows
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest


@dataclass(frozen=True, kw_only=True)
class RegVqConfig(CodebookConfig):
    """A learned codebook with a prior on its use."""

    kind: ClassVar[str] = "regvq"

    mask_ratio: float = 0.4
    """Share of the positions whose code is sampled from p in training; the others take the nearest code."""
    temperature: float = 1.0
    """Temperature of p = softmax(-|z - c|^2 / temperature)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "l2":
            raise ConfigError("regvq compares squared distances", "For cosines set model.quantizer.normalize = true")
        check_range(self, "model.quantizer", "[0, 1]", "mask_ratio")
        check_range(self, "model.quantizer", "(0, inf)", "temperature")


class RegularizedQuantizer(VectorQuantizer):
    """Vector quantization with two regularizations.

    - "prior": KL(mean p || uniform) = log K + sum q log q in nats, q the mean over the vectors of this rank of
      p = softmax(-|z - c|^2 / temperature). It is 0 where all codes are used alike.
    - Stochastic masks: in training, at a share `mask_ratio` of the positions, drawn anew for each batch, the id is
      sampled from p (the Gumbel-max trick); elsewhere, and in evaluation, it is the nearest code.

    Gradients pass straight through to the latent, as in `vq`, with its losses. The paper's third part, a probabilistic
    contrastive loss between features of images and reconstructions, belongs to a feature network and is left out; the
    released results have it. Two more things differ from the paper. Its posterior is the mean of one-hot predictions,
    relaxed in the backward pass only; q here is the mean of p itself, so "prior" is near 0 where distances are small
    against the temperature, even if few codes are in use. And the paper passes gradients through the softmax, and
    through a Gumbel-softmax where ids are sampled.
    """

    config_class = RegVqConfig
    loss_names = ("commitment", "codebook", "prior")

    def __init__(self, config: RegVqConfig) -> None:
        super().__init__(config)
        self.mask_ratio, self.temperature = config.mask_ratio, config.temperature

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = self.search_input(latent)
            vectors, codebook = to_rows(latent), self.codebook()
            ids = nearest(vectors, codebook, check=not self.training)
            prior = {}
            if self.computes_all_losses:
                sampled, prior["prior"] = self.sample(vectors, codebook)
            if self.training:
                masked = torch.rand(len(ids), device=ids.device) < self.mask_ratio
                ids = torch.where(masked, sampled, ids)
            quantized = self.quantized(latent, by_image(ids, latent))
            return quantized._replace(losses=quantized.losses | prior)

    def sample(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """An id sampled for each vector, int64[N], and the loss "prior", a scalar."""
        ids, total = [], vectors.new_zeros(len(codebook))
        for chunk in vectors.split(max(1, LOGITS_PER_CHUNK // len(codebook))):
            part = checkpoint(self.sample_chunk, chunk, codebook, use_reentrant=False)
            ids.append(part[0])
            total = total + part[1]
        mean = total / len(vectors)
        return torch.cat(ids), math.log(len(codebook)) + (mean * mean.clamp(min=1e-12).log()).sum()

    def sample_chunk(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled ids int64[n] of n vectors, and the sum of their p, float32[K]."""
        distances = torch.addmm(codebook.square().sum(1), vectors, codebook.T, alpha=-2)  # less |z|^2: p stays
        log_p = (-distances / self.temperature).log_softmax(1)
        noisy = log_p.detach()
        if self.training:
            noisy = noisy - torch.empty_like(noisy).exponential_().clamp(min=1e-30).log()
        return noisy.argmax(1), log_p.exp().sum(0)
