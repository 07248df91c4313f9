"""Mini-batch k-means against its definition."""

import numpy as np
import pytest
import torch

from vqpipe.codebooks import feature_set
from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.codebooks.mini_batch import CHUNK, batches, mini_batch
from vqpipe.codebooks.points import Points
from vqpipe.errors import ConfigError

CPU = torch.device("cpu")


def drawn(rows: int, dim: int = 4, middles: int = 20) -> np.ndarray:
    random = np.random.default_rng(0)
    of = random.integers(middles, size=rows)
    return (4 * random.standard_normal((middles, dim))[of] + random.standard_normal((rows, dim))).astype(np.float32)


def nearest_ids(data: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((data[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2).argmin(axis=1)


def test_an_epoch_shows_every_vector_once_in_an_order_of_its_own() -> None:
    orders = [np.concatenate(batches(1000, 300, (7, epoch))) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(0, 1000, CHUNK))
    assert [len(starts) for starts in batches(1000, 300, (0,))] == [3, 3, 2]
    assert [len(starts) for starts in batches(1000, 1, (0,))] == [1] * 8


def test_centres_are_the_means_of_all_vectors_they_have_had() -> None:
    """Two epochs written out in float64, one vector's learning rate after another's (Sculley's algorithm 1)."""
    data, key = drawn(1500), (3,)
    start = data[np.random.default_rng(1).choice(1500, 12, replace=False)]
    centres, counts = start.astype(np.float64), np.zeros(12)
    for epoch in range(2):
        for starts in batches(1500, 256, (*key, epoch)):
            rows = np.concatenate([np.arange(first, min(first + CHUNK, 1500)) for first in starts])
            ids = nearest_ids(data[rows], centres.astype(np.float32))
            for vector, centre in zip(data[rows], ids, strict=True):
                counts[centre] += 1
                centres[centre] += (vector - centres[centre]) / counts[centre]
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False, visits=2)
    result = mini_batch(points, torch.from_numpy(start), 2, 0.0, 256, key)
    np.testing.assert_allclose(result.codes, centres, atol=1e-5)
    assert result.counts.tolist() == np.bincount(nearest_ids(data, result.codes.numpy()), minlength=12).tolist()
    exact = ((data - result.codes.numpy()[nearest_ids(data, result.codes.numpy())]) ** 2).sum(axis=1).mean()
    assert result.inertia == pytest.approx(exact, rel=1e-5)
    assert (result.iterations, len(result.history)) == (2, 3)


def test_comes_close_to_lloyd_with_every_cluster_in_use() -> None:
    features = FeatureSet([drawn(8000)], ["x"])
    full = kmeans(features, KmeansConfig(k=60, iterations=10, tolerance=0.0), seed=0, device=CPU)
    mini = kmeans(features, KmeansConfig(k=60, iterations=10, tolerance=0.0, batch=1024), seed=0, device=CPU)
    assert mini.inertia < 1.05 * full.inertia
    assert mini.counts.min() >= 1
    assert mini.counts.sum() == 8000
    early = kmeans(features, KmeansConfig(k=60, iterations=50, tolerance=0.01, batch=1024), seed=0, device=CPU)
    assert early.converged
    assert early.iterations < 50


def test_dead_centres_are_moved_to_far_vectors() -> None:
    data = drawn(2000)
    start = np.concatenate([data[:5], np.full((3, 4), 1e3, np.float32) + np.arange(3, dtype=np.float32)[:, None]])
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False, visits=3)
    result = mini_batch(points, torch.from_numpy(start), 3, 0.0, 500, (0,))
    assert result.reseeded >= 3
    assert result.counts.min() >= 1
    assert result.codes.abs().max() < 100


def test_runs_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reads only runs of its own blocks, so none may cross into the next."""
    monkeypatch.setattr(feature_set, "BLOCK_ROWS", 4 * CHUNK)
    points = Points(FeatureSet([drawn(1300)], ["x"]), CPU, shared=False)
    assert len(points.rows(np.array([0, 1280]), CHUNK)) == CHUNK + 20
    assert points.rows(np.array([], dtype=np.int64), CHUNK).shape == (0, 4)


def test_refuses_a_negative_batch() -> None:
    with pytest.raises(ConfigError, match=r"kmeans\.batch = -1"):
        KmeansConfig(batch=-1)
