"""The one interface of every quantizer, and the half they share that look for the nearest code of a table.

Shapes: B images, C latent channels, h x w positions, N = B * h * w vectors, K codes, G groups, F feature channels.

A quantizer is one file: a frozen `XConfig(QuantizerConfig)` with its `kind`, above `class X(Quantizer)` whose
`config_class` is XConfig. Defining the subclass is all the registration there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import class_for
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.search import nearest


class Quantized(NamedTuple):
    """What a quantizer makes of a latent."""

    codes: Tensor
    """float32[B, C, h, w]: the value of the chosen codes, the gradient of the latent (straight-through)."""
    ids: Tensor
    """int64[B, N] in [0, codebook_size), ordered by the quantizer's layout; -1 where a group is masked out."""
    losses: dict[str, Tensor]
    """Unweighted scalars, one for each of the quantizer's `loss_names`."""


@dataclass(frozen=True)
class TokenLayout:
    """The order of one image's ids: grids from coarse to fine, each row by row, a position's groups side by side."""

    grids: tuple[tuple[int, int], ...]
    """(height, width) of each grid."""
    num_groups: int = 1
    """Ids per position."""

    @property
    def num_tokens(self) -> int:
        """Ids per image."""
        return sum(height * width for height, width in self.grids) * self.num_groups

    def split(self, ids: Tensor) -> list[Tensor]:
        """int64[B, num_tokens] -> for each grid int64[B, h, w, G].

        Raises:
            DataError: the ids are not `num_tokens` per image.
        """
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens:
            raise DataError(
                f"ids of shape {list(ids.shape)} where [images, {self.num_tokens}] is expected",
                f"The layout is grids {list(map(list, self.grids))} with {self.num_groups} group(s)",
            )
        sizes = [height * width * self.num_groups for height, width in self.grids]
        parts = ids.split(sizes, dim=1)
        return [part.unflatten(1, (*grid, self.num_groups)) for part, grid in zip(parts, self.grids, strict=True)]

    def join(self, grids: Sequence[Tensor]) -> Tensor:
        """For each grid int64[B, h, w, G] -> int64[B, num_tokens]; undoes `split`."""
        return torch.cat([grid.flatten(1) for grid in grids], dim=1)

    def to_table(self) -> dict[str, Any]:
        """The layout as JSON can hold it."""
        return {"grids": [list(grid) for grid in self.grids], "num_groups": self.num_groups}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> TokenLayout:
        """Undoes `to_table`."""
        return cls(tuple((int(height), int(width)) for height, width in table["grids"]), int(table["num_groups"]))


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Section [model.quantizer]; `kind` chooses the quantizer."""

    kind: ClassVar[str]


class Quantizer(nn.Module, ABC):
    """Turns a latent into ids and back.

    `forward` is pure: a codebook that does not learn by gradient moves in `update` alone, which the training loop
    calls after the optimizer's step, and which gives the same codebook on every rank.
    """

    config_class: ClassVar[type[QuantizerConfig]]
    loss_names: ClassVar[tuple[str, ...]] = ()
    """The terms of `Quantized.losses`, so that an objective can be checked before the first step."""

    def __init__(self, config: QuantizerConfig, *, codebook_size: int, latent_dim: int, num_groups: int = 1) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = codebook_size
        """K, codes one id ranges over (per group, never the total)."""
        self.latent_dim = latent_dim
        """C, channels of the latent."""
        self.num_groups = num_groups
        """Ids per position."""
        self.channel_groups = 1
        """Equal runs of channels that are quantized apart; each is whitened, and may be convolved, by itself."""

    @abstractmethod
    def forward(self, latent: Tensor) -> Quantized:
        """float[B, C, h, w] -> codes, ids and losses, in float32 whatever autocast says.

        Raises:
            NumericError: the latent or the codebook holds NaN or infinity. In training it is not looked for, so that no
                GPU is waited for: then codes or losses are not finite either, and the loop skips the step.
        """

    @abstractmethod
    def lookup(self, ids: Tensor, layout: TokenLayout) -> Tensor:
        """int64[B, N] -> codes float32[B, C, h, w]; a negative id is the zero vector.

        Raises:
            DataError: an id is not below `codebook_size`, or the ids do not fit the layout.
        """

    def layout(self, height: int, width: int) -> TokenLayout:
        """The order of the ids of a latent of `height` x `width` positions."""
        return TokenLayout(((height, width),), self.num_groups)

    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Move the codebook after the optimizer's step, alike on every rank. Default: nothing to move."""

    def codebook(self) -> Tensor:
        """The codes as the search compares them, float32[K, C] (with groups: [G, K, C])."""
        raise self.unsupported("has no table of codes")

    @torch.no_grad()
    def all_codes(self) -> Tensor:
        """Every code, float32[G, K, C], also of a quantizer without a stored codebook (lfq, fsq)."""
        try:
            codebook = self.codebook()
        except ConfigError:
            device = next(iter(self.buffers()), torch.zeros(())).device
            ids = torch.arange(self.codebook_size, device=device)
            codebook = self.lookup(ids[:, None], self.layout(1, 1)).flatten(1)
        return codebook.reshape(-1, *codebook.shape[-2:])

    def load_codebook(self, codebook: Tensor) -> None:
        """Load the codes of a codebook artifact, float[K, F].

        Raises:
            ConfigError: this quantizer takes none, or one of another shape.
        """
        raise self.unsupported("does not start from a codebook artifact", "Leave --codebook out, or choose kind = lc")

    def standardize_codebook(self) -> None:
        """Centre the codes on zero and scale them to unit variance, the mean over channels being 1.

        This half of the matched start is for a codebook that meets whitened latents: the two then fill the same
        region of space, and the search spreads over all codes from the first step. Default: codes that are fixed
        points of a grid around zero, which whitened latents already meet.
        """

    def unsupported(self, what: str, hint: str = "") -> ConfigError:
        return ConfigError(f"the {self.config.kind} quantizer {what}", hint)


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(QuantizerConfig):
    """What quantizers with a searched table of codes share."""

    codebook_size: int
    """K, codes one id ranges over (per group, never the total)."""
    code_dim: int
    """Channels of a code."""
    metric: Literal["l2", "cosine"] = "l2"
    """Distance of the search. The VQGAN-LC paper says cosine; its released code, whose numbers the paper prints,
    compares squared L2 distances of unnormalised vectors: we follow the code."""
    normalize: bool = False
    """Put latents and codes on the unit sphere before anything else: what is compared, drawn together by the losses
    and handed on are unit vectors (ViT-VQGAN, LlamaGen, MGVQ). Stored codes may drift off the sphere."""

    def __post_init__(self) -> None:
        if self.codebook_size < 2 or self.code_dim < 1:
            raise ConfigError(
                f"a codebook of {self.codebook_size} codes with {self.code_dim} channels cannot quantize",
                "Set model.quantizer.codebook_size >= 2 and code_dim >= 1",
            )


