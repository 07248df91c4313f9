"""Use of the codebook by a set of images: utilization at stated numbers of tokens, perplexity, bits per pixel.

A utilization depends on the number of tokens it was counted over: a coder that draws its codes uniformly reaches
86.5 % of 32,768 codes with 65,536 tokens, and all of them with a million. So each utilization is reported beside that
of such a coder (`uniform_utilization`), at the numbers of tokens in BUDGETS and over the whole set.

Shapes: B images, N tokens per image, G groups, K codes per group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqpipe.distributed import all_reduce_sum, gather_objects, gather_rows
from vqpipe.errors import ConfigError, DataError
from vqpipe.metrics.joint_entropy import JointEntropy
from vqpipe.metrics.resumable import Resumable, State

MAX_COUNTERS = 2**24
"""G x K up to which every code has a counter (128 MiB, twice that with positions). Of larger codebooks, such as grids
with up to 2^36 codes, only the codes that occur are counted: 24 bytes each, three times that while sorting."""
MIN_SORTED = 2**20
"""Smallest number of ids of such a codebook that are sorted into the counts at once."""
BUDGETS = (65_536, 1_048_576)
"""Numbers of tokens of one group, from the start of the set, after which codes in use are counted. The first is the
window of LlamaGen's and MGVQ's released training code."""
CURVE_POINTS = 64
"""Largest number of points of the curve of codes in use against tokens."""
NEVER = 2**63 - 1
"""First position of a code that was not chosen."""
POSITIONS_AT_ONCE = 2**20
"""Codes whose first positions are exchanged between ranks at once: each rank receives 8 MiB of every other."""


class UsageResult(NamedTuple):
    """The use of the codebook over all ranks."""

    counts: Tensor
    """int64[G, K], as in `CodeUsage`."""
    numbers: dict[str, Any]
    not_computed: dict[str, str]
    """Name -> reason."""


class CodeUsage(Resumable):
    """Counts how often each code of each group was chosen; exact for codebooks of any size.

    `counts` is int64[G, K] on `device`: dense up to MAX_COUNTERS codes, else sparse (COO, coalesced), its memory
    growing with the number of distinct ids. With the positions of images in the set, three more things are counted:
    the first position of each code, the tokens within each budget, and the joint occurrence of groups (`JointEntropy`).
    """

    def __init__(self, codebook_size: int, num_groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.codebook_size = codebook_size
        self.num_groups = num_groups
        self._counts = no_counts(num_groups, codebook_size, device)
        self._unsorted: list[Tensor] = []  # int64[4, n] each: group, id, how often, first position
        self._first: Tensor | None = None  # positions: int64[G, K], or int64[n] beside the values of sparse counts
        self._joint = JointEntropy(num_groups, codebook_size)
        self._lengths: set[int] = set()  # tokens of one group an image has, of images whose position is known
        self._within = [0] * len(BUDGETS)  # tokens of one group whose position is below each budget
        self._unknown = False  # the position of some image is not known

    @property
    def counts(self) -> Tensor:
        """int64[G, K] of this rank."""
        self._sort()
        return self._counts

    def update(self, ids: Tensor, *, start: int | Sequence[int] | None = None, trusted: bool = False) -> None:
        """Count int64[B, N], groups last as in every token layout. Negative ids (groups left out) are not counted.

        Args:
            start: position of the first of these images in the set, 0-based, the others following it; or the position
                of each. None: positions are unknown, and `compute` reports neither budgets nor joint entropy.
            trusted: skip the check of ids that come straight from a quantizer, so that no GPU is waited for.

        Raises:
            DataError: an id of K or more, N is not a multiple of G, or there are not as many positions as images.
        """
        if ids.shape[-1] % self.num_groups:
            raise DataError(f"{ids.shape[-1]} tokens per image are not divisible into {self.num_groups} groups")
        grouped = ids.to(self._counts.device).reshape(-1, self.num_groups).T  # int64[G, B * N / G]
        unchecked = trusted and not self._counts.is_sparse and grouped.is_cuda
        if not unchecked and grouped.numel() and int(grouped.max()) >= self.codebook_size:
            raise DataError(f"token id {int(grouped.max())} is outside a codebook of {self.codebook_size}")
        self._unknown = self._unknown or start is None
        positions = None if start is None else self._positions(ids, start)
        if self._counts.is_sparse:
            self._count_sparse(grouped, positions)
            return
        if positions is not None:
            self._first = torch.full_like(self._counts, NEVER) if self._first is None else self._first
            chosen_at = torch.where(grouped >= 0, positions, NEVER)
            self._first.scatter_reduce_(1, grouped.clamp(min=0), chosen_at, "amin")
        if unchecked:
            self._counts.scatter_add_(1, grouped.clamp(min=0), (grouped >= 0).long())
        else:
            for counts, row in zip(self._counts, grouped, strict=True):
                counts += torch.bincount(row[row >= 0], minlength=self.codebook_size)

    def state(self) -> State:
        counts = self.counts
        return {
            "counts": as_rows(counts) if counts.is_sparse else counts,
            "first": self._first,
            "joint": self._joint.state(),
            "lengths": sorted(self._lengths),
            "within": self._within,
            "unknown": self._unknown,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        device, counts, first = self._counts.device, state["counts"], state["first"]
        if self._counts.is_sparse:
            self._counts = from_rows(counts.to(device), self.num_groups, self.codebook_size)
        else:
            self._counts = counts.to(device)
        self._first = None if first is None else first.to(device)
        self._unsorted = []
        self._joint.load_state(state["joint"])
        self._lengths, self._within, self._unknown = set(state["lengths"]), state["within"], state["unknown"]

    def merged(self) -> "CodeUsage":
        """The counts of all ranks, on every rank. (First positions and joint counts are reduced by `compute`.)"""
        merged = CodeUsage(self.codebook_size, self.num_groups, self._counts.device)
        if self._counts.is_sparse:
            merged._counts = from_rows(gather_rows(as_rows(self.counts)), self.num_groups, self.codebook_size)
        else:
            merged._counts = all_reduce_sum(self._counts.clone())
        merged._unknown = True
        return merged

    def compute(self, num_pixels: int) -> UsageResult:
        """Every number about codes over all ranks, and the reason of each that is not computed.

        Beside the numbers of `usage_of`, `spread_of` and `JointEntropy.compute`:
        `bits_per_pixel`: log2(K) bits per token; `bits_per_pixel_entropy`: the cost under an ideal coder of order 0
        with each group's frequencies, H bits per token, H being the entropy of these counts (so slightly too low).
        `utilization_at`: a row for each budget that the set reaches, and one for the whole set: `tokens` (those
        counted, of one group), `utilization`, `utilization_per_group`, and `uniform_utilization`, the ceiling.
        `utilization_curve`: (tokens, utilization, uniform_utilization) at growing numbers of tokens, for a plot; where
        it is not computed, neither are the rows of the budgets. Budgets count the tokens of skipped images, `tokens`
        does not.

        Args:
            num_pixels: H x W, summed over all images on all ranks.
        """
        counts = self.merged().counts
        unknown, lengths, within = zip(*gather_objects((self._unknown, self._lengths, self._within)), strict=True)
        total = max(tokens_per_group(counts))
        everything = self._row(total, [len(times) for times in times_chosen(counts)])
        numbers: dict[str, Any] = {**usage_of(counts), **spread_of(counts), **bits_of(counts, num_pixels)}
        numbers["utilization_at"] = [everything]
        if any(unknown):
            names = ("utilization_curve", "joint_entropy") if self.num_groups > 1 else ("utilization_curve",)
            reason = "the positions of the images in the set are not known"
            return UsageResult(counts, numbers, dict.fromkeys(names, reason))
        joint, absent = self._joint.compute(counts.device)
        numbers |= joint
        if len(set().union(*lengths)) > 1:
            absent["utilization_curve"] = "images of several sizes: the number of tokens before each is not known"
            return UsageResult(counts, numbers, absent)
        firsts = self._first_positions()

        def row_at(budget: int, tokens: int) -> dict[str, Any]:
            return self._row(tokens, [int((first < budget).sum()) for first in firsts])

        counted = [sum(tokens) for tokens in zip(*within, strict=True)]
        budgets = [(budget, tokens) for budget, tokens in zip(BUDGETS, counted, strict=True) if total >= budget]
        numbers["utilization_at"] = [*(row_at(budget, min(tokens, total)) for budget, tokens in budgets), everything]
        numbers["utilization_curve"] = [
            (row["tokens"], row["utilization"], row["uniform_utilization"])
            for row in [*(row_at(n, n) for n in curve_tokens(total)[:-1]), everything]
        ]
        return UsageResult(counts, numbers, absent)

    def _row(self, tokens: int, used: list[int]) -> dict[str, Any]:
        shares = [number / self.codebook_size for number in used]
        return {
            "tokens": tokens,
            "utilization": sum(shares) / len(shares),
            "utilization_per_group": shares,
            "uniform_utilization": uniform_utilization(self.codebook_size, tokens),
        }

    def _positions(self, ids: Tensor, start: int | Sequence[int]) -> Tensor:
        """The position of each token of a group in the set, int64[B * N / G], for images of one size. Also counts what
        needs positions: tokens within the budgets, and tuples of ids."""
        per_image = ids.shape[-1] // self.num_groups
        images = torch.arange(start, start + len(ids)) if isinstance(start, int) else torch.tensor([*start])
        if len(images) != len(ids):
            raise DataError(f"{len(images)} positions for {len(ids)} images")
        if len(ids):
            self._lengths.add(per_image)
            self._joint.update(ids.reshape(-1, self.num_groups))
        positions = (images.long()[:, None] * per_image + torch.arange(per_image)).flatten()
        self._within = [n + int((positions < budget).sum()) for n, budget in zip(self._within, BUDGETS, strict=True)]
        return positions.to(self._counts.device, non_blocking=True)

    def _count_sparse(self, grouped: Tensor, positions: Tensor | None) -> None:
        """Gather ids of a huge codebook; they are sorted once there are as many as counted ones."""
        group, place = (grouped >= 0).nonzero(as_tuple=True)
        first = torch.full_like(place, NEVER) if positions is None else positions[place]
        self._unsorted.append(torch.stack([group, grouped[group, place], torch.ones_like(group), first]))
        if sum(part.shape[1] for part in self._unsorted) > max(MIN_SORTED, len(self._counts.values())):
            self._sort()

    def _sort(self) -> None:
        if self._unsorted:
            rows, self._unsorted = torch.cat([self._sparse_rows(), *self._unsorted], dim=1), []
            self._counts = sparse(rows[:2], rows[2], self._counts.shape)
            self._first = earliest(rows, self.codebook_size)

    def _sparse_rows(self) -> Tensor:
        """int64[4, n] of the sparse counts: group, id, how often, first position."""
        values = self._counts.values()
        first = torch.full_like(values, NEVER) if self._first is None else self._first
        return torch.stack([*self._counts.indices(), values, first])

    def _first_positions(self) -> list[Tensor]:
        """For each group int64[n]: the first positions over all ranks of at least its codes in use."""
        if self._counts.is_sparse:
            self._sort()
            rows = gather_rows(self._sparse_rows().T.contiguous()).T
            groups = sparse(rows[:2], rows[2], self._counts.shape).indices()[0]
            first = earliest(rows, self.codebook_size)
            return [first[groups == group] for group in range(self.num_groups)]
        own = torch.full_like(self._counts, NEVER) if self._first is None else self._first
        parts = [gather_rows(part[None].contiguous()).amin(0) for part in own.flatten().split(POSITIONS_AT_ONCE)]
        return list(torch.cat(parts).view_as(own))


def no_counts(num_groups: int, codebook_size: int, device: torch.device | str = "cpu") -> Tensor:
    """int64[G, K] of zeros; sparse above MAX_COUNTERS codes. 2^63 codes are a ConfigError: no int64 numbers them."""
    if num_groups * codebook_size >= 2**63:
        raise ConfigError(f"{num_groups} x {codebook_size} codes are too many to count", "Use fewer")
    if num_groups * codebook_size <= MAX_COUNTERS:
        return torch.zeros(num_groups, codebook_size, dtype=torch.int64, device=device)
    return from_rows(torch.zeros(0, 3, dtype=torch.int64, device=device), num_groups, codebook_size)


def sparse(indices: Tensor, times: Tensor, shape: torch.Size) -> Tensor:
    """int64[2, n] of group and id and int64[n] -> sparse int64[G, K], sorted, the counts of equal ids summed."""
    return torch.sparse_coo_tensor(indices, times, shape, check_invariants=True).coalesce()


def earliest(rows: Tensor, codebook_size: int) -> Tensor:
    """int64[4, n] of group, id, how often and position -> the first position of each code, in the order of `sparse`."""
    codes, at = (rows[0] * codebook_size + rows[1]).unique(return_inverse=True)
    return torch.full_like(codes, NEVER).scatter_reduce_(0, at, rows[3], "amin")


def as_rows(counts: Tensor) -> Tensor:
    """Sparse int64[G, K] -> int64[n, 3]: group, id and how often, sorted."""
    return torch.cat([counts.indices(), counts.values()[None]]).T.contiguous()


def from_rows(rows: Tensor, num_groups: int, codebook_size: int) -> Tensor:
    """Undo `as_rows`; rows of the same code are summed."""
    return sparse(rows[:, :2].T, rows[:, 2], torch.Size((num_groups, codebook_size)))


def times_chosen(counts: Tensor) -> list[Tensor]:
    """int64[G, K] -> for each group int64[n], how often each of its n codes in use was chosen, in codebook order."""
    if counts.is_sparse:
        return [counts[group].coalesce().values() for group in range(len(counts))]
    return [row[row > 0] for row in counts]


def tokens_per_group(counts: Tensor) -> list[int]:
    """The number of tokens of each group in int64[G, K] counts."""
    return [int(times.sum()) for times in times_chosen(counts)]


def dead_codes(counts: Tensor) -> Tensor:
    """Dense int64[G, K] -> int64[n, 2]: group and id of every code that was never chosen, the content of
    `dead-codes.npy`. A DataError for sparse counts: nearly all of so many codes are dead."""
    if counts.is_sparse:
        raise DataError("the dead codes of so large a codebook are not listed", "counts.npy holds the codes in use")
    return (counts == 0).nonzero()


def usage_of(counts: Tensor) -> dict[str, float | list[float]]:
    """Utilization and perplexity of int64[G, K] counts.

    `utilization` is the share of the G x K codes chosen at least once, in [0, 1]; `perplexity_per_group` is
    exp of the entropy of the choices, 1 (one code) to K (all alike).
    """
    times = times_chosen(counts)
    used = [len(row) / counts.shape[1] for row in times]
    return {
        "utilization": sum(used) / len(used),
        "utilization_per_group": used,
        "perplexity_per_group": [math.exp(entropy(row)) for row in times],
    }


def spread_of(counts: Tensor) -> dict[str, list[float] | list[int]]:
    """How unevenly the codes of int64[G, K] counts are chosen, per group, codes never chosen included.

    `gini_per_group`: Gini coefficient of the counts, 0 (all alike) to 1 - 1/K (one code alone);
    `num_dead_per_group`: codes never chosen; `min_count_per_group`, `max_count_per_group`.
    """
    times, size = times_chosen(counts), counts.shape[1]
    return {
        "gini_per_group": [gini(row, size) for row in times],
        "num_dead_per_group": [size - len(row) for row in times],
        "min_count_per_group": [int(row.min()) if len(row) == size else 0 for row in times],
        "max_count_per_group": [int(row.max()) if len(row) else 0 for row in times],
    }


def bits_of(counts: Tensor, num_pixels: int) -> dict[str, float]:
    """Bits of all tokens over all pixels: raw, log2(K) each, and coded by the entropy of each group's counts."""
    times, tokens = times_chosen(counts), tokens_per_group(counts)
    coded = sum(n * entropy(row) / math.log(2) for n, row in zip(tokens, times, strict=True))
    return {
        "bits_per_pixel": sum(tokens) * math.log2(counts.shape[1]) / num_pixels,
        "bits_per_pixel_entropy": coded / num_pixels,
    }


