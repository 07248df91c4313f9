"""SiT: its path, its size, and its solvers on Gaussian data, x ~ N(MEAN, STD^2), for which the velocity is known."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.generation import DitConfig, SamplingConfig, SitConfig, Space, build_generator
from vqpipe.generation.latents import gaussian_noise
from vqpipe.generation.sit import euler, heun, linear_score, sde

MEAN, STD = 1.5, 0.5


def rngs(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start(*seeds: int) -> Tensor:
    return gaussian_noise(rngs(*seeds), (2, 48, 48), torch.device("cpu"))


def test_the_transformer_is_dit_s_without_the_variance(make_space: Callable[..., Space]) -> None:
    with torch.device("meta"):
        sit, dit = (
            build_generator(config(), make_space(16, 16, latent_dim=8, code_dim=8, num_classes=1000))
            for config in (SitConfig, DitConfig)
        )
    shapes, others = ({name: value.shape for name, value in network.state_dict().items()} for network in (sit, dit))
    assert shapes.keys() == others.keys()
    different = {name for name in shapes if shapes[name] != others[name]}
    assert different == {"network.final_layer.linear.weight", "network.final_layer.linear.bias"}
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (sit, dit)]
    assert counts[1] - counts[0] == (1152 + 1) * 2 * 2 * 8


def test_a_network_that_predicts_the_velocity_has_zero_loss(make_space: Callable[..., Space]) -> None:
    """x_t moves on a straight line from the data at t = 0 to the noise at t = 1."""
    generator = build_generator(SitConfig(size="tiny"), make_space(latent_dim=3, code_dim=3))
    examples = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    class Oracle(nn.Module):
        def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
            seen.append(times)
            return (x - examples) / times[:, None, None, None]  # (1 - t) x0 + t e - x0 = t (e - x0)

    generator.network = Oracle()
    torch.manual_seed(0)
    for _ in range(50):
        assert generator.loss(examples, torch.arange(8) % 5)["total"].item() < 1e-4
    times = torch.cat(seen)
    assert times.min() >= 0
    assert times.max() < 1
    assert float(times.mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_every_sampler_reaches_the_one_latent_of_the_data(sampler: str, make_space: Callable[..., Space]) -> None:
    generator = build_generator(SitConfig(size="tiny", sampler=sampler), make_space(latent_dim=3, code_dim=3))  # type: ignore[arg-type]
    target = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator.network = VelocityTowards(target)
    samples = generator.sample(torch.tensor([0, 1]), SamplingConfig(steps=100), rngs(1, 2))
    assert (samples - target).abs().max() < 0.15
    alone = generator.sample(torch.tensor([1]), SamplingConfig(steps=100), rngs(2))
    assert torch.allclose(samples[1:], alone, atol=1e-5)


class VelocityTowards(nn.Module):
    """The velocity of data that is `target` alone."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = nn.Parameter(target)

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        return (x - self.target) / times.clamp(min=1e-2)[:, None, None, None]


def test_samplers_of_noise_are_refused(make_space: Callable[..., Space]) -> None:
    generator = build_generator(SitConfig(size="tiny"), make_space())
    with pytest.raises(ConfigError, match="the sampler ddim needs predicted noise, sit predicts velocities"):
        generator.sample(torch.zeros(1, dtype=torch.int64), SamplingConfig(sampler="ddim"), rngs(1))


def expected_velocity(x: Tensor, time: float, progress: float) -> Tensor:
    apart = (x - (1 - time) * MEAN) / ((1 - time) ** 2 * STD**2 + time**2)
    return time * apart - (MEAN + (1 - time) * STD**2 * apart)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solvers_converge_to_the_flow_at_their_order(solver: Callable[..., Tensor], order: int) -> None:
    x = start(1).double()
    errors = [float((solver(expected_velocity, x, steps) - (MEAN + STD * x)).abs().max()) for steps in (32, 64, 128)]
    assert errors[2] < (0.05 if order == 1 else 0.002)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_heun_evaluates_the_network_at_most_steps_times() -> None:
    calls = []

    def velocity(x: Tensor, time: float, progress: float) -> Tensor:
        calls.append((time, progress))
        return -x

    heun(velocity, torch.ones(1, 1, 1, 1), 7)
    assert [time for time, _ in calls] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])
    assert [progress for _, progress in calls] == [0, 0, 0.5, 0.5, 1, 1]
    with pytest.raises(ConfigError, match="one step of heun needs 2"):
        heun(velocity, torch.ones(1, 1, 1, 1), 1)


@pytest.mark.parametrize("solver", [euler, lambda velocity, x, steps: sde(velocity, x, rngs(1), steps)])
def test_guidance_progresses_from_0_in_the_first_step_to_1_in_the_last(solver: Callable[..., Tensor]) -> None:
    seen = []

    def velocity(x: Tensor, time: float, progress: float) -> Tensor:
        seen.append(progress)
        return -x

    solver(velocity, torch.ones(1, 1, 1, 1), 5)
    assert seen == [0, 0.25, 0.5, 0.75, 1]
    solver(velocity, torch.ones(1, 1, 1, 1), 1)
    assert seen[5:] == [0]


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    for time in (0.1, 0.5, 1.0):
        x = torch.linspace(-2, 3, 11, dtype=torch.float64, requires_grad=True)
        std = math.sqrt((1 - time) ** 2 * STD**2 + time**2)
        density = torch.distributions.Normal(torch.tensor((1 - time) * MEAN).double(), std).log_prob(x).sum()
        (truth,) = torch.autograd.grad(density, x)
        assert torch.allclose(linear_score(expected_velocity(x.detach(), time, 0), x.detach(), time), truth)


def test_the_sde_keeps_the_distribution_and_an_image_depends_on_its_rng_alone() -> None:
    samples = sde(expected_velocity, start(1, 2), rngs(3, 4), 250)
    assert samples.mean() == pytest.approx(MEAN, abs=0.02)
    assert samples.std() == pytest.approx(STD, rel=0.03)
    assert torch.equal(samples[1:], sde(expected_velocity, start(2), rngs(4), 250))
    assert not torch.equal(samples, sde(expected_velocity, start(1, 2), rngs(5, 6), 250))


def test_the_sde_takes_the_steps_of_the_released_code() -> None:
    """There time runs from noise at 0 to data at 1; drift u + D s and noise sqrt(2 D) dW with D = sigma = 1 - time."""
    x, noise, ends = start(1), rngs(3), torch.linspace(0, 0.96, 10).tolist()

    def drift(x: Tensor, time: float) -> Tensor:
        std = math.sqrt(time**2 * STD**2 + (1 - time) ** 2)
        return -expected_velocity(x, 1 - time, 0) - (1 - time) * (x - time * MEAN) / std**2

    for here, there in pairwise(ends):
        drawn = math.sqrt(2 * (1 - here) * (there - here)) * gaussian_noise(noise, x.shape[1:], x.device)
        x = x + drift(x, here) * (there - here) + drawn
    x = x + drift(x, 0.96) * 0.04
    torch.testing.assert_close(sde(expected_velocity, start(1), rngs(3), 10), x, rtol=1e-4, atol=1e-4)
