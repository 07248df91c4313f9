"""Samplers on distributions whose best network is known: Gaussian data, x ~ N(MEAN, STD^2), each number apart."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.generation.base import SamplingConfig
from vqpipe.generation.samplers import Guided, ddim, ddpm, euler, heun, linear_score, noise, sde, spaced
from vqpipe.generation.schedules import NoiseSchedule

MEAN, STD = 1.5, 0.5
SHAPE = (2, 48, 48)
SCHEDULE = NoiseSchedule.of("linear", 1e-4, 0.02, 1000)


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(*seeds: int) -> Tensor:
    return noise(draws(*seeds), SHAPE, torch.device("cpu"))


def expected_noise(x: Tensor, time: float, progress: float) -> Tensor:
    level = float(SCHEDULE.alphas_cumprod[int(time)])
    return (1 - level) ** 0.5 * (x - level**0.5 * MEAN) / (level * STD**2 + 1 - level)


def with_exact_variance(steps: int):  # type: ignore[no-untyped-def]
    """The best noise, and in the other channels the share of eq. 15 that gives the true variance of a step back."""
    short = spaced(SCHEDULE, steps, ends_at_zero=True)
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


def expected_velocity(x: Tensor, time: float, progress: float) -> Tensor:
    apart = (x - (1 - time) * MEAN) / ((1 - time) ** 2 * STD**2 + time**2)
    return time * apart - (MEAN + (1 - time) * STD**2 * apart)


def assert_gaussian(samples: Tensor, *, std: float = 0.02) -> None:
    """Mean and standard deviation of 9,216 numbers and more: their own errors are 0.005 and 0.004."""
    assert samples.mean() == pytest.approx(MEAN, abs=0.02)
    assert samples.std() == pytest.approx(STD, rel=std)


def test_ddpm_with_the_true_variance_is_exact_in_few_steps() -> None:
    for steps in (5, 50):
        assert_gaussian(ddpm(with_exact_variance(steps), SCHEDULE, start(1, 2), draws(3, 4), steps))
    fixed = ddpm(expected_noise, SCHEDULE, start(1, 2), draws(3, 4), 5)
    assert fixed.std() < 0.9 * STD  # the posterior's variance alone is too small for steps this long


def test_ddpm_with_the_fixed_variance_needs_many_steps() -> None:
    assert_gaussian(ddpm(expected_noise, SCHEDULE, start(1, 2), draws(3, 4), 500), std=0.03)


def test_ddim_follows_the_flow_and_converges_at_first_order() -> None:
    x = start(1)
    level = float(SCHEDULE.alphas_cumprod[-1])
    truth = MEAN + STD * (x - level**0.5 * MEAN) / (level * STD**2 + 1 - level) ** 0.5
    errors = [(ddim(expected_noise, SCHEDULE, x, draws(9), n, 0.0) - truth).abs().max() for n in (30, 60, 120)]
    assert errors[2] < 0.1
    assert 1.6 < errors[0] / errors[1] < 2.5
    assert 1.6 < errors[1] / errors[2] < 2.5


def test_ddim_without_eta_takes_no_noise_and_with_it_keeps_the_distribution() -> None:
    x = start(1, 2)
    untouched = draws(3, 4)
    states = [draw.get_state() for draw in untouched]
    first = ddim(expected_noise, SCHEDULE, x, untouched, 7, 0.0)
    assert all(torch.equal(draw.get_state(), state) for draw, state in zip(untouched, states, strict=True))
    assert torch.equal(first, ddim(expected_noise, SCHEDULE, x, draws(5, 6), 7, 0.0))
    fresh = ddim(expected_noise, SCHEDULE, x, draws(3, 4), 300, 1.0)
    assert not torch.equal(fresh, ddim(expected_noise, SCHEDULE, x, draws(5, 6), 300, 1.0))
    assert_gaussian(fresh, std=0.03)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solvers_follow_the_flow_at_their_order(solver, order: int) -> None:  # type: ignore[no-untyped-def]
    x = start(1).double()
    errors = [float((solver(expected_velocity, x, steps) - (MEAN + STD * x)).abs().max()) for steps in (32, 64, 128)]
    assert errors[2] < (0.05 if order == 1 else 0.002)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_heun_asks_the_network_as_often_as_it_was_told() -> None:
    asked = []

    def velocity(x: Tensor, time: float, progress: float) -> Tensor:
        asked.append((time, progress))
        return -x

    heun(velocity, torch.ones(1, 1, 1, 1), 7)
    assert len(asked) == 6
    assert all(time + progress in (pytest.approx(1), pytest.approx(1 - 1 / 3)) for time, progress in asked)
    with pytest.raises(ConfigError, match="one step of heun takes 2"):
        heun(velocity, torch.ones(1, 1, 1, 1), 1)


def test_the_sde_keeps_the_distribution() -> None:
    samples = sde(expected_velocity, start(1, 2), draws(3, 4), 250)
    assert_gaussian(samples, std=0.03)
    assert not torch.equal(samples, sde(expected_velocity, start(1, 2), draws(5, 6), 250))


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    for time in (0.1, 0.5, 1.0):
        x = torch.linspace(-2, 3, 11, dtype=torch.float64, requires_grad=True)
        std = math.sqrt((1 - time) ** 2 * STD**2 + time**2)
        density = torch.distributions.Normal(torch.tensor((1 - time) * MEAN).double(), std).log_prob(x).sum()
        (truth,) = torch.autograd.grad(density, x)
        assert torch.allclose(linear_score(expected_velocity(x.detach(), time, 0), x.detach(), time), truth)


def test_the_same_steps_as_diffusers_where_those_are_right() -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    def predict(x: Tensor, time: float, progress: float) -> Tensor:
        return torch.cat([(0.9 * x + time / 1000).sin(), (x - 0.3).cos()], dim=1)

    theirs = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace", clip_sample=False)
    theirs.set_timesteps(40)
    x, generators = start(1, 2), draws(3, 4)
    for t in theirs.timesteps:
        x = theirs.step(predict(x, float(t), 0), t, x, generator=generators).prev_sample
    assert torch.allclose(ddpm(predict, SCHEDULE, start(1, 2), draws(3, 4), 40), x, rtol=1e-3, atol=1e-3)

    for eta in (0.0, 0.7):
        theirs = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        theirs.set_timesteps(40)  # divides 1000
        x, generators = start(1, 2), draws(3, 4)
        for t in theirs.timesteps:
            x = theirs.step(predict(x, float(t), 0)[:, :2], t, x, eta=eta, generator=generators).prev_sample
        ours = ddim(predict, SCHEDULE, start(1, 2), draws(3, 4), 40, eta)
        assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)


def test_spacing_begins_at_the_noisiest_time() -> None:
    assert spaced(SCHEDULE, 5, ends_at_zero=True).times.tolist() == [0, 250, 500, 749, 999]
    assert spaced(SCHEDULE, 5, ends_at_zero=False).times.tolist() == [199, 399, 599, 799, 999]
    for both in (True, False):
        assert spaced(SCHEDULE, 1, ends_at_zero=both).times.tolist() == [999]
        assert spaced(SCHEDULE, 1000, ends_at_zero=both).times.tolist() == list(range(1000))
        for steps in (3, 7, 30, 333, 999):
            times = spaced(SCHEDULE, steps, ends_at_zero=both).times
            assert len(np.unique(times)) == steps
            assert times[-1] == 999
    with pytest.raises(ConfigError, match=r"generate.steps = 1001, the noise schedule has 1000"):
        spaced(SCHEDULE, 1001, ends_at_zero=True)


def test_an_image_depends_on_its_own_draw_alone() -> None:
    together = ddpm(with_exact_variance(9), SCHEDULE, start(1, 2, 3), draws(7, 8, 9), 9)
    alone = ddpm(with_exact_variance(9), SCHEDULE, start(2), draws(8), 9)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(
        sde(expected_velocity, start(1, 2), draws(7, 8), 9)[1:], sde(expected_velocity, start(2), draws(8), 9)
    )


class Network:
    """Conditional 3, null 1; and a variance channel that tells the class. Counts what it is asked."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        self.sizes.append(len(x))
        value = torch.where(classes == 10, 1.0, 3.0)[:, None, None, None]
        return torch.cat([value.expand_as(x), classes[:, None, None, None].expand_as(x).float()], dim=1)


