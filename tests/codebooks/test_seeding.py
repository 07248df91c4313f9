"""First centres: what a round remembers is true, and the centres are better than random ones."""

import numpy as np
import pytest
import torch

from vqpipe.artifacts.saved import Checkpoints
from vqpipe.codebooks import seeding
from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.codebooks.points import Points
from vqpipe.codebooks.seeding import Spread, plusplus_rows

CPU = torch.device("cpu")


def drawn(rows: int, dim: int = 6) -> np.ndarray:
    random = np.random.default_rng(0)
    of = random.choice(40, rows, p=(weights := 1.0 / np.arange(1, 41)) / weights.sum())
    middles = 5 * random.standard_normal((40, dim))
    return (middles[of] + random.standard_normal((rows, dim))).astype(np.float32)


def test_each_vector_knows_its_nearest_chosen_one() -> None:
    data = np.concatenate([drawn(500), drawn(500)[:200]])  # with copies
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False)
    vectors = torch.from_numpy(data)
    spread = Spread(points, vectors, torch.ones(700, dtype=torch.int64), (0,), Checkpoints(None), "x")
    for count, tries in ((30, 1), (60, 3)):
        spread.draw(count, 8, tries)
        assert len(spread.chosen) == count
        chosen = data[spread.chosen.numpy()]
        assert len(np.unique(chosen, axis=0)) == count
        squared = ((data[:, None].astype(np.float64) - chosen[None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(spread.squared, squared.min(axis=1), rtol=1e-5)
        np.testing.assert_allclose(squared[np.arange(700), spread.owner], squared.min(axis=1), rtol=1e-5)


def test_a_sample_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vectors are many, only a sample is looked at; the rows are still rows of all of them, and differ."""
    monkeypatch.setattr(seeding, "SAMPLE_ROWS", 400)
    data = drawn(5000)
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False)
    rows = plusplus_rows(points, 30, (0,), Checkpoints(None))
    assert len(np.unique(rows)) == 30
    assert rows.max() > 1000
    assert np.array_equal(rows, plusplus_rows(points, 30, (0,), Checkpoints(None)))
    assert not np.array_equal(rows, plusplus_rows(points, 30, (1,), Checkpoints(None)))


def test_is_better_than_vectors_drawn_at_random() -> None:
    def inertia(init: str, seed: int, iterations: int) -> float:
        config = KmeansConfig(k=120, iterations=iterations, tolerance=0.0, init=init)  # type: ignore[arg-type]
        return kmeans(FeatureSet([drawn(6000)], ["x"]), config, seed=seed, device=CPU).inertia

    for iterations, share in ((0, 0.85), (5, 0.97)):
        ours, random = (np.mean([inertia(i, seed, iterations) for seed in range(3)]) for i in ("k-means++", "random"))
        assert ours < share * random
