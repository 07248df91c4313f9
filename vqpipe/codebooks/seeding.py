"""Initial centers of k-means, chosen far apart.

k-means++ (Arthur & Vassilvitskii 2007) draws centers one by one, each with probability proportional to its squared
distance to the centers so far: K passes over the data. k-means|| (Bahmani et al. 2012) draws many in each of a few
rounds, more than K in total, then clusters these candidates, each weighted by the number of vectors nearest to it. Here
2 K to 4 K candidates are drawn from a sample, then K of the candidates, keeping the best of several trials as in greedy
k-means++. For K = 100,000 that takes as long as one Lloyd iteration on two million vectors.

Ranks share the work, block by block. A random choice is a function of (seed, series, round), so a saved round is all
that a resumed run needs.
"""

import numpy as np
import torch
from torch import Tensor

from vqpipe.codebooks.lloyd import PART, UNSAVED, CollectiveStates, Points
from vqpipe.errors import NumericError
from vqpipe.search import first_copies, nearest

SAMPLE, SAMPLE_ROWS, SAMPLE_BYTES = 8, 65_536, 2**30
"""Size of the sample: so many vectors in units of K, but at least SAMPLE_ROWS, and at most SAMPLE_BYTES of float32."""
ROWS = 65_536
"""Rows of the sample that a rank takes at a time."""
SAVE_SECONDS = 30.0
"""Seconds between saved rounds."""
CANDIDATES, CHOICE = (32, 1), (64, 4)
"""(rounds, trials per round) to draw the candidates, and to choose among them."""
TITLES = {"candidates": "drawing candidate centers", "choice": "choosing initial centers"}
"""Series -> what its progress is called."""


def num_candidates(k: int) -> int:
    """How many candidates are drawn for K centers: 4 K up to K = 4,096, then 2 K + 8,192."""
    return 2 * k + min(2 * k, 8192)


