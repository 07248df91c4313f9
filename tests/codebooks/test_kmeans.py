"""k-means against scikit-learn, its guarantees about clusters and ranks, and its errors; codebook files."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans

from vqpipe import distributed
from vqpipe.codebooks import features as features_module
from vqpipe.codebooks import kmeans as module
from vqpipe.codebooks import seeding
from vqpipe.codebooks.codebook import Clustering, load_codebook
from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.config import from_table
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.progress import Silent

CPU = torch.device("cpu")


def blobs(rows: int, dim: int, centers: int, seed: int = 0) -> np.ndarray:
    """float32[rows, dim] around `centers` points, some with many more rows than others."""
    random = np.random.default_rng(seed)
    weights = random.pareto(1.5, centers) + 0.2
    of = random.choice(centers, rows, p=weights / weights.sum())
    return (random.standard_normal((centers, dim))[of] * 3 + random.standard_normal((rows, dim))).astype(np.float32)


def run(data: np.ndarray, labels: np.ndarray | None = None, seed: int = 0, **settings) -> Clustering:
    rest = {name: settings.pop(name) for name in ("checkpoints", "progress") if name in settings}
    return kmeans(FeatureSet([data], ["x"], labels), KmeansConfig(**settings), seed=seed, device=CPU, **rest)


@pytest.mark.parametrize("k", [8, pytest.param(60, marks=pytest.mark.slow), 300])
def test_inertia_is_as_low_as_scikit_learns(k: int) -> None:
    data = blobs(3000, 12, 50)
    ours = [run(data, k=k, iterations=20, tolerance=0.0, seed=seed).inertia for seed in range(3)]
    theirs = [KMeans(k, n_init=1, max_iter=20, tol=0, random_state=seed).fit(data).inertia_ for seed in range(3)]
    assert np.mean(ours) < 1.02 * np.mean(theirs) / len(data)


def test_converged_result_is_a_fixed_point_with_every_cluster_in_use() -> None:
    data = blobs(3000, 6, 20)
    result = run(data, k=40, iterations=300, tolerance=0.0)
    assert result.converged
    squared = (data[:, None].astype(np.float64) - result.codebook.double().numpy()[None]) ** 2
    ids = squared.sum(axis=2).argmin(axis=1)
    assert np.array_equal(np.bincount(ids, minlength=40), result.counts.numpy())
    means = np.stack([data[ids == code].astype(np.float64).mean(axis=0) for code in range(40)])
    np.testing.assert_allclose(result.codebook.numpy(), means, atol=1e-6)
    assert result.inertia == pytest.approx(squared.sum(axis=2).min(axis=1).mean(), rel=1e-6)
    assert all(after <= before for before, after in zip(result.history, result.history[1:], strict=False))


@pytest.mark.parametrize("batch", [0, 512])
def test_tolerance_is_a_share_of_the_inertia(batch: int) -> None:
    random = np.random.default_rng(0)
    centers = 4 * random.standard_normal((20, 4))
    data = (centers[random.integers(20, size=3000)] + random.standard_normal((3000, 4))).astype(np.float32)
    small, large = (run(data * scale, k=40, iterations=50, tolerance=0.003, batch=batch) for scale in (1, 256))
    assert small.converged
    assert small.iterations == large.iterations < 50
    assert torch.equal(small.codebook * 256, large.codebook)


def test_empty_clusters_are_filled() -> None:
    """The vectors are copies of one point and one far blob, so most clusters start empty."""
    random = np.random.default_rng(0)
    data = np.concatenate([np.zeros((5000, 3)), 100 + random.standard_normal((60, 3))]).astype(np.float32)
    for init in ("random", "k-means++"):
        result = run(data, k=50, iterations=2, init=init)
        assert result.counts.min() >= 1
        assert result.counts.sum() == 5060
        assert len(result.codebook.unique(dim=0)) == 50


def test_k_may_equal_the_number_of_distinct_vectors() -> None:
    distinct = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    result = run(np.repeat(distinct, 7, axis=0), k=30)
    assert result.inertia == 0
    assert result.counts.tolist() == [7] * 30
    assert np.array_equal(np.unique(result.codebook.numpy(), axis=0), np.unique(distinct, axis=0))


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    data = blobs(2000, 5, 30)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(data, k=64, seed=seed).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    tensors = load_file(tmp_path / "a")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()} == {
        "codebook": (torch.float32, (64, 5)),
        "counts": (torch.int64, (64,)),
    }


def test_result_does_not_depend_on_sharding_or_stored_precision() -> None:
    data = blobs(1000, 4, 10).astype(np.float16)
    config = KmeansConfig(k=20)
    whole = kmeans(FeatureSet([data.astype(np.float32)], ["x"]), config, seed=0, device=CPU)
    parts = FeatureSet([data[:10], data[10:700], data[700:700], data[700:]], list("abcd"))
    assert torch.equal(kmeans(parts, config, seed=0, device=CPU).codebook, whole.codebook)


class Ranks:
    """Threads that stand for `count` ranks, with their collectives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
        self.count, self.here, self.sent = count, threading.local(), {}
        self.meet = threading.Barrier(count, timeout=60)
        monkeypatch.setattr(distributed, "rank", lambda: self.here.rank)
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        for name in ("all_reduce_sum", "broadcast", "broadcast_object", "gather_objects"):
            monkeypatch.setattr(distributed, name, getattr(self, name))

    def exchange(self, value: Any) -> list[Any]:
        self.sent[self.here.rank] = value
        self.meet.wait()
        values = [self.sent[rank] for rank in range(self.count)]
        self.meet.wait()
        return values

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.exchange(tensor.clone())))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self.exchange(tensor.clone())[0])

    def broadcast_object(self, value: Any) -> Any:
        return self.exchange(value)[0]

    def gather_objects(self, value: Any) -> list[Any]:
        return self.exchange(value)

    def run(self, work: Callable[[], Any]) -> list[Any]:
        results: dict[int, Any] = {}

        def start(rank: int) -> None:
            self.here.rank = rank
            try:
                results[rank] = work()
            except BaseException:
                self.meet.abort()
                raise

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        return [results[rank] for rank in range(self.count)]


