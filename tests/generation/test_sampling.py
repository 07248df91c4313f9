"""From logits to ids: probabilities are the promised ones, and each image has its own numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError
from vqpipe.generation import SamplingConfig, guidance_scale
from vqpipe.generation.sampling import (
    draw_ids,
    for_each_run,
    guided,
    keep_most_probable,
    top_count,
    uniforms,
    with_null,
)

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
ROWS = 1000


def shares(sampling: SamplingConfig, logits: Tensor = LOGITS) -> Tensor:
    """How often each id is drawn over numbers that are spread evenly over [0, 1)."""
    chances = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS
    ids = draw_ids(logits.expand(ROWS, -1), chances, sampling)
    return torch.bincount(ids, minlength=len(logits)) / ROWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_are_drawn_with_the_probabilities_of_the_softmax(temperature: float) -> None:
    drawn = shares(SamplingConfig(temperature=temperature))
    torch.testing.assert_close(drawn, (LOGITS / temperature).softmax(0), rtol=0, atol=1.5 / ROWS)


def test_temperature_zero_is_greedy() -> None:
    assert shares(SamplingConfig(temperature=0.0)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("top_k", [2, 0.4])
def test_top_k_draws_from_the_most_probable(top_k: int | float) -> None:
    drawn = shares(SamplingConfig(top_k=top_k))
    two = torch.tensor([0.0, math.e**2, 0.0, math.e, 0.0])
    torch.testing.assert_close(drawn, two / two.sum(), rtol=0, atol=1.5 / ROWS)


def test_top_k_keeps_so_many_where_logits_are_equal() -> None:
    kept = keep_most_probable(torch.zeros(1, 6), SamplingConfig(top_k=4))
    assert int(kept.isfinite().sum()) == 4


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.2, 0.1]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.85, 3), (1.0, 4)):
        assert int(keep_most_probable(logits, SamplingConfig(top_p=top_p)).isfinite().sum()) == kept
    assert int(keep_most_probable(logits, SamplingConfig(top_p=1e-9)).isfinite().sum()) == 1


@pytest.mark.parametrize("chance", [0.0, math.nextafter(1.0, 0.0)])
def test_what_is_left_out_is_never_drawn(chance: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]])
    for sampling in (SamplingConfig(), SamplingConfig(top_k=1), SamplingConfig(top_p=0.5)):
        assert draw_ids(logits, torch.tensor([chance], dtype=torch.float64), sampling).item() in (1, 2)


def test_a_share_of_the_codebook_is_no_exponent() -> None:
    assert [top_count(k, 100_000) for k in (0, 0.0, 1, 12, 0.1, 1.0, 10**6)] == [100_000] * 2 + [1, 12, 10_000] + [
        100_000
    ] * 2
    assert top_count(1e-9, 100) == 1


def test_an_image_has_the_same_numbers_in_any_batch() -> None:
    seeds = (3, 5, 8)
    together = uniforms([torch.Generator().manual_seed(seed) for seed in seeds], 7, torch.device("cpu"))
    assert together.shape == (3, 7)
    for row, seed in zip(together, seeds, strict=True):
        alone = uniforms([torch.Generator().manual_seed(seed)], 7, torch.device("cpu"))
        assert torch.equal(alone[0], row)
    assert uniforms([], 7, torch.device("cpu")).shape == (0, 7)


def test_guidance_goes_from_null_through_the_conditional() -> None:
    conditional, null = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1.5, 4.0):
        mixed = guided(torch.cat([conditional, null]), SamplingConfig(cfg_scale=scale), 0, 10)
        torch.testing.assert_close(mixed, null + scale * (conditional - null))
    assert torch.equal(guided(conditional, SamplingConfig(), 0, 10), conditional)


def test_guidance_doubles_what_runs() -> None:
    labels, sampling = torch.tensor([4, 2]), SamplingConfig(cfg_scale=2.0)
    assert with_null(labels, 9, sampling).tolist() == [4, 2, 9, 9]
    assert for_each_run(labels, sampling).tolist() == [4, 2, 4, 2]
    assert with_null(labels, 9, SamplingConfig()) is for_each_run(labels, SamplingConfig())


def test_schedules_rise_to_the_scale() -> None:
    def at(**options: Any) -> list[float]:
        sampling = SamplingConfig(cfg_scale=5.0, **options)
        return [round(guidance_scale(sampling, step / 4), 6) for step in range(5)]

    assert at() == [5, 5, 5, 5, 5]
    assert at(cfg_schedule="linear") == [1, 2, 3, 4, 5]
    assert at(cfg_schedule="cosine") == [1, 1.585786, 3, 4.414214, 5]
    assert at(cfg_interval=(0.3, 0.8)) == [1, 1, 5, 5, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"cfg_scale": -0.1},
        {"cfg_interval": (0.6, 0.5)},
        {"steps": 0},
        {"eta": 2.0},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"generate\.{name} = .* should be"):
        SamplingConfig(**wrong)


@pytest.mark.parametrize("top_k", [1, 1.0, 0.1])
def test_a_count_and_a_share_come_back_as_what_they_were(top_k: int | float) -> None:
    config = SamplingConfig(top_k=top_k)
    again = from_table(SamplingConfig, to_table(config))
    assert again == config
    assert type(again.top_k) is type(top_k)