def entropy(times: Tensor) -> float:
    """Entropy of the frequencies of counts int64[n], in nats; as an estimate of the true entropy it is biased low."""
    return float(torch.special.entr(times.double() / times.sum()).sum()) if len(times) else 0.0


def gini(times: Tensor, size: int) -> float:
    """Gini coefficient of `size` counts, of which int64[n] are not zero; 0 where nothing was counted."""
    if not len(times):
        return 0.0
    ascending = times.double().sort().values
    ranks = torch.arange(size - len(times) + 1, size + 1, device=times.device, dtype=torch.float64)
    return max(0.0, float(2 * (ranks * (ascending / ascending.sum())).sum() / size - (size + 1) / size))


def uniform_utilization(codebook_size: int, num_tokens: int) -> float:
    """The expected share of K codes in use after `num_tokens` independent uniform draws: 1 - (1 - 1/K)^n. No coder of
    independent tokens has a higher expectation."""
    if codebook_size == 1 or num_tokens == 0:
        return float(num_tokens > 0)
    return -math.expm1(num_tokens * math.log1p(-1 / codebook_size))


def curve_tokens(num_tokens: int) -> list[int]:
    """At most CURVE_POINTS numbers of tokens from 1 to all, at equal steps of their logarithm."""
    steps = torch.logspace(0, math.log10(max(num_tokens, 1)), CURVE_POINTS, dtype=torch.float64)
    return sorted({min(round(step), num_tokens) for step in steps.tolist()} | {num_tokens}) if num_tokens else []