MODES = (
    {"iterations": 4},
    {"per_class": True, "iterations": 3},
    {"batch": 400, "iterations": 3},
    {"init": "random", "iterations": 2},
)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])  # 2 also where a run is resumed
@pytest.mark.parametrize(
    ("dim", "settings"),
    # not mini-batches with D > 16: the rounding of their distances depends on the share of a rank (see `lloyd`)
    [
        *((5, mode) for mode in MODES),
        *(pytest.param(64, mode, marks=pytest.mark.slow) for mode in MODES if "batch" not in mode),
    ],
    ids=str,
)
def test_ranks_give_the_codebook_of_one(
    dim: int, settings: dict, ranks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(features_module, "BLOCK_ROWS", 256)
    monkeypatch.setattr(seeding, "ROWS", 300)
    half = blobs(1000, dim, 30)
    data, labels = np.concatenate([half, half * (1 + 2**-22)]), np.arange(2000, dtype=np.int32) % 3  # many near ties
    alone = run(data, labels, k=33, **settings)
    for result in Ranks(monkeypatch, ranks).run(lambda: run(data, labels, k=33, **settings, checkpoints=tmp_path)):
        assert torch.equal(result.codebook, alone.codebook)
        assert torch.equal(result.counts, alone.counts)
        assert result.facts() == alone.facts()


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_two_ranks_resume_the_run_of_one(settings: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features_module, "BLOCK_ROWS", 256)
    data, labels = blobs(2000, 5, 30), np.arange(2000, dtype=np.int32) % 3
    alone = run(data, labels, k=33, **settings)

    class StopAtSecondNote(Silent):
        notes = 0

        def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
            self.notes += 1
            if self.notes == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, labels, k=33, **settings, checkpoints=tmp_path, progress=StopAtSecondNote())
    for result in Ranks(monkeypatch).run(lambda: run(data, labels, k=33, **settings, checkpoints=tmp_path)):
        assert torch.equal(result.codebook, alone.codebook)
        assert result.facts() == alone.facts()


