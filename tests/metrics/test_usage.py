"""Code usage beside numpy."""

import numpy as np
import pytest
import torch

from vqpipe.errors import DataError
from vqpipe.metrics.usage import CodeUsage, bits_per_pixel, usage_of


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


def test_bits_per_pixel_of_a_16_by_16_grid_of_16384_codes() -> None:
    assert bits_per_pixel(256, 16_384, 256, 256) == pytest.approx(256 * 14 / 65_536)
