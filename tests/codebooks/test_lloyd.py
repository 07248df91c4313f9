"""Passes over features on a device, Lloyd's iterations and mini-batches against their definitions."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from vqpipe.codebooks import features as features_module
from vqpipe.codebooks import kmeans as module
from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.codebooks.lloyd import RUN, Points, batches, lloyd, mini_batch
from vqpipe.progress import Silent

CPU = torch.device("cpu")
DATA = np.random.default_rng(0).standard_normal((1100, 3)).astype(np.float16)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK_ROWS", 256)


def mixture(rows: int, dim: int = 4, centers: int = 20) -> np.ndarray:
    """float32[rows, dim] from a mixture of Gaussians."""
    random = np.random.default_rng(0)
    of = random.integers(centers, size=rows)
    return (4 * random.standard_normal((centers, dim))[of] + random.standard_normal((rows, dim))).astype(np.float32)


def nearest_ids(data: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return ((data[:, None].astype(np.float64) - centers[None]) ** 2).sum(axis=2).argmin(axis=1)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_read_in_order_as_float32() -> None:
    points = Points(FeatureSet([DATA[:300], DATA[300:]], ["a", "b"]), CPU, shared=False)
    blocks = list(points.blocks())
    assert [start for start, _ in blocks] == [0, 256, 512, 768, 1024]
    joined = torch.cat([block for _, block in blocks])
    assert joined.dtype == torch.float32
    assert np.array_equal(joined.numpy(), DATA.astype(np.float32))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batch", [0, 300])
def test_features_kept_on_the_device_are_read_once_and_give_the_same_codebook(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KmeansConfig(k=20, iterations=3, batch=batch, tolerance=0.0)
    streamed = kmeans(FeatureSet([DATA], ["x"]), config, seed=0, device=CPU)
    monkeypatch.setattr(module, "room_for_features", lambda *_: DATA.nbytes)
    features, reads = FeatureSet([DATA], ["x"]), Counter()
    stored = features.stored
    monkeypatch.setattr(features, "stored", lambda start, stop: reads.update([start]) or stored(start, stop))
    kept = kmeans(features, config, seed=0, device=CPU)
    assert torch.equal(kept.codebook, streamed.codebook)
    assert kept.facts() == streamed.facts()
    assert reads == dict.fromkeys([0, 256, 512, 768, 1024], 1)
    assert Points(features, CPU, shared=False, room=DATA.nbytes - 1).kept is None
    points = Points(features, CPU, shared=False, room=DATA.nbytes)
    assert points.kept is not None
    assert {block.dtype for block in points.kept.values()} == {torch.float16}


class Phases(Silent):
    """Records each phase: title, total, sum of advances."""

    def __init__(self) -> None:
        self.phases: list[list] = []
        self.notes: list[str] = []

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        assert unit in ("vectors", "assignments")
        self.phases.append([title, total, 0])

    def advance(self, count: int = 1) -> None:
        self.phases[-1][2] += count

    def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "settings", [{}, {"batch": 300}, {"per_class": True}, {"select": "random"}, {"init": "random"}], ids=str
)
def test_progress_of_each_phase_adds_up_to_its_total(settings: dict) -> None:
    progress = Phases()
    labels = np.arange(1100, dtype=np.int32) % 2
    config = KmeansConfig(k=40, iterations=3, tolerance=0.0, **settings)
    kmeans(FeatureSet([DATA], ["x"], labels), config, seed=0, device=CPU, progress=progress)
    assert progress.phases
    assert progress.notes
    for title, total, done in progress.phases:
        assert done == total, title


@pytest.mark.usefixtures("small_blocks")
def test_scale_leaves_room_for_the_sum_of_all_vectors() -> None:
    for data, visits in ((DATA * 1000, 1), (DATA * 1000, 50), (DATA.astype(np.float32) * 1e-30, 1)):
        points = Points(FeatureSet([data], ["x"]), CPU, shared=False, visits=visits)
        assert float(np.abs(data).max()) * len(data) * visits * points.scale < 2.0**62
        assert torch.isfinite(torch.from_numpy(data).float() * points.scale).all()


def test_lloyd_takes_the_same_steps_as_scikit_learn() -> None:
    data = mixture(3000, 6)
    start = data[np.random.default_rng(0).choice(3000, 25, replace=False)]
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False)
    ours = lloyd(points, torch.from_numpy(start), 8, 0.0)
    theirs = KMeans(25, init=start, n_init=1, max_iter=8, tol=0, algorithm="lloyd").fit(data)
    assert ours.counts.tolist() == np.bincount(theirs.labels_, minlength=25).tolist()
    np.testing.assert_allclose(ours.codebook.numpy(), theirs.cluster_centers_, atol=1e-5)


def test_an_epoch_visits_every_vector_once_in_its_own_random_order() -> None:
    orders = [np.concatenate(batches(1000, 300, (7, epoch))) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(0, 1000, RUN))
    assert [len(starts) for starts in batches(1000, 300, (0,))] == [3, 3, 2]
    assert [len(starts) for starts in batches(1000, 1, (0,))] == [1] * 8


def test_mini_batch_centers_are_means_of_all_vectors_assigned_to_them() -> None:
    """Two epochs in float64, one vector's update after another's (Sculley's algorithm 1)."""
    data, key = mixture(1500), (3,)
    start = data[np.random.default_rng(1).choice(1500, 12, replace=False)]
    centers, counts = start.astype(np.float64), np.zeros(12)
    for epoch in range(2):
        for starts in batches(1500, 256, (*key, epoch)):
            rows = np.concatenate([np.arange(first, min(first + RUN, 1500)) for first in starts])
            ids = nearest_ids(data[rows], centers.astype(np.float32))
            for vector, center in zip(data[rows], ids, strict=True):
                counts[center] += 1
                centers[center] += (vector - centers[center]) / counts[center]
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False, visits=2)
    result = mini_batch(points, torch.from_numpy(start), 2, 0.0, 256, key)
    np.testing.assert_allclose(result.codebook, centers, atol=1e-5)
    ids = nearest_ids(data, result.codebook.numpy())
    assert result.counts.tolist() == np.bincount(ids, minlength=12).tolist()
    exact = ((data - result.codebook.numpy()[ids]) ** 2).sum(axis=1).mean()
    assert result.inertia == pytest.approx(exact, rel=1e-5)
    assert (result.iterations, len(result.history)) == (2, 3)


