"""`residual`: a sum of codes, each the nearest to the residual of those before, the quantizer of RQ-VAE.

Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization", section 3.1.
Shapes: B images, C channels, D depths, h x w positions, N latent vectors, K codes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.distributed import broadcast, gather_rows
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import (
    CodebookConfig,
    Quantized,
    Quantizer,
    by_image,
    check_ids,
    from_rows,
    straight_through,
    to_rows,
)
from vqpipe.quantizers.ema import EmaConfig, EmaQuantizer
from vqpipe.quantizers.layout import TokenLayout
from vqpipe.search import nearest

COPY_NOISE = 0.01
"""Scale of the noise added to copies of a residual: uniform in [0, 0.01 / sqrt(C)) on every channel, as released."""


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(CodebookConfig):
    """D ids per position, whose codes are summed; the first k are a coarser quantization of the same latent."""

    kind: ClassVar[str] = "residual"

    depth: int = 4
    """D, ids per position."""
    shared: bool = True
    """One codebook for all depths, as in the paper's experiments; else one per depth."""
    decay: float = 0.99
    """Decay of the moving averages, per step, in [0, 1)."""
    epsilon: float = 1e-5
    """Added to the count of each code before the division (Laplace smoothing); positive."""
    restart: bool = True
    """Restart codes used less than once per step, on (decayed) average, at residuals of the batch."""

    def __post_init__(self) -> None:
        self.averages()  # raises for settings that EmaConfig does not allow
        check_range(self, "model.quantizer", "[1, inf)", "depth")
        if self.normalize:
            raise ConfigError(
                "the residual quantizer sums its codes, so they cannot be unit vectors",
                "Set model.quantizer.normalize = false",
            )

    def averages(self) -> EmaConfig:
        """The settings of one codebook."""
        return EmaConfig(
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            metric=self.metric,
            decay=self.decay,
            epsilon=self.epsilon,
        )


class ResidualQuantizer(Quantizer):
    """Quantizes the latent, then D - 1 times the residual.

    "commitment" is the mean over depths of |latent - sg(partial sum of codes)|^2, itself a mean over elements. The
    paper sums over depths, the released code averages: we follow the code.

    The codebook is a moving average of the residuals, without gradient; unused codes restart. The released code updates
    a shared codebook D times within a forward pass, after the search of each depth; here `update` updates it once per
    step, from the residuals of all depths.
    """

    config_class = ResidualConfig
    sums_codes = True
    loss_names = ("commitment",)

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__(
            config, codebook_size=config.codebook_size, latent_dim=config.code_dim, num_groups=config.depth
        )
        self.depth, self.shared, self.restart = config.depth, config.shared, config.restart
        self.codebooks = nn.ModuleList(
            EmaQuantizer(config.averages()) for _ in range(1 if config.shared else config.depth)
        )

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            vectors = to_rows(latent)
            residual, total = vectors.detach(), torch.zeros_like(vectors)
            ids, losses = [], []
            for quantizer in self.per_depth():
                ids.append(nearest(residual, quantizer.codebook(), quantizer.metric, check=not self.training))
                codes = quantizer.embed_valid(ids[-1])
                residual, total = residual - codes, total + codes
                losses.append(F.mse_loss(vectors, total))
            return Quantized(
                straight_through(latent, from_rows(total, latent)),
                torch.stack([by_image(depth_ids, latent) for depth_ids in ids], dim=-1).flatten(1),
                {"commitment": torch.stack(losses).mean()},
            )

    def token_codes(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.codebook_size)
        by_depth = ids.unflatten(1, (-1, self.depth)).unbind(-1)
        parts = zip(self.per_depth(), by_depth, strict=True)
        return torch.stack([quantizer.embed_valid(part) for quantizer, part in parts], dim=2).flatten(1, 2)

    def combine(self, codes: Tensor, layout: TokenLayout) -> Tensor:
        """The sum of the codes of a position, depth by depth."""
        (grid,) = layout.split(codes)
        total = torch.zeros_like(grid[:, :, :, 0])
        for depth_codes in grid.unbind(3):
            total = total + depth_codes
        return total.permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Update the codebook with the residuals of all depths; negative ids are ignored."""
        residual, assigned = to_rows(latent).float(), []
        for quantizer, depth_ids in zip(self.per_depth(), ids.view(-1, self.depth).unbind(1), strict=True):
            valid = depth_ids >= 0
            assigned.append((residual[valid], depth_ids[valid]))
            residual = residual - quantizer.embed_valid(depth_ids)
        if self.shared:
            residuals, all_ids = zip(*assigned, strict=True)
            assigned = [(torch.cat(residuals), torch.cat(all_ids))]
        for quantizer, (vectors, vector_ids) in zip(self.quantizers(), assigned, strict=True):
            quantizer.update(vectors[:, :, None, None], vector_ids)  # as images of one position each
            if self.restart:
                restart_unused_codes(quantizer, vectors)

    def codebook(self) -> Tensor:
        return torch.stack([quantizer.codebook() for quantizer in self.per_depth()])

    def standardize_codebook(self) -> None:
        for quantizer in self.quantizers():
            quantizer.standardize_codebook()

    def quantizers(self) -> list[EmaQuantizer]:
        """One quantizer per codebook: 1 if shared, else D."""
        return list(self.codebooks)  # type: ignore[arg-type]  # a ModuleList is not generic

    def per_depth(self) -> list[EmaQuantizer]:
        """The quantizer of each depth."""
        return self.quantizers() * (self.depth if self.shared else 1)


def restart_unused_codes(quantizer: EmaQuantizer, vectors: Tensor) -> None:
    """Replace codes with a decayed count below 1 by vectors sampled from float32[N, C] of all ranks."""
    unused = (quantizer.counts < 1).nonzero().flatten()
    if len(unused) == 0:  # on every rank
        return
    vectors = gather_rows(vectors)
    if len(vectors) == 0:
        return
    sampled = broadcast(sample_vectors(vectors, len(unused)))
    quantizer.counts[unused] = 1.0
    quantizer.sums[unused] = sampled
    quantizer.codes[unused] = sampled


def sample_vectors(vectors: Tensor, count: int) -> Tensor:
    """Sample `count` of the vectors float32[N, C] without replacement; if too few, from noisy copies of them."""
    copies = -(-count // len(vectors))
    if copies > 1:
        vectors = vectors.repeat(copies, 1)
        vectors = vectors + torch.rand_like(vectors) * (COPY_NOISE * vectors.shape[1] ** -0.5)
    return vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
