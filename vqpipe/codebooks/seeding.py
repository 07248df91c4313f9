"""The first centres of k-means, chosen far apart.

k-means++ (Arthur & Vassilvitskii 2007) draws centres one by one, each with probability proportional to its squared
distance from the centres so far: K passes over the data. k-means|| (Bahmani et al. 2012) draws many in each of a few
rounds, more than K in all, then clusters these candidates, each weighing as many vectors as it is nearest to. Here two
to four times K are drawn, and K of them are drawn again, keeping the best of four tries as in greedy k-means++.
"""

import numpy as np
import torch
from torch import Tensor

from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.errors import NumericError
from vqpipe.search import first_copies, nearest

SAMPLE = 16  # times K distinct vectors are looked at for seeding, but
SAMPLE_ROWS, SAMPLE_BYTES = 65_536, 2**30  # at least so many, and at most so many bytes of float32


def plusplus_rows(
    features: FeatureSet, distinct: np.ndarray, k: int, random: np.random.Generator, device: torch.device
) -> np.ndarray:
    """int64[K]: rows of `features`, all different in value, spread over them. `distinct` holds at least K rows."""
    wanted = 2 * k + min(2 * k, 8192)  # candidates; four times K where that is cheap
    room = max(wanted, min(max(SAMPLE * k, SAMPLE_ROWS), SAMPLE_BYTES // (4 * features.dim)))
    if features.num_vectors <= room:
        rows = np.arange(features.num_vectors)
    else:
        rows = np.sort(random.choice(distinct, min(room, len(distinct)), replace=False))
    points = features.take(rows).to(device)
    candidates = spread(points, torch.ones(len(rows)), wanted, 32, 1, random)
    ids = nearest(points, points[candidates.to(device)]).cpu()
    weights = torch.bincount(ids, minlength=len(candidates)).clamp(min=1)
    chosen = spread(points[candidates.to(device)], weights, k, 64, 4, random)
    if len(chosen) < k:
        raise NumericError(
            f"only {len(chosen)} of k = {k} first centres differ by more than float32 shows", "Use a smaller k"
        )
    return rows[candidates[chosen].numpy()]


def spread(points: Tensor, weights: Tensor, count: int, rounds: int, tries: int, random: np.random.Generator) -> Tensor:
    """Indices of `count` points (fewer where fewer differ), drawn by weight times squared distance to those before.

    In each of `rounds` rounds at least, the best of `tries` draws is kept: the one that leaves the smallest sum.
    """
    batch = max(1, count // rounds)
    chosen = draw(weights.double(), 1, random)
    squared = squared_distances(points, chosen)
    while len(chosen) < count and squared.any():
        drawn = [draw(squared * weights, min(batch, count - len(chosen)), random) for _ in range(tries)]
        left = [torch.minimum(squared, squared_distances(points, indices)) for indices in drawn]
        best = int(np.argmin([float((rest * weights).sum()) for rest in left]))
        squared = left[best]
        chosen = torch.cat([chosen, without_copies(points, drawn[best])])
    return chosen


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distance of each point to the nearest of those at the indices `centres`: float64[R] on the CPU."""
    codes = points[centres.to(points.device)]
    blocks = [(block - codes[nearest(block, codes)]).square_().sum(dim=1) for block in points.split(65_536)]
    return torch.cat(blocks).cpu().double()


def without_copies(points: Tensor, indices: Tensor) -> Tensor:
    first = first_copies(points[indices.to(points.device)])
    return indices if first is None else indices[first.unique().cpu()]


def draw(weights: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """`count` different indices (fewer if fewer have weight), each draw proportional to `weights`, float64[R] >= 0.

    An exponential clock per index, ticking at the rate of its weight: the first to ring are a weighted sample without
    replacement (Efraimidis & Spirakis 2006).
    """
    clocks = torch.from_numpy(random.exponential(size=len(weights))) / weights
    times, indices = clocks.topk(min(count, len(clocks)), largest=False)
    return indices[torch.isfinite(times)]
