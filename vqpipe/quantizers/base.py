"""The interface of all quantizers, and the base class of those that search a codebook for the nearest code.

Shapes: B images, C latent channels, h x w positions, N = B * h * w vectors, K codes, G groups, F feature channels.

A quantizer is one file: a frozen `XConfig(QuantizerConfig)` with its `kind`, above `class X(Quantizer)` with
`config_class = XConfig`. Defining the subclass registers it; import it in `quantizers/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_choices, check_range, class_for
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.quantizers.layout import TokenLayout
from vqpipe.search import nearest

LOGITS_PER_CHUNK = 2**24
"""Logits of vectors against codes computed at a time: 64 MiB in float32, a few times that in the backward pass."""


class Quantized(NamedTuple):
    """The output of a quantizer."""

    codes: Tensor
    """float32[B, C, h, w]: values of the selected codes, with the gradient of the latent (straight-through)."""
    ids: Tensor
    """int64[B, N] in [0, codebook_size), ordered by the quantizer's layout; -1 where a group is masked."""
    losses: dict[str, Tensor]
    """Unweighted scalars, one per entry of the quantizer's `loss_names`. Without gradients in evaluation, those that
    need the distances to all codes are left out."""


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Section [model.quantizer]; `kind` selects the quantizer."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_choices(self, "model.quantizer")

    @property
    def needs_codebook(self) -> bool:
        """Whether the codes are those of a codebook artifact, which a new run has to be given."""
        return False

    def codebook_settings(self, size: int, dim: int) -> dict[str, int]:
        """The settings that follow from a codebook of `size` codes of `dim` channels; none where it is not used."""
        return {}


