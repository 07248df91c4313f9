"""Sampling of ids: probabilities, top-k, top-p, guidance, and the settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError, NumericError
from vqpipe.generation import SamplingConfig, guidance_scale
from vqpipe.generation.base import SAMPLING_OF
from vqpipe.generation.sampling import (
    append_null_classes,
    checked,
    filter_logits,
    guide_logits,
    repeat_for_guidance,
    sample_ids,
    top_k_count,
    uniform_noise,
)
from vqpipe.settings import field_docs

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
ROWS = 1000


def frequencies(sampling: SamplingConfig, logits: Tensor = LOGITS) -> Tensor:
    """The relative frequency of each id for uniform numbers spread evenly over [0, 1)."""
    uniform = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS
    ids = sample_ids(logits.expand(ROWS, -1), uniform, sampling)
    return torch.bincount(ids, minlength=len(logits)) / ROWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_are_sampled_with_the_probabilities_of_the_softmax(temperature: float) -> None:
    found = frequencies(SamplingConfig(temperature=temperature))
    torch.testing.assert_close(found, (LOGITS / temperature).softmax(0), rtol=0, atol=1.5 / ROWS)


def test_temperature_zero_is_greedy() -> None:
    assert frequencies(SamplingConfig(temperature=0.0)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("top_k", [2, 0.4])
def test_top_k_samples_from_the_most_probable_ids(top_k: int | float) -> None:
    found = frequencies(SamplingConfig(top_k=top_k))
    two = torch.tensor([0.0, math.e**2, 0.0, math.e, 0.0])
    torch.testing.assert_close(found, two / two.sum(), rtol=0, atol=1.5 / ROWS)


def test_top_k_keeps_k_ids_of_equal_logits() -> None:
    kept = filter_logits(torch.zeros(1, 6), SamplingConfig(top_k=4))
    assert int(kept.isfinite().sum()) == 4


def test_top_p_keeps_the_smallest_set_that_reaches_the_probability() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.2, 0.1]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.85, 3), (1.0, 4)):
        assert int(filter_logits(logits, SamplingConfig(top_p=top_p)).isfinite().sum()) == kept
    assert int(filter_logits(logits, SamplingConfig(top_p=1e-9)).isfinite().sum()) == 1
    assert int(filter_logits(torch.zeros(1, 4), SamplingConfig(top_p=0.5)).isfinite().sum()) == 2  # reached exactly


@pytest.mark.parametrize("number", [0.0, math.nextafter(1.0, 0.0)])
def test_excluded_ids_are_never_sampled(number: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]])
    for sampling in (SamplingConfig(), SamplingConfig(top_k=1), SamplingConfig(top_p=0.5)):
        assert sample_ids(logits, torch.tensor([number], dtype=torch.float64), sampling).item() in (1, 2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_are_an_error(wrong: float, options: dict[str, Any]) -> None:
    logits, half = torch.tensor([[0.0, wrong, 1.0, 2.0]]), torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(NumericError, match="the generator predicts NaN or infinity"):
        checked(sample_ids(logits, half, SamplingConfig(**options)))
    with pytest.raises(NumericError, match="raise the temperature"):
        checked(sample_ids(torch.ones(1, 4), half, SamplingConfig(temperature=1e-320)))


def test_top_k_is_a_count_or_a_share_of_the_codebook() -> None:
    assert [top_k_count(k, 100_000) for k in (0, 0.0, 1, 12, 0.1, 1.0, 10**6)] == [100_000] * 2 + [1, 12, 10_000] + [
        100_000
    ] * 2
    assert top_k_count(1e-9, 100) == 1


def test_an_image_has_the_same_random_numbers_in_any_batch() -> None:
    seeds = (3, 5, 8)
    together = uniform_noise([torch.Generator().manual_seed(seed) for seed in seeds], 7, torch.device("cpu"))
    assert together.shape == (3, 7)
    for row, seed in zip(together, seeds, strict=True):
        alone = uniform_noise([torch.Generator().manual_seed(seed)], 7, torch.device("cpu"))
        assert torch.equal(alone[0], row)
    assert uniform_noise([], 7, torch.device("cpu")).shape == (0, 7)


def test_guidance_extrapolates_from_null_through_conditional_logits() -> None:
    conditional, null = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1.5, 4.0):
        mixed = guide_logits(torch.cat([conditional, null]), SamplingConfig(cfg_scale=scale), 0, 10)
        torch.testing.assert_close(mixed, null + scale * (conditional - null))
    assert torch.equal(guide_logits(conditional, SamplingConfig(), 0, 10), conditional)


def test_guidance_doubles_the_batch() -> None:
    labels, sampling = torch.tensor([4, 2]), SamplingConfig(cfg_scale=2.0)
    assert append_null_classes(labels, 9, sampling).tolist() == [4, 2, 9, 9]
    assert repeat_for_guidance(labels, sampling).tolist() == [4, 2, 4, 2]
    assert append_null_classes(labels, 9, SamplingConfig()) is labels
    assert repeat_for_guidance(torch.tensor([4, -1]), SamplingConfig()).tolist() == [4, 0]


def test_the_guidance_scale_follows_schedule_and_interval() -> None:
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
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"cfg_scale": -0.1},
        {"cfg_scale": math.inf},
        {"cfg_scale": 1e39},
        {"cfg_interval": (0.6, 0.5)},
        {"steps": 0},
        {"eta": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"generate\.{name} = "):
        SamplingConfig(**wrong)


def test_the_settings_of_one_kind_of_generator_are_those_whose_doc_names_it() -> None:
    docs = field_docs(SamplingConfig)
    for examples, names in SAMPLING_OF.items():
        assert [name for name in docs if docs[name].lower().startswith(examples)] == list(names)


@pytest.mark.parametrize("top_k", [1, 1.0, 0.1])
def test_a_count_and_a_share_round_trip_through_tables(top_k: int | float) -> None:
    config = SamplingConfig(top_k=top_k)
    again = from_table(SamplingConfig, to_table(config))
    assert again == config
    assert type(again.top_k) is type(top_k)
