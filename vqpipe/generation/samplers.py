"""From noise to latents: DDPM and DDIM for networks that predict noise; Euler, Heun and an SDE for velocities.

Of image i all randomness comes from `draws[i]`, a generator on the CPU, so that it does not depend on its batch. No
solver chooses its steps by an error over the batch, for the same reason: dopri5, which the released SiT code samples
with, is left out. (SiT's paper reports Heun and Euler-Maruyama, both here.)

diffusers' schedulers do the same steps, and the tests compare with them where they are right. They are not used: its
DDIM takes T // steps back from each time, which is wrong wherever `steps` does not divide T, and they calculate noise
levels in float32.

Shapes: B images, C latent channels, h x w positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.generation.base import SamplingConfig, guidance_scale
from vqpipe.generation.schedules import NoiseSchedule

Draws = Sequence[torch.Generator]
LAST_STEP = 0.04
"""Length of the SDE's last step, which adds no noise; the released SiT code's default."""


def noise(draws: Draws, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal float32[B, *shape], image i's from draws[i]; drawn on the CPU: the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=draw) for draw in draws]).to(device)


@dataclass(frozen=True)
class Guided:
    """A network under classifier-free guidance (Ho & Salimans 2022), for one batch of classes.

    Guidance acts on the C channels of the prediction; channels beyond them (a variance) are the conditional ones.
    """

    network: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(float[B, C, h, w], times float32[B], classes int64[B]) -> float[B, C or more, h, w]."""
    classes: Tensor
    """int64[B]."""
    null: Tensor
    """int64[B], the null class."""
    sampling: SamplingConfig

    def __call__(self, x: Tensor, time: float, progress: float) -> Tensor:
        """The prediction for `x`, float32[B, C, h, w], at `time`, the network's own; `progress` goes from 0 to 1."""
        scale = guidance_scale(self.sampling, progress)
        times = torch.full((len(x),), time, device=x.device)
        if scale == 1:
            return self.network(x, times, self.classes).float()
        both = self.network(torch.cat([x, x]), torch.cat([times, times]), torch.cat([self.classes, self.null])).float()
        conditional, null = both.chunk(2)
        channels = x.shape[1]
        guided = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([guided, conditional[:, channels:]], dim=1)


Predict = Callable[[Tensor, float, float], Tensor]
"""(x, time, progress) -> prediction, as `Guided` does it."""


def spaced(schedule: NoiseSchedule, steps: int, *, ends_at_zero: bool) -> NoiseSchedule:
    """`schedule` on `steps` of its times, the last of them included.

    With `ends_at_zero` the first one is, too, and the others lie evenly between (IDDPM's respacing, which DiT samples
    with); without, each is T / steps from the next ("trailing", Lin et al. 2024), which spends no step on a time at
    which there is no noise left. The released LDM code's spacing begins below the time at which the noise is pure.

    Raises:
        ConfigError: more steps than times.
    """
    total = len(schedule)
    if steps > total:
        raise ConfigError(f"generate.steps = {steps}, the noise schedule has {total}", f"Use at most {total}")
    places = np.linspace(total - 1, 0, steps) if ends_at_zero else np.arange(total, 0, -total / steps)[:steps] - 1
    return schedule.respaced(np.sort(places.round().astype(np.int64)))


def ddpm(predict: Predict, schedule: NoiseSchedule, x: Tensor, draws: Draws, steps: int) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) in `steps` steps.

    Where `predict` gives 2 C channels, the second half interpolates the variance (Nichol & Dhariwal 2021, eq. 15);
    else the variance is the posterior's. Nothing is clipped: latents have no range.
    """
    short = spaced(schedule, steps, ends_at_zero=True)
    for k in reversed(range(len(short))):
        output = predict(x, float(short.times[k]), 1 - (k + 1) / len(short))
        eps, rest = output.split([x.shape[1], output.shape[1] - x.shape[1]], dim=1)
        here = torch.full((len(x),), k, device=x.device)
        log_variance = short.learned_log_variance(rest, here) if rest.shape[1] else short.at("log posterior", here, x)
        x = short.posterior_mean(short.clean(x, eps, here), x, here)
        if k > 0:
            x = x + (0.5 * log_variance).exp() * noise(draws, x.shape[1:], x.device)
    return x


def ddim(predict: Predict, schedule: NoiseSchedule, x: Tensor, draws: Draws, steps: int, eta: float) -> Tensor:
    """Song et al. 2021, eq. 12 and 16, in `steps` steps: deterministic with eta 0, DDPM's variance with eta 1.

    The last step ends at the clean latent, without noise. (The released LDM code leaves there the noise of time 0.)
    """
    short = spaced(schedule, steps, ends_at_zero=False)
    for k in reversed(range(len(short))):
        level, next_level = float(short.alphas_cumprod[k]), float(short.alphas_cumprod_before[k])
        eps = predict(x, float(short.times[k]), 1 - (k + 1) / len(short))[:, : x.shape[1]]
        clean = (x - (1 - level) ** 0.5 * eps) / level**0.5
        sigma = eta * float(short.posterior_variance[k]) ** 0.5
        x = next_level**0.5 * clean + max(1 - next_level - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise(draws, x.shape[1:], x.device)
    return x


def euler(velocity: Predict, x: Tensor, steps: int) -> Tensor:
    """dx = v(x, t) dt from t = 1 (noise) to t = 0 in `steps` equal steps."""
    for k in range(steps):
        x = x - velocity(x, 1 - k / steps, k / steps) / steps
    return x


def heun(velocity: Predict, x: Tensor, steps: int) -> Tensor:
    """The same by Heun's second-order method. It asks the network twice a step, so it takes `steps` // 2 of them.

    Raises:
        ConfigError: `steps` is 1.
    """
    if steps < 2:
        raise ConfigError("generate.steps = 1, and one step of heun takes 2", "Use 2 or more, or the sampler euler")
    count = steps // 2
    for k in range(count):
        here, there = 1 - k / count, 1 - (k + 1) / count
        slope = velocity(x, here, k / count)
        ahead = velocity(x - slope / count, there, k / count)
        x = x - (slope + ahead) / (2 * count)
    return x


def sde(velocity: Predict, x: Tensor, draws: Draws, steps: int) -> Tensor:
    """The reverse SDE by Euler-Maruyama: dx = (v - w s / 2) dt + sqrt(w) dW, time running from 1 to 0.

    Ma et al. 2024 (SiT), section 2, with w = sigma_t = t, as released. The last step, from `LAST_STEP` to 0, leaves the
    noise out; before it the steps are equal. The score follows from the velocity.
    """
    ends = [*np.linspace(1, LAST_STEP, steps).tolist(), 0.0] if steps > 1 else [1.0, 0.0]
    for k, (here, there) in enumerate(pairwise(ends)):
        slope = velocity(x, here, k / steps)
        step = here - there
        x = x - step * (slope - 0.5 * here * linear_score(slope, x, here))
        if there > 0:
            x = x + (here * step) ** 0.5 * noise(draws, x.shape[1:], x.device)
    return x


def linear_score(velocity: Tensor, x: Tensor, time: float) -> Tensor:
    """The score of x_t = (1 - t) data + t noise, t in (0, 1], from the velocity: -((1 - t) v + x) / t.

    Ma et al. 2024, section 2: (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')); alpha = 1 - t, sigma = t.
    """
    return -((1 - time) * velocity + x) / time
