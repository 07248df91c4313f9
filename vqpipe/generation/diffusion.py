"""Generators whose network predicts the noise in a latent: the losses, and the way from network to samples.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (IDDPM), Song et al. 2021 (DDIM).
Shapes: T times, B images, C latent channels, h x w positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.generation.base import GeneratorConfig, SamplingConfig, Space
from vqpipe.generation.latents import LatentGenerator
from vqpipe.generation.samplers import Guided, ddim, ddpm
from vqpipe.generation.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(GeneratorConfig):
    """The noise schedule, and how to sample where nothing else is asked for."""

    schedule: Literal["linear", "scaled_linear"] = "linear"
    """Betas rise evenly, or their square roots do (LDM)."""
    beta_start: float = 1e-4
    """Variance added at the first time."""
    beta_end: float = 0.02
    """Variance added at the last."""
    num_times: int = 1000
    """T."""
    learn_variance: bool = False
    """The network also gives the variance of each step back, learned by the variational bound (IDDPM)."""
    bound_weight: float = 0.001
    """Weight of that bound beside the noise's squared error: lambda of IDDPM, eq. 16."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """What the generator samples with."""
    eta: float = 0.0
    """ddim: share of fresh noise, 0 (deterministic) to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start <= self.beta_end < 1 or self.num_times < 2:
            raise ConfigError(
                f"generator.beta_start = {self.beta_start}, beta_end = {self.beta_end}, num_times = {self.num_times}",
                "Betas rise between 0 and 1, over 2 times or more",
            )
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"generator.eta = {self.eta} should be in [0, 1]")
        if self.bound_weight < 0:
            raise ConfigError(f"generator.bound_weight = {self.bound_weight} is negative")


class DiffusionGenerator(LatentGenerator):
    """Learns to tell the noise from the latent; a subclass makes `network`, which is told the time, 0 to T - 1."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, space: Space) -> None:
        super().__init__(config, space)
        self.schedule = NoiseSchedule.of(config.schedule, config.beta_start, config.beta_end, config.num_times)

    @property
    def output_channels(self) -> int:
        """What the network gives: C, or 2 C with a learned variance."""
        return self.space.latent_dim * (1 + self.config.learn_variance)

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.check_latents(examples)
        t = torch.randint(len(self.schedule), (len(examples),), device=examples.device)
        noise = torch.randn_like(examples)
        noisy = self.schedule.noisy(examples, noise, t)
        output = self.network(noisy, t.float(), self.classes(self.dropped(labels))).float()
        weight = self.config.bound_weight if self.config.learn_variance else None
        return noise_losses(self.schedule, output, examples, noisy, noise, t, weight)

    def solve(
        self, predict: Guided, start: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]
    ) -> Tensor:
        sampler = sampling.sampler or self.config.sampler
        if sampler == "ddpm":
            return ddpm(predict, self.schedule, start, draws, sampling.steps)
        if sampler == "ddim":
            eta = self.config.eta if sampling.eta is None else sampling.eta
            return ddim(predict, self.schedule, start, draws, sampling.steps, eta)
        raise ConfigError(
            f"the sampler {sampler} needs a velocity, {self.config.kind} predicts noise", "Use ddpm, ddim"
        )


def noise_losses(
    schedule: NoiseSchedule,
    output: Tensor,
    clean: Tensor,
    noisy: Tensor,
    noise: Tensor,
    t: Tensor,
    bound_weight: float | None = None,
) -> dict[str, Tensor]:
    """The network's `output` [B, C or 2 C, h, w] at times t judged: "noise", and with a weight "bound"; "total".

    "noise" is the mean squared error of its first C channels (DDPM, eq. 14). "bound" is T times the term of the
    variational bound at t, an estimate of the whole bound in bits a number, and total = noise + weight * bound (IDDPM,
    eq. 16). No gradient of it reaches the mean.
    """
    eps, rest = output.split([clean.shape[1], output.shape[1] - clean.shape[1]], dim=1)
    error = (eps - noise).square().mean()
    if bound_weight is None:
        return {"total": error, "noise": error.detach()}
    bound = len(schedule) * bound_terms(schedule, eps.detach(), rest, clean, noisy, t).mean()
    return {"total": error + bound_weight * bound, "noise": error.detach(), "bound": bound.detach()}


def bound_terms(
    schedule: NoiseSchedule, eps: Tensor, variance: Tensor, clean: Tensor, noisy: Tensor, t: Tensor
) -> Tensor:
    """float[B]: the terms of the variational bound at times t, in bits a number (IDDPM, eq. 4 to 6, 15).

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at the first time -log p(x_0 | x_1). That last one the
    released DiT code takes as the probability of a bin of 1/127.5 in [-1, 1], as if a latent were a pixel of 8 bits;
    latents are continuous, so here it is a density, and may be negative.
    """
    mean, log_variance = schedule.posterior_mean(clean, noisy, t), schedule.at("log posterior", t, clean)
    guess = schedule.posterior_mean(schedule.clean(noisy, eps, t), noisy, t)
    guess_log_variance = schedule.learned_log_variance(variance, t)
    apart = (mean - guess).square() * (-guess_log_variance).exp()
    ratio = log_variance - guess_log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + apart)
    first = 0.5 * (math.log(2 * math.pi) + guess_log_variance + (clean - guess).square() * (-guess_log_variance).exp())
    nats = torch.where((t == 0)[:, None, None, None], first, divergence)
    return nats.flatten(1).mean(dim=1) / math.log(2)
