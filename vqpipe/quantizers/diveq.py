"""`diveq`: a learned codebook without auxiliary losses.

Vali et al. 2025, "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick" (arXiv 2509.26469).
Shapes: B images, C channels, h x w positions, K codes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.config import check_range
from vqpipe.distributed import all_reduce_sum, broadcast, is_main
from vqpipe.quantizers.base import CodebookConfig, Quantized, straight_through
from vqpipe.quantizers.vq import VectorQuantizer

REPLACEMENT_NOISE = 1e-9
"""Standard deviation of the noise on a code that replaces an unused one, as in the paper's code. Float32 numbers above
about 0.05 do not change by it: copies of codes of ordinary size are equal."""


@dataclass(frozen=True, kw_only=True)
class DiveqConfig(CodebookConfig):
    """A codebook that the reconstruction loss trains through the length of the quantization error."""

    kind: ClassVar[str] = "diveq"

    noise: float = 1e-3
    """Standard deviation of the noise on the direction of the error."""
    replace_every: int = 100
    """Steps between two replacements of unused codes; 0: codes are never replaced."""
    min_hit_rate: float = 0.01
    """Codes used in a smaller share of the steps since the last replacement are replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model.quantizer", "[0, inf)", "noise", "replace_every")
        check_range(self, "model.quantizer", "[0, 1]", "min_hit_rate")


class DiveqQuantizer(VectorQuantizer):
    """The code c nearest to the latent z, with the gradient of z + |c - z| sg(d / |d|), d = c - z + noise.

    The decoder's gradient so reaches the latent, and the codes along the direction of the error. The paper uses this
    sum as the value in training too; here the value is exactly c, as in evaluation, from which it differs by about the
    noise. There are no losses. Every `replace_every` steps, rank 0 replaces rarely used codes by copies of used ones,
    drawn in proportion to their use. SF-DiVeQ, which quantizes to points between codes, has no ids and is left out.
    """

    config_class = DiveqConfig
    loss_names = ()
    hits: Tensor
    steps: Tensor

    def __init__(self, config: DiveqConfig) -> None:
        super().__init__(config)
        self.noise, self.replace_every, self.min_hit_rate = config.noise, config.replace_every, config.min_hit_rate
        self.register_buffer("hits", torch.zeros(config.codebook_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def quantized(self, latent: Tensor, ids: Tensor) -> Quantized:
        codes = self.embed(ids).transpose(1, 2).reshape_as(latent)
        error = codes - latent
        direction = (error + self.noise * torch.randn_like(error)).detach() if self.training else error.detach()
        moved = latent + error.norm(dim=1, keepdim=True) * F.normalize(direction, dim=1)
        return Quantized(straight_through(moved, codes), ids, {})

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Count in how many steps each code was used; replace unused codes when it is time.

        Steps in which all ids are negative (masked groups) do not count.
        """
        if not self.has_update:
            return
        used = all_reduce_sum(torch.bincount(ids[ids >= 0], minlength=self.codebook_size)) > 0
        self.hits.add_(used)
        self.steps.add_(used.any())
        if self.steps < self.replace_every:
            return
        self.replace_unused()
        self.hits.zero_()
        self.steps.zero_()

    @property
    def has_update(self) -> bool:
        return self.replace_every > 0

    def replace_unused(self) -> None:
        """Replace the codes with a low hit rate, identically on every rank."""
        unused = self.hits < self.min_hit_rate * self.steps
        if bool(unused.any()) and not bool(unused.all()):
            if is_main():
                sources = torch.where(unused, 0.0, self.hits).multinomial(int(unused.sum()), replacement=True)
                copies = self.codes[sources]
                self.codes[unused] = copies + REPLACEMENT_NOISE * torch.randn_like(copies)
            broadcast(self.codes)
