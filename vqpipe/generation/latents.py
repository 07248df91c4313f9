"""What LDM, DiT and SiT have in common: they learn normalised latents, and a tokenizer makes images of theirs.

A latent is the encoder's output after quant_conv, before quantization, as in VQGAN-LC (Zhu et al. 2024, section 4).
What a generator draws is denormalised, quantized, and decoded by way of its ids, like any other tokens.

Where the code released with VQGAN-LC and this differ: latents are computed once, not in every step; they are normalised
by measured statistics (released: as they are; `raw` does so); images enter the encoder in [-1, 1] (released DiT: in
[-3, 1], normalised twice); guidance acts on all channels (released DiT and SiT: on the first 3 of 8, left over from a
latent of 4); the null class is trained in all three (released LDM: never, though it samples with it).

Shapes: B images of H x W pixels, N ids an image, C latent channels, h x w positions.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.data.latents import LatentSet, LatentStatistics, open_latents
from vqpipe.errors import DataError, NumericError
from vqpipe.generation.base import Generator, GeneratorConfig, SamplingConfig, Space
from vqpipe.generation.samplers import Guided, noise
from vqpipe.tokenizer import Tokenizer

__all__ = ["LatentGenerator", "LatentSet", "LatentStatistics", "open_latents", "to_images"]


class LatentGenerator(Generator):
    """A network on noisy latents: (float[B, C, h, w], times float32[B], classes int64[B]) -> [B, C or more, h, w].

    A subclass makes `network`, and says how to learn (`loss`) and how to get from noise to a latent (`solve`).
    """

    trained_on: ClassVar[Literal["tokens", "latents"]] = "latents"
    network: nn.Module

    def __init__(self, config: GeneratorConfig, space: Space) -> None:
        super().__init__(config, space)
        self.latent_shape = (space.latent_dim, space.height, space.width)

    @property
    def class_rows(self) -> int:
        """Rows of a class embedding: the classes, and the null class where there is one; 1 where unconditional."""
        return 1 if self.num_classes is None else self.num_classes + self.has_null

    def classes(self, labels: Tensor) -> Tensor:
        """int64[B] rows of the class embedding for these labels, which may hold the null class."""
        return torch.zeros_like(labels) if self.num_classes is None else labels

    def check_latents(self, latents: Tensor) -> None:
        """Raise a DataError unless these are latents of this generator's space."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise DataError(
                f"latents of shape {list(latents.shape)}, the generator is for {list(self.latent_shape)}",
                "Use latents of the tokenizer and image size it was made for",
            )

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
        """float32[B, C, h, w] normalised latents; see `Generator.sample`. Dropout and the like are off meanwhile."""
        self.check_sampling(labels, sampling, draws)
        device = next(self.parameters()).device
        classes = self.classes(labels.to(device))
        null = torch.full_like(classes, self.class_rows - 1)
        learning = self.training
        self.eval()
        try:
            predict = Guided(self.network, classes, null, sampling)
            return self.solve(predict, noise(draws, self.latent_shape, device), sampling, draws)
        finally:
            self.train(learning)

    @abstractmethod
    def solve(
        self, predict: Guided, start: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]
    ) -> Tensor:
        """From noise, float32[B, C, h, w], to latents."""


@torch.no_grad()
def to_images(latents: Tensor, statistics: LatentStatistics, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Normalised latents float[B, C, h, w] -> images uint8[B, 3, H, W] and their ids int64[B, N].

    Raises:
        NumericError: a latent is NaN or infinite.
        DataError: its channels are not the tokenizer's.
    """
    if not bool(torch.isfinite(latents).all()):
        raise NumericError("the generator drew NaN or infinity", "Lower the guidance, or train it further")
    if latents.shape[1] != tokenizer.autoencoder.quantizer.latent_dim:
        raise DataError(
            f"latents of {latents.shape[1]} channels, the tokenizer has {tokenizer.autoencoder.quantizer.latent_dim}"
        )
    ids = tokenizer.autoencoder.quantizer(statistics.denormalize(latents.to(tokenizer.device))).ids
    factor = tokenizer.downsample_factor
    return tokenizer.decode(ids, (latents.shape[2] * factor, latents.shape[3] * factor)), ids
