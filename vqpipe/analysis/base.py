"""The base class of analyses, and what they share.

Shapes: B images of H x W pixels, N ids per image, G groups, K codes per group, C channels of a code.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.metrics.resumable import Resumable
from vqpipe.quantizers import MultiGroupQuantizer, Quantizer, TokenLayout
from vqpipe.reports import page
from vqpipe.tokenizer import Tokenizer

EMBEDDING_CODES = 2000
NO_GRID = "no image whose tokens lie on a grid of its own size (padded, or in tiles)"


@dataclass(frozen=True)
class AnalysisInputs:
    """The tokenizer to analyze, and further inputs."""

    tokenizer: Tokenizer
    perceptual: Mapping[str, nn.Module] = field(default_factory=dict)
    """LPIPS networks by key."""
    seed: int = 0
    embedding_codes: int = EMBEDDING_CODES
    """Codes that `embedding` shows at most."""

    def layout(self, images: Tensor, ids: Tensor) -> TokenLayout | None:
        """The layout of the ids, int64[B, N], of images [B, 3, H, W]; None for images that were padded or tiled."""
        height, width = images.shape[-2:]
        factor = self.tokenizer.downsample_factor
        if height % factor or width % factor:
            return None
        layout = self.tokenizer.layout(height, width)
        return layout if layout.num_tokens == ids.shape[1] else None


class MissingPackage(ConfigError):
    """An optional package that an analysis needs is not installed: an error, not a reason to omit the analysis."""


class Analysis(Resumable, ABC):
    """Updated with each batch of a rank's share; then `result` is called once on every rank, then `sections` on the
    rank that makes the page. Pictures are attributes, since the result holds only numbers. Memory does not grow with
    the set.

    Raises:
        ConfigError: by the constructor, where the analysis does not apply to this tokenizer.
    """

    name: ClassVar[str]

    def __init__(self, inputs: AnalysisInputs) -> None:
        self.inputs = inputs

    @abstractmethod
    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        """Accumulate a batch: two uint8[B, 3, H, W] tensors, int64[B, N], and the names of the images."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The result over all ranks, for JSON; `not_computed` is the reason where there is none."""

    @abstractmethod
    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        """The sections of the page, after `result`."""


class NotComputed(Analysis):
    """Stands for an analysis that does not apply to the tokenizer."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name  # type: ignore[misc]  # of the analysis it stands for
        self.reason = reason

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        pass

    def result(self) -> dict[str, Any]:
        return {"not_computed": self.reason}

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        return reason_section(self.name, result)


def reason_section(name: str, result: Mapping[str, Any]) -> list[page.Section]:
    """The section of an analysis that was not computed."""
    return [page.Reasons(f"Not computed: {name}", {name: result["not_computed"]})]


def sampling_key(name: str) -> str:
    """A pseudorandom key of an image: the images with the lowest keys are the same sample for any sharding."""
    return hashlib.sha256(name.encode()).hexdigest()


def sample_ids(codebook_size: int, max_codes: int, seed: int) -> Tensor:
    """At most `max_codes` ids of a codebook, uniformly at random, ascending: int64[n]."""
    if codebook_size <= max_codes:
        return torch.arange(codebook_size)
    return torch.randperm(codebook_size, generator=torch.Generator().manual_seed(seed))[:max_codes].sort().values


def codebooks(quantizer: Quantizer) -> list[Tensor]:
    """The codes of each group as the search compares them, float32[K, C]: projected, normalized under cosine.

    Raises:
        ConfigError: the quantizer has no codebook.
    """
    stored = quantizer.codebook().detach()
    groups = list(stored) if stored.ndim == 3 else [stored]
    return [F.normalize(codes, dim=1) if metric_of(quantizer) == "cosine" else codes for codes in groups]


def metric_of(quantizer: Quantizer) -> str:
    """ "l2" or "cosine". (`ibq` searches by inner product; the distances of its codes are still l2.)"""
    if isinstance(quantizer, MultiGroupQuantizer):
        return metric_of(quantizer.quantizers()[0])
    return str(getattr(quantizer.config, "metric", "l2"))
