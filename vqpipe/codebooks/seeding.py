"""The first centres of k-means, chosen far apart.

k-means++ (Arthur & Vassilvitskii 2007) draws centres one by one, each with probability proportional to its squared
distance from the centres so far: K passes over the data. k-means|| (Bahmani et al. 2012) draws many in each of a few
rounds, more than K in all, then clusters these candidates, each weighing as many vectors as it is nearest to. Here two
to four times K are drawn from a sample, and K of them are drawn again, keeping the best of some tries as in greedy
k-means++. For K = 100,000 that costs as much as one Lloyd iteration on two million vectors.

Ranks share the work, block by block. A random choice is a function of (seed, stage, round), so a saved round is all
that a resumed run needs.
"""

import time

import numpy as np
import torch
from torch import Tensor

from vqpipe.artifacts.saved import Checkpoints, Saved
from vqpipe.codebooks.points import Points
from vqpipe.errors import NumericError
from vqpipe.search import first_copies, nearest

SAMPLE = 8  # times K distinct vectors are looked at for seeding, but
SAMPLE_ROWS, SAMPLE_BYTES = 65_536, 2**30  # at least so many, and at most so many bytes of float32
ROWS = 65_536  # of the sample that a rank takes at a time
SAVE_SECONDS = 30.0  # a round is saved where so much work would be lost without
SEARCH, CHOOSE = (32, 1), (64, 4)  # rounds, and tries in each, that find candidates and that choose among them


def num_candidates(k: int) -> int:
    """How many vectors are drawn to choose K centres from: four times K where that is cheap, else twice."""
    return 2 * k + min(2 * k, 8192)


def sample_rows(num_vectors: int, dim: int, k: int) -> int:
    """How many vectors seeding looks at."""
    room = min(max(SAMPLE * k, SAMPLE_ROWS), SAMPLE_BYTES // (4 * dim))
    return min(num_vectors, max(num_candidates(k), room))


def plusplus_rows(points: Points, k: int, key: tuple[int, ...], checkpoints: Checkpoints) -> np.ndarray:
    """int64[K]: rows of the features, all different in value, spread over them. There are at least K such rows.

    `key` is what random choices are a function of. Rounds are saved as series "candidates" and "choice".
    """
    features = points.features
    room = sample_rows(features.num_vectors, features.dim, k)
    if features.num_vectors <= room:
        rows = np.arange(features.num_vectors)
    else:
        random = np.random.default_rng((*key, 0))
        rows = np.sort(random.choice(points.distinct, min(room, len(points.distinct)), replace=False))
    sample = features.take(rows).to(points.device)
    search = Spread(points, sample, torch.ones(len(rows), dtype=torch.int64), (*key, 1), checkpoints, "candidates")
    search.draw(num_candidates(k), *SEARCH)
    weights = torch.bincount(search.owner, minlength=len(search.chosen))
    some = sample[search.chosen.to(points.device)]
    del sample
    choice = Spread(points, some, weights.clamp(min=1), (*key, 2), checkpoints, "choice")
    choice.draw(k, *CHOOSE)
    if len(choice.chosen) < k:
        raise NumericError(
            f"only {len(choice.chosen)} of k = {k} first centres differ by more than float32 shows", "Use a smaller k"
        )
    return rows[search.chosen[choice.chosen].numpy()]


class Spread:
    """Vectors drawn one round after another, each by its weight times its squared distance to those drawn before.

    It begins where `checkpoints` left off; the first vector of all is drawn by weight alone.

    Attributes:
        chosen: int64[C], indices into the vectors, all different in value.
        squared: float64[R] on the CPU: each vector's squared distance to the nearest that is chosen.
        owner: int64[R] on the CPU: which of the chosen that is.
    """

    def __init__(
        self,
        points: Points,
        vectors: Tensor,
        weights: Tensor,
        key: tuple[int, ...],
        checkpoints: Checkpoints,
        series: str,
    ) -> None:
        self.points, self.vectors, self.weights, self.key = points, vectors, weights, key
        self.checkpoints, self.series = checkpoints, series
        nothing = torch.zeros(0, dtype=torch.int64)
        saved = checkpoints.newest(series, points.device) or Saved(0, {"chosen": nothing})
        self.round, self.chosen = saved.step, saved.tensors["chosen"]
        self.squared = saved.tensors.get("squared", torch.ones(len(vectors), dtype=torch.float64))
        self.owner = saved.tensors.get("owner", nothing)

    def draw(self, count: int, rounds: int, tries: int) -> None:
        """Go on until `count` are chosen (fewer where fewer differ), in `rounds` rounds at least.

        In each, the best of `tries` draws is kept: the one that leaves the smallest sum.
        """
        batch = max(1, count // rounds)
        left = -(-(count - len(self.chosen)) // batch)
        self.points.watch.phase(f"first centres: {self.series}", left * tries * len(self.vectors))
        if self.round == 0:
            self.take(1, 1)
        saved_at = time.monotonic()
        while len(self.chosen) < count and bool(self.squared.any()):
            self.take(min(batch, count - len(self.chosen)), tries)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def take(self, count: int, tries: int) -> None:
        """One round: `count` more, less those that are copies of each other."""
        random = np.random.default_rng((*self.key, self.round))
        best = float("inf")
        for _ in range(tries):
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
        self.round += 1

    def save(self) -> None:
        """Save this round."""
        tensors = {"chosen": self.chosen, "squared": self.squared, "owner": self.owner}
        self.checkpoints.save(self.series, Saved(self.round, tensors))

    def measure(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance of each vector to the nearest of those at `indices`, and which of them that is."""
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
            points.watch.advance(min(points.ranks * ROWS, len(self.vectors) - start))
        return points.total(squared), points.total(owner)


def without_copies(points: Tensor, indices: Tensor) -> Tensor:
    first = first_copies(points[indices.to(points.device)])
    return indices if first is None else indices[first.unique().cpu()]


def weighted_draw(weights: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """`count` different indices (fewer if fewer have weight), each draw proportional to `weights`, float64[R] >= 0.

    An exponential clock per index, ticking at the rate of its weight: the first to ring are a weighted sample without
    replacement (Efraimidis & Spirakis 2006).
    """
    clocks = torch.from_numpy(random.exponential(size=len(weights))) / weights
    times, indices = clocks.topk(min(count, len(clocks)), largest=False)
    return indices[torch.isfinite(times)]
