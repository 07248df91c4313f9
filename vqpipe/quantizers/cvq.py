"""`cvq`: a learned codebook whose dead codes move to where the latents are.

Zheng & Vedaldi 2023, "Online Clustered Codebook" (CVQ-VAE); MGVQ (Jia et al. 2025) gives every group such a codebook.
Shapes: B images, C channels, N latent vectors of one global batch, K codes, R rows of the codebook.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.distributed import all_reduce_sum, broadcast, gather_rows, is_main
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import CodebookConfig, to_rows
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest

DISTANCES_AT_ONCE = 2**24
"""Distances of codes to latents held together: 64 MiB in float32, whatever the codebook and the batch."""
SMALLEST_PULL = 1e-6
"""Codes that would move by less than this share of the way are left alone, where most would: drawing costs time."""
LEAST_PROBABILITY = 1e-10
"""With which "probrandom" draws even the farthest latent, as MGVQ's released code does."""


@dataclass(frozen=True, kw_only=True)
class CvqConfig(CodebookConfig):
    """A codebook learned by gradient whose unused codes restart at latents of the batch."""

    kind: ClassVar[str] = "cvq"

    decay: float = 0.99
    """Share of each code's running frequency that one step keeps, in [0, 1)."""
    anchor: Literal["probrandom", "closest", "random"] = "probrandom"
    """The latent that a dead code moves to: one drawn with probability softmax(-squared distance), the closest one,
    or any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay = {self.decay} should be in [0, 1)", "MGVQ uses 0.99")


class ClusteredQuantizer(VectorQuantizer):
    """Codes follow the "codebook" loss as in `vq`; between steps the unused ones are pulled to latents.

    With p a code's running frequency, and t its anchor among the latents of the global batch, `update` does

        p    <- p + (1 - decay) (frequency in this batch - p)
        a     = exp(-10 K p / (1 - decay) - 0.001)
        code <- (1 - a) code + a t

    so that a code used at a tenth of the fair share 1 / K keeps its place (a = exp(-1 / (1 - decay)), or e^-100), and
    one never used goes to t. MGVQ's released code does this inside the forward pass, and on each rank by that rank's
    latents alone, so that the ranks' codebooks drift apart; here rank 0 draws from all ranks' latents, after the
    optimizer's step, and hands its codebook to the others. CVQ-VAE's contrastive loss is left out, as in MGVQ.
    Under `normalize`, t is a unit vector.
    """

    config_class = CvqConfig
    frequencies: Tensor

    def __init__(self, config: CvqConfig) -> None:
        super().__init__(config)
        self.decay, self.anchor = config.decay, config.anchor
        self.register_buffer("frequencies", torch.zeros(config.codebook_size))

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Count the ids of all ranks and move the dead codes; a negative id's latent (a masked group's) has no part."""
        ids, vectors = ids.flatten(), self.on_sphere(to_rows(latent).float())
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
        """Pull each code to its anchor among `vectors`, float32[N, C], by how little it is used."""
        scaled = self.codebook_size * self.frequencies * 10 / (1 - self.decay)
        pulls = torch.exp(-scaled - 0.001).unsqueeze(1)
        rows_at_once = max(1, DISTANCES_AT_ONCE // len(vectors))
        for rows, pull in zip(self.codes.split(rows_at_once), pulls.split(rows_at_once), strict=True):
            moved = (pull[:, 0] >= SMALLEST_PULL).nonzero().flatten()
            if 2 * len(moved) > len(rows):  # most: draw for all at once, as the released code does
                rows.lerp_(vectors[self.anchors(self.on_sphere(rows), vectors)], pull)
            elif len(moved) > 0:
                codes = rows[moved]
                anchors = vectors[self.anchors(self.on_sphere(codes), vectors)]
                rows[moved] = codes.lerp(anchors, pull[moved])

    def anchors(self, codes: Tensor, vectors: Tensor) -> Tensor:
        """Which of `vectors`, float32[N, C], each of `codes`, float32[R, C], would move to: int64[R]."""
        if self.anchor == "closest":
            return nearest(codes, vectors, self.metric)
        if self.anchor == "random":
            return torch.randint(len(vectors), (len(codes),), device=codes.device)
        if self.metric == "cosine":
            codes, vectors = F.normalize(codes, dim=1), F.normalize(vectors, dim=1)
        # minus the squared distances, but for |code|^2, which is the same for all vectors
        nearness = torch.addmm(-vectors.square().sum(1), codes, vectors.T, alpha=2)
        probabilities = nearness.softmax(dim=1).clamp_(min=LEAST_PROBABILITY)
        return probabilities.multinomial(1).squeeze(1)
