"""Schedule and losses against formulas written out here in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError, DataError
from vqpipe.generation.base import GeneratorConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.diffusion import bound_terms, noise_losses
from vqpipe.generation.dit import DitConfig
from vqpipe.generation.schedules import NoiseSchedule
from vqpipe.quantizers import TokenLayout

LINEAR = NoiseSchedule.of("linear", 1e-4, 0.02, 1000)


def test_levels_of_the_two_published_schedules() -> None:
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    left = math.exp(math.fsum(math.log1p(-beta) for beta in betas))
    assert LINEAR.alphas_cumprod[-1] == pytest.approx(left, rel=1e-10)
    roots = [(0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * t / 999) ** 2 for t in range(1000)]
    assert NoiseSchedule.of("scaled_linear", 0.0015, 0.0195, 1000).betas == pytest.approx(roots)
    with pytest.raises(ConfigError, match="betas should lie between 0 and 1"):
        NoiseSchedule(np.array([0.5, 1.0]))


def test_the_posterior_is_that_of_two_gaussians() -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule: precisions add up."""
    generator = torch.Generator().manual_seed(0)
    clean, noisy = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64).unbind()
    for place, t in enumerate((1, 500, 999)):
        before, beta = LINEAR.alphas_cumprod_before[t], LINEAR.betas[t]
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (math.sqrt(before) * clean / (1 - before) + math.sqrt(1 - beta) * noisy / beta) / precision
        ours = LINEAR.posterior_mean(clean, noisy, torch.full((3,), t))
        assert torch.allclose(ours[place], mean[place], rtol=1e-9)
        assert LINEAR.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)
    first = LINEAR.posterior_mean(clean, noisy, torch.zeros(3, dtype=torch.int64))
    assert torch.allclose(first, clean, rtol=1e-9)


def test_respacing_keeps_the_levels() -> None:
    places = np.array([0, 10, 500, 999])
    short = LINEAR.respaced(places)
    assert short.alphas_cumprod == pytest.approx(LINEAR.alphas_cumprod[places], rel=1e-12)
    assert short.times.tolist() == places.tolist()
    assert short.respaced(np.array([1, 3])).times.tolist() == [10, 999]


def test_noise_comes_back_out() -> None:
    clean, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 1, 300, 800, 999])
    noisy = LINEAR.noisy(clean, noise, t)
    assert torch.allclose(LINEAR.clean(noisy, noise, t)[:4], clean[:4], atol=1e-4)
    level = LINEAR.alphas_cumprod[800]
    assert torch.allclose(noisy[3], math.sqrt(level) * clean[3] + math.sqrt(1 - level) * noise[3], atol=1e-6)


def test_a_term_of_the_bound_is_a_divergence_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, eps, variance = torch.randn(4, 6, 2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    t = torch.tensor([0, 1, 2, 400, 998, 999])
    noisy = LINEAR.noisy(clean, noise, t)
    ours = bound_terms(LINEAR, eps, variance, clean, noisy, t)
    betas = np.linspace(1e-4, 0.02, 1000)
    levels = np.cumprod(1 - betas)
    for i, place in enumerate(t.tolist()):
        beta, level, before = betas[place], levels[place], levels[place - 1] if place else 1.0
        share = (variance[i] + 1) / 2
        smallest = betas[max(place, 1)] * (1 - levels[max(place, 1) - 1]) / (1 - levels[max(place, 1)])
        std = (share * math.log(beta) + (1 - share) * math.log(smallest)).exp().sqrt()  # eq. 15
        guess = (noisy[i] - math.sqrt(1 - level) * eps[i]) / math.sqrt(level)
        weights = math.sqrt(before) * beta / (1 - level), math.sqrt(1 - beta) * (1 - before) / (1 - level)
        back = Normal(weights[0] * guess + weights[1] * noisy[i], std)
        if place == 0:
            nats = -back.log_prob(clean[i])
        else:
            truth = Normal(weights[0] * clean[i] + weights[1] * noisy[i], torch.full_like(std, smallest).sqrt())
            nats = kl_divergence(truth, back)
        assert float(ours[i]) == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-6)


