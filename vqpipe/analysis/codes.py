"""The codes of a quantizer as vectors, and how far a latent lies from those chosen for it.

Letters: B images, C channels, h x w positions, G groups, K codes a group, F feature channels.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.metrics.metric import Metric
from vqpipe.quantizers import (
    CodebookQuantizer,
    FrozenCodebookQuantizer,
    MultiGroupQuantizer,
    Quantizer,
    ResidualQuantizer,
    TokenLayout,
)

CODES_AT_ONCE = 2**24
"""Distances between codes that are held together: 128 MiB in float64."""


def codebooks(quantizer: Quantizer) -> list[Tensor]:
    """Each group's codes as its search compares them, float32[K, C]: projected, and of unit length under cosine.

    Raises:
        ConfigError: there is no codebook.
    """
    table = quantizer.codebook().detach()
    tables = list(table) if table.ndim == 3 else [table]
    return [F.normalize(each, dim=1) if metric_of(quantizer) == "cosine" else each for each in tables]


def feature_codebooks(quantizer: Quantizer) -> list[Tensor]:
    """Each group's codes before a projector, float32[K, F]; empty where codes are not projected."""
    if isinstance(quantizer, MultiGroupQuantizer):
        return [table for group in quantizer.quantizers() for table in feature_codebooks(group)]
    if isinstance(quantizer, FrozenCodebookQuantizer) and len(quantizer.projector):
        return [quantizer.codes.detach().float()]
    return []


def metric_of(quantizer: Quantizer) -> str:
    """ "l2" or "cosine". (`ibq` chooses by inner product; how far its codes lie apart is still told in l2.)"""
    if isinstance(quantizer, MultiGroupQuantizer):
        return metric_of(quantizer.quantizers()[0])
    return str(getattr(quantizer.config, "metric", "l2"))


def kth_nearest(ids: Tensor, codebook: Tensor, ranks: list[int]) -> Tensor:
    """The k-th nearest *other* code of each code, for each k of `ranks`: int64[n], float32[K, C] -> int64[n, R].

    The code itself is left out by its id, so an equal code stands at distance 0. Tile by tile, in float64: the same
    whatever the tiles, but for codes that are equal. Never a K x K matrix: O(K) beside CODES_AT_ONCE distances.
    """
    table = codebook.double()
    norms = table.square().sum(1)
    found = torch.empty(len(ids), len(ranks), dtype=torch.int64, device=ids.device)
    wanted = torch.tensor(ranks, device=ids.device) - 1
    step = max(1, CODES_AT_ONCE // len(table))
    for start in range(0, len(ids), step):
        own = ids[start : start + step]
        distances = torch.addmm(norms, table[own], table.T, alpha=-2)
        distances[torch.arange(len(own), device=ids.device), own] = float("inf")
        near = distances.topk(max(ranks), dim=1, largest=False, sorted=True)
        found[start : start + step] = near.indices[:, wanted]
    return found


class Neighbours(Metric):
    """`kth_nearest` of the codes that occur, each looked for once: int32[K, R] a group is what it keeps."""

    state_names: ClassVar[tuple[str, ...]] = ("known",)

    def __init__(self, quantizer: Quantizer, ranks: list[int]) -> None:
        self.codebooks = codebooks(quantizer)
        self.ranks = ranks
        shape = (len(self.codebooks), quantizer.codebook_size, len(ranks))
        self.known = torch.full(shape, -1, dtype=torch.int32, device=self.codebooks[0].device)

    def of(self, ids: Tensor) -> Tensor:
        """int64[P, G] -> int64[R, P, G], each group in its own codebook; a negative id stays."""
        groups = []
        for codebook, known, column in zip(self.codebooks, self.known, ids.unbind(1), strict=True):
            codes = column[column >= 0].unique()
            new = codes[known[codes, 0] < 0]
            known[new] = kth_nearest(new, codebook, self.ranks).int()
            groups.append(torch.where(column[:, None] >= 0, known[column.clamp(min=0)].long(), column[:, None]))
        return torch.stack(groups, dim=-1).movedim(1, 0)


def check_single_grid(quantizer: Quantizer) -> None:
    """A ConfigError unless a position of the latent has one vector for each group (or a first depth) to compare."""
    kinds = (CodebookQuantizer, ResidualQuantizer)
    inner = quantizer.quantizers()[0] if isinstance(quantizer, MultiGroupQuantizer) else quantizer
    if not isinstance(inner, kinds):
        raise quantizer.unsupported("has no codebook")
    if len(quantizer.layout(2, 2).grids) != 1:
        raise ConfigError("codes stand for cells of several sizes, so they have no patch of one size")


def compared_groups(quantizer: Quantizer) -> int:
    """How many of a position's ids `distances` looks at: all groups, but of depths only the first."""
    return 1 if isinstance(quantizer, ResidualQuantizer) else quantizer.num_groups


def distances(quantizer: Quantizer, latent: Tensor, ids: Tensor, layout: TokenLayout) -> Tensor:
    """L2 distance between a latent and its chosen codes as the search compares them: float32[B, C, h, w], int64[B, N]
    -> float32[B, h, w, G]; under cosine between unit vectors. Of a residual quantizer, only that of its first depth."""
    (grid,) = layout.split(ids)
    if isinstance(quantizer, MultiGroupQuantizer):
        single = TokenLayout(layout.grids)
        parts = zip(quantizer.split_channels(latent), grid.unbind(-1), strict=True)
        return torch.cat([distances(group, part, own.flatten(1), single) for (group, part), own in parts], dim=-1)
    vectors = latent.float()
    if isinstance(quantizer, CodebookQuantizer):
        vectors = quantizer.search_input(latent)
    vectors = vectors.permute(0, 2, 3, 1)
    if metric_of(quantizer) == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    codes = codebooks(quantizer)[0][grid[..., 0].clamp(min=0)]
    return (vectors - codes).norm(dim=-1, keepdim=True)
