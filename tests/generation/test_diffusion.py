"""Noise schedule, losses and samplers of diffusion, against formulas in float64 and known distributions.

The samplers are tested on Gaussian data, x ~ N(MEAN, STD^2), independent in each value, for which the best network is
known.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vqpipe.config import from_table
from vqpipe.errors import ConfigError
from vqpipe.generation import DitConfig, GeneratorConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.diffusion import NoiseSchedule, bound_terms, ddim, ddpm, noise_losses, spaced
from vqpipe.generation.latents import gaussian_noise

LINEAR = NoiseSchedule.of("linear", 1e-4, 0.02, 1000)
MEAN, STD = 1.5, 0.5


def test_noise_levels_of_the_published_schedules() -> None:
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    left = math.exp(math.fsum(math.log1p(-beta) for beta in betas))
    assert LINEAR.alphas_cumprod[-1] == pytest.approx(left, rel=1e-10)
    roots = [(0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * t / 999) ** 2 for t in range(1000)]
    assert NoiseSchedule.of("scaled_linear", 0.0015, 0.0195, 1000).betas == pytest.approx(roots)


def test_the_posterior_is_the_product_of_two_gaussians() -> None:
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


def test_respacing_keeps_noise_levels() -> None:
    places = np.array([0, 10, 500, 999])
    short = LINEAR.respaced(places)
    assert short.alphas_cumprod == pytest.approx(LINEAR.alphas_cumprod[places], rel=1e-12)
    assert short.times.tolist() == places.tolist()
    assert short.respaced(np.array([1, 3])).times.tolist() == [10, 999]


def test_remove_noise_inverts_add_noise() -> None:
    clean, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 1, 300, 800, 999])
    noisy = LINEAR.add_noise(clean, noise, t)
    assert torch.allclose(LINEAR.remove_noise(noisy, noise, t)[:4], clean[:4], atol=1e-4)
    level = LINEAR.alphas_cumprod[800]
    assert torch.allclose(noisy[3], math.sqrt(level) * clean[3] + math.sqrt(1 - level) * noise[3], atol=1e-6)


def test_terms_of_the_bound_are_divergences_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, eps, variance = torch.randn(4, 6, 2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    t = torch.tensor([0, 1, 2, 400, 998, 999])
    noisy = LINEAR.add_noise(clean, noise, t)
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
    """Gaussian data, the best noise prediction and the true variances: the bound is tight."""
    std, count = 0.5, 40
    schedule = NoiseSchedule(np.linspace(1e-3, 0.5, count))
    t = torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, 1, 100, 100, generator=generator, dtype=torch.float64).unbind()
    clean, noise = (x / x.square().mean(dim=(2, 3), keepdim=True).sqrt() for x in (clean, noise))  # exact variances
    clean = clean[:1].expand_as(clean) * std
    noisy = schedule.add_noise(clean, noise, t)
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


def test_the_gradient_of_the_bound_reaches_the_variance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 2, 3, 3, generator=generator).unbind()
    output = torch.randn(4, 4, 3, 3, generator=generator, requires_grad=True)
    t = torch.tensor([0, 5, 500, 999])
    noisy = LINEAR.add_noise(clean, noise, t)
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


def test_a_network_that_predicts_the_noise_has_zero_loss(make_space: Callable[..., Space]) -> None:
    generator = build_generator(DitConfig(size="tiny", learn_variance=False), make_space(latent_dim=3, code_dim=3))
    examples = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    class Oracle(torch.nn.Module):
        def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
            seen.append((times, classes))
            t = times.long()
            return (x - LINEAR.at("signal", t, x) * examples) / LINEAR.at("noise", t, x)

    generator.network = Oracle()
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


def test_invalid_settings_and_samplers_are_refused(make_space: Callable[..., Space]) -> None:
    generator = build_generator(DitConfig(size="tiny"), make_space())
    with pytest.raises(ConfigError, match="the sampler heun needs predicted velocities, dit predicts noise"):
        generator.sample(torch.zeros(1, dtype=torch.int64), SamplingConfig(sampler="heun"), [torch.Generator()])
    for wrong in ({"beta_start": 0.1}, {"eta": 2.0}, {"bound_weight": -1.0}, {"num_times": 1}):
        with pytest.raises(ConfigError, match=r"generator\."):
            from_table(GeneratorConfig, {"kind": "dit", **wrong}, "generator")


def rngs(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(*seeds: int) -> Tensor:
    return gaussian_noise(rngs(*seeds), (2, 48, 48), torch.device("cpu"))


def expected_noise(x: Tensor, time: float, progress: float) -> Tensor:
    level = float(LINEAR.alphas_cumprod[int(time)])
    return (1 - level) ** 0.5 * (x - level**0.5 * MEAN) / (level * STD**2 + 1 - level)


def with_exact_variance(steps: int) -> Callable[..., Tensor]:
    """The best noise prediction, and the output that gives the true variance of a reverse step by eq. 15."""
    short = spaced(LINEAR, steps, ends_at_zero=True)
    places = {int(time): k for k, time in enumerate(short.times)}

    def predict(x: Tensor, time: float, progress: float) -> Tensor:
        k = places[int(time)]
        level = short.alphas_cumprod[k]
        of_clean = math.sqrt(short.alphas_cumprod_before[k]) * short.betas[k] / (1 - level)
        variance_of_clean = STD**2 * (1 - level) / (level * STD**2 + 1 - level)
        truth = math.log(short.posterior_variance[k] + of_clean**2 * variance_of_clean)
        low, high = short.posterior_log_variance[k], math.log(short.betas[k])
        share = 2 * (truth - low) / (high - low) - 1 if high > low else 0.0
        assert k == 0 or -1 <= share <= 1
        return torch.cat([expected_noise(x, time, progress), torch.full_like(x, share)], dim=1)

    return predict


def assert_gaussian(samples: Tensor, *, std: float = 0.02) -> None:
    """Check mean and standard deviation of at least 9,216 numbers; their standard errors are 0.005 and 0.004."""
    assert samples.mean() == pytest.approx(MEAN, abs=0.02)
    assert samples.std() == pytest.approx(STD, rel=std)


def test_ddpm_with_the_true_variance_is_exact_in_few_steps() -> None:
    for steps in (5, 50):
        assert_gaussian(ddpm(with_exact_variance(steps), LINEAR, start(1, 2), rngs(3, 4), steps))
    fixed = ddpm(expected_noise, LINEAR, start(1, 2), rngs(3, 4), 5)
    assert fixed.std() < 0.9 * STD  # the posterior's variance alone is too small for steps this long


def test_ddpm_with_the_fixed_variance_is_exact_in_many_steps() -> None:
    assert_gaussian(ddpm(expected_noise, LINEAR, start(1, 2), rngs(3, 4), 500), std=0.03)


def test_guidance_progresses_from_0_in_the_first_step_to_1_in_the_last() -> None:
    seen = []

    def predict(x: Tensor, time: float, progress: float) -> Tensor:
        seen.append(progress)
        return torch.zeros_like(x)

    for steps in (5, 1):
        ddpm(predict, LINEAR, torch.ones(1, 1, 1, 1), rngs(1), steps)
        ddim(predict, LINEAR, torch.ones(1, 1, 1, 1), rngs(1), steps, 0.0)
    assert seen == [0, 0.25, 0.5, 0.75, 1] * 2 + [0] * 2


def test_ddim_converges_to_the_flow_at_first_order() -> None:
    x = start(1)
    level = float(LINEAR.alphas_cumprod[-1])
    truth = MEAN + STD * (x - level**0.5 * MEAN) / (level * STD**2 + 1 - level) ** 0.5
    errors = [(ddim(expected_noise, LINEAR, x, rngs(9), n, 0.0) - truth).abs().max() for n in (30, 60, 120)]
    assert errors[2] < 0.1
    assert 1.6 < errors[0] / errors[1] < 2.5
    assert 1.6 < errors[1] / errors[2] < 2.5


def test_ddim_is_deterministic_with_eta_0_and_keeps_the_distribution_with_eta_1() -> None:
    x = start(1, 2)
    unused = rngs(3, 4)
    states = [rng.get_state() for rng in unused]
    first = ddim(expected_noise, LINEAR, x, unused, 7, 0.0)
    assert all(torch.equal(rng.get_state(), state) for rng, state in zip(unused, states, strict=True))
    assert torch.equal(first, ddim(expected_noise, LINEAR, x, rngs(5, 6), 7, 0.0))
    fresh = ddim(expected_noise, LINEAR, x, rngs(3, 4), 300, 1.0)
    assert not torch.equal(fresh, ddim(expected_noise, LINEAR, x, rngs(5, 6), 300, 1.0))
    assert_gaussian(fresh, std=0.03)


def test_steps_equal_those_of_diffusers() -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    def predict(x: Tensor, time: float, progress: float) -> Tensor:
        return torch.cat([(0.9 * x + time / 1000).sin(), (x - 0.3).cos()], dim=1)

    theirs = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace", clip_sample=False)
    theirs.set_timesteps(40)
    x, generators = start(1, 2), rngs(3, 4)
    for t in theirs.timesteps:
        x = theirs.step(predict(x, float(t), 0), t, x, generator=generators).prev_sample
    assert torch.allclose(ddpm(predict, LINEAR, start(1, 2), rngs(3, 4), 40), x, rtol=1e-3, atol=1e-3)

    for eta in (0.0, 0.7):
        theirs = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        theirs.set_timesteps(40)  # divides 1000
        x, generators = start(1, 2), rngs(3, 4)
        for t in theirs.timesteps:
            x = theirs.step(predict(x, float(t), 0)[:, :2], t, x, eta=eta, generator=generators).prev_sample
        ours = ddim(predict, LINEAR, start(1, 2), rngs(3, 4), 40, eta)
        assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)


def test_spaced_times_include_the_last() -> None:
    assert spaced(LINEAR, 5, ends_at_zero=True).times.tolist() == [0, 250, 500, 749, 999]
    assert spaced(LINEAR, 5, ends_at_zero=False).times.tolist() == [199, 399, 599, 799, 999]
    for both in (True, False):
        assert spaced(LINEAR, 1, ends_at_zero=both).times.tolist() == [999]
        assert spaced(LINEAR, 1000, ends_at_zero=both).times.tolist() == list(range(1000))
        for steps in (3, 7, 30, 333, 999):
            times = spaced(LINEAR, steps, ends_at_zero=both).times
            assert len(np.unique(times)) == steps
            assert times[-1] == 999
    with pytest.raises(ConfigError, match=r"generate.steps = 1001, the noise schedule has 1000"):
        spaced(LINEAR, 1001, ends_at_zero=True)
