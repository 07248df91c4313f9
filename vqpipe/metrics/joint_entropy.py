"""The joint entropy of the groups of a codebook, from exact counts of the tuples of ids that occur together.

Shapes: G groups, K codes per group, n positions, W words that hold a tuple of G ids.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vqpipe.distributed import gather_objects, gather_rows, world_size
from vqpipe.metrics.resumable import Resumable, State

MAX_TUPLES = 2**24
"""Distinct tuples of G ids over all ranks up to which they are counted. A tuple takes 16 bytes if it fits 63 bits, 8
more for every further 63 bits, and three times that while sorting. All positions of 50,000 images of 256 tokens fit."""
MIN_SORTED_TUPLES = 2**18
"""Smallest number of tuples that are sorted into the counts at once."""
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""An odd number of random bits: products with it distribute tuples uniformly over the ranks."""


class JointEntropy(Resumable):
    """Joint entropy of the groups, for G > 1, from exact counts of the tuples of G ids at one position. With more than
    MAX_TUPLES distinct tuples it is not computed.

    The sum of the groups' entropies is their joint entropy only if the groups are independent.
    """

    state_names: ClassVar[tuple[str, ...]] = ("rows", "given_up")

    def __init__(self, num_groups: int, codebook_size: int) -> None:
        self.num_groups = num_groups
        self.bits = max(1, (codebook_size - 1).bit_length())
        self.per_word = 63 // self.bits
        self.rows = np.zeros((0, -(-num_groups // self.per_word) + 1), dtype=np.int64)
        """int64[n, W + 1]: the words of each distinct tuple, sorted, and its count."""
        self.unsorted: list[np.ndarray] = []
        self.given_up = False

    def update(self, ids: Tensor) -> None:
        """Count int64[n, G]. A position with a negative id (a group left out) is not counted."""
        if self.num_groups == 1 or self.given_up:
            return
        ids = ids[(ids >= 0).all(1)].cpu()
        words = [self._word(part) for part in ids.split(self.per_word, dim=1)]
        self.unsorted.append(torch.stack([*words, torch.ones_like(words[0])], dim=1).numpy())
        if sum(map(len, self.unsorted)) > max(MIN_SORTED_TUPLES, len(self.rows)):
            self._sort()

    def state(self) -> State:
        self._sort()
        return super().state()

    def compute(self, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
        """Numbers over all ranks, and the reason where they are not computed; nothing for one group.

        `joint_entropy`: bits per position, of the counted frequencies. It is biased low, most so if most tuples occur
        once: with n positions it is at most `joint_entropy_limit` = log2(n) bits. `joint_entropy_bias` is the first
        term of the bias, (distinct - 1) / 2n nats (Miller 1955), valid only if `joint_coverage` is near 1: the
        probability that the next position has a tuple that occurred before, 1 - singletons / n (Good 1953).
        `joint_distinct`: the number of different tuples.

        Args:
            device: of the tensors that are exchanged with other ranks.
        """
        if self.num_groups == 1:
            return {}, {}
        self._sort()
        if any(gather_objects(self.given_up)):
            return {}, {"joint_entropy": too_many_tuples()}
        owner = hashed(self.rows[:, :-1]) % np.uint64(world_size())
        positions, distinct, once, weighted = 0, 0, 0, 0.0
        for part in range(world_size()):  # all ranks' counts of one share of the tuples at a time
            own = torch.from_numpy(self.rows[owner == part]).to(device)
            times = summed_rows(gather_rows(own).cpu().numpy())[:, -1]
            positions += int(times.sum())
            distinct += len(times)
            once += int((times == 1).sum())
            weighted += float((times * np.log2(times)).sum())
        if distinct > MAX_TUPLES:  # the same decision as on one rank
            return {}, {"joint_entropy": too_many_tuples()}
        if positions == 0:
            return {}, {"joint_entropy": "no position has an id of every group"}
        return {
            "joint_entropy": math.log2(positions) - weighted / positions,
            "joint_entropy_limit": math.log2(positions),
            "joint_entropy_bias": (distinct - 1) / (2 * positions * math.log(2)),
            "joint_coverage": 1 - once / positions,
            "joint_distinct": distinct,
        }, {}

    def _word(self, ids: Tensor) -> Tensor:
        """int64[n, at most 63 / bits] -> int64[n]."""
        word = torch.zeros(len(ids), dtype=torch.int64)
        for column in ids.unbind(1):
            word = (word << self.bits) | column
        return word

    def _sort(self) -> None:
        if self.unsorted:
            self.rows, self.unsorted = summed_rows(np.concatenate([self.rows, *self.unsorted])), []
        if len(self.rows) > MAX_TUPLES:
            self.rows, self.given_up = self.rows[:0].copy(), True


def summed_rows(rows: np.ndarray) -> np.ndarray:
    """int64[n, W + 1] of words and counts -> the distinct words, sorted, with the sums of their counts."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort(rows[:, :-1].T)]
    begins = np.flatnonzero(np.append(True, (rows[1:, :-1] != rows[:-1, :-1]).any(1)))
    return np.column_stack([rows[begins, :-1], np.add.reduceat(rows[:, -1], begins)])


def hashed(words: np.ndarray) -> np.ndarray:
    """int64[n, W] -> uint64[n], the same for equal rows and spread uniformly."""
    total = np.zeros(len(words), dtype=np.uint64)
    for column in words.T:
        total = (total ^ column.astype(np.uint64)) * HASH_FACTOR
    return total >> np.uint64(32)


def too_many_tuples() -> str:
    return f"more than {MAX_TUPLES:,} different tuples of ids: their counts exceed the memory set aside for them"
