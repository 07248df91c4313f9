"""How noise is added, and what is known of the way back: the arithmetic of diffusion in discrete time.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (IDDPM). Levels are computed in float64 by numpy, once.

Shapes: T times, B images, C latent channels, h x w positions. Times are 0 to T - 1; the papers count from 1.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vqpipe.errors import ConfigError


class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) at T times.

    Attributes, float64[T]:
        betas: variance added on the way to each time from the one before.
        alphas_cumprod: abar, what is left of the data's variance.
        alphas_cumprod_before: abar of the time before; 1 at the first.
        posterior_variance: of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7); 0 at the first time.
        posterior_log_variance: its logarithm, at the first time the second's, as IDDPM's code clips it.
        times: int64[T], what the network is told.
    """

    def __init__(self, betas: np.ndarray, times: np.ndarray | None = None) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ConfigError("a noise schedule's betas should lie between 0 and 1")
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
        """Betas from `start` to `end`: evenly ("linear", DDPM and DiT), or their roots are ("scaled_linear", LDM, whose
        code calls it linear)."""
        if kind == "linear":
            return cls(np.linspace(start, end, times, dtype=np.float64))
        return cls(np.linspace(start**0.5, end**0.5, times, dtype=np.float64) ** 2)

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, places: np.ndarray) -> "NoiseSchedule":
        """The process seen only at `places`, rising: the same marginals there, longer steps between (IDDPM, eq. 19)."""
        levels = self.alphas_cumprod[places]
        return NoiseSchedule(1 - levels / np.append(1.0, levels[:-1]), self.times[places])

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """One of `values` at places t, int64[B], as [B, 1, 1, 1], computed in float64 and then of `like`'s type."""
        key = name, t.device, like.dtype
        if key not in self.tables:
            self.tables[key] = torch.from_numpy(self.values[name]).to(t.device, like.dtype)
        return self.tables[key][t][:, None, None, None]

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of x_0 and its noise, float[B, C, h, w] (DDPM, eq. 4)."""
        return self.at("signal", t, clean) * clean + self.at("noise", t, clean) * noise

    def clean(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_0 of x_t and its noise: undoes `noisy`."""
        return (noisy - self.at("noise", t, noisy) * noise) / self.at("signal", t, noisy)

    def posterior_mean(self, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7); at the first time x_0."""
        return self.at("of clean", t, clean) * clean + self.at("of noisy", t, clean) * noisy

    def learned_log_variance(self, output: Tensor, t: Tensor) -> Tensor:
        """Between the posterior's and beta, by the network's output, which is about [-1, 1] (IDDPM, eq. 15)."""
        share = (output + 1) / 2
        return share * self.at("log beta", t, output) + (1 - share) * self.at("log posterior", t, output)
