"""`nearest` against float64 brute force, its tie rule, and its errors."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import faiss
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.search import engine_name, exhaustive, nearest
from vqpipe.search.exhaustive import nearest_tiles

module = sys.modules["vqpipe.search.nearest"]


ENGINES = ("faiss", "tiles", "triton")


@pytest.fixture(params=ENGINES)
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `nearest` on the CPU through each engine: Triton's kernels in its interpreter."""
    if request.param == "tiles":
        small = partial(nearest_tiles, tile_vectors=32, tile_codes=48)
        monkeypatch.setattr(module, "nearest_faiss", small)
    if request.param == "triton":
        from vqpipe.search.screening import nearest_screened

        interpreted = request.getfixturevalue("interpreted")
        monkeypatch.setattr(
            module, "nearest_faiss", lambda rows, codes: interpreted(nearest_screened, rows[None], codes[None])[0]
        )


def distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Squared distances as float64[N, K], without the expanded formula."""
    return (vectors.double()[:, None] - codes.double()[None]).square().sum(dim=2)


def assert_nearest(ids: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """Every id is a nearest code, up to float32's rounding of the two squared lengths."""
    exact = distances(vectors, codes)
    excess = exact.gather(1, ids[:, None])[:, 0] - exact.amin(dim=1)
    rounding = 2**-22 * (vectors.double().square().sum(dim=1) + codes.double().square().sum(dim=1).amax())
    assert (excess <= rounding).all()


def lattice(rows: int, dim: int, seed: int) -> Tensor:
    """Small integers: float32 distances are exact, and ties between different codes are many."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


SIZES = [
    (1, 1, 1),
    (7, 3, 1),
    (33, 1025, 3),
    (100, 50, 8),
    (65, 4097, 8),
    (130, 300, 33),
    (40, 200, 96),
    (17, 100, 1024),
]
SHAPES = [(3, 1), (3, 64), (16, 2), (16, 8), (17, 17), (17, 64), (257, 1), (257, 8)]
INTERPRETED = [(1, 1, 1), (33, 1025, 3), (130, 300, 33), (40, 200, 96), (17, 17), (17, 64), (257, 8)]
"""What Triton's interpreter runs in fast tests: each chunk of dimensions; a part of a tile, and several tiles."""