@pytest.mark.parametrize("batch", [0, 500])
def test_result_does_not_depend_on_the_number_of_threads(batch: int) -> None:
    data, before = blobs(3000, 9, 30), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(data, k=50, batch=batch, iterations=3))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.codebook, results[0].codebook)
        assert result.facts() == results[0].facts()


def test_large_common_mean_costs_no_precision() -> None:
    """CLIP features have one: the same points far from the origin give the same clusters and inertia."""
    data = np.round(blobs(2000, 8, 20) * 64) / 64
    near, far = (run(data + np.float32(shift), k=30, iterations=5, tolerance=0.0) for shift in (0, 1024))
    assert near.counts.tolist() == far.counts.tolist()
    np.testing.assert_allclose(far.codebook - 1024, near.codebook, atol=1e-4)
    np.testing.assert_allclose(far.history, near.history, rtol=1e-5)


def test_facts_report_cluster_sizes() -> None:
    counts = torch.tensor([*range(1, 200), 1000])
    facts = Clustering(torch.randn(200, 3), counts, (2.0, 1.5), True, 1, 4).facts()
    assert facts["cluster_sizes"] == {
        "smallest": 1,
        "median": 101,
        "largest": 1000,
        "share_in_largest_percent": 1199 / counts.sum().item(),
    }
    assert (facts["distinct_codes"], facts["reseeded"], facts["inertia"]) == (200, 4, 1.5)
    assert Clustering(torch.ones(3, 2), torch.ones(3), (1.0,), True, 1).distinct_codes() == 1


