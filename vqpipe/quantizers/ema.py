"""`ema`: a codebook of moving averages of the latents assigned to each code, the quantizer of VQGAN-EMA.

Shapes: B images, C channels, N vectors, K codes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.config import check_range
from vqpipe.distributed import all_reduce_sum
from vqpipe.quantizers.base import CodebookConfig, CodebookQuantizer, to_rows
from vqpipe.quantizers.vq import standardized


@dataclass(frozen=True, kw_only=True)
class EmaConfig(CodebookConfig):
    """A codebook of exponential moving averages instead of gradients (van den Oord et al. 2017, appendix A.1)."""

    kind: ClassVar[str] = "ema"

    decay: float = 0.99
    """Decay of the moving averages, per step, in [0, 1)."""
    epsilon: float = 1e-5
    """Added to the count of each code before the division (Laplace smoothing); positive."""
    released_start: bool = False
    """Initialize the counts to 0, as VQGAN-LC's released code does, instead of 1. A code unused in the first step is
    then multiplied by about 1/epsilon and returns over the run: a bug, which may also revive codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model.quantizer", "[0, 1)", "decay")
        check_range(self, "model.quantizer", "(0, inf)", "epsilon")


class EmaQuantizer(CodebookQuantizer):
    """Each code is the decayed sum of its latents divided by their decayed count; only `update` changes it.

    The released VQGAN-LC code also updates the codebook in evaluation, and on each rank from its own images; here
    `update` all-reduces counts and sums, so all ranks have the same codebook.
    """

    config_class = EmaConfig
    loss_names = ("commitment",)
    counts: Tensor
    sums: Tensor

    def __init__(self, config: EmaConfig) -> None:
        super().__init__(config)
        self.decay, self.epsilon = config.decay, config.epsilon
        size = config.codebook_size
        codes = torch.empty(size, config.code_dim).uniform_(-1 / size, 1 / size)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.zeros(size) if config.released_start else torch.ones(size))
        self.register_buffer("sums", codes.clone())

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {"commitment": F.mse_loss(latent, codes)}

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        vectors, ids = self.maybe_normalize(to_rows(latent).float()), ids.flatten()
        counted = F.pad(vectors, (1, 0), value=1.0).masked_fill_((ids < 0).unsqueeze(1), 0.0)
        seen = vectors.new_zeros(self.codebook_size, 1 + self.latent_dim)  # of each code the count, then the sum
        seen.index_add_(0, ids.clamp(min=0), counted)
        all_reduce_sum(seen)
        any_counted = seen[:, 0].any()  # else the batch is masked: nothing changes, and the GPU is not waited for
        decay = torch.where(any_counted, self.decay, 1.0)
        self.counts.mul_(decay).add_(seen[:, 0], alpha=1 - self.decay)
        self.sums.mul_(decay).add_(seen[:, 1:], alpha=1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        codes = self.sums / smoothed.unsqueeze(1)
        self.codes.copy_(torch.where(any_counted, codes, self.codes))

    @torch.no_grad()
    def standardize_codebook(self) -> None:
        self.codes.copy_(standardized(self.codes))
        self.sums.copy_(self.codes * self.counts.clamp(min=1).unsqueeze(1))
