"""What feature networks saw of many images: the means, covariances and kept features that set distances compare.

Letters: B images of H x W pixels, D features.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.errors import DataError
from vqpipe.metrics.fid import FrechetStatistics
from vqpipe.metrics.inception import SIZES
from vqpipe.metrics.networks import FeatureNetworks
from vqpipe.metrics.resizing import INCEPTION_SIZE, clean_resize_all
from vqpipe.metrics.set_metrics import KeptFeatures
from vqpipe.metrics.state import Accumulator


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be gathered of every image."""

    moments: tuple[str, ...] = ()
    """Outputs of Inception whose mean and covariance are wanted."""
    kept: tuple[str, ...] = ()
    """Outputs of Inception that are kept of each image."""
    most_bytes: float = 0.0
    """How much of each kept output this rank may hold."""
    extractor_sizes: Mapping[str, int] = field(default_factory=dict)
    """The user's extractors in use -> D."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs of Inception that have to be computed."""
        return tuple(dict.fromkeys((*self.moments, *self.kept)))


class Population(Accumulator):
    """One side of a set distance: originals or reconstructions, seen with one resize."""

    accumulates: ClassVar[tuple[str, ...]] = ("moments", "named", "kept")

    def __init__(
        self, networks: FeatureNetworks, resize: Literal["tf1", "clean"], asked: Asked, device: torch.device
    ) -> None:
        self.inception: nn.Module | None = networks.inception if asked.outputs else None
        self.extractors = {name: networks.extractors[name] for name in asked.extractor_sizes}
        self.resize = resize
        self.asked = asked
        sizes = {name: SIZES[name] for name in asked.moments if self.inception is not None}
        self.moments = {name: FrechetStatistics(size, device) for name, size in sizes.items()}
        self.named = {name: FrechetStatistics(size, device) for name, size in asked.extractor_sizes.items()}
        self.kept = {name: KeptFeatures(asked.most_bytes) for name in asked.kept if self.inception is not None}

    def update(self, images: Tensor, resized: Tensor | None = None) -> None:
        """Take in uint8[B, 3, H, W]; `resized`, float[B, 3, 299, 299], stands for them before Inception alone.

        Raises:
            NumericError: a network returned NaN or infinity.
        """
        if self.inception is not None:
            if resized is None:
                resized = clean_resize_all(images) if self.resize == "clean" else images
            elif resized.shape[1:] != (3, INCEPTION_SIZE, INCEPTION_SIZE):
                raise DataError(f"references of shape {list(resized.shape)} are not resized for Inception")
            features = self.inception(resized, self.asked.outputs)
            for name, moments in self.moments.items():
                moments.update(features[name])
            for name, kept in self.kept.items():
                kept.update(features[name])
        for name, moments in self.named.items():
            with torch.inference_mode():
                moments.update(self.extractors[name](images))

    def merged_moments(self) -> dict[str, FrechetStatistics]:
        """The moments of all ranks, by output."""
        return {name: moments.merged() for name, moments in self.moments.items()}

    def merged_named(self) -> dict[str, FrechetStatistics]:
        """The moments of all ranks, by the user's extractor."""
        return {name: moments.merged() for name, moments in self.named.items()}

    def merged_kept(self, names: Collection[str]) -> dict[str, Tensor | None]:
        """The kept features of all ranks, on rank 0; None where they were too large."""
        return {name: self.kept[name].merged() for name in names}