def test_k_beyond_the_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 million centers of 768 numbers, 24 bytes for each, are 184 GB; 200 million vectors, 36 bytes each, are 7."""
    features = FeatureSet([np.broadcast_to(np.float16(0), (200_000_000, 768))], ["x"])
    monkeypatch.setattr(module, "available_bytes", lambda: 64_000_000_000)
    with pytest.raises(
        ConfigError,
        match=r"k = 10,000,000 .* 768 need about 19\d\.\d\d GB, this machine has 64\.00 GB",
    ):
        kmeans(features, KmeansConfig(k=10_000_000), seed=0, device=CPU)
    module.check_memory(features, 1_000_000, CPU)


def test_per_class_clusters_each_class_separately() -> None:
    data, labels = blobs(900, 4, 12), np.repeat([7, 2, 5], 300).astype(np.int32)
    result = run(data, labels, k=30, per_class=True)
    assert result.counts.view(3, 10).sum(dim=1).tolist() == [300, 300, 300]
    for part, label in enumerate([2, 5, 7]):
        alone = run(data[labels == label], np.full(300, label, np.int32), k=10, per_class=True)
        assert torch.equal(result.codebook[10 * part : 10 * part + 10], alone.codebook)


def test_error_of_a_class_is_raised_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    data, labels = blobs(100, 4, 5), np.repeat([0, 1], 50).astype(np.int32)
    data[50:] = 1

    def error() -> str:
        with pytest.raises(DataError) as raised:
            run(data, labels, k=10, per_class=True)
        return str(raised.value)

    first, second = Ranks(monkeypatch).run(error)
    assert first == second
    assert first.startswith("class 1 has 1 distinct vectors among its 50")


def test_codes_of_classes_have_no_negative_zeros() -> None:
    """A sum over several ranks has none either."""
    data = np.where(np.arange(60)[:, None] == np.arange(60), 1.0, -0.0).astype(np.float32)
    result = run(data, np.repeat([0, 1], 30).astype(np.int32), k=60, per_class=True, select="random")
    assert not result.codebook.signbit().any()


def test_random_selection_takes_distinct_vectors_unchanged() -> None:
    data = np.repeat(blobs(400, 3, 10), 2, axis=0)
    result = run(data, k=100, select="random")
    rows = {row.tobytes() for row in data}
    assert len({code.tobytes() for code in result.codebook.numpy()} & rows) == 100
    assert result.iterations == 0
    assert result.counts.sum() == 800


def test_too_few_or_nonfinite_features_are_errors() -> None:
    data = blobs(100, 4, 5)
    with pytest.raises(DataError, match="100 vectors, fewer than k = 101"):
        run(data, k=101)
    with pytest.raises(DataError, match="1 distinct vectors among its 50, fewer than k = 2"):
        run(np.ones((50, 4), np.float32), k=2)
    with pytest.raises(DataError, match="100 distinct vectors among its 300, fewer than k = 101"):
        run(np.tile(data, (3, 1)), k=101)
    for bad in (np.nan, np.inf):
        second = data.copy()
        second[17, 2] = bad
        with pytest.raises(NumericError, match=r"NaN or infinity: b\.npy, row 17 \(1 such"):
            kmeans(FeatureSet([data, second], ["a.npy", "b.npy"]), KmeansConfig(k=5), seed=0, device=CPU)


def test_too_many_centers_are_refused_before_the_features_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureSet, "verify", lambda self, progress: pytest.fail("the features were hashed"))
    with pytest.raises(DataError, match="100 vectors, fewer than k = 101"):
        run(blobs(100, 4, 5), k=101)


def test_unusable_classes_are_errors() -> None:
    data, labels = blobs(100, 4, 5), np.zeros(100, np.int32)
    labels[95:] = 3
    with pytest.raises(DataError, match="100 of 100 vectors have none"):
        run(data, k=10, per_class=True)
    with pytest.raises(ConfigError, match="k = 11 is not a multiple of the 2 classes"):
        run(data, labels, k=11, per_class=True)
    with pytest.raises(DataError, match="class 3 has 5 vectors, fewer than k = 6"):
        run(data, labels, k=12, per_class=True)
    labels[0] = -1
    with pytest.raises(DataError, match="1 of 100 vectors have none"):
        run(data, labels, k=10, per_class=True)


@pytest.mark.parametrize("setting", ["k=0", "batch=-1", "gpu_share=2", "iterations=-1", "init=farthest", "select=best"])
def test_invalid_settings_are_errors(setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=rf"{name} = '?{value}"):
        from_table(KmeansConfig, {name: value if value.isalpha() else int(value)}, "kmeans")


def test_load_codebook_reads_safetensors_npy_and_released_files(tmp_path: Path) -> None:
    codes = torch.randn(6, 3)
    save_file({"codebook": codes, "counts": torch.ones(6, dtype=torch.int64)}, tmp_path / "codebook.safetensors")
    np.save(tmp_path / "codes.npy", codes.numpy())
    torch.save(codes, tmp_path / "released.pth")
    for name in ("codebook.safetensors", "codes.npy", "released.pth"):
        assert torch.equal(load_codebook(tmp_path / name), codes)
    torch.save({"codebook": codes[0]}, tmp_path / "flat.pth")
    with pytest.raises(DataError, match="does not hold one codebook"):
        load_codebook(tmp_path / "flat.pth")
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan, np.float32))
    with pytest.raises(NumericError, match="holds NaN"):
        load_codebook(tmp_path / "nan.npy")
    torch.save(torch.tensor([[1e300], [1.0]], dtype=torch.float64), tmp_path / "large.pth")
    with pytest.raises(NumericError, match="holds NaN or infinity"):
        load_codebook(tmp_path / "large.pth")
    np.save(tmp_path / "one.npy", np.ones((5, 3), np.float32))
    with pytest.raises(DataError, match=r"all 5 codes of .*one\.npy are equal"):
        load_codebook(tmp_path / "one.npy")
