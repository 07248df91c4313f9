"""Code usage against numpy."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vqpipe.errors import DataError
from vqpipe.metrics import joint_entropy
from vqpipe.metrics import usage as usage_module
from vqpipe.metrics.usage import (
    CodeUsage,
    as_rows,
    dead_codes,
    from_rows,
    spread_of,
    uniform_utilization,
    usage_of,
)


def test_counts_and_shares_agree_with_numpy() -> None:
    random = np.random.default_rng(0)
    ids = random.zipf(1.5, size=(9, 4, 4, 3)).clip(max=64) - 1  # images, height, width, groups
    meter = CodeUsage(codebook_size=64, num_groups=3)
    for batch in np.array_split(ids, 2):
        meter.update(torch.from_numpy(batch).reshape(len(batch), -1))
    expected = np.stack([np.bincount(ids[..., group].ravel(), minlength=64) for group in range(3)])
    assert np.array_equal(meter.merged().counts.numpy(), expected)

    usage = usage_of(meter.merged().counts)
    shares = expected / expected.sum(1, keepdims=True)
    entropy = [-sum(p * np.log(p) for p in row if p > 0) for row in shares]
    assert usage["utilization"] == pytest.approx(np.mean(expected > 0))
    assert usage["utilization_per_group"] == pytest.approx(np.mean(expected > 0, axis=1))
    assert usage["perplexity_per_group"] == pytest.approx(np.exp(entropy))


def test_perplexity_of_uniform_and_constant_codes() -> None:
    even, single = torch.full((1, 100_000), 7), torch.zeros(1, 100_000, dtype=torch.int64)
    single[0, 5] = 12
    assert usage_of(even)["perplexity_per_group"] == pytest.approx([100_000])
    assert usage_of(single) == {
        "utilization": 1e-5,
        "utilization_per_group": [1e-5],
        "perplexity_per_group": [pytest.approx(1.0)],
    }


def test_negative_ids_are_not_counted_and_ids_beyond_the_codebook_raise() -> None:
    meter = CodeUsage(codebook_size=4, num_groups=2)
    meter.update(torch.tensor([[1, -1, 3, -1]]))
    assert meter.counts.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert usage_of(meter.counts)["perplexity_per_group"] == [pytest.approx(2.0), 1.0]
    assert usage_of(meter.counts)["utilization"] == 2 / 8  # the unused group counts
    assert meter.compute(1).numbers["utilization_at"][0]["tokens"] == 2
    with pytest.raises(DataError, match="4 is outside a codebook of 4"):
        meter.update(torch.tensor([[4, 0]]))


def test_a_codebook_too_large_for_counters_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    large = 2**36
    few = random.integers(0, large, (2, 40))
    ids = np.stack([random.choice(few[group], (9, 16)) for group in range(2)], axis=-1)  # images, positions, groups
    ids[0, 0] = -1
    monkeypatch.setattr(usage_module, "MIN_SORTED", 50)
    meter = CodeUsage(large, num_groups=2)
    for batch in np.array_split(ids, 5):
        meter.update(torch.from_numpy(batch).flatten(1))
    counts = meter.merged().counts
    expected = [np.unique(ids[..., group][ids[..., group] >= 0], return_counts=True) for group in range(2)]
    assert [counts[group].coalesce().indices()[0].tolist() for group in range(2)] == [e[0].tolist() for e in expected]
    assert [counts[group].coalesce().values().tolist() for group in range(2)] == [e[1].tolist() for e in expected]
    assert torch.equal(as_rows(from_rows(as_rows(counts), 2, large)), as_rows(counts))
    assert int(counts[0].sum()) == 9 * 16 - 1

    _, small = np.unique(ids, return_inverse=True)
    dense = CodeUsage(81, num_groups=2)
    dense.update(torch.from_numpy(small.reshape(ids.shape) - 1).flatten(1))
    big, little = usage_of(counts), usage_of(dense.merged().counts)
    assert big["perplexity_per_group"] == pytest.approx(little["perplexity_per_group"])
    assert big["utilization"] == pytest.approx(little["utilization"] * 81 / large)


def test_perplexity_of_no_tokens_is_one() -> None:
    assert usage_of(CodeUsage(2**36).merged().counts)["perplexity_per_group"] == [1.0]


class Ranks:
    """Runs one function on several threads, each a rank whose collectives wait for the others."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.barrier, self.box, self.own = size, threading.Barrier(size), [None] * size, threading.local()
        for module in (usage_module, joint_entropy):
            for name in ("gather_objects", "gather_rows", "all_reduce_sum", "world_size"):
                monkeypatch.setattr(module, name, getattr(self, name), raising=False)

    def gather_objects(self, value: Any) -> list[Any]:
        self.box[self.own.rank] = value
        self.barrier.wait(10)
        everything = list(self.box)
        self.barrier.wait(10)
        return everything

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self.gather_objects(rows))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(tensor)).sum(0)

    def world_size(self) -> int:
        return self.size

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            self.own.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on_rank, range(self.size)))