def test_mini_batches_come_close_to_lloyd_with_every_cluster_in_use() -> None:
    features = FeatureSet([mixture(8000)], ["x"])
    full = kmeans(features, KmeansConfig(k=60, iterations=10, tolerance=0.0), seed=0, device=CPU)
    mini = kmeans(features, KmeansConfig(k=60, iterations=10, tolerance=0.0, batch=1024), seed=0, device=CPU)
    assert mini.inertia < 1.05 * full.inertia
    assert mini.counts.min() >= 1
    assert mini.counts.sum() == 8000
    early = kmeans(features, KmeansConfig(k=60, iterations=50, tolerance=0.01, batch=1024), seed=0, device=CPU)
    assert early.converged
    assert early.iterations < 50


def test_mini_batch_moves_centers_without_vectors_to_far_vectors() -> None:
    data = mixture(2000)
    start = np.concatenate([data[:5], np.full((3, 4), 1e3, np.float32) + np.arange(3, dtype=np.float32)[:, None]])
    points = Points(FeatureSet([data], ["x"]), CPU, shared=False, visits=3)
    result = mini_batch(points, torch.from_numpy(start), 3, 0.0, 500, (0,))
    assert result.reseeded >= 3
    assert result.counts.min() >= 1
    assert result.codebook.abs().max() < 100


def test_runs_of_a_mini_batch_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reads only runs of its own blocks, so none crosses into the next block."""
    monkeypatch.setattr(features_module, "BLOCK_ROWS", 4 * RUN)
    points = Points(FeatureSet([mixture(1300)], ["x"]), CPU, shared=False)
    assert len(points.rows(np.array([0, 1280]), RUN)) == RUN + 20
    assert points.rows(np.array([], dtype=np.int64), RUN).shape == (0, 4)
