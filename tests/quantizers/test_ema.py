import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.quantizers import EmaConfig, EmaQuantizer, build_quantizer, ema

CONFIG = EmaConfig(codebook_size=5, code_dim=2)


def fresh(**settings: Any) -> EmaQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(dataclasses.replace(CONFIG, **settings))
    assert isinstance(quantizer, EmaQuantizer)
    return quantizer


def one_update(latent: Tensor) -> EmaQuantizer:
    quantizer = fresh()
    quantizer.update(latent, quantizer(latent).ids)
    return quantizer


def test_two_updates_match_the_formula() -> None:
    quantizer = fresh()
    counts, sums, codes = [torch.ones(5), quantizer.codes.clone(), quantizer.codes.clone()]
    for step in range(2):
        latent = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        ids = quantizer(latent).ids
        one_hot = torch.nn.functional.one_hot(ids.flatten(), 5).float()
        rows = latent.permute(0, 2, 3, 1).reshape(-1, 2)
        counts = 0.99 * counts + 0.01 * one_hot.sum(0)
        sums = 0.99 * sums + 0.01 * one_hot.T @ rows
        codes = sums / ((counts + 1e-5) / (counts.sum() + 5e-5) * counts.sum())[:, None]
        quantizer.update(latent, ids)
    torch.testing.assert_close(quantizer.codebook(), codes)
    torch.testing.assert_close(quantizer.counts, counts)


def test_unused_code_does_not_move() -> None:
    quantizer = fresh()
    quantizer.codes[0] = quantizer.sums[0] = 50.0
    latent = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        quantizer.update(latent, quantizer(latent).ids)
    torch.testing.assert_close(quantizer.codes[0], torch.full((2,), 50.0), rtol=1e-3, atol=0)


def test_released_start_makes_unused_codes_huge() -> None:
    quantizer = fresh(released_start=True)
    quantizer.codes[0] = quantizer.sums[0] = 50.0
    latent = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    quantizer.update(latent, quantizer(latent).ids)
    assert quantizer.codes[0].norm() > 1e6


def test_ranks_get_the_codebook_of_their_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    shares: list[Tensor] = []
    monkeypatch.setattr(ema, "all_reduce_sum", lambda tensor: shares.append(tensor.clone()))
    for rank in range(2):
        one_update(latent[rank::2])
    monkeypatch.setattr(ema, "all_reduce_sum", lambda tensor: tensor.copy_(sum(shares)))
    ranks = [one_update(latent[rank::2]).codebook() for rank in range(2)]
    monkeypatch.undo()
    assert torch.equal(ranks[0], ranks[1])
    torch.testing.assert_close(ranks[0], one_update(latent).codebook())


def test_lengths_of_latents_do_not_count_if_they_are_normalized() -> None:
    first, latent = fresh(normalize=True), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    second, ids = copy.deepcopy(first), first(latent).ids
    first.update(latent, ids)
    second.update(3 * latent, ids)
    torch.testing.assert_close(first.codes, second.codes)


def test_decay_and_epsilon_are_those_of_the_settings() -> None:
    quantizer = fresh(codebook_size=2, code_dim=1, decay=0.75, epsilon=0.5)
    quantizer.sums.copy_(torch.tensor([[2.0], [4.0]]))
    quantizer.update(torch.tensor([5.0, 7.0, 9.0]).view(1, 1, 1, 3), torch.tensor([[0, 0, 1]]))
    counts = torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25])
    sums = torch.tensor([0.75 * 2 + 0.25 * 12, 0.75 * 4 + 0.25 * 9])
    smoothed = (counts + 0.5) / (counts.sum() + 2 * 0.5) * counts.sum()
    torch.testing.assert_close(quantizer.counts, counts)
    torch.testing.assert_close(quantizer.codes[:, 0], sums / smoothed)


def test_sums_of_the_released_start_are_the_standardized_codes() -> None:
    quantizer = fresh(released_start=True)
    quantizer.standardize_codebook()
    assert torch.equal(quantizer.sums, quantizer.codes)


@pytest.mark.parametrize("released_start", [False, True])
def test_masked_batch_changes_nothing(released_start: bool) -> None:
    quantizer = fresh(released_start=released_start)
    latent = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        before = copy.deepcopy(quantizer.state_dict())
        quantizer.update(latent, torch.full((3, 16), -1))
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
        quantizer.update(latent, quantizer(latent).ids)