class Quantizer(nn.Module, ABC):
    """Maps a latent to ids and back.

    `forward` changes no weight. A codebook that is not trained by gradient changes in `update` only, which the training
    loop calls after the optimizer step, and which leaves the same codebook on every rank.

    Its weights stay in float32: `half()`, `bfloat16()`, `double()` and `to(dtype)`, also of a module that contains it,
    do not convert them.

    `loss_names` are the keys of `Quantized.losses`; each needs a weight in section [objective].
    """

    config_class: ClassVar[type[QuantizerConfig]]
    loss_names: ClassVar[tuple[str, ...]] = ()
    """The keys of `Quantized.losses`, so that an objective can be checked before the first step."""
    sums_codes: ClassVar[bool] = False
    """Whether `combine` sums the codes of a position, which then have all channels, instead of concatenating them."""

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
        """Number of equal groups of consecutive channels that are quantized independently; each is whitened by itself,
        and `quant_conv` may be grouped in the same way."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of `nn.Module`, which calls it to move and to convert, but tensors are converted to float32 alone."""

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype in (tensor.dtype, torch.float32) else tensor.to(result.device)

        return super()._apply(move, recurse)

    @property
    def token_dim(self) -> int:
        """Channels of the code of an id: C / G where the codes of a position are concatenated, C where summed."""
        return self.latent_dim if self.sums_codes else self.latent_dim // self.num_groups

    @property
    def computes_all_losses(self) -> bool:
        """Whether `forward` computes the losses that need the distances to all codes too."""
        return self.training or torch.is_grad_enabled()

    @abstractmethod
    def forward(self, latent: Tensor) -> Quantized:
        """Quantize float[B, C, h, w], in float32 under any autocast.

        Raises:
            NumericError: the latent or the codebook contains NaN or infinity. Not checked in training mode, to avoid a
                GPU synchronization: codes or losses are then not finite, and the training loop skips the step.
        """

    @abstractmethod
    def token_codes(self, ids: Tensor) -> Tensor:
        """The code of each id, float32[B, N, C / G] of int64[B, N] in the order of a layout; a negative id gives zeros.

        (`residual` and `multi_scale` sum their codes: each has all C channels.)

        Raises:
            DataError: an id is not below `codebook_size`.
        """

    def combine(self, codes: Tensor, layout: TokenLayout) -> Tensor:
        """The codes of the positions, float32[B, C, h, w], from those of the ids, float32[B, N, C / G], with gradient.

        Default: the codes of the groups of a position are concatenated.
        """
        (grid,) = layout.split(codes)
        return grid.flatten(3).permute(0, 3, 1, 2).contiguous()

    def lookup(self, ids: Tensor, layout: TokenLayout) -> Tensor:
        """Return the codes float32[B, C, h, w] of int64[B, N]; a negative id gives the zero vector.

        Raises:
            DataError: an id is not below `codebook_size`, or the ids do not fit the layout.
        """
        layout.split(ids)  # raises
        with torch.autocast(ids.device.type, enabled=False):
            return self.combine(self.token_codes(ids), layout)

    def layout(self, height: int, width: int) -> TokenLayout:
        """The order of the ids of a latent of `height` x `width` positions."""
        return TokenLayout(((height, width),), self.num_groups)

    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Update the codebook after the optimizer step, identically on every rank; latents with a negative id (masked
        groups) are ignored. Default: do nothing."""

    @property
    def has_update(self) -> bool:
        """Whether `update` does anything: a step on a GPU waits for that."""
        return type(self).update is not Quantizer.update

    def codebook(self) -> Tensor:
        """The codes that the search compares latents with: float32[K, C]; with groups [G, K, C / G], or, as all groups
        have all channels in `residual`, [G, K, C]."""
        raise self.unsupported("has no codebook")

    @torch.no_grad()
    def all_codes(self) -> Tensor:
        """All codes, float32[G, K, C / G], also of quantizers without a stored codebook (lfq, fsq).

        (`residual` sums its codes: [G, K, C].)
        """
        codebook = self.codebook()
        return codebook.reshape(-1, *codebook.shape[-2:])

    def load_codebook(self, codebook: Tensor) -> None:
        """Load the codes of a codebook artifact, float[K, F].

        Raises:
            ConfigError: this quantizer has no codebook to load, or it has another shape.
        """
        raise self.unsupported("does not start from a codebook artifact", "Leave --codebook out, or choose kind = lc")

    def standardize_codebook(self) -> None:
        """Center the codes on zero and scale them to unit variance (averaged over channels).

        The counterpart of whitened latents (`Autoencoder.whiten_init`): both then cover the same region, and the
        search uses all codes from the first step. Default: do nothing, for codes on a fixed grid around zero.
        """

    def unsupported(self, what: str, hint: str = "") -> ConfigError:
        return ConfigError(f"the {self.config.kind} quantizer {what}", hint)


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(QuantizerConfig):
    """Settings of quantizers that search a codebook."""

    codebook_size: int
    """K, codes one id ranges over (per group, never the total)."""
    code_dim: int
    """Channels of a code."""
    metric: Literal["l2", "cosine"] = "l2"
    """Distance of the search. The VQGAN-LC paper says cosine; its released code, which gives the numbers of the paper,
    uses squared L2 distances of unnormalized vectors. We follow the code."""
    normalize: bool = False
    """Normalize latents and codes to unit length before the search, the losses and the decoder (ViT-VQGAN, LlamaGen,
    MGVQ). Stored codes may have any length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "model.quantizer", "[2, inf)", "codebook_size")
        check_range(self, "model.quantizer", "[1, inf)", "code_dim")


