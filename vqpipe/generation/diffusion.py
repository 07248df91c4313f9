"""Discrete-time diffusion: the noise schedule, the losses of networks that predict noise, and their samplers.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (IDDPM), Song et al. 2021 (DDIM).
Shapes: T times, B images, C latent channels, h x w positions. Times are 0 to T - 1; the papers count from 1.

diffusers' schedulers compute the same steps, and the tests compare with them where they are right. They are not used:
diffusers' DDIM takes steps of T // steps, which is wrong if `steps` does not divide T, and it computes noise levels in
float32; here they are computed once, in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.generation.base import GeneratorConfig, SamplingConfig, Space, progress_at
from vqpipe.generation.latents import Denoiser, LatentGenerator, gaussian_noise, times_and_noise


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) at T times.

    Attributes, float64[T]:
        betas: variance added from the previous time to this one.
        alphas_cumprod: abar, the remaining share of the data's variance.
        alphas_cumprod_before: abar of the previous time; 1 at the first.
        posterior_variance: of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7); 0 at the first time.
        posterior_log_variance: its logarithm; at the first time that of the second, as IDDPM's code clips it.
        times: int64[T], the times of the full schedule, which are the network's input.
    """

    def __init__(self, betas: np.ndarray, times: np.ndarray | None = None) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.times = np.arange(len(self.betas)) if times is None else times
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        before = self.alphas_cumprod_before = np.append(1.0, self.alphas_cumprod[:-1])
        rest = 1 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - before) / rest
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if len(clipped) > 1 else self.betas[0]
        self.posterior_log_variance = np.log(clipped)
        self.values = {
            "signal": np.sqrt(self.alphas_cumprod),
            "noise": np.sqrt(rest),
            "of clean": np.sqrt(before) * self.betas / rest,
            "of noisy": np.sqrt(1 - self.betas) * (1 - before) / rest,
            "log posterior": self.posterior_log_variance,
            "log beta": np.log(self.betas),
        }
        self.tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def of(cls, kind: Literal["linear", "scaled_linear"], start: float, end: float, times: int) -> "NoiseSchedule":
        """Betas from `start` to `end`, evenly spaced ("linear", DDPM and DiT), or their square roots evenly spaced
        ("scaled_linear", LDM, whose code calls it linear)."""
        if kind == "linear":
            return cls(np.linspace(start, end, times, dtype=np.float64))
        return cls(np.linspace(start**0.5, end**0.5, times, dtype=np.float64) ** 2)

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, places: np.ndarray) -> "NoiseSchedule":
        """The schedule at the indices `places` only, in ascending order: the same marginals, longer steps (IDDPM, eq.
        19)."""
        levels = self.alphas_cumprod[places]
        return NoiseSchedule(1 - levels / np.append(1.0, levels[:-1]), self.times[places])

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return one of `values`, computed in float64, at t, int64[B], as [B, 1, 1, 1] in the type of `like`."""
        key = name, t.device, like.dtype
        if key not in self.tables:
            self.tables[key] = torch.from_numpy(self.values[name]).to(t.device, like.dtype)
        return self.tables[key][t][:, None, None, None]

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t for x_0 and its noise, float[B, C, h, w] (DDPM, eq. 4)."""
        return self.at("signal", t, clean) * clean + self.at("noise", t, clean) * noise

    def remove_noise(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_0 for x_t and its noise: the inverse of `add_noise`."""
        return (noisy - self.at("noise", t, noisy) * noise) / self.at("signal", t, noisy)

    def posterior_mean(self, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7); at the first time it is x_0."""
        return self.at("of clean", t, clean) * clean + self.at("of noisy", t, clean) * noisy

    def learned_log_variance(self, output: Tensor, t: Tensor) -> Tensor:
        """Interpolate log posterior variance and log beta by the network's output, about [-1, 1] (IDDPM, eq. 15)."""
        share = (output + 1) / 2
        return share * self.at("log beta", t, output) + (1 - share) * self.at("log posterior", t, output)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(GeneratorConfig):
    """The noise schedule, and the default sampler."""

    schedule: Literal["linear", "scaled_linear"] = "linear"
    """Betas are evenly spaced, or their square roots are (LDM)."""
    beta_start: float = 1e-4
    """Variance of the noise added at the first time."""
    beta_end: float = 0.02
    """Variance of the noise added at the last time."""
    num_times: int = 1000
    """T, times of the schedule."""
    learn_variance: bool = False
    """The network also predicts the variance of each reverse step, trained by the variational bound (IDDPM)."""
    bound_weight: float = 0.001
    """Weight of the variational bound in the loss: lambda of IDDPM, eq. 16."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Default solver of `sample`."""
    eta: float = 0.0
    """ddim: share of fresh noise, 0 (deterministic) to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "generator", "(0, 1)", "beta_start", "beta_end")
        check_range(self, "generator", "[2, inf)", "num_times")
        check_range(self, "generator", "[0, 1]", "eta")
        check_range(self, "generator", "[0, inf)", "bound_weight")
        if self.beta_start > self.beta_end:
            raise ConfigError(f"generator.beta_start = {self.beta_start} is more than beta_end = {self.beta_end}")


class DiffusionGenerator(LatentGenerator):
    """Predicts the noise in a latent. A subclass builds `network`; the time is its input as a number in [0, T - 1]."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, space: Space) -> None:
        super().__init__(config, space)
        self.schedule = NoiseSchedule.of(config.schedule, config.beta_start, config.beta_end, config.num_times)
        self.loss_in_words = "mean squared error of the noise"
        if config.learn_variance:
            self.loss_in_words += f" + {config.bound_weight:g} x the variational bound in bits per value"

    @property
    def output_channels(self) -> int:
        """Channels of the network's output: C, or 2 C with a learned variance."""
        return self.space.latent_dim * (1 + self.config.learn_variance)

    def loss(
        self, examples: Tensor, labels: Tensor, rngs: Sequence[torch.Generator] | None = None
    ) -> dict[str, Tensor]:
        """See `noise_losses`; times are uniform over the schedule."""
        self.check_latents(examples)
        t, noise = times_and_noise(partial(torch.randint, len(self.schedule)), examples, rngs)
        noisy = self.schedule.add_noise(examples, noise, t)
        output = self.network(noisy, t.float(), self.drop_labels(labels)).float()
        weight = self.config.bound_weight if self.config.learn_variance else None
        return noise_losses(self.schedule, output, examples, noisy, noise, t, weight)

    def check_sampling(self, labels: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> None:
        super().check_sampling(labels, sampling, rngs)
        spaced(self.schedule, sampling.steps, ends_at_zero=True)  # more steps than times

    def solve(
        self, predict: Denoiser, start: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]
    ) -> Tensor:
        """Sample by `ddpm` or `ddim`.

        Raises:
            ConfigError: another sampler, or more steps than times.
        """
        sampler = sampling.sampler or self.config.sampler
        if sampler == "ddpm":
            return ddpm(predict, self.schedule, start, rngs, sampling.steps)
        if sampler == "ddim":
            eta = self.config.eta if sampling.eta is None else sampling.eta
            return ddim(predict, self.schedule, start, rngs, sampling.steps, eta)
        raise ConfigError(
            f"the sampler {sampler} needs predicted velocities, {self.config.kind} predicts noise",
            "Use ddpm or ddim",
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
    """Return the losses of the network's `output` [B, C or 2 C, h, w] at times t: "noise", "total" and, with a weight,
    "bound".

    "noise" is the mean squared error of the first C channels (DDPM, eq. 14). "bound" is T times the term of the
    variational bound at t, an estimate of the whole bound in bits per value; its gradient reaches the variance only,
    not the mean. total = noise + weight * bound (IDDPM, eq. 16).
    """
    eps, variance = output.split([clean.shape[1], output.shape[1] - clean.shape[1]], dim=1)
    error = (eps - noise).square().mean()
    if bound_weight is None:
        return {"total": error, "noise": error.detach()}
    bound = len(schedule) * bound_terms(schedule, eps.detach(), variance, clean, noisy, t).mean()
    return {"total": error + bound_weight * bound, "noise": error.detach(), "bound": bound.detach()}


def bound_terms(
    schedule: NoiseSchedule, eps: Tensor, variance: Tensor, clean: Tensor, noisy: Tensor, t: Tensor
) -> Tensor:
    """Return the terms of the variational bound at times t, float[B], in bits per value (IDDPM, eq. 4 to 6, 15).

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at the first time -log p(x_0 | x_1). For the latter the
    released DiT code uses the probability of a bin of 1/127.5 in [-1, 1], as for 8-bit pixels; latents are continuous,
    so we use the density, and the term may be negative.
    """
    mean, log_variance = schedule.posterior_mean(clean, noisy, t), schedule.at("log posterior", t, clean)
    predicted = schedule.posterior_mean(schedule.remove_noise(noisy, eps, t), noisy, t)
    predicted_log_variance = schedule.learned_log_variance(variance, t)
    distance = (mean - predicted).square() * (-predicted_log_variance).exp()
    ratio = log_variance - predicted_log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + distance)
    first = 0.5 * (
        math.log(2 * math.pi) + predicted_log_variance + (clean - predicted).square() * (-predicted_log_variance).exp()
    )
    nats = torch.where((t == 0)[:, None, None, None], first, divergence)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def spaced(schedule: NoiseSchedule, steps: int, *, ends_at_zero: bool) -> NoiseSchedule:
    """Return `schedule` at `steps` of its times, including the last.

    With `ends_at_zero` it also includes the first, the others evenly spaced between (IDDPM's respacing, used by DiT);
    without, times are T / steps apart ("trailing", Lin et al. 2024), so that no step is spent on a time without noise.
    The released LDM code's spacing does not include the last time, at which the latent is pure noise.

    Raises:
        ConfigError: more steps than times.
    """
    total = len(schedule)
    if steps > total:
        raise ConfigError(f"generate.steps = {steps}, the noise schedule has {total}", f"Use at most {total}")
    places = np.linspace(total - 1, 0, steps) if ends_at_zero else np.arange(total, 0, -total / steps)[:steps] - 1
    return schedule.respaced(np.sort(places.round().astype(np.int64)))


def ddpm(predict: Denoiser, schedule: NoiseSchedule, x: Tensor, rngs: Sequence[torch.Generator], steps: int) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) in `steps` steps.

    If `predict` returns 2 C channels, the second half interpolates the variance (Nichol & Dhariwal 2021, eq. 15);
    otherwise the posterior's variance is used. Nothing is clipped: latents have no fixed range.
    """
    short = spaced(schedule, steps, ends_at_zero=True)
    for step, k in enumerate(reversed(range(steps))):
        output = predict(x, float(short.times[k]), progress_at(step, steps))
        eps, variance = output.split([x.shape[1], output.shape[1] - x.shape[1]], dim=1)
        here = torch.full((len(x),), k, device=x.device)
        log_variance = (
            short.learned_log_variance(variance, here) if variance.shape[1] else short.at("log posterior", here, x)
        )
        x = short.posterior_mean(short.remove_noise(x, eps, here), x, here)
        if k > 0:
            x = x + (0.5 * log_variance).exp() * gaussian_noise(rngs, x.shape[1:], x.device)
    return x


def ddim(
    predict: Denoiser, schedule: NoiseSchedule, x: Tensor, rngs: Sequence[torch.Generator], steps: int, eta: float
) -> Tensor:
    """Song et al. 2021, eq. 12 and 16, in `steps` steps: deterministic with eta 0, DDPM's variance with eta 1.

    The last step returns the latent without noise. (The released LDM code leaves the noise of time 0 in it.)
    """
    short = spaced(schedule, steps, ends_at_zero=False)
    for step, k in enumerate(reversed(range(steps))):
        level, next_level = float(short.alphas_cumprod[k]), float(short.alphas_cumprod_before[k])
        eps = predict(x, float(short.times[k]), progress_at(step, steps))[:, : x.shape[1]]
        clean = (x - (1 - level) ** 0.5 * eps) / level**0.5
        sigma = eta * float(short.posterior_variance[k]) ** 0.5
        x = next_level**0.5 * clean + max(1 - next_level - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * gaussian_noise(rngs, x.shape[1:], x.device)
    return x