def on_each_engine(shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """(engine, *shape) as parameters of a test."""
    return [
        pytest.param(engine, *shape, marks=pytest.mark.slow if engine == "triton" and shape not in INTERPRETED else [])
        for engine in ENGINES
        for shape in shapes
    ]


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(("search", "num_vectors", "num_codes", "dim"), on_each_engine(SIZES), indirect=["search"])
def test_agrees_with_float64(num_vectors: int, num_codes: int, dim: int) -> None:
    torch.manual_seed(dim)
    vectors, codes = torch.randn(num_vectors, dim), torch.randn(num_codes, dim)
    ids = nearest(vectors, codes)
    assert ids.dtype == torch.int64
    assert_nearest(ids, vectors, codes)
    assert (ids == distances(vectors, codes).argmin(dim=1)).float().mean() > 0.99


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(("search", "num_codes", "dim"), on_each_engine(SHAPES), indirect=["search"])
def test_the_lowest_id_wins_exact_ties(num_codes: int, dim: int) -> None:
    vectors, codes = lattice(40, dim, seed=0), lattice(num_codes, dim, seed=1)
    expected = distances(vectors, codes).argmin(dim=1)
    assert torch.equal(nearest(vectors, codes), expected)
    assert torch.equal(nearest(vectors + 4096, codes + 4096), expected)  # the offset is subtracted without rounding


@pytest.mark.parametrize(("num_codes", "dim"), [(1024, 16), (2048, 32), (5000, 8), (641, 1), (640, 24)])
def test_searching_in_parts_gives_the_ids_of_the_whole(
    num_codes: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, codes = lattice(77, dim, seed=0), lattice(num_codes, dim, seed=1)
    expected = distances(vectors, codes).argmin(dim=1)
    for size in (exhaustive.FUSED_BYTES, 4096, 1):  # 1: the smallest possible parts
        monkeypatch.setattr(exhaustive, "FUSED_BYTES", size)
        assert torch.equal(nearest(vectors, codes), expected)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dim", [8, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (1, 4, 12, 33, 128))])
def test_the_lowest_of_equal_codes_wins_under_any_rounding(dim: int) -> None:
    torch.manual_seed(dim)
    distinct = torch.randn(211, dim)
    vectors, codes = torch.randn(24, dim), torch.cat([distinct, distinct.flip(0), distinct])
    ids = nearest(vectors, codes)
    assert ids.max() < 211
    assert_nearest(ids, vectors, codes)


@pytest.mark.usefixtures("search")
def test_large_common_mean_costs_no_precision() -> None:
    torch.manual_seed(0)
    vectors, codes = torch.randn(24, 64), torch.randn(300, 64)
    mean = 300 * torch.randn(64)
    vectors, codes = vectors + mean, codes + mean
    assert torch.equal(nearest(vectors, codes), distances(vectors, codes).argmin(dim=1))


@pytest.mark.usefixtures("search")
def test_cosine_ignores_length() -> None:
    torch.manual_seed(0)
    vectors, codes = torch.randn(24, 8), torch.randn(90, 8)
    expected = F.cosine_similarity(vectors.double()[:, None], codes.double()[None], dim=2).argmax(dim=1)
    assert torch.equal(nearest(vectors * 7, codes * torch.rand(90, 1), "cosine"), expected)
    assert not torch.equal(expected, nearest(vectors, codes))
    vectors[3] = 0
    assert nearest(vectors, codes, "cosine")[3] == 0


@pytest.mark.usefixtures("search")
def test_cosine_finds_codes_whose_squares_underflow() -> None:
    """As those that the moving averages of `ema` leave of an unused code."""
    torch.manual_seed(0)
    vectors, codes = torch.randn(60, 8), torch.randn(90, 8)
    expected = nearest(vectors, codes, "cosine")
    shrink = torch.ones(90, 1)
    shrink[expected[:3]] = torch.tensor([[1e-15], [1e-24], [1e-30]])
    assert torch.equal(nearest(vectors * 1e-30, codes * shrink, "cosine"), expected)
    zero = int((torch.bincount(expected, minlength=90) == 0).nonzero()[0])
    similar = F.cosine_similarity(vectors[:, None], codes[None], dim=2).amax(dim=1) > 0.5
    codes[zero] = 0
    assert torch.equal(nearest(vectors, codes, "cosine", check=False)[similar], expected[similar])


@pytest.mark.usefixtures("search")
def test_groups_are_searched_separately() -> None:
    torch.manual_seed(0)
    vectors, codes = torch.randn(3, 12, 8), torch.randn(3, 70, 8)
    codes[1] += 1000  # one group is far away: offsets are per group
    vectors[1] += 1000
    for metric in ("l2", "cosine"):
        expected = torch.stack([nearest(rows, table, metric) for rows, table in zip(vectors, codes, strict=True)])
        assert torch.equal(nearest(vectors, codes, metric), expected)
    assert nearest(vectors[:, :0], codes).shape == (3, 0)


def test_engine_depends_on_the_device() -> None:
    assert engine_name(torch.device("cpu")) == "faiss"
    assert engine_name(torch.device("mps")) == "torch tiles"


def test_search_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    vectors, codes = torch.randn(300, 8), torch.randn(5000, 8, requires_grad=True)
    expected = nearest(vectors, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(vectors, codes), expected)
    half = vectors.half()
    assert torch.equal(nearest(half, codes), nearest(half.float(), codes))


@pytest.mark.parametrize(("dim", "most"), [(8, 2), (64, 1)])
def test_faiss_uses_as_many_threads_as_torch(dim: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    knn, taken = faiss.knn, list[int]()

    def counted(*args: object) -> object:
        taken.append(faiss.omp_get_max_threads())
        return knn(*args)

    monkeypatch.setattr(faiss, "knn", counted)
    for threads in (2, 1):  # 1 is the setting of the other tests
        torch.set_num_threads(threads)
        nearest(torch.randn(20, dim), torch.randn(100, dim))
        assert taken.pop() == min(threads, most)  # long vectors: each of torch's threads calls it


class Searching(IterableDataset):
    """Searches in the process that iterates."""

    def __iter__(self) -> Iterator[int]:
        yield int(nearest(lattice(2000, 8, seed=0), lattice(3000, 8, seed=1)).sum())


def test_a_worker_forked_after_a_search_can_search() -> None:
    torch.set_num_threads(2)
    try:
        (expected,) = Searching()
    finally:
        torch.set_num_threads(1)
    assert list(DataLoader(Searching(), batch_size=None, num_workers=1, timeout=60)) == [expected]


def near_ties(dim: int) -> tuple[Tensor, Tensor]:
    """2,000 vectors and 3,000 codes, in pairs of nearly equal distance."""
    torch.manual_seed(0)
    vectors, codes = torch.randn(2000, dim), torch.randn(3000, dim)
    codes[1500:] = codes[:1500] * (1 + 2**-23)
    return vectors, codes


@pytest.mark.parametrize("dim", [8, 32, 64, 300])
def test_ids_do_not_depend_on_the_number_of_threads(dim: int) -> None:
    vectors, codes = near_ties(dim)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [nearest(vectors, codes), nearest(vectors, codes)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(ids, found[0]) for ids in found)


@pytest.mark.parametrize("dim", [8, 16])
def test_id_of_a_short_vector_does_not_depend_on_its_batch(dim: int) -> None:
    vectors, codes = near_ties(dim)
    assert torch.equal(torch.cat([nearest(part, codes) for part in vectors.split(77)]), nearest(vectors, codes))


def test_non_contiguous_and_empty_input() -> None:
    torch.manual_seed(0)
    latent, codes = torch.randn(2, 8, 5, 5), torch.randn(8, 40).T
    vectors = latent.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(nearest(vectors, codes), nearest(vectors.contiguous(), codes.contiguous()))
    assert nearest(torch.empty(0, 8), codes).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nonfinite_or_huge_numbers_are_errors(bad: float) -> None:
    good, broken = torch.randn(9, 4), torch.randn(9, 4)
    broken[5, 2] = bad
    with pytest.raises(NumericError, match=r"1 of 9 vectors .*row 5"):
        nearest(broken, good)
    with pytest.raises(NumericError, match=r"1 of 9 codes .*row 5"):
        nearest(good, broken)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dim", [4, 70])
def test_unchecked_ids_of_nonfinite_vectors_are_in_range(dim: int) -> None:
    vectors, codes = torch.randn(9, dim), torch.randn(20, dim)
    expected = nearest(vectors, codes)
    vectors[5, 2], vectors[6, 0] = float("nan"), float("inf")
    ids = nearest(vectors, codes, check=False)
    whole = torch.isfinite(vectors).all(dim=1)
    assert torch.equal(ids[whole], expected[whole])
    assert ((ids >= 0) & (ids < 20)).all()
    codes[3] = float("nan")
    ids = nearest(vectors, codes, check=False)
    assert ((ids >= 0) & (ids < 20)).all()


def test_mismatched_shapes_and_unknown_metrics_are_errors() -> None:
    with pytest.raises(DataError, match=r"\[2, 3\] and codes \[5, 4\]"):
        nearest(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(DataError, match="groups"):
        nearest(torch.zeros(2, 3, 4), torch.zeros(3, 5, 4))
    with pytest.raises(DataError, match="groups"):
        nearest(torch.zeros(2, 3, 4), torch.zeros(5, 4))
    with pytest.raises(DataError, match="empty codebook"):
        nearest(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="dot"):
        nearest(torch.zeros(2, 3), torch.zeros(5, 3), "dot")  # type: ignore[arg-type]
    codes = torch.ones(5, 3)
    codes[[1, 4]] = 0
    with pytest.raises(NumericError, match=r"2 of 5 codes are zero \(first: 1\)"):
        nearest(torch.ones(2, 3), codes, "cosine")


def test_memory_grows_with_n_plus_k() -> None:
    """A matrix of 30,000 x 100,000 distances would be 12 GB; this process may not grow by 300 MB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    nearest(torch.randn(30_000, 2), torch.randn(100_000, 2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
