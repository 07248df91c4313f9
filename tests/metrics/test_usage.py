"""Code usage beside numpy."""

import numpy as np
import pytest
import torch

from vqpipe.errors import DataError
from vqpipe.metrics import usage as usage_module
from vqpipe.metrics.usage import CodeUsage, as_rows, bits_per_pixel, from_rows, usage_of


def test_counts_and_shares_agree_with_numpy() -> None:
    random = np.random.default_rng(0)
    ids = random.zipf(1.5, size=(9, 4, 4, 3)).clip(max=64) - 1  # images, height, width, groups
    meter = CodeUsage(codebook_size=64, num_groups=3)
    for batch in np.array_split(ids, 2):
        meter.update(torch.from_numpy(batch).reshape(len(batch), -1))
    expected = np.stack([np.bincount(ids[..., group].ravel(), minlength=64) for group in range(3)])
    assert np.array_equal(meter.merged().numpy(), expected)

    usage = usage_of(meter.merged())
    shares = expected / expected.sum(1, keepdims=True)
    entropy = [-sum(p * np.log(p) for p in row if p > 0) for row in shares]
    assert usage["utilization"] == pytest.approx(np.mean(expected > 0))
    assert usage["utilization_per_group"] == pytest.approx(np.mean(expected > 0, axis=1))
    assert usage["perplexity_per_group"] == pytest.approx(np.exp(entropy))


def test_the_two_ends_of_perplexity() -> None:
    even, single = torch.full((1, 100_000), 7), torch.zeros(1, 100_000, dtype=torch.int64)
    single[0, 5] = 12
    assert usage_of(even)["perplexity_per_group"] == pytest.approx([100_000])
    assert usage_of(single) == {
        "utilization": 1e-5,
        "utilization_per_group": [1e-5],
        "perplexity_per_group": [pytest.approx(1.0)],
    }


def test_ids_left_out_are_not_counted_and_ids_beyond_the_codebook_are_refused() -> None:
    meter = CodeUsage(codebook_size=4, num_groups=2)
    meter.update(torch.tensor([[1, -1, 3, -1]]))
    assert meter.counts.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert usage_of(meter.counts)["perplexity_per_group"] == [pytest.approx(2.0), 1.0]
    with pytest.raises(DataError, match="4 is outside a codebook of 4"):
        meter.update(torch.tensor([[4, 0]]))


def test_a_codebook_too_large_for_counters_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    large = 2**36
    few = random.integers(0, large, (2, 40))
    ids = np.stack([random.choice(few[group], (9, 16)) for group in range(2)], axis=-1)  # images, positions, groups
    ids[0, 0] = -1
    monkeypatch.setattr(usage_module, "MOST_WAITING", 50)
    meter = CodeUsage(large, num_groups=2)
    for batch in np.array_split(ids, 5):
        meter.update(torch.from_numpy(batch).flatten(1))
    counts = meter.merged()
    expected = [np.unique(ids[..., group][ids[..., group] >= 0], return_counts=True) for group in range(2)]
    assert [counts[group].coalesce().indices()[0].tolist() for group in range(2)] == [e[0].tolist() for e in expected]
    assert [counts[group].coalesce().values().tolist() for group in range(2)] == [e[1].tolist() for e in expected]
    assert torch.equal(as_rows(from_rows(as_rows(counts), 2, large)), as_rows(counts))
    assert int(counts[0].sum()) == 9 * 16 - 1

    _, small = np.unique(ids, return_inverse=True)
    dense = CodeUsage(81, num_groups=2)
    dense.update(torch.from_numpy(small.reshape(ids.shape) - 1).flatten(1))
    big, little = usage_of(counts), usage_of(dense.merged())
    assert big["perplexity_per_group"] == pytest.approx(little["perplexity_per_group"])
    assert big["utilization"] == pytest.approx(little["utilization"] * 81 / large)


def test_nothing_seen_of_a_large_codebook_is_nothing_used() -> None:
    assert usage_of(CodeUsage(2**36).merged())["perplexity_per_group"] == [1.0]


def test_bits_per_pixel_of_a_16_by_16_grid_of_16384_codes() -> None:
    assert bits_per_pixel(256, 16_384, 256, 256) == pytest.approx(256 * 14 / 65_536)
