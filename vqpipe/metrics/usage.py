"""How much of the codebook a set of images uses: utilization, perplexity, bits per pixel.

Letters: B images, N tokens an image, G groups, K codes a group.
"""

import math

import torch
from torch import Tensor

from vqpipe.distributed import all_reduce_sum, gather_rows
from vqpipe.errors import ConfigError, DataError

MOST_COUNTERS = 2**24
"""G x K up to which every code has a counter (128 MiB in all). Beyond, as with grids of fixed codes that may have 2^36,
only the codes that occur have one."""
MOST_WAITING = 2**20
"""Ids of a huge codebook that are gathered before they are merged into the sorted counts, at the least."""


class CodeUsage:
    """How often each code of each group was chosen, over any number of images; exact for codebooks of any size.

    `counts` is int64[G, K] on `device`: dense up to MOST_COUNTERS codes, else sparse (COO, coalesced), its memory
    growing with the number of distinct ids.
    """

    def __init__(self, codebook_size: int, num_groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.codebook_size = codebook_size
        self.num_groups = num_groups
        self._counts = no_counts(num_groups, codebook_size, device)
        self._waiting: list[Tensor] = []  # int64[2, n] each: group and id, not merged yet

    @property
    def counts(self) -> Tensor:
        """int64[G, K] so far."""
        self._merge_waiting()
        return self._counts

    def update(self, ids: Tensor, *, trusted: bool = False) -> None:
        """Take in int64[B, N], groups last as in every token layout. A negative id (a group left out) is not counted.

        `trusted` ids come straight from a quantizer and are not looked at first, so that no GPU is waited for.

        Raises:
            DataError: an id of K or more, or N is not a multiple of G.
        """
        if ids.shape[-1] % self.num_groups:
            raise DataError(f"{ids.shape[-1]} tokens an image do not divide into {self.num_groups} groups")
        grouped = ids.to(self._counts.device).reshape(-1, self.num_groups).T  # int64[G, B * N / G]
        if trusted and not self._counts.is_sparse and grouped.is_cuda:
            self._counts.scatter_add_(1, grouped.clamp(min=0), (grouped >= 0).long())
            return
        if grouped.numel() and int(grouped.max()) >= self.codebook_size:
            raise DataError(f"token id {int(grouped.max())} is outside a codebook of {self.codebook_size}")
        if self._counts.is_sparse:
            group, place = (grouped >= 0).nonzero(as_tuple=True)
            self._waiting.append(torch.stack([group, grouped[group, place]]))
            waiting = sum(part.shape[1] for part in self._waiting)
            if waiting > max(MOST_WAITING, len(self._counts.values())):  # as many as are sorted: each is sorted rarely
                self._merge_waiting()
            return
        for counts, row in zip(self._counts, grouped, strict=True):
            counts += torch.bincount(row[row >= 0], minlength=self.codebook_size)

    def merged(self) -> Tensor:
        """The counts of all ranks together: int64[G, K], on every rank."""
        if self._counts.is_sparse:
            return from_rows(gather_rows(as_rows(self.counts)), self.num_groups, self.codebook_size)
        return all_reduce_sum(self._counts.clone())

    def _merge_waiting(self) -> None:
        if self._waiting:
            indices = torch.cat(self._waiting, dim=1)
            seen = sparse(indices, torch.ones_like(indices[0]), self._counts.shape)
            self._counts, self._waiting = (self._counts + seen).coalesce(), []


def no_counts(num_groups: int, codebook_size: int, device: torch.device | str = "cpu") -> Tensor:
    """int64[G, K] of zeros; sparse above MOST_COUNTERS codes. 2^63 codes are a ConfigError: no int64 numbers them."""
    if num_groups * codebook_size >= 2**63:
        raise ConfigError(f"{num_groups} x {codebook_size} codes are too many to count", "Use fewer")
    if num_groups * codebook_size <= MOST_COUNTERS:
        return torch.zeros(num_groups, codebook_size, dtype=torch.int64, device=device)
    return from_rows(torch.zeros(0, 3, dtype=torch.int64, device=device), num_groups, codebook_size)


def sparse(indices: Tensor, times: Tensor, shape: torch.Size) -> Tensor:
    """int64[2, n] of group and id and int64[n] -> sparse int64[G, K], sorted, the times of equal ids added up."""
    return torch.sparse_coo_tensor(indices, times, shape, check_invariants=True).coalesce()


def as_rows(counts: Tensor) -> Tensor:
    """Sparse int64[G, K] -> int64[n, 3]: group, id and how often, sorted."""
    return torch.cat([counts.indices(), counts.values()[None]]).T.contiguous()


def from_rows(rows: Tensor, num_groups: int, codebook_size: int) -> Tensor:
    """Undoes `as_rows`; rows of the same code are added up."""
    return sparse(rows[:, :2].T, rows[:, 2], torch.Size((num_groups, codebook_size)))


def times_chosen(counts: Tensor) -> list[Tensor]:
    """int64[G, K] -> for each group int64[n], how often each of its n codes in use was chosen, in their order."""
    if counts.is_sparse:
        return [counts[group].coalesce().values() for group in range(len(counts))]
    return [row[row > 0] for row in counts]


def usage_of(counts: Tensor) -> dict[str, float | list[float]]:
    """Utilization and perplexity of int64[G, K] counts.

    `utilization` is the share of the G x K codes chosen at least once, in [0, 1]; `perplexity_per_group` is
    exp of the entropy of the choices, 1 (one code) to K (all alike).
    """
    times = times_chosen(counts)
    used = [len(row) / counts.shape[1] for row in times]
    shares = [row.double() / row.sum() for row in times]
    return {
        "utilization": sum(used) / len(used),
        "utilization_per_group": used,
        "perplexity_per_group": [torch.special.entr(share).sum().exp().item() for share in shares],
    }


def bits_per_pixel(num_tokens: int, codebook_size: int, height: int, width: int) -> float:
    """Raw cost of an image's tokens: N log2(K) bits over H x W pixels."""
    return num_tokens * math.log2(codebook_size) / (height * width)
