"""How much of the codebook a set of images uses: utilization at stated numbers of tokens, perplexity, bits per pixel.

A utilization says little without the number of tokens it was counted over: a coder that draws its codes evenly reaches
86.5 % of 32,768 codes with 65,536 tokens, and all of them with a million. So every utilization stands beside that of
such a coder (`uniform_utilization`), at the budgets of BUDGETS and over the whole set.

Letters: B images, N tokens an image, G groups, K codes a group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqpipe.distributed import all_reduce_sum, gather_objects, gather_rows
from vqpipe.errors import ConfigError, DataError
from vqpipe.metrics.joint import JointCounts
from vqpipe.metrics.state import Accumulator, State

MOST_COUNTERS = 2**24
"""G x K up to which every code has a counter (128 MiB in all, twice that where places are kept). Beyond, as with grids
of fixed codes that may have 2^36, only the codes that occur have one: 24 bytes each, three times that while merging."""
MOST_WAITING = 2**20
"""Ids of a huge codebook that are gathered before they are merged into the sorted counts, at the least."""
BUDGETS = (65_536, 1_048_576)
"""Numbers of tokens of one group, from the set's beginning, after which codes in use are counted. The first is the
window that LlamaGen's and MGVQ's released training code counts over."""
CURVE_POINTS = 64
"""Points of the curve of codes in use against tokens, at the most."""
NEVER = 2**63 - 1
"""Place of a code that was not chosen."""
PLACES_AT_ONCE = 2**20
"""Codes whose places are compared over the ranks together."""


class CodeUsage(Accumulator):
    """How often each code of each group was chosen, over any number of images; exact for codebooks of any size.

    `counts` is int64[G, K] on `device`: dense up to MOST_COUNTERS codes, else sparse (COO, coalesced), its memory
    growing with the number of distinct ids. Where `update` is told which images it sees, three more things are kept:
    the place in the set of each code's first token, how many tokens lie within each budget, and, with groups, how
    often they occur together (`JointCounts`). Training tells nothing, and pays for the counts alone.
    """

    def __init__(self, codebook_size: int, num_groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.codebook_size = codebook_size
        self.num_groups = num_groups
        self._counts = no_counts(num_groups, codebook_size, device)
        self._waiting: list[Tensor] = []  # int64[4, n] each: group, id, how often, first place; not merged yet
        self._first: Tensor | None = None  # int64[G, K], or int64[n] beside the values of sparse counts
        self._joint = JointCounts(num_groups, codebook_size)
        self._lengths: set[int] = set()  # tokens of one group an image has, of images whose place is known
        self._within = [0] * len(BUDGETS)  # tokens of one group whose place is below each budget
        self._lost = False  # the place of some image is not known

    @property
    def counts(self) -> Tensor:
        """int64[G, K] so far."""
        self._merge_waiting()
        return self._counts

    def update(self, ids: Tensor, *, start: int | Sequence[int] | None = None, trusted: bool = False) -> None:
        """Take in int64[B, N], groups last as in every token layout. A negative id (a group left out) is not counted.

        Args:
            start: the place of the first of these images in the whole set, 0 for its first image, the others following
                it; or the place of each. None: places are not kept, and nothing is said at budgets or of joint ids.
            trusted: the ids come straight from a quantizer and are not looked at first, so that no GPU is waited for.

        Raises:
            DataError: an id of K or more, N is not a multiple of G, or there are not as many places as images.
        """
        if ids.shape[-1] % self.num_groups:
            raise DataError(f"{ids.shape[-1]} tokens an image do not divide into {self.num_groups} groups")
        grouped = ids.to(self._counts.device).reshape(-1, self.num_groups).T  # int64[G, B * N / G]
        careless = trusted and not self._counts.is_sparse and grouped.is_cuda
        if not careless and grouped.numel() and int(grouped.max()) >= self.codebook_size:
            raise DataError(f"token id {int(grouped.max())} is outside a codebook of {self.codebook_size}")
        self._lost = self._lost or start is None
        places = None if start is None else self._place(ids, start)
        if self._counts.is_sparse:
            return self._wait(grouped, places)
        if places is not None:
            self._first = torch.full_like(self._counts, NEVER) if self._first is None else self._first
            seen = torch.where(grouped >= 0, places, NEVER)
            self._first.scatter_reduce_(1, grouped.clamp(min=0), seen, "amin")
        if careless:
            self._counts.scatter_add_(1, grouped.clamp(min=0), (grouped >= 0).long())
            return None
        for counts, row in zip(self._counts, grouped, strict=True):
            counts += torch.bincount(row[row >= 0], minlength=self.codebook_size)
        return None

    def state(self) -> State:
        counts = self.counts
        return {
            "counts": as_rows(counts) if counts.is_sparse else counts,
            "first": self._first,
            "joint": self._joint.state(),
            "lengths": sorted(self._lengths),
            "within": self._within,
            "lost": self._lost,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        device, counts, first = self._counts.device, state["counts"], state["first"]
        if self._counts.is_sparse:
            self._counts = from_rows(counts.to(device), self.num_groups, self.codebook_size)
        else:
            self._counts = counts.to(device)
        self._first = None if first is None else first.to(device)
        self._waiting = []
        self._joint.load(state["joint"])
        self._lengths, self._within, self._lost = set(state["lengths"]), state["within"], state["lost"]

    def merged(self) -> Tensor:
        """The counts of all ranks together: int64[G, K], on every rank."""
        if self._counts.is_sparse:
            return from_rows(gather_rows(as_rows(self.counts)), self.num_groups, self.codebook_size)
        return all_reduce_sum(self._counts.clone())

    def report(self, counts: Tensor, num_pixels: int) -> tuple[dict[str, Any], dict[str, str]]:
        """Every number about codes, over all ranks, and the reason of each that is left out. Call it on every rank.

        Beside what `usage_of`, `spread_of` and `JointCounts.report` give:
        `bits_per_pixel`: log2(K) bits a token; `bits_per_pixel_entropy`: what an ideal coder of order 0 would need that
        knows each group's frequencies, H bits a token, H being the entropy of these very counts (so a little too low).
        `utilization_at`: a row for each budget the set reaches, and one for the whole set: `tokens` (those counted, of
        one group), `utilization`, `utilization_per_group`, and `uniform_utilization`, the ceiling.
        `utilization_curve`: (tokens, utilization, uniform_utilization) at growing numbers of tokens, for a plot. Where
        it is left out, so are the rows of the budgets. An image that was skipped leaves a gap in the set's order: a
        budget ends where it would have ended with it, and says how many tokens were counted.

        Args:
            counts: `merged()`.
            num_pixels: H x W, summed over all images on all ranks.
        """
        shared = gather_objects((self._lost, self._lengths, self._within))
        numbers = usage_of(counts) | spread_of(counts) | bits_of(counts, num_pixels)
        whole = max(tokens_per_group(counts))
        everything = self._row(whole, [len(times) for times in times_chosen(counts)])
        if any(share[0] for share in shared):
            unknown = "the places of the images in the set are not known"
            names = ("utilization_curve", "joint_entropy") if self.num_groups > 1 else ("utilization_curve",)
            return numbers | {"utilization_at": [everything]}, dict.fromkeys(names, unknown)
        joint, absent = self._joint.report(counts.device)
        if len(set().union(*(share[1] for share in shared))) > 1:
            absent["utilization_curve"] = "images of several sizes: how many tokens lie before one is not known"
            return numbers | joint | {"utilization_at": [everything]}, absent
        within = [sum(share[2][number] for share in shared) for number in range(len(BUDGETS))]
        firsts = self._firsts_of_all()
        rows = [
            self._row(min(tokens, whole), [int((first < budget).sum()) for first in firsts])
            for budget, tokens in zip(BUDGETS, within, strict=True)
            if whole >= budget
        ]
        points = [self._row(n, [int((first < n).sum()) for first in firsts]) for n in curve_places(whole)[:-1]]
        curve = [(row["tokens"], row["utilization"], row["uniform_utilization"]) for row in [*points, everything]]
        return numbers | joint | {"utilization_at": [*rows, everything], "utilization_curve": curve}, absent

    def _row(self, tokens: int, used: list[int]) -> dict[str, Any]:
        shares = [number / self.codebook_size for number in used]
        return {
            "tokens": tokens,
            "utilization": sum(shares) / len(shares),
            "utilization_per_group": shares,
            "uniform_utilization": uniform_utilization(self.codebook_size, tokens),
        }

    def _place(self, ids: Tensor, start: int | Sequence[int]) -> Tensor:
        """int64[B * N / G]: the place of each position among those of the whole set, all images being of one size."""
        per_image = ids.shape[-1] // self.num_groups
        images = torch.arange(start, start + len(ids)) if isinstance(start, int) else torch.tensor([*start])
        if len(images) != len(ids):
            raise DataError(f"{len(images)} places for {len(ids)} images")
        if len(ids):
            self._lengths.add(per_image)
            self._joint.update(ids.reshape(-1, self.num_groups))
        places = (images.long()[:, None] * per_image + torch.arange(per_image)).flatten()
        self._within = [n + int((places < budget).sum()) for n, budget in zip(self._within, BUDGETS, strict=True)]
        return places.to(self._counts.device, non_blocking=True)

    def _wait(self, grouped: Tensor, places: Tensor | None) -> None:
        """Put ids of a huge codebook aside; as many wait as are sorted, so that each is sorted rarely."""
        group, place = (grouped >= 0).nonzero(as_tuple=True)
        first = torch.full_like(place, NEVER) if places is None else places[place]
        self._waiting.append(torch.stack([group, grouped[group, place], torch.ones_like(group), first]))
        if sum(part.shape[1] for part in self._waiting) > max(MOST_WAITING, len(self._counts.values())):
            self._merge_waiting()

    def _merge_waiting(self) -> None:
        if self._waiting:
            known = torch.full_like(self._counts.values(), NEVER) if self._first is None else self._first
            old = torch.stack([*self._counts.indices(), self._counts.values(), known])
            rows, self._waiting = torch.cat([old, *self._waiting], dim=1), []
            self._counts = sparse(rows[:2], rows[2], self._counts.shape)
            self._first = earliest(rows, self.codebook_size)

    def _firsts_of_all(self) -> list[Tensor]:
        """For each group int64[n]: the first places over all ranks, those of its codes in use at the least."""
        if self._counts.is_sparse:
            counts = self.counts
            known = torch.full_like(counts.values(), NEVER) if self._first is None else self._first
            rows = gather_rows(torch.stack([*counts.indices(), counts.values(), known]).T.contiguous()).T
            groups = sparse(rows[:2], rows[2], counts.shape).indices()[0]
            first = earliest(rows, self.codebook_size)
            return [first[groups == group] for group in range(self.num_groups)]
        own = torch.full_like(self._counts, NEVER) if self._first is None else self._first
        parts = [gather_rows(part[None].contiguous()).amin(0) for part in own.flatten().split(PLACES_AT_ONCE)]
        return list(torch.cat(parts).view_as(own))


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


def earliest(rows: Tensor, codebook_size: int) -> Tensor:
    """int64[4, n] of group, id, how often and first place -> the least place of each code, in the order of `sparse`."""
    codes, at = (rows[0] * codebook_size + rows[1]).unique(return_inverse=True)
    return torch.full_like(codes, NEVER).scatter_reduce_(0, at, rows[3], "amin")


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


def tokens_per_group(counts: Tensor) -> list[int]:
    """How many tokens of each group are in int64[G, K] counts."""
    return [int(times.sum()) for times in times_chosen(counts)]


def dead_codes(counts: Tensor) -> Tensor:
    """Dense int64[G, K] -> int64[n, 2]: group and id of every code that was never chosen, the content of
    `dead-codes.npy`. Of sparse counts, all but the n codes in use are dead: a list would not fit, so a DataError."""
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
    """Entropy of counts int64[n], in nats: of these very frequencies, which is biased towards 0."""
    return float(torch.special.entr(times.double() / times.sum()).sum()) if len(times) else 0.0


def gini(times: Tensor, size: int) -> float:
    """Gini coefficient of `size` counts, of which int64[n] are not zero; 0 where nothing was counted."""
    if not len(times):
        return 0.0
    rising = times.double().sort().values
    ranks = torch.arange(size - len(times) + 1, size + 1, device=times.device, dtype=torch.float64)
    return max(0.0, float(2 * (ranks * (rising / rising.sum())).sum() / size - (size + 1) / size))


def uniform_utilization(codebook_size: int, num_tokens: int) -> float:
    """The share of K codes that a coder is expected to use at least once which draws each of `num_tokens` tokens evenly
    and by itself: 1 - (1 - 1/K)^n. No coder whose tokens are as good as independent can be expected to use more."""
    if codebook_size == 1 or num_tokens == 0:
        return float(num_tokens > 0)
    return -math.expm1(num_tokens * math.log1p(-1 / codebook_size))


def curve_places(num_tokens: int) -> list[int]:
    """At most CURVE_POINTS numbers of tokens from 1 to all, even in their logarithm."""
    steps = torch.logspace(0, math.log10(max(num_tokens, 1)), CURVE_POINTS, dtype=torch.float64)
    return sorted({min(round(step), num_tokens) for step in steps.tolist()} | {num_tokens}) if num_tokens else []


def bits_per_pixel(num_tokens: int, codebook_size: int, height: int, width: int) -> float:
    """Raw cost of an image's tokens: N log2(K) bits over H x W pixels."""
    return num_tokens * math.log2(codebook_size) / (height * width)