def guided(network: Network, **sampling: object) -> Guided:
    classes = torch.tensor([4, 5])
    return Guided(network, classes, torch.full_like(classes, 10), SamplingConfig(**sampling))  # type: ignore[arg-type]


def test_guidance_moves_every_channel_in_one_batch_of_both() -> None:
    network, x = Network(), torch.zeros(2, 8, 2, 2)
    output = guided(network, cfg_scale=4.0)(x, 0.5, 0.5)
    assert network.sizes == [4]
    assert torch.equal(output[:, :8], torch.full_like(x, 1 + 4 * (3 - 1)))  # released: the first 3 channels only
    assert output[:, 8:].amax(dim=(1, 2, 3)).tolist() == [4, 5]  # the variance stays the conditional one

    network = Network()
    plain = guided(network, cfg_scale=1.0)(x, 0.5, 0.5)
    assert network.sizes == [2]
    assert torch.equal(plain[:, :8], torch.full_like(x, 3))


def test_guidance_holds_on_its_interval_and_follows_its_schedule() -> None:
    network, x = Network(), torch.zeros(2, 1, 1, 1)
    predict = guided(network, cfg_scale=3.0, cfg_interval=(0.25, 0.75))
    values = [float(predict(x, 0.0, progress)[0, 0]) for progress in (0.0, 0.2, 0.3, 0.7, 0.8, 1.0)]
    assert values == [3, 3, 7, 7, 3, 3]
    assert network.sizes == [2, 2, 4, 4, 2, 2]
    rising = guided(network, cfg_scale=3.0, cfg_schedule="linear")
    assert [float(rising(x, 0.0, progress)[0, 0]) for progress in (0.0, 0.5, 1.0)] == [3, 5, 7]
