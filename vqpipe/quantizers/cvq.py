"""`cvq`: a learned codebook whose unused codes restart at latents of the batch.

Zheng & Vedaldi 2023, "Online Clustered Codebook" (CVQ-VAE); MGVQ (Jia et al. 2025) gives every group such a codebook.
Shapes: B images, C channels, N latent vectors of one global batch, K codes, R codes of a chunk.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.config import check_range
from vqpipe.distributed import all_reduce_sum, broadcast, gather_rows, is_main
from vqpipe.quantizers.base import CodebookConfig, to_rows
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest

DISTANCES_PER_CHUNK = 2**24
"""Distances of codes to latents computed at a time: 64 MiB in float32."""
MIN_ALPHA = 1e-6
"""If most codes of a chunk have an a (see `ClusteredQuantizer`) below this, only the others are moved, to save time."""
MIN_PROBABILITY = 1e-10
"""Smallest probability of an anchor under "probrandom", as in MGVQ's released code."""


@dataclass(frozen=True, kw_only=True)
class CvqConfig(CodebookConfig):
    """A codebook trained by gradient, with restarts of unused codes."""

    kind: ClassVar[str] = "cvq"

    decay: float = 0.99
    """Decay of the running frequency of each code, per step, in [0, 1)."""
    anchor: Literal["probrandom", "closest", "random"] = "probrandom"
    """The latent that an unused code moves to: sampled with probability softmax(-squared distance), the closest, or
    sampled uniformly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model.quantizer", "[0, 1)", "decay")


class ClusteredQuantizer(VectorQuantizer):
    """Trains codes by the "codebook" loss as `vq` does; after each step, moves unused codes to latents.

    With p the running frequency of a code, and t its anchor among the latents of the global batch, `update` computes

        p    <- p + (1 - decay) (frequency in this batch - p)
        a     = exp(-10 K p / (1 - decay) - 0.001)
        code <- (1 - a) code + a t

    A code used at a tenth of the uniform frequency 1 / K stays (a = exp(-1 / (1 - decay)) = e^-100); an unused one
    moves to t. MGVQ's released code does this in the forward pass, on each rank from its own latents, so codebooks
    diverge between ranks; here rank 0 samples from the latents of all ranks, after the optimizer step, and broadcasts
    its codebook. The contrastive loss of CVQ-VAE is omitted, as in MGVQ. With `normalize`, t is a unit vector.
    """

    config_class = CvqConfig
    frequencies: Tensor

    def __init__(self, config: CvqConfig) -> None:
        super().__init__(config)
        self.decay, self.anchor = config.decay, config.anchor
        self.register_buffer("frequencies", torch.zeros(config.codebook_size))

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Count the ids of all ranks and move unused codes; latents with a negative id (masked groups) are ignored."""
        ids, vectors = ids.flatten(), self.maybe_normalize(to_rows(latent).float())
        ids, vectors = ids[ids >= 0], vectors[ids >= 0]
        counts = all_reduce_sum(torch.bincount(ids, minlength=self.codebook_size).float())
        total = counts.sum()
        if total == 0:
            return
        self.frequencies.lerp_(counts / total, 1 - self.decay)
        vectors = gather_rows(vectors)
        if is_main():
            self.move_dead_codes(vectors)
        broadcast(self.codes)

    def move_dead_codes(self, vectors: Tensor) -> None:
        """Move each code towards its anchor among `vectors`, float32[N, C], the more the less it is used."""
        scaled = self.codebook_size * self.frequencies * 10 / (1 - self.decay)
        alphas = torch.exp(-scaled - 0.001).unsqueeze(1)
        chunk = max(1, DISTANCES_PER_CHUNK // len(vectors))
        for codes, alpha in zip(self.codes.split(chunk), alphas.split(chunk), strict=True):
            moved = (alpha[:, 0] >= MIN_ALPHA).nonzero().flatten()
            if 2 * len(moved) > len(codes):  # most of them: move all, as the released code does
                codes.lerp_(vectors[self.anchors(self.maybe_normalize(codes), vectors)], alpha)
            elif len(moved) > 0:
                unused = codes[moved]
                anchors = vectors[self.anchors(self.maybe_normalize(unused), vectors)]
                codes[moved] = unused.lerp(anchors, alpha[moved])

    def anchors(self, codes: Tensor, vectors: Tensor) -> Tensor:
        """Return the index int64[R] of the anchor of each of `codes`, float32[R, C], among `vectors`, float32[N, C]."""
        if self.anchor == "closest":
            return nearest(codes, vectors, self.metric)
        if self.anchor == "random":
            return torch.randint(len(vectors), (len(codes),), device=codes.device)
        if self.metric == "cosine":
            codes, vectors = F.normalize(codes, dim=1), F.normalize(vectors, dim=1)
        # minus the squared distances, up to |code|^2, which is the same for all vectors
        nearness = torch.addmm(-vectors.square().sum(1), codes, vectors.T, alpha=2)
        probabilities = nearness.softmax(dim=1).clamp_(min=MIN_PROBABILITY)
        return probabilities.multinomial(1).squeeze(1)
