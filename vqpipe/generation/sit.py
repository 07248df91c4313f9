"""`sit`: DiT's transformer trained as a flow from noise to latents, and its samplers.

Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", with
the linear path and unweighted velocity prediction, as in VQGAN-LC: x_t = (1 - t) x + t noise, v = noise - x.

We follow the paper where the released code differs: t = 0 is the data and t = 1 the noise (released: reversed, with the
opposite sign of v); the network predicts the velocity only (released: twice the channels, half of them discarded); the
samplers are Heun's method and the SDE (released with VQGAN-LC: dopri5, whose steps depend on an error over the batch,
so that an image would depend on its batch). As released, the network's input is t in [0, 1], not scaled.

Shapes: B images, C latent channels, h x w positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.generation.base import SamplingConfig, Space, progress_at
from vqpipe.generation.dit import Transformer, TransformerConfig
from vqpipe.generation.latents import Denoiser, LatentGenerator, gaussian_noise, times_and_noise

LAST_STEP = 0.04
"""Length of the SDE's last step, which adds no noise; the released code's default."""


@dataclass(frozen=True, kw_only=True)
class SitConfig(TransformerConfig):
    """SiT: linear path, velocity prediction."""

    kind: ClassVar[str] = "sit"

    sampler: Literal["euler", "heun", "sde"] = "heun"
    """Default solver of `sample`: Euler's or Heun's method for the ODE, or Euler-Maruyama for the SDE."""


class Sit(LatentGenerator):
    """SiT on a tokenizer's latents."""

    config_class = SitConfig
    loss_in_words = "mean squared error of the velocity"
    config: SitConfig
    network: Transformer

    def __init__(self, config: SitConfig, space: Space) -> None:
        super().__init__(config, space)
        self.network = Transformer(config, self.latent_shape, space.latent_dim, self.num_class_embeddings)

    def loss(
        self, examples: Tensor, labels: Tensor, rngs: Sequence[torch.Generator] | None = None
    ) -> dict[str, Tensor]:
        """Return "total", the mean squared error of the velocity, at times uniform in [0, 1)."""
        self.check_latents(examples)
        times, noise = times_and_noise(torch.rand, examples, rngs)
        t = times[:, None, None, None]
        output = self.network((1 - t) * examples + t * noise, times, self.drop_labels(labels)).float()
        return {"total": (output - (noise - examples)).square().mean()}

    def solve(
        self, predict: Denoiser, start: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]
    ) -> Tensor:
        """Sample by `euler`, `heun` or `sde`.

        Raises:
            ConfigError: another sampler.
        """
        sampler = sampling.sampler or self.config.sampler
        if sampler == "euler":
            return euler(predict, start, sampling.steps)
        if sampler == "heun":
            return heun(predict, start, sampling.steps)
        if sampler == "sde":
            return sde(predict, start, rngs, sampling.steps)
        raise ConfigError(
            f"the sampler {sampler} needs predicted noise, sit predicts velocities", "Use euler, heun or sde"
        )

    def blocks(self) -> Iterable[nn.Module]:
        return self.network.blocks


def euler(velocity: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Euler's method for dx = v(x, t) dt from t = 1 (noise) to t = 0, in `steps` equal steps."""
    for k in range(steps):
        x = x - velocity(x, 1 - k / steps, progress_at(k, steps)) / steps
    return x


def heun(velocity: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Heun's second-order method for the same equation. A step evaluates the network twice, so there are `steps` // 2.

    Raises:
        ConfigError: `steps` is 1.
    """
    if steps < 2:
        raise ConfigError("generate.steps = 1, one step of heun needs 2", "Use 2 or more, or the sampler euler")
    count = steps // 2
    for k in range(count):
        here, there = 1 - k / count, 1 - (k + 1) / count
        progress = progress_at(k, count)
        slope = velocity(x, here, progress)
        ahead = velocity(x - slope / count, there, progress)
        x = x - (slope + ahead) / (2 * count)
    return x


def sde(velocity: Denoiser, x: Tensor, rngs: Sequence[torch.Generator], steps: int) -> Tensor:
    """Euler-Maruyama for the reverse SDE dx = (v - w s / 2) dt + sqrt(w) dW, from t = 1 to t = 0.

    Ma et al. 2024 (SiT), section 2, with w = 2 sigma_t = 2 t: the diffusion of the released code, sigma, is w / 2. The
    last step, from `LAST_STEP` to 0, adds no noise; the steps before it are equal. The score s is computed from the
    velocity.
    """
    ends = [*np.linspace(1, LAST_STEP, steps).tolist(), 0.0] if steps > 1 else [1.0, 0.0]
    for k, (here, there) in enumerate(pairwise(ends)):
        slope = velocity(x, here, progress_at(k, steps))
        step = here - there
        x = x - step * (slope - here * linear_score(slope, x, here))
        if there > 0:
            x = x + (2 * here * step) ** 0.5 * gaussian_noise(rngs, x.shape[1:], x.device)
    return x


def linear_score(velocity: Tensor, x: Tensor, time: float) -> Tensor:
    """Return the score of x_t = (1 - t) data + t noise, t in (0, 1], for its velocity: -((1 - t) v + x) / t.

    Ma et al. 2024, section 2: (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')); alpha = 1 - t, sigma = t.
    """
    return -((1 - time) * velocity + x) / time
