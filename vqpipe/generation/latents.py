"""What LDM, DiT and SiT share: networks on noisy latents, classifier-free guidance, images to latents, latents to ids.

A latent is the encoder's output after quant_conv, before quantization, as in VQGAN-LC (Zhu et al. 2024, section 4).
Sampled latents are denormalized, quantized, and decoded from their ids, like any other tokens.

Differences from the code released with VQGAN-LC: latents are computed once, not in every step; they are normalized by
measured statistics (released: not normalized, as here with `raw`); images enter the encoder in [-1, 1] (released DiT:
in [-3, 1], normalized twice); guidance acts on all channels by default (released DiT and SiT: on the first 3 of 8, as
here with `cfg_channels`); the null class is trained for all three (released LDM: never, although it is sampled with).

Image i takes its random numbers from `rngs[i]`, a generator on the CPU, so that it does not depend on its batch.

Shapes: B images of H x W pixels, N ids per image, C latent channels, h x w positions.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe import artifacts
from vqpipe.artifacts import Artifact
from vqpipe.data.images import ImageSet
from vqpipe.data.latents import LatentStatistics, write_latents
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.generation.base import Generator, GeneratorConfig, SamplingConfig, Space, guidance_scale
from vqpipe.progress import SILENT, Progress
from vqpipe.tokenizer import Tokenizer

Denoiser = Callable[[Tensor, float, float], Tensor]
"""(x, time, progress) -> prediction of the network; see `GuidedNetwork`."""


class LatentGenerator(Generator):
    """A generator with a network on noisy latents: (float[B, C, h, w], times float32[B], classes int64[B]) ->
    float[B, C or more, h, w].

    A subclass builds `network` and implements `loss` and `solve`.
    """

    trained_on: ClassVar[Literal["tokens", "latents"]] = "latents"
    network: nn.Module

    def __init__(self, config: GeneratorConfig, space: Space) -> None:
        super().__init__(config, space)
        self.latent_shape = (space.latent_dim, space.height, space.width)

    def check_latents(self, latents: Tensor) -> None:
        """Raise a DataError unless the latents have the shape of this generator's space."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise DataError(
                f"latents of shape {list(latents.shape)}, the generator needs {list(self.latent_shape)}",
                "Use latents of the tokenizer and image size it was built for",
            )

    def check_sampling(self, labels: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> None:
        super().check_sampling(labels, sampling, rngs)
        if sampling.cfg_channels > self.space.latent_dim:
            raise ConfigError(
                f"generate.cfg_channels = {sampling.cfg_channels}, the latent has {self.space.latent_dim} channels",
                "Use 0 to guide all of them",
            )

    def sample_batch(self, classes: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        if not rngs:
            return torch.empty(0, *self.latent_shape, device=classes.device)
        predict = GuidedNetwork(self.network, classes, torch.full_like(classes, self.null_class), sampling)
        return self.solve(predict, gaussian_noise(rngs, self.latent_shape, classes.device), sampling, rngs)

    @abstractmethod
    def loss(
        self, examples: Tensor, labels: Tensor, rngs: Sequence[torch.Generator] | None = None
    ) -> dict[str, Tensor]:
        """As `Generator.loss`; with `rngs` the time and the noise of image i are drawn from `rngs[i]`, on the CPU."""

    def forward(
        self, examples: Tensor, labels: Tensor, rngs: Sequence[torch.Generator] | None = None
    ) -> dict[str, Tensor]:
        return self.loss(examples, labels, rngs)

    @abstractmethod
    def solve(
        self, predict: Denoiser, start: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]
    ) -> Tensor:
        """Transform noise, float32[B, C, h, w], into latents."""


@dataclass(frozen=True)
class GuidedNetwork:
    """A network with classifier-free guidance (Ho & Salimans 2022), for one batch of classes.

    Guidance acts on the C channels of the prediction, or on the first `cfg_channels` of them; further channels (the
    rest, a variance) are the conditional ones.
    """

    network: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(float[B, C, h, w], times float32[B], classes int64[B]) -> float[B, C or more, h, w]."""
    classes: Tensor
    """int64[B]."""
    null: Tensor
    """int64[B], the null class."""
    sampling: SamplingConfig

    def __call__(self, x: Tensor, time: float, progress: float) -> Tensor:
        """Return the prediction for `x`, float32[B, C, h, w], at `time`, in the network's unit, and at `progress` of
        sampling, 0 in the first step to 1 in the last."""
        scale = guidance_scale(self.sampling, progress)
        times = torch.full((len(x),), time, device=x.device)
        if scale == 1:
            return self.network(x, times, self.classes).float()
        both = self.network(torch.cat([x, x]), torch.cat([times, times]), torch.cat([self.classes, self.null])).float()
        conditional, null = both.chunk(2)
        channels = self.sampling.cfg_channels or x.shape[1]
        guided = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([guided, conditional[:, channels:]], dim=1)


def gaussian_noise(rngs: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return standard normal numbers float32[B, *shape], image i's from `rngs[i]`; the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=rng) for rng in rngs]).to(device)


def times_and_noise(
    draw_times: Callable[..., Tensor], examples: Tensor, rngs: Sequence[torch.Generator] | None
) -> tuple[Tensor, Tensor]:
    """Return the times [B] and the noise float32[B, C, h, w] of a loss: see `LatentGenerator.loss`.

    Args:
        draw_times: size -> numbers, with the options of `torch.rand`.
    """
    if rngs is None:
        return draw_times((len(examples),), device=examples.device), torch.randn_like(examples)
    times = torch.cat([draw_times((1,), generator=rng) for rng in rngs]).to(examples.device)
    return times, gaussian_noise(rngs, examples.shape[1:], examples.device)


def encode_latents(
    out: Path,
    images: ImageSet,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    flip: bool,
    num_workers: int = 0,
    max_skipped: float = 0.01,
    progress: Progress = SILENT,
) -> Artifact:
    """Encode images into the `latents` artifact `out`, or open it if it was made by the same request.

    With `flip` the latents of each image's horizontal flip are stored too, as by `vqpipe tokenize --flip`.

    Raises:
        DataError: the downsample factor does not divide the size, or too many images cannot be read.
        NumericError: a latent is NaN or too large for float16.
        ArtifactError: `out` was made by a different request.
    """
    settings: dict[str, Any] = {"image_size": image_size, "flip": flip, "precision": "fp32"}
    settings["max_skipped"] = max_skipped
    inputs: dict[str, Any] = {"images": images, "tokenizer": tokenizer.source}
    remedies = {"flip": "Choose another --latents, or leave out --images to use them as they are"}
    draft = artifacts.start(out, "latents", settings, inputs, option="--latents", remedies=remedies)
    if isinstance(draft, Artifact):
        return draft
    with draft:
        facts = write_latents(draft, images, tokenizer, num_workers=num_workers, progress=progress, **settings)
        made = draft.publish(facts)
    progress.message(f"latents: {made.path}")
    return made


@torch.no_grad()
def quantize_latents(latents: Tensor, statistics: LatentStatistics, tokenizer: Tokenizer) -> Tensor:
    """Return the ids int64[B, N] of normalized latents float[B, C, h, w].

    Raises:
        NumericError: a latent is NaN or infinite.
        DataError: the statistics are of another number of channels.
    """
    if not bool(torch.isfinite(latents).all()):
        raise NumericError("the generator sampled NaN or infinity", "Lower the guidance scale, or train it longer")
    quantizer = tokenizer.autoencoder.quantizer
    if not len(latents):
        num_tokens = quantizer.layout(*latents.shape[2:]).num_tokens
        return torch.empty(0, num_tokens, dtype=torch.int64, device=tokenizer.device)
    return quantizer(statistics.denormalize(latents.to(tokenizer.device))).ids