class CodebookQuantizer(Quantizer):
    """Replaces each latent vector by the nearest code of a codebook (van den Oord et al. 2017).

    A subclass defines its stored `codes`, or how they are computed (`raw_codebook`) and how some of them are, with
    gradient (`raw_embed`).
    Both losses are means over all elements (eq. 3 there): "commitment" moves the latent towards its code, "codebook"
    the code towards its latent. Their weights belong to the objective.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("commitment", "codebook")
    codes: Tensor
    """float[K, C]."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config, codebook_size=config.codebook_size, latent_dim=config.code_dim)
        self.metric = config.metric
        self.normalize = config.normalize

    def raw_codebook(self) -> Tensor:
        """The stored or projected codes before normalization, float32[K, C]."""
        return self.codes.float()

    def raw_embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64[...], none negative) of `raw_codebook`, float32[..., C], with gradient where it learns."""
        return self.codes[ids].float()

    def codebook(self) -> Tensor:
        return self.maybe_normalize(self.raw_codebook())

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64[...], none negative) of the codebook, float32[..., C], with gradient where it learns; in
        float32 under any autocast."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.maybe_normalize(self.raw_embed(ids))

    def maybe_normalize(self, vectors: Tensor, dim: int = -1) -> Tensor:
        """Normalize vectors along `dim` to unit length if `config.normalize`."""
        return F.normalize(vectors, dim=dim) if self.normalize else vectors

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            latent = self.search_input(latent)
            with torch.no_grad():
                ids = nearest(to_rows(latent), self.codebook(), self.metric, check=not self.training)
            return self.quantized(latent, by_image(ids, latent))

    def search_input(self, latent: Tensor) -> Tensor:
        """The latent that the search compares with `codebook`, float32[B, C, h, w]."""
        return self.maybe_normalize(latent.float(), dim=1)

    def quantized(self, latent: Tensor, ids: Tensor) -> Quantized:
        """The output for a `search_input`, float32[B, C, h, w], whose nearest codes are `ids`, int64[B, h * w]."""
        codes = self.embed(ids).transpose(1, 2).reshape_as(latent)
        return Quantized(straight_through(latent, codes), ids, self.losses(latent, codes))

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {
            "commitment": F.mse_loss(latent, codes.detach()),
            "codebook": F.mse_loss(codes, latent.detach()),
        }

    def embed_valid(self, ids: Tensor) -> Tensor:
        """As `embed`, with the zero vector for a negative id."""
        return self.embed(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1)

    def token_codes(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.codebook_size)
        return self.embed_valid(ids)


class GridQuantizer(Quantizer):
    """Quantizes each channel by itself. The codes are a grid around zero, which is computed and not stored."""

    @abstractmethod
    def quantize(self, latent: Tensor) -> Quantized:
        """`forward` for float32[B, C, h, w] without autocast."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """The codes float32[..., C] of ids int64[..., G]; any value for a negative id."""

    def forward(self, latent: Tensor) -> Quantized:
        if not self.training:
            check_finite(latent)
        with torch.autocast(latent.device.type, enabled=False):
            return self.quantize(latent.float())

    def token_codes(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.codebook_size)
        groups = ids.unflatten(1, (-1, self.num_groups))
        codes = self.embed(groups).unflatten(2, (self.num_groups, -1)).flatten(1, 2)
        return codes.masked_fill((ids < 0).unsqueeze(-1), 0.0)

    def all_codes(self) -> Tensor:
        return self.embed(torch.arange(self.codebook_size)[:, None]).expand(self.num_groups, -1, -1)


def check_ids(ids: Tensor, codebook_size: int) -> None:
    """Raise a DataError if an id is not below `codebook_size`; negative ids are allowed.

    In a graph of torch.compile or torch.export, a value is checked by an assertion, which raises a RuntimeError.
    """
    if torch.compiler.is_compiling():
        torch._assert_async((ids < codebook_size).all(), "an id is outside the codebook")
        return
    if ids.numel() and int(ids.max()) >= codebook_size:
        raise DataError(
            f"id {int(ids.max())} is outside a codebook of {codebook_size} codes",
            "These tokens come from another tokenizer",
        )


def check_finite(latent: Tensor) -> None:
    """Raise a NumericError if the latent contains NaN or infinity, which signs and rounding would hide.

    In a graph of torch.compile or torch.export this is an assertion, which raises a RuntimeError.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(latent.isfinite().all(), "the latent contains NaN or infinity")
        return
    if not bool(latent.isfinite().all()):
        raise NumericError(
            "the latent contains NaN or infinity",
            "Check for a diverged training run or float16 overflow",
        )


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """Build the quantizer of `config`, with initial weights."""
    return class_for(Quantizer, config)(config)  # type: ignore[type-abstract, call-arg]  # a subclass takes its config alone


def to_rows(latent: Tensor) -> Tensor:
    """Flatten float[B, C, h, w] to float[N, C], in the order b, h, w."""
    return latent.flatten(2).transpose(1, 2).flatten(0, 1)


def by_image(ids: Tensor, latent: Tensor) -> Tensor:
    """The ids int64[N] of `to_rows(latent)` as int64[B, h * w]."""
    return ids.view_as(latent[:, 0]).flatten(1)


def from_rows(rows: Tensor, latent: Tensor) -> Tensor:
    """The inverse of `to_rows`: float[N, C] to float[B, C, h, w], B, h and w as those of `latent`."""
    batch, _, height, width = latent.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def straight_through(latent: Tensor, codes: Tensor) -> Tensor:
    """Return the exact value of `codes` with the gradient of `latent` (Bengio et al. 2013).

    The usual latent + sg(codes - latent) has a rounding error, so the images decoded from stored ids would differ.
    """
    return (latent - latent.detach()) + codes.detach()