def test_the_bound_of_the_exact_model_is_the_entropy_of_the_data() -> None:
    """Gaussian data, the best noise and the true variances: nothing is lost, so the bound is tight."""
    std, count = 0.5, 40
    schedule = NoiseSchedule(np.linspace(1e-3, 0.5, count))
    t = torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 1, 100, 100, generator=generator, dtype=torch.float64).unbind()
    clean, noise = (x / x.square().mean(dim=(2, 3), keepdim=True).sqrt() for x in (clean, noise))  # less chance
    clean = clean[:1].expand_as(clean) * std
    noisy = schedule.noisy(clean, noise, t)
    levels, before = schedule.alphas_cumprod, schedule.alphas_cumprod_before
    column = (slice(None), None, None, None)
    level = torch.from_numpy(levels)[column]
    eps = (1 - level).sqrt() * noisy / (level * std**2 + 1 - level)
    of_clean = np.sqrt(before) * schedule.betas / (1 - levels)
    truth = np.log(schedule.posterior_variance + of_clean**2 * std**2 * (1 - levels) / (levels * std**2 + 1 - levels))
    low, high = schedule.posterior_log_variance, np.log(schedule.betas)
    share = torch.from_numpy(2 * (truth - low) / (high - low) - 1)[column].expand_as(clean)
    bound = float(bound_terms(schedule, eps, share, clean, noisy, t).sum())
    last = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    ends = Normal(math.sqrt(levels[-1]) * clean[0], math.sqrt(1 - levels[-1]))
    bound += float(kl_divergence(ends, last).mean()) / math.log(2)
    assert bound == pytest.approx(math.log2(std * math.sqrt(2 * math.pi * math.e)), abs=0.01)


def test_the_bound_teaches_the_variance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 2, 3, 3, generator=generator).unbind()
    output = torch.randn(4, 4, 3, 3, generator=generator, requires_grad=True)
    t = torch.tensor([0, 5, 500, 999])
    noisy = LINEAR.noisy(clean, noise, t)
    losses = noise_losses(LINEAR, output, clean, noisy, noise, t, 0.001)
    terms = bound_terms(LINEAR, output[:, :2], output[:, 2:], clean, noisy, t)
    assert losses["bound"].item() == pytest.approx(1000 * terms.mean().item())
    assert losses["total"].item() == pytest.approx(losses["noise"].item() + 0.001 * losses["bound"].item())
    (gradient,) = torch.autograd.grad(losses["total"], output)
    assert torch.allclose(gradient[:, :2], 2 * (output[:, :2] - noise) / noise.numel())
    assert gradient[:, 2:].abs().amin(dim=(1, 2, 3)).gt(0).all()
    plain = noise_losses(LINEAR, output[:, :2], clean, noisy, noise, t)
    assert plain.keys() == {"total", "noise"}
    assert plain["total"].item() == pytest.approx((output[:, :2] - noise).square().mean().item())


def space(num_classes: int | None = 5) -> Space:
    return Space(layout=TokenLayout(((4, 4),)), codebook_size=16, latent_dim=3, code_dim=3, num_classes=num_classes)


def test_the_loss_of_an_all_knowing_network_is_zero() -> None:
    generator = build_generator(DitConfig(size="tiny", learn_variance=False), space())
    examples = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    class Knowing(torch.nn.Module):
        def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
            seen.append((times, classes))
            t = times.long()
            return (x - LINEAR.at("signal", t, x) * examples) / LINEAR.at("noise", t, x)

    generator.network = Knowing()
    torch.manual_seed(0)
    labels = torch.arange(8) % 5
    assert generator.loss(examples, labels)["total"].item() < 1e-4
    for _ in range(100):
        generator.loss(examples, labels)
    times = torch.cat([times for times, _ in seen])
    assert times.min() < 20
    assert times.max() > 980
    dropped = torch.cat([classes for _, classes in seen]) == 5
    assert 0.05 < float(dropped.float().mean()) < 0.15
    assert all(torch.equal(classes[classes != 5], labels[classes != 5]) for _, classes in seen)


def test_refuses_what_it_cannot_do() -> None:
    generator = build_generator(DitConfig(size="tiny", patch_size=2), space())
    with pytest.raises(DataError, match=r"latents of shape \[2, 3, 4, 2\], the generator is for \[3, 4, 4\]"):
        generator.loss(torch.zeros(2, 3, 4, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="the sampler heun needs a velocity, dit predicts noise"):
        generator.sample(torch.zeros(1, dtype=torch.int64), SamplingConfig(sampler="heun"), [torch.Generator()])
    for wrong in ({"beta_start": 0.1}, {"eta": 2.0}, {"bound_weight": -1.0}, {"num_times": 1}, {"class_dropout": 2.0}):
        with pytest.raises(ConfigError, match=r"generator\."):
            from_table(GeneratorConfig, {"kind": "dit", **wrong}, "generator")
    config = from_table(GeneratorConfig, {"kind": "dit", "size": "S", "patch_size": 4}, "generator")
    assert from_table(GeneratorConfig, to_table(config), "generator") == config
