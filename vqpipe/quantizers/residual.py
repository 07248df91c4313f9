"""`residual`: codes that add up, each the nearest to what those before it left over, the quantizer of RQ-VAE.

Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization", section 3.1.
Shapes: B images, C channels, D depths, h x w positions, N latent vectors, K codes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.distributed import broadcast, gather_rows
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import (
    CodebookConfig,
    Quantized,
    Quantizer,
    TokenLayout,
    check_ids,
    straight_through,
    to_rows,
)
from vqpipe.quantizers.ema import EmaConfig, EmaQuantizer
from vqpipe.search import nearest

COPY_NOISE = 0.01
"""Of copies of a residual: uniform noise in [0, 0.01 / sqrt(C)) on every channel, as released, sets them apart."""


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(CodebookConfig):
    """D ids per position, whose codes are summed; the first k of them are a coarser code of the same latent."""

    kind: ClassVar[str] = "residual"

    depth: int = 4
    """D, ids per position."""
    shared: bool = True
    """One codebook for every depth, as in the paper's experiments; else one for each."""
    decay: float = 0.99
    """Share of the moving averages that one step keeps."""
    epsilon: float = 1e-5
    """Added to each code's count before dividing by it (Laplace smoothing)."""
    restart: bool = True
    """Move codes used less than once a step, on (decayed) average, to residuals of the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ConfigError(f"depth = {self.depth} should be at least 1", "The paper takes model.quantizer.depth = 4")
        if self.normalize:
            raise ConfigError(
                "the residual quantizer sums its codes, so they cannot be unit vectors",
                "Set model.quantizer.normalize = false",
            )


class ResidualQuantizer(Quantizer):
    """Quantizes the latent, then D - 1 times what is left of it.

    "commitment" is the mean over depths of |latent - sg(sum of the codes so far)|^2, itself a mean over elements. The
    paper adds the depths up, the released code averages them: we follow the code.

    The codebook follows moving averages of the residuals, without gradient; dead codes restart. The released code moves
    a shared one D times within a forward pass, after each depth's search; here `update` moves it once a step, by the
    residuals of all depths together.
    """

    config_class = ResidualConfig
    loss_names = ("commitment",)

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__(
            config, codebook_size=config.codebook_size, latent_dim=config.code_dim, num_groups=config.depth
        )
        self.depth, self.shared, self.restart = config.depth, config.shared, config.restart
        table = EmaConfig(
            codebook_size=config.codebook_size,
            code_dim=config.code_dim,
            metric=config.metric,
            decay=config.decay,
            epsilon=config.epsilon,
        )
        self.tables = nn.ModuleList(EmaQuantizer(table) for _ in range(1 if config.shared else config.depth))

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            vectors = to_rows(latent)
            rest, total = vectors.detach(), torch.zeros_like(vectors)
            ids, losses = [], []
            for table in self.by_depth():
                chosen = nearest(rest, table.codebook(), table.metric, check=not self.training)
                codes = codes_of(table, chosen)
                rest, total = rest - codes, total + codes
                ids.append(chosen)
                losses.append(F.mse_loss(vectors, total))
            codes = total.unflatten(0, (len(latent), -1)).transpose(1, 2).reshape_as(latent)
            return Quantized(
                straight_through(latent, codes),
                torch.stack(ids, dim=-1).view(len(latent), -1),
                {"commitment": torch.stack(losses).mean()},
            )

    def lookup(self, ids: Tensor, layout: TokenLayout) -> Tensor:
        check_ids(ids, self.codebook_size)
        (grid,) = layout.split(ids)
        total = torch.zeros(*grid.shape[:3], self.latent_dim, device=ids.device)
        for table, chosen in zip(self.by_depth(), grid.unbind(-1), strict=True):
            total = total + codes_of(table, chosen)
        return total.permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Move the codebook by every depth's residuals; a negative id has no part in it."""
        rest, seen = to_rows(latent).float(), []
        for table, chosen in zip(self.by_depth(), ids.view(-1, self.depth).unbind(1), strict=True):
            kept = chosen >= 0
            seen.append((rest[kept], chosen[kept]))
            rest = rest - codes_of(table, chosen)
        if self.shared:
            residuals, all_ids = zip(*seen, strict=True)
            seen = [(torch.cat(residuals), torch.cat(all_ids))]
        for table, (vectors, chosen) in zip(self.own_tables(), seen, strict=True):
            table.update(vectors[:, :, None, None], chosen)  # as images of one position each
            if self.restart:
                restart_dead_codes(table, vectors)

    def codebook(self) -> Tensor:
        return torch.stack([table.codebook() for table in self.by_depth()])

    def standardize_codebook(self) -> None:
        for table in self.own_tables():
            table.standardize_codebook()

    def own_tables(self) -> list[EmaQuantizer]:
        """The one shared table, or D of them."""
        return list(self.tables)  # type: ignore[arg-type]  # a ModuleList forgets what it holds

    def by_depth(self) -> list[EmaQuantizer]:
        """The table that each depth searches."""
        return self.own_tables() * (self.depth if self.shared else 1)


def codes_of(table: EmaQuantizer, ids: Tensor) -> Tensor:
    """int64[...] -> codes float32[..., C]; a negative id is the zero vector."""
    return table.embed(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1)


def restart_dead_codes(table: EmaQuantizer, vectors: Tensor) -> None:
    """Put codes whose decayed count is below 1 on vectors drawn from all ranks' float32[N, C], alike on every rank."""
    dead = (table.counts < 1).nonzero().flatten()
    vectors = gather_rows(vectors)
    if len(dead) == 0 or len(vectors) == 0:
        return
    drawn = broadcast(draw(vectors, len(dead)))
    table.counts[dead] = 1.0
    table.sums[dead] = drawn
    table.codes[dead] = drawn


def draw(vectors: Tensor, count: int) -> Tensor:
    """`count` of the vectors float32[N, C] at random, once each; where they are too few, of noisy copies of them."""
    copies = -(-count // len(vectors))
    if copies > 1:
        vectors = vectors.repeat(copies, 1)
        vectors = vectors + torch.rand_like(vectors) * (COPY_NOISE * vectors.shape[1] ** -0.5)
    return vectors[torch.randperm(len(vectors), device=vectors.device)[:count]]
