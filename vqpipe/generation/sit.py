"""`sit`: DiT's transformer trained as a flow from noise to latents.

Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers", with
the linear path and the velocity, unweighted, as in VQGAN-LC: x_t = (1 - t) x + t noise, v = noise - x.

Where we follow the paper and not the released code: t = 0 is the data and t = 1 the noise (released: the other way
round, with v's sign); the network gives the velocity alone (released: as many channels again, thrown away); samples are
drawn by Heun's method or the SDE, as the paper reports (released with VQGAN-LC: dopri5, whose steps depend on the
batch). The network is told t in [0, 1] as it is, as released.

Shapes: B images, C latent channels, h x w positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.generation.base import SamplingConfig, Space
from vqpipe.generation.dit import Transformer, TransformerConfig
from vqpipe.generation.latents import LatentGenerator
from vqpipe.generation.samplers import Guided, euler, heun, sde


@dataclass(frozen=True, kw_only=True)
class SitConfig(TransformerConfig):
    """SiT: linear path, velocity."""

    kind: ClassVar[str] = "sit"

    sampler: Literal["euler", "heun", "sde"] = "heun"
    """What the generator samples with: the ODE by Euler's or Heun's method, or the SDE by Euler-Maruyama."""


class Sit(LatentGenerator):
    """SiT on a tokenizer's latents."""

    config_class = SitConfig
    config: SitConfig
    network: Transformer

    def __init__(self, config: SitConfig, space: Space) -> None:
        super().__init__(config, space)
        self.network = Transformer(config, self.latent_shape, space.latent_dim, self.class_rows)

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean squared error of the velocity, at times uniform in [0, 1)."""
        self.check_latents(examples)
        times = torch.rand(len(examples), device=examples.device)
        noise = torch.randn_like(examples)
        t = times[:, None, None, None]
        output = self.network((1 - t) * examples + t * noise, times, self.classes(self.dropped(labels))).float()
        return {"total": (output - (noise - examples)).square().mean()}

    def solve(
        self, predict: Guided, start: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]
    ) -> Tensor:
        sampler = sampling.sampler or self.config.sampler
        if sampler == "euler":
            return euler(predict, start, sampling.steps)
        if sampler == "heun":
            return heun(predict, start, sampling.steps)
        if sampler == "sde":
            return sde(predict, start, draws, sampling.steps)
        raise ConfigError(
            f"the sampler {sampler} needs predicted noise, sit predicts velocities", "Use euler, heun, sde"
        )

    def blocks(self) -> Iterable[nn.Module]:
        return self.network.blocks
