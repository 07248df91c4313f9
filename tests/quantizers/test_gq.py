import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vqpipe import distributed
from vqpipe.quantizers import GaussianQuantizer, GqConfig, build_quantizer
from vqpipe.quantizers.base import to_rows
from vqpipe.quantizers.gq import gaussian_codes

LATENT = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(1))


def make(**settings: Any) -> GaussianQuantizer:
    quantizer = build_quantizer(GqConfig(codebook_size=64, code_dim=3, **settings))
    assert isinstance(quantizer, GaussianQuantizer)
    return quantizer


def test_id_is_the_code_of_the_largest_likelihood_ratio() -> None:
    quantizer = make().eval()
    mean, log_variance = (part.permute(0, 2, 3, 1).reshape(-1, 1, 3).double() for part in LATENT.chunk(2, 1))
    codes = quantizer.codes.double()
    ratio = Normal(mean, (0.5 * log_variance).exp()).log_prob(codes) - Normal(0.0, 1.0).log_prob(codes)
    assert torch.equal(quantizer(LATENT).ids.flatten(), ratio.sum(2).argmax(1))


def test_codes_in_training_are_samples_of_the_posterior() -> None:
    quantizer, latent = make().train(), LATENT.clone().requires_grad_()
    torch.manual_seed(4)
    codes = quantizer(latent).codes
    torch.manual_seed(4)
    mean, log_variance = LATENT.chunk(2, 1)
    torch.testing.assert_close(codes[:, :3], mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
    assert not codes[:, 3:].any()
    (gradient,) = torch.autograd.grad(codes.square().sum(), latent)
    assert gradient[:, 3:].any()  # the width of the posterior trains


def test_rate_is_the_divergence_in_bits_with_the_weights_of_its_range() -> None:
    quantizer = make()
    mean, log_variance = LATENT.chunk(2, 1)
    nats = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
    bits = nats / math.log(2)
    torch.testing.assert_close(quantizer(LATENT).losses["rate"], bits.mean())  # all weights start at 1
    quantizer.weights.copy_(torch.tensor([2.0, 3.0, 0.5]))
    weight = torch.where(bits > 6.5, 3.0, torch.where(bits < 5.5, 0.5, 1.0))
    torch.testing.assert_close(quantizer(LATENT).losses["rate"], 2 * (weight * bits).mean())


def test_update_moves_the_weights_towards_log2_k_bits() -> None:
    quantizer = make()
    flat = torch.zeros(1, 6, 2, 2)  # N(0, 1) itself: no bits at all
    quantizer.update(flat, torch.zeros(1, 4, dtype=torch.int64))
    torch.testing.assert_close(quantizer.weights, torch.tensor([1 / 1.01, 1.0, 1 / 1.01]))
    quantizer.update(flat + 9.0, torch.zeros(1, 4, dtype=torch.int64))  # far above
    torch.testing.assert_close(quantizer.weights, torch.tensor([1.0, 1.01, 1.0]))


def test_update_without_valid_ids_changes_nothing() -> None:
    quantizer = make()
    quantizer.update(LATENT, torch.full((2, 9), -1))
    assert torch.equal(quantizer.weights, torch.ones(3))


def test_codes_are_standard_normal_and_reproducible() -> None:
    codes = gaussian_codes(4096, 3, seed=42)
    assert np.array_equal(codes, gaussian_codes.__wrapped__(4096, 3, seed=42))
    assert np.abs(codes.mean(0)).max() < 0.01
    assert np.abs(codes.std(0) - 1).max() < 0.02
    assert not np.array_equal(codes, gaussian_codes(4096, 3, seed=43))


@pytest.mark.parametrize(("log_variance", "used"), [(200.0, 20.0), (-200.0, -30.0), (-25.0, -25.0)])
def test_extreme_variances_have_a_finite_rate_and_the_id_of_the_largest_ratio(log_variance: float, used: float) -> None:
    quantizer, mean = make().eval(), LATENT[:, :3]
    _, ids, losses = quantizer(torch.cat([mean, torch.full_like(mean, log_variance)], dim=1))
    means, codes = to_rows(mean).double()[:, None], quantizer.codes.double()
    posterior, prior = Normal(means, torch.full_like(means, math.exp(used / 2))), Normal(0.0, 1.0)
    bits = kl_divergence(posterior, prior).sum(2) / math.log(2)
    torch.testing.assert_close(losses["rate"], bits.mean().float())
    assert torch.equal(ids.flatten(), (posterior.log_prob(codes) - prior.log_prob(codes)).sum(2).argmax(1))


def test_tolerance_and_seed_are_those_of_the_settings() -> None:
    quantizer, latent = make(tolerance=3.0, codebook_seed=7), 2 * LATENT
    assert not torch.equal(quantizer.codes, make().codes)
    mean, log_variance = latent.chunk(2, 1)
    bits = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / math.log(2)
    quantizer.weights.copy_(torch.tensor([1.0, 5.0, 0.1]))
    weight = torch.where(bits > 9, 5.0, torch.where(bits < 3, 0.1, 1.0))
    assert ((bits > 6.5) & (bits < 9)).any()
    torch.testing.assert_close(quantizer(latent).losses["rate"], (weight * bits).mean())


@pytest.mark.parametrize(
    ("mean", "start", "end"),
    [(0.0, [1.0, 1.0, 1e-3], [1 / 1.01, 1.0, 1e-3]), (9.0, [1.0, 1e3, 1.0], [1.01, 1e3, 1.0])],
)
def test_weights_stay_in_their_range(mean: float, start: list[float], end: list[float]) -> None:
    quantizer = make()
    quantizer.weights.copy_(torch.tensor(start))
    quantizer.update(torch.full((1, 6, 2, 2), mean), torch.zeros(1, 4, dtype=torch.int64))
    torch.testing.assert_close(quantizer.weights, torch.tensor(end), rtol=1e-5, atol=0)


def test_ranks_get_the_weights_of_their_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of one rank are 0 bits, those of the other far above log2 K: each alone would move its own way."""
    latents, ids = (torch.zeros(1, 6, 2, 2), torch.full((1, 6, 2, 2), 9.0)), torch.zeros(1, 4, dtype=torch.int64)
    shares: list[Tensor] = []
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda parts: shares.append(parts.clone()) or parts)
    for latent in latents:
        make().update(latent, ids)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda parts: sum(shares))
    for latent in latents:
        quantizer = make()
        quantizer.update(latent, ids)
        torch.testing.assert_close(quantizer.weights, torch.tensor([1.01, 1.01, 1 / 1.01]))
