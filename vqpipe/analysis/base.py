"""What the analyses share.

Shapes: B images of H x W pixels, N ids per image, K codes per group, C channels of a code.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.evaluation.analysis import Analysis
from vqpipe.quantizers import MultiGroupQuantizer, Quantizer
from vqpipe.reports import page

NO_GRID = "no image whose tokens lie on a grid of its own size (padded, or in tiles)"


class MissingPackage(ConfigError):
    """An optional package that an analysis needs is not installed: an error, not a reason to omit the analysis."""


class NotComputed(Analysis):
    """Stands for an analysis that does not apply to the tokenizer."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name  # type: ignore[misc]  # of the analysis it stands for
        self.reason = reason

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        pass

    def result(self) -> dict[str, Any]:
        return {"not_computed": self.reason}

    def sections_of(self, result: Mapping[str, Any]) -> list[page.Section]:
        return []


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