def sample_rows(num_vectors: int, dim: int, k: int) -> int:
    """Size of the sample that candidates are drawn from."""
    room = min(max(SAMPLE * k, SAMPLE_ROWS), SAMPLE_BYTES // (4 * dim))
    return min(num_vectors, max(num_candidates(k), room))


def plusplus_rows(points: Points, k: int, key: tuple[int, ...], states: CollectiveStates = UNSAVED) -> np.ndarray:
    """int64[K]: rows of the features, distinct in value and far apart. There are at least K distinct vectors.

    `key` seeds the random choices. Rounds are saved as series "candidates" and "choice".
    """
    features = points.features
    room = sample_rows(features.num_vectors, features.dim, k)
    if features.num_vectors <= room:
        rows = np.arange(features.num_vectors)
    else:
        random = np.random.default_rng((*key, 0))
        rows = np.sort(random.choice(points.distinct, min(room, len(points.distinct)), replace=False))
    sample = features.take(rows).to(points.device)
    ones = torch.ones(len(rows), dtype=torch.int64)
    candidates = SeedingRounds(points, sample, ones, (*key, 1), states, "candidates")
    candidates.run(num_candidates(k), *CANDIDATES)
    weights = torch.bincount(candidates.owner, minlength=len(candidates.chosen))
    vectors = sample[candidates.chosen.to(points.device)]
    del sample
    choice = SeedingRounds(points, vectors, weights.clamp(min=1), (*key, 2), states, "choice")
    choice.run(k, *CHOICE)
    if len(choice.chosen) < k:
        raise NumericError(f"only {len(choice.chosen)} of k = {k} initial centers differ in float32", "Use a smaller k")
    return rows[candidates.chosen[choice.chosen].numpy()]


class SeedingRounds:
    """Vectors drawn in rounds, each by its weight times its squared distance to those drawn before.

    It resumes from the newest saved round. The first vector is drawn by weight alone.

    Attributes:
        chosen: int64[C], indices into the vectors, all distinct in value.
        squared: float64[R] on the CPU: squared distance of each vector to the nearest chosen one.
        owner: int64[R] on the CPU: index in `chosen` of that one.
    """

    def __init__(
        self,
        points: Points,
        vectors: Tensor,
        weights: Tensor,
        key: tuple[int, ...],
        states: CollectiveStates = UNSAVED,
        series: str = "",
    ) -> None:
        self.points, self.vectors, self.weights, self.key = points, vectors, weights, key
        self.states, self.series = states, series
        none = torch.zeros(0, dtype=torch.int64)
        saved = states.newest(series)
        tensors = {} if saved is None else saved.parts[PART]
        self.round = 0 if saved is None else saved.step
        self.chosen = tensors.get("chosen", none)
        self.squared = tensors.get("squared", torch.ones(len(vectors), dtype=torch.float64))
        self.owner = tensors.get("owner", none)

    def run(self, count: int, rounds: int, trials: int) -> None:
        """Draw until `count` vectors are chosen (fewer if fewer are distinct), in at least `rounds` rounds.

        Each round keeps the best of `trials` draws: the one with the smallest sum of weighted distances.
        """
        batch = max(1, count // rounds)
        self.points.progress.start(TITLES.get(self.series, "drawing"), count, "vectors", len(self.chosen))
        if self.round == 0:
            self.draw(1, 1)
        while len(self.chosen) < count and bool(self.squared.any()):
            self.draw(min(batch, count - len(self.chosen)), trials)
            self.save(SAVE_SECONDS)
        self.save()

    def draw(self, count: int, trials: int) -> None:
        """One round: `count` more vectors, less those that are copies of each other."""
        random = np.random.default_rng((*self.key, self.round))
        best = float("inf")
        for _ in range(trials):
            drawn = weighted_draw(self.squared * self.weights, count, random)
            drawn = without_copies(self.vectors, drawn)
            squared, owner = self.measure(drawn)
            if len(self.chosen):
                closer = squared < self.squared
                squared = torch.where(closer, squared, self.squared)
                owner = torch.where(closer, owner + len(self.chosen), self.owner)
            left = float((squared * self.weights).numpy().sum())  # NumPy's sum is the same on any number of threads
            if left < best:
                best, kept = left, (drawn, squared, owner)
        drawn, self.squared, self.owner = kept
        self.chosen = torch.cat([self.chosen, drawn])
        self.points.progress.advance(len(drawn))
        self.round += 1

    def save(self, seconds: float = 0.0) -> None:
        """Save this round, unless one was saved less than `seconds` ago."""
        tensors = {"chosen": self.chosen, "squared": self.squared, "owner": self.owner}
        self.states.save(self.series, self.round, tensors, seconds=seconds)

    def measure(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance of each vector to the nearest of those at `indices`, and the position of that one."""
        points = self.points
        codes = self.vectors[indices.to(points.device)]
        squared = torch.zeros(len(self.vectors), dtype=torch.float64)
        owner = torch.zeros(len(self.vectors), dtype=torch.int64)
        starts = range(0, len(self.vectors), ROWS)
        for start in starts[points.rank :: points.ranks]:
            here = slice(start, start + ROWS)
            ids = nearest(self.vectors[here], codes)
            squared[here] = codes[ids].sub_(self.vectors[here]).square_().sum(dim=1).cpu().double()
            owner[here] = ids.cpu()
        return points.all_reduce(squared), points.all_reduce(owner)


def without_copies(vectors: Tensor, indices: Tensor) -> Tensor:
    """`indices` without those of vectors equal to an earlier one."""
    first = first_copies(vectors[indices.to(vectors.device)])
    return indices if first is None else indices[first.unique().cpu()]


def weighted_draw(weights: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """`count` different indices (fewer if fewer have weight), each draw proportional to `weights`, float64[R] >= 0.

    Weighted sampling without replacement (Efraimidis & Spirakis 2006): each index gets an exponentially distributed
    number with its weight as rate, and the indices of the smallest numbers are the sample.
    """
    numbers = torch.from_numpy(random.exponential(size=len(weights))) / weights
    smallest, indices = numbers.topk(min(count, len(numbers)), largest=False)
    return indices[torch.isfinite(smallest)]
