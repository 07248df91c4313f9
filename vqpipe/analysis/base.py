"""What every analysis is: something that looks at batches, and then has a result and its place on a page.

Letters: B images of H x W pixels, N ids an image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from vqpipe.metrics.metric import Metric
from vqpipe.quantizers import TokenLayout
from vqpipe.reports import page
from vqpipe.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """What is looked at, and with what."""

    tokenizer: Tokenizer
    perceptual: Mapping[str, nn.Module] = field(default_factory=dict)
    """LPIPS networks by key."""
    seed: int = 0

    def layout(self, images: Tensor, ids: Tensor) -> TokenLayout | None:
        """The layout of int64[B, N], the ids of [B, 3, H, W]; None where it is no single one, as with images that were
        padded or went through in tiles."""
        height, width = images.shape[-2:]
        factor = self.tokenizer.downsample_factor
        if height % factor or width % factor:
            return None
        layout = self.tokenizer.layout(height, width)
        return layout if layout.num_tokens == ids.shape[1] else None


class Analysis(Metric, ABC):
    """Call `update` batch by batch on each rank's share, then `result` once on every rank, then `sections` where the
    page is made: pictures are kept in the object, since the result is only numbers. Memory does not grow with the set.

    Raises:
        ConfigError: when made, where it says nothing about this tokenizer; the error tells why.
    """

    name: ClassVar[str]

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abstractmethod
    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        """Take in uint8[B, 3, H, W] twice, their int64[B, N] and their names in the set."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """What was found over all ranks, as JSON can hold it; `not_computed` holds the reason where nothing was."""

    @abstractmethod
    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        """Its part of the page, after `result` was called."""


class LeftOut(Analysis):
    """In the place of an analysis that says nothing about this tokenizer."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name  # type: ignore[misc]  # of the one it stands for
        self.reason = reason

    def update(self, originals: Tensor, reconstructions: Tensor, ids: Tensor, keys: Sequence[str]) -> None:
        pass

    def result(self) -> dict[str, Any]:
        return {"not_computed": self.reason}

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        return left_out(self.name, result)


def left_out(name: str, result: Mapping[str, Any]) -> list[page.Section]:
    """The section that says why there is no other."""
    return [page.Reasons(f"Left out: {name}", {name: result["not_computed"]})]


def lot(key: str) -> str:
    """A number drawn for an image by its name: the lowest are a sample that no sharding changes."""
    return hashlib.sha256(key.encode()).hexdigest()
