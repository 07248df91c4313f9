"""What an analysis of ids and reconstructions is: a further measurement of the evaluation pass.

Shapes: B images of H x W pixels, N ids per image.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from vqpipe.metrics.resumable import Resumable
from vqpipe.quantizers import TokenLayout
from vqpipe.reports import page
from vqpipe.tokenizer import Tokenizer

EMBEDDING_CODES = 2000


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

    def sections(self, result: Mapping[str, Any]) -> list[page.Section]:
        """The sections of the page, after `result`."""
        if "not_computed" in result:
            return [page.Reasons(f"Not computed: {self.name}", {self.name: result["not_computed"]})]
        return self.sections_of(result)

    @abstractmethod
    def sections_of(self, result: Mapping[str, Any]) -> list[page.Section]:
        """The sections of a result that was computed."""
