"""How much of the codebook a set of images uses: utilization, perplexity, bits per pixel.

Letters: B images, N tokens an image, G groups, K codes a group.
"""

import math

import torch
from torch import Tensor

from vqpipe.distributed import all_reduce_sum
from vqpipe.errors import DataError


class CodeUsage:
    """How often each code of each group was chosen, over any number of images.

    `counts` is int64[G, K] on `device`.
    """

    def __init__(self, codebook_size: int, num_groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.codebook_size = codebook_size
        self.num_groups = num_groups
        self.counts = torch.zeros(num_groups, codebook_size, dtype=torch.int64, device=device)

    def update(self, ids: Tensor) -> None:
        """Take in int64[B, N], groups last as in every token layout. A negative id (a group left out) is not counted.

        Raises:
            DataError: an id of K or more, or N is not a multiple of G.
        """
        if ids.shape[-1] % self.num_groups:
            raise DataError(f"{ids.shape[-1]} tokens an image do not divide into {self.num_groups} groups")
        grouped = ids.to(self.counts.device).reshape(-1, self.num_groups).T  # int64[G, B * N / G]
        if grouped.numel() and int(grouped.max()) >= self.codebook_size:
            raise DataError(f"token id {int(grouped.max())} is outside a codebook of {self.codebook_size}")
        for group, row in zip(self.counts, grouped, strict=True):
            group += torch.bincount(row[row >= 0], minlength=self.codebook_size)

    def merged(self) -> Tensor:
        """The counts of all ranks together: int64[G, K], on every rank."""
        return all_reduce_sum(self.counts.clone())


def usage_of(counts: Tensor) -> dict[str, float | list[float]]:
    """Utilization and perplexity of int64[G, K] counts.

    `utilization` is the share of the G x K codes chosen at least once, in [0, 1]; `perplexity_per_group` is
    exp of the entropy of the choices, 1 (one code) to K (all alike).
    """
    used = (counts > 0).double().mean(1)
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(shares).sum(1)
    return {
        "utilization": float(used.mean()),
        "utilization_per_group": used.tolist(),
        "perplexity_per_group": entropy.exp().tolist(),
    }


def bits_per_pixel(num_tokens: int, codebook_size: int, height: int, width: int) -> float:
    """Raw cost of an image's tokens: N log2(K) bits over H x W pixels."""
    return num_tokens * math.log2(codebook_size) / (height * width)
