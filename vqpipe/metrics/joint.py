"""How often ids of several groups occur together: the joint entropy of the tokens at one position.

Each group's entropy says how much its ids tell; their sum says how much all tell only if no group repeats another.
Letters: n positions, G groups, K codes a group, W words that hold a tuple of G ids.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vqpipe.distributed import gather_objects, gather_rows, world_size
from vqpipe.metrics.state import Accumulator, State

MOST_TUPLES = 2**24
"""Distinct tuples of G ids over all ranks up to which they are counted. A tuple takes 16 bytes where it fits 63 bits, 8
more for every 63 bits more, and three times that while merging. All positions of 50,000 images of 256 fit."""
MOST_WAITING = 2**18
"""Tuples that are gathered before they are merged into the sorted counts, at the least."""
MIXER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number whose bits look random: a product with it shares tuples out evenly."""


class JointCounts(Accumulator):
    """Exact counts of the tuples of G ids at one position, for G > 1, up to MOST_TUPLES; beyond, they are given up."""

    accumulates: ClassVar[tuple[str, ...]] = ("rows", "given_up")

    def __init__(self, num_groups: int, codebook_size: int) -> None:
        self.num_groups = num_groups
        self.bits = max(1, (codebook_size - 1).bit_length())
        self.per_word = 63 // self.bits
        self.rows = np.zeros((0, -(-num_groups // self.per_word) + 1), dtype=np.int64)
        """int64[n, W + 1]: the words of each distinct tuple, sorted, and how often it occurred."""
        self.waiting: list[np.ndarray] = []
        self.given_up = False

    def update(self, ids: Tensor) -> None:
        """Take in int64[n, G]. A position with a negative id (a group left out) is not counted."""
        if self.num_groups == 1 or self.given_up:
            return
        ids = ids[(ids >= 0).all(1)].cpu()
        words = [self._word(part) for part in ids.split(self.per_word, dim=1)]
        self.waiting.append(torch.stack([*words, torch.ones_like(words[0])], dim=1).numpy())
        if sum(map(len, self.waiting)) > max(MOST_WAITING, len(self.rows)):
            self._merge()

    def state(self) -> State:
        self._merge()
        return super().state()

    def report(self, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
        """Numbers over all ranks, and the reason where they are left out; nothing at all for one group.

        `joint_entropy`: in bits a position, of the frequencies as counted. It is too low, most so where tuples are
        seen about once: n positions cannot show more than `joint_entropy_limit` = log2(n) bits. `joint_entropy_bias` is
        the first term of what is missing, (distinct - 1) / 2n nats (Miller 1955), good only while `joint_coverage` is
        near 1: the share of the next position's probability that lies on tuples seen so far, 1 - singletons / n (Good
        1953). `joint_distinct`: different tuples seen.

        Args:
            device: where this process's tensors are exchanged with other ranks.
        """
        if self.num_groups == 1:
            return {}, {}
        self._merge()
        if any(gather_objects(self.given_up)):
            return {}, {"joint_entropy": too_many()}
        places = mixed(self.rows[:, :-1]) % np.uint64(world_size())
        positions, distinct, once, weighted = 0, 0, 0, 0.0
        for part in range(world_size()):  # of one share of the tuples at a time, all ranks' counts
            own = torch.from_numpy(self.rows[places == part]).to(device)
            times = counted(gather_rows(own).cpu().numpy())[:, -1]
            positions, distinct, once = (
                positions + int(times.sum()),
                distinct + len(times),
                once + int((times == 1).sum()),
            )
            weighted += float((times * np.log2(times)).sum())
        if distinct > MOST_TUPLES:  # as one process would have found
            return {}, {"joint_entropy": too_many()}
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

    def _merge(self) -> None:
        if self.waiting:
            self.rows, self.waiting = counted(np.concatenate([self.rows, *self.waiting])), []
        if len(self.rows) > MOST_TUPLES:
            self.rows, self.given_up = self.rows[:0].copy(), True


def counted(rows: np.ndarray) -> np.ndarray:
    """int64[n, W + 1] of words and counts -> the distinct words, sorted, their counts added up."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort(rows[:, :-1].T)]
    begins = np.flatnonzero(np.append(True, (rows[1:, :-1] != rows[:-1, :-1]).any(1)))
    return np.column_stack([rows[begins, :-1], np.add.reduceat(rows[:, -1], begins)])


def mixed(words: np.ndarray) -> np.ndarray:
    """int64[n, W] -> uint64[n], the same for equal rows and spread evenly."""
    total = np.zeros(len(words), dtype=np.uint64)
    for column in words.T:
        total = (total ^ column.astype(np.uint64)) * MIXER
    return total >> np.uint64(32)


def too_many() -> str:
    return f"more than {MOST_TUPLES:,} different tuples of ids: their counts would not fit the memory set aside"
