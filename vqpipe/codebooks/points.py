"""Features on a device, shared out among ranks, with what one look at all of them tells."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.errors import NumericError
from vqpipe.search import row_hashes


class Points:
    """N vectors to cluster; where `shared`, rank r of w reads blocks r, r + w, ..., else every rank reads all.

    Attributes:
        distinct: int64[M], the first row of each distinct vector, ascending.
        scale: the fixed-point unit is 1 / scale: sums of all N vectors stay below 2**62.
    """

    def __init__(self, features: FeatureSet, device: torch.device, shared: bool) -> None:
        self.features, self.device, self.shared = features, device, shared
        hashes = torch.zeros(features.num_vectors, dtype=torch.int64)
        largest = torch.zeros(distributed.world_size() if shared else 1)
        for start, block in self.blocks():
            hashes[start : start + len(block)] = row_hashes(block).cpu()
            largest[self.rank] = max(float(largest[self.rank]), self.check(start, block))
        _, first = np.unique(self.total(hashes).numpy(), return_index=True)
        self.distinct: np.ndarray = np.sort(first)
        magnitude = np.frexp(float(self.total(largest).amax()))[1] + np.frexp(features.num_vectors)[1]
        self.scale = 2.0 ** float(62 - magnitude)

    @property
    def rank(self) -> int:
        return distributed.rank() if self.shared else 0

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """This rank's blocks: (first row, float32[R, D] on the device)."""
        ranks = distributed.world_size() if self.shared else 1
        for index, start in enumerate(self.features.block_starts()):
            if index % ranks == self.rank:
                yield start, self.features.block(start).to(self.device)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share these points."""
        if not self.shared:
            return tensor
        return distributed.all_reduce_sum(tensor.to(self.device)).to(tensor.device)

    def check(self, start: int, block: Tensor) -> float:
        """The largest absolute value of a block.

        Raises:
            NumericError: a NaN or an infinity, with its shard and row.
        """
        low, high = torch.aminmax(block)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = (~torch.isfinite(block)).any(dim=1).nonzero()[:, 0]
            raise NumericError(
                f"features hold NaN or infinity: {self.features.place(start + int(bad[0]))}"
                f" ({len(bad)} such vectors in rows {start} to {start + len(block) - 1})",
                "Extract the features again; look at the images of those rows",
            )
        return float(max(-low, high))