def report(meter: CodeUsage, num_pixels: int = 1) -> tuple[dict[str, Any], dict[str, str]]:
    _, numbers, not_computed = meter.compute(num_pixels)
    return numbers, not_computed


def some_ids(images: int = 40, positions: int = 6, groups: int = 2, size: int = 200) -> np.ndarray:
    return np.random.default_rng(1).zipf(1.3, (images, positions, groups)).clip(max=size) - 1


@pytest.mark.parametrize("scale", [1, 2**35], ids=["dense", "sparse"])
def test_utilization_at_a_budget_is_that_of_the_first_tokens(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, size = some_ids() * scale, 200 * scale
    monkeypatch.setattr(usage_module, "BUDGETS", (20, 100, 10_000))
    monkeypatch.setattr(usage_module, "MIN_SORTED", 30)
    meter = CodeUsage(size, num_groups=2)
    for start in (24, 0, 7, 31):  # in any order
        part = ids[start : {0: 7, 7: 24, 24: 31, 31: 40}[start]]
        meter.update(torch.from_numpy(part).flatten(1), start=start)
    numbers, absent = report(meter)
    assert absent == {}
    rows = numbers["utilization_at"]
    assert [row["tokens"] for row in rows] == [20, 100, 240]  # the set does not reach 10,000
    flat = ids.reshape(-1, 2)
    for row in rows:
        used = [len(np.unique(flat[: row["tokens"], group])) / size for group in range(2)]
        assert row["utilization_per_group"] == pytest.approx(used)
        assert row["utilization"] == pytest.approx(np.mean(used))
        assert row["uniform_utilization"] == pytest.approx(1 - (1 - 1 / size) ** row["tokens"], rel=1e-4)
    for tokens, utilization, _ in numbers["utilization_curve"]:
        assert utilization == pytest.approx(np.mean([len(np.unique(flat[:tokens, group])) / size for group in (0, 1)]))
    assert numbers["utilization_curve"][-1][0] == 240


@pytest.mark.parametrize("scale", [1, 2**35], ids=["dense", "sparse"])
def test_results_do_not_depend_on_the_division_into_ranks(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, size = torch.from_numpy(some_ids() * scale).flatten(1), 200 * scale
    monkeypatch.setattr(usage_module, "BUDGETS", (20, 100))
    monkeypatch.setattr(usage_module, "POSITIONS_AT_ONCE", 64)
    alone = CodeUsage(size, num_groups=2)
    alone.update(ids, start=0)
    expected = report(alone, 999)

    def on_rank(rank: int) -> Any:  # the first has every third image, the second the others, the third none
        meter = CodeUsage(size, num_groups=2)
        places = [i for i in range(40) if (i % 3 > 0) == rank and rank < 2]
        for start in range(0, len(places), 5):
            meter.update(ids[places[start : start + 5]], start=places[start : start + 5])
        return report(meter, 999)

    results = Ranks(3, monkeypatch).run(on_rank)
    assert results[0] == results[1] == results[2]
    numbers, absent = results[0]
    assert absent == expected[1] == {}
    assert numbers.keys() == expected[0].keys()
    for name, value in numbers.items():
        assert value == (pytest.approx(expected[0][name]) if name.startswith("joint") else expected[0][name])


def test_uniform_coder_reaches_uniform_utilization() -> None:
    assert uniform_utilization(32_768, 65_536) == pytest.approx(0.865, abs=5e-4)  # both from the literature's window
    assert uniform_utilization(16_384, 65_536) == pytest.approx(0.982, abs=5e-4)
    assert uniform_utilization(10**9, 10) == pytest.approx(1e-8, rel=1e-6)
    assert [uniform_utilization(1, n) for n in (0, 5)] == [0.0, 1.0]
    meter = CodeUsage(300)
    meter.update(torch.randint(0, 300, (50, 20), generator=torch.Generator().manual_seed(0)), start=0)
    (row,) = report(meter)[0]["utilization_at"]
    assert row["utilization"] == pytest.approx(row["uniform_utilization"], abs=0.02)


def test_gini_dead_codes_and_extreme_counts_against_their_definitions() -> None:
    counts = torch.tensor([[5, 0, 2, 9], [4, 4, 4, 4], [0, 0, 7, 0], [0, 0, 0, 0]])
    spread = spread_of(counts)
    for row, found in zip(counts.double().numpy(), spread["gini_per_group"], strict=True):
        mean = row.mean()
        pairs = np.abs(row[:, None] - row[None]).mean() / (2 * mean) if mean else 0.0
        assert found == pytest.approx(pairs)
    assert spread["num_dead_per_group"] == [1, 0, 3, 4]
    assert spread["min_count_per_group"] == [0, 4, 0, 0]
    assert spread["max_count_per_group"] == [9, 4, 7, 0]
    assert dead_codes(counts[:1]).tolist() == [[0, 1]]
    large = counts.to_sparse().coalesce()
    assert spread_of(large) == spread
    with pytest.raises(DataError, match="not listed"):
        dead_codes(large)


def test_coded_bits_follow_the_entropy() -> None:
    meter = CodeUsage(4, num_groups=2)
    meter.update(torch.tensor([[0, 3, 1, 3], [2, 3, 3, 3]]), start=0)  # the first group even, the second constant
    numbers, _ = report(meter, num_pixels=32)
    assert numbers["bits_per_pixel"] == pytest.approx(8 * 2 / 32)
    assert numbers["bits_per_pixel_entropy"] == pytest.approx(4 * 2 / 32)


def test_joint_entropy_against_counted_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_entropy, "MIN_SORTED_TUPLES", 10)
    for groups, size in ((2, 6), (2, 200), (5, 2**40), (8, 16_384)):  # in one word, in five, and in two
        ids = some_ids(groups=groups, size=6) * (size // 6)
        ids[3, 2, 1] = -1
        meter = CodeUsage(size, num_groups=groups)
        for start in range(0, 40, 8):
            meter.update(torch.from_numpy(ids[start : start + 8]).flatten(1), start=start)
        numbers, absent = report(meter)
        times = Counter(map(tuple, ids.reshape(-1, groups).tolist()))
        times = Counter({key: n for key, n in times.items() if min(key) >= 0})
        shares = np.array(list(times.values())) / 239
        assert absent == {}
        assert numbers["joint_entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())
        assert numbers["joint_entropy_limit"] == pytest.approx(np.log2(239))
        assert numbers["joint_distinct"] == len(times)
        assert numbers["joint_entropy_bias"] == pytest.approx((len(times) - 1) / (2 * 239) / np.log(2))
        assert numbers["joint_coverage"] == pytest.approx(1 - sum(n == 1 for n in times.values()) / 239)
        singles = sum(np.log2(perplexity) for perplexity in numbers["perplexity_per_group"])
        assert numbers["joint_entropy"] < singles


def test_joint_entropy_of_too_many_tuples_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joint_entropy, "MAX_TUPLES", 50)
    ids = torch.arange(60).repeat(2, 1).T.reshape(20, 6)

    def on_rank(rank: int) -> Any:
        meter = CodeUsage(60, num_groups=2)
        meter.update(ids[10 * rank : 10 * rank + 10], start=10 * rank)
        return report(meter)

    alone = CodeUsage(60, num_groups=2)
    alone.update(ids, start=0)
    with monkeypatch.context() as patch:
        dealt = Ranks(2, patch).run(on_rank)
    for numbers, absent in (report(alone), *dealt):
        assert "joint_entropy" not in numbers
        assert "more than 50 different tuples" in absent["joint_entropy"]


def test_without_positions_or_with_several_sizes_only_the_whole_set_is_reported() -> None:
    blind, mixed = CodeUsage(8, num_groups=2), CodeUsage(8, num_groups=2)
    blind.update(torch.tensor([[1, 2, 3, 4]]))
    mixed.update(torch.tensor([[1, 2, 3, 4]]), start=0)
    mixed.update(torch.tensor([[1, 2]]), start=1)
    for meter, reason in ((blind, "not known"), (mixed, "several sizes")):
        numbers, absent = report(meter)
        assert reason in absent["utilization_curve"]
        assert [row["utilization"] for row in numbers["utilization_at"]] == [numbers["utilization"]] == [0.25]
    assert set(report(blind)[1]) == {"utilization_curve", "joint_entropy"}
    with pytest.raises(DataError, match="2 positions for 1 images"):
        mixed.update(torch.tensor([[1, 2]]), start=[4, 5])


def test_one_code_and_no_images() -> None:
    single = CodeUsage(1)
    single.update(torch.zeros(1, 1, dtype=torch.int64), start=0)
    numbers, _ = report(single)
    assert numbers["utilization_at"] == [
        {"tokens": 1, "utilization": 1.0, "utilization_per_group": [1.0], "uniform_utilization": 1.0}
    ]
    assert (numbers["bits_per_pixel"], numbers["gini_per_group"]) == (0.0, [0.0])
    numbers, absent = report(CodeUsage(7, num_groups=2))
    assert numbers["utilization_at"][0]["tokens"] == numbers["utilization"] == 0
    assert "no position" in absent["joint_entropy"]


def test_budgets_count_the_tokens_without_skipped_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "BUDGETS", (4,))
    meter = CodeUsage(9)
    meter.update(torch.tensor([[1, 2], [3, 4], [5, 6]]), start=[0, 2, 3])  # image 1 could not be read
    first, whole = report(meter)[0]["utilization_at"]
    assert (first["tokens"], first["utilization"]) == (2, pytest.approx(2 / 9))
    assert (whole["tokens"], whole["utilization"]) == (6, pytest.approx(6 / 9))
