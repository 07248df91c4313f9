"""Initial centers: the state of a round is correct, and the centers are better than random ones."""

from typing import Any

import numpy as np
import pytest
import torch

from vqpipe.codebooks import seeding
from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.codebooks.lloyd import Points
from vqpipe.codebooks.seeding import SeedingRounds, plusplus_rows, weighted_draw

CPU = torch.device("cpu")


def mixture(rows: int, dim: int = 6) -> np.ndarray:
    random = np.random.default_rng(0)
    of = random.choice(40, rows, p=(weights := 1.0 / np.arange(1, 41)) / weights.sum())
    middles = 5 * random.standard_normal((40, dim))
    return (middles[of] + random.standard_normal((rows, dim))).astype(np.float32)


def test_distances_and_owners_are_of_the_nearest_chosen_vector() -> None:
    data = np.concatenate([mixture(500), mixture(500)[:200]])  # with copies
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False)
    vectors = torch.from_numpy(data)
    rounds = SeedingRounds(points, vectors, torch.ones(700, dtype=torch.int64), (0,))
    for count, trials in ((30, 1), (60, 3)):
        rounds.run(count, 8, trials)
        assert len(rounds.chosen) == count
        chosen = data[rounds.chosen.numpy()]
        assert len(np.unique(chosen, axis=0)) == count
        squared = ((data[:, None].astype(np.float64) - chosen[None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(rounds.squared, squared.min(axis=1), rtol=1e-5)
        np.testing.assert_allclose(squared[np.arange(700), rounds.owner], squared.min(axis=1), rtol=1e-5)


def test_a_sample_is_used_where_vectors_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "SAMPLE_ROWS", 400)
    data = mixture(5000)
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False)
    rows = plusplus_rows(points, 30, (0,))
    assert len(np.unique(rows)) == 30
    assert rows.max() > 1000
    assert np.array_equal(rows, plusplus_rows(points, 30, (0,)))
    assert not np.array_equal(rows, plusplus_rows(points, 30, (1,)))


def test_weighted_draw_is_proportional_and_without_replacement() -> None:
    random, weights = np.random.default_rng(0), torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    firsts = torch.cat([weighted_draw(weights, 1, random) for _ in range(4000)])
    np.testing.assert_allclose(torch.bincount(firsts, minlength=5) / 4000, weights / 8, atol=0.03)
    assert sorted(weighted_draw(weights, 5, random).tolist()) == [1, 2, 4]


def test_inertia_is_lower_than_from_random_vectors() -> None:
    def inertia(init: str, seed: int, iterations: int) -> float:
        config = KmeansConfig(k=60, iterations=iterations, tolerance=0.0, init=init)  # type: ignore[arg-type]
        return kmeans(FeatureSet([mixture(1000)], ["x"]), config, seed=seed, device=CPU).inertia

    for iterations, share in ((0, 0.85), (5, 0.97)):
        ours, random = (np.mean([inertia(i, seed, iterations) for seed in range(2)]) for i in ("k-means++", "random"))
        assert ours < share * random


def test_candidates_count_as_often_as_they_are_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[torch.Tensor] = []

    class Recorded(SeedingRounds):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            weights.append(self.weights)

    monkeypatch.setattr(seeding, "SeedingRounds", Recorded)
    plusplus_rows(Points(FeatureSet([mixture(1000)], ["x"]), CPU, shared=False), 30, (0,))
    assert [len(weight) for weight in weights] == [1000, 120]
    assert [int(weight.sum()) for weight in weights] == [1000, 1000]
    assert weights[1].max() > 20


def test_the_best_of_several_trials_is_kept() -> None:
    data = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False)
    left = []
    for trials in (1, 2, 4, 8):
        rounds = SeedingRounds(points, torch.from_numpy(data), torch.ones(1000, dtype=torch.int64), (0,))
        rounds.draw(1, 1)
        rounds.round = 0  # the same random numbers: the trials of fewer are the first of more
        rounds.draw(20, trials)
        left.append(float(rounds.squared.sum()))
    assert left == sorted(left, reverse=True)
    assert left[3] < left[0]