class CodebookQuantizer(Quantizer):
    """A quantizer that replaces each latent vector by its nearest code in a table (van den Oord et al. 2017).

    A subclass says what the table is (`table`) and how to read a few of its rows with gradient (`rows`).
    Both losses are plain means over all elements (eq. 3 there): "commitment" draws the latent to its code,
    "codebook" the code to its latent; their weights belong to the objective.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("commitment", "codebook")

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config, codebook_size=config.codebook_size, latent_dim=config.code_dim)
        self.metric = config.metric
        self.normalize = config.normalize

    @abstractmethod
    def raw_codebook(self) -> Tensor:
        """The codes as they are stored or projected, float32[K, C]."""

    @abstractmethod
    def raw_embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64[...], none negative) of the table, float32[..., C], with gradient where it learns."""

    def codebook(self) -> Tensor:
        return self.on_sphere(self.raw_codebook())

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64[...], none negative) of the codebook, float32[..., C], with gradient where it learns."""
        return self.on_sphere(self.raw_embed(ids))

    def on_sphere(self, vectors: Tensor, dim: int = -1) -> Tensor:
        """The vectors along `dim` scaled to unit length where the config says so, else as they are."""
        return F.normalize(vectors, dim=dim) if self.normalize else vectors

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = self.compared(latent)
            with torch.no_grad():
                ids = nearest(to_rows(latent), self.codebook(), self.metric, check=not self.training)
            return self.replaced(latent, ids.view(len(latent), -1))

    def compared(self, latent: Tensor) -> Tensor:
        """The latent as its search compares it, float32[B, C, h, w]."""
        return self.on_sphere(latent.float(), dim=1)

    def replaced(self, latent: Tensor, ids: Tensor) -> Quantized:
        """A compared latent, float32[B, C, h, w], with each vector replaced by its code, int64[B, h * w]."""
        codes = self.embed(ids).transpose(1, 2).reshape_as(latent)
        return Quantized(straight_through(latent, codes), ids, self.losses(latent, codes))

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {
            "commitment": F.mse_loss(latent, codes.detach()),
            "codebook": F.mse_loss(codes, latent.detach()),
        }

    def lookup(self, ids: Tensor, layout: TokenLayout) -> Tensor:
        check_ids(ids, self.codebook_size)
        (grid,) = layout.split(ids)
        with torch.autocast(ids.device.type, enabled=False):
            codes = self.embed(grid.clamp(min=0)) * (grid >= 0).unsqueeze(-1)
        return codes.squeeze(3).permute(0, 3, 1, 2).contiguous()


def check_ids(ids: Tensor, codebook_size: int) -> None:
    """Raise a DataError where an id is not below `codebook_size`; negative ones stand for the zero vector."""
    if ids.numel() and int(ids.max()) >= codebook_size:
        raise DataError(
            f"id {int(ids.max())} is outside a codebook of {codebook_size} codes",
            "These tokens come from another tokenizer",
        )


def check_finite(latent: Tensor) -> None:
    """Raise a NumericError where the latent holds NaN or infinity, which signs and rounding would hide."""
    if not bool(latent.isfinite().all()):
        raise NumericError(
            "the latent holds NaN or infinity",
            "Look at what made it: a diverged training run, or float16 overflow",
        )


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config` describes, freshly initialised."""
    return class_for(Quantizer, config)(config)  # type: ignore[call-arg]  # a subclass reads its sizes off its config


def to_rows(latent: Tensor) -> Tensor:
    """float[B, C, h, w] -> float[N, C], in the order b, h, w."""
    return latent.flatten(2).transpose(1, 2).flatten(0, 1)


def straight_through(latent: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes`, bit for bit, with the gradient of `latent` (Bengio et al. 2013).

    The usual latent + sg(codes - latent) is off by a rounding error, so that decoding stored ids would differ.
    """
    return (latent - latent.detach()) + codes.detach()
