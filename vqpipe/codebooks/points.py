"""Features on a device, shared out among ranks, with what one look at all of them tells.

Every pass reads the same blocks in the same order, the next one from disk while this one is worked on. On a CPU the
memory for that is two blocks: the shards are memory-mapped, and what the machine has free keeps them. On a GPU this
rank's features stay there, in the precision they are stored in, where they fit into a stated share of its free memory;
else every pass copies them there, out of pinned memory. The same float32 numbers come out in each case.

No offset is subtracted here, although features of a CLIP have a large common mean: what would lose digits by it looks
after itself. The search moves both sides by the codes' mean where it is far (`vqpipe.search.nearest`), the distance to
a centre is a sum of squared differences, not of products, and sums of vectors are exact integers.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.codebooks.watch import Watch
from vqpipe.errors import NumericError
from vqpipe.search import row_hashes

LARGEST_EXPONENT = 120  # 2**120 times the smallest unit still is a float32


class Points:
    """N vectors to cluster; where `shared`, rank r of w reads blocks r, r + w, ..., else every rank reads all.

    Args:
        visits: how often one sum may meet each vector (`scale` leaves room for it).
        room: bytes of the device that this rank's features may stay in; None: on a GPU half of what is free.

    Attributes:
        distinct: int64[M], the first row of each distinct vector, ascending.
        scale: the fixed-point unit is 1 / scale: sums of all N vectors stay below 2**62.
        watch: hears of every block that is done.
    """

    def __init__(
        self,
        features: FeatureSet,
        device: torch.device,
        shared: bool,
        *,
        visits: int = 1,
        room: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.features, self.device, self.shared = features, device, shared
        self.watch = watch or Watch()
        self.kept: dict[int, Tensor] | None = {} if self.fits(room) else None
        hashes = torch.zeros(features.num_vectors, dtype=torch.int64)
        largest = torch.zeros(self.ranks)
        self.watch.phase("looking at the features", features.num_vectors)
        for start, block in self.blocks():
            hashes[start : start + len(block)] = row_hashes(block).cpu()
            largest[self.rank] = max(float(largest[self.rank]), self.check(start, block))
        _, first = np.unique(self.total(hashes).numpy(), return_index=True)
        self.distinct: np.ndarray = np.sort(first)
        magnitude = np.frexp(float(self.total(largest).amax()))[1] + np.frexp(features.num_vectors * visits)[1]
        self.scale = 2.0 ** float(min(62 - magnitude, LARGEST_EXPONENT))

    @property
    def rank(self) -> int:
        return distributed.rank() if self.shared else 0

    @property
    def ranks(self) -> int:
        return distributed.world_size() if self.shared else 1

    def fits(self, room: int | None) -> bool:
        """Whether this rank's features, as they are stored, go into so many bytes of the device."""
        if room is None:
            room = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else 0
        rows = sum(self.features.block_stop(start) - start for start in self.block_starts())
        return rows * self.features.dim * np.dtype(self.features.dtype).itemsize <= room

    def block_starts(self) -> list[int]:
        """First rows of this rank's blocks."""
        return list(self.features.block_starts())[self.rank :: self.ranks]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """This rank's blocks: (first row, float32[R, D] on the device)."""
        starts = self.block_starts()
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.load, start) for start in starts[:1]]
            for index, start in enumerate(starts):
                block = ahead.pop().result().to(self.device, non_blocking=True)
                ahead += [reader.submit(self.load, following) for following in starts[index + 1 : index + 2]]
                if self.kept is not None:
                    self.kept[start] = block
                yield start, block.float()
                group = min(start + self.ranks * (self.features.block_stop(start) - start), self.features.num_vectors)
                self.watch.advance(group - start)

    def load(self, start: int) -> Tensor:
        """The block at `start` in its stored precision, where it lies already or in memory fit to be copied from."""
        if self.kept is not None and start in self.kept:
            return self.kept[start]
        block = self.features.stored(start, self.features.block_stop(start))
        if self.device.type != "cuda":
            return block
        with torch.cuda.device(self.device):  # a thread starts out on the first GPU
            return block.pin_memory()

    def rows(self, starts: np.ndarray, length: int) -> Tensor:
        """Runs of `length` rows (less at the end of all) from each of `starts`, none across two blocks: float32[R, D].

        The caller asks only for blocks of its own rank.
        """
        parts = []
        size = self.features.block_stop(0)
        for start in starts.tolist():
            stop = min(start + length, self.features.num_vectors)
            first = start // size * size
            if self.kept is not None and first in self.kept:
                parts.append(self.kept[first][start - first : stop - first])
            else:
                parts.append(self.features.stored(start, stop))
        joined = torch.cat(parts) if parts else torch.empty(0, self.features.dim)
        return joined.to(self.device).float()

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
