import math

import numpy as np
import torch
from torch.distributions import Normal

from vqpipe.quantizers import GaussianQuantizer, GqConfig, build_quantizer
from vqpipe.quantizers.gq import gaussian_codes

LATENT = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(1))


def make() -> GaussianQuantizer:
    quantizer = build_quantizer(GqConfig(codebook_size=64, code_dim=3))
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
    nats = torch.distributions.kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
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


def test_codes_are_standard_normal_and_reproducible() -> None:
    codes = gaussian_codes(4096, 3, seed=42)
    assert np.array_equal(codes, gaussian_codes.__wrapped__(4096, 3, seed=42))
    assert np.abs(codes.mean(0)).max() < 0.01
    assert np.abs(codes.std(0) - 1).max() < 0.02
    assert not np.array_equal(codes, gaussian_codes(4096, 3, seed=43))
