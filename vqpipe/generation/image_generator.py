"""A generator with its tokenizer, labels -> images, and the `generator` artifact that holds both.

The artifact contains the generator's weights and sizes, the tokenizer that decodes its samples, the default sampling
settings, the classes of its training set, and the statistics by which latents were normalized.

Shapes: B images of H x W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqpipe.artifacts import Artifact, Draft, open_artifact
from vqpipe.config import from_table, to_table
from vqpipe.data.latents import LatentStatistics
from vqpipe.errors import ArtifactError, VqpipeError
from vqpipe.generation.base import Generator, GeneratorConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.latents import quantize_latents
from vqpipe.tokenizer import Tokenizer
from vqpipe.weights import load_tensors, load_weights, save_weights

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in the artifact, in the format of `Tokenizer.from_pretrained`."""


@dataclass(frozen=True)
class ImageGenerator:
    """A generator and the tokenizer that decodes its samples."""

    generator: Generator
    tokenizer: Tokenizer
    image_size: int
    """Side of its images, pixels."""
    classes: tuple[int, ...]
    """Labels of the training set, in ascending order; empty for an unconditional generator."""
    sampling: SamplingConfig
    """Default sampling settings."""
    statistics: LatentStatistics | None = None
    """Normalization of latents; None for a generator of ids."""
    artifact: Artifact | None = None
    """The artifact it was opened from."""

    @torch.no_grad()
    def sample_ids(self, labels: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        """Return ids int64[B, N] of new images of classes int64[B]; image i's random numbers are those of `rngs[i]`.

        Sampled latents are quantized by the tokenizer.

        Raises:
            DataError, ConfigError: see `Generator.sample`.
            NumericError: a sampled latent, or the probabilities of ids, are not finite.
        """
        ids = self.generator.sample(labels, sampling, rngs)
        return ids if self.statistics is None else quantize_latents(ids, self.statistics, self.tokenizer)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Return the images uint8[B, 3, H, W] of ids int64[B, N]."""
        return self.tokenizer.decode(ids, (self.image_size, self.image_size))

    def sample(self, labels: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        """Return new images uint8[B, 3, H, W]; arguments and errors are those of `sample_ids`."""
        return self.decode(self.sample_ids(labels, sampling, rngs))


def image_rngs(seed: int, images: Sequence[int]) -> list[torch.Generator]:
    """Return for each image a random number generator on the CPU that is a function of (seed, image) alone."""
    states = [np.random.SeedSequence(seed, spawn_key=(image,)).generate_state(1, np.uint64)[0] for image in images]
    return [torch.Generator().manual_seed(int(state) & (2**63 - 1)) for state in states]


def write_generator(draft: Draft, images: ImageGenerator, weights: Mapping[str, Tensor]) -> None:
    """Write the files of a `generator` artifact, including the tokenizer's; `weights` is the generator's state dict."""
    table = {
        "generator": to_table(images.generator.config),
        "space": to_table(images.generator.space),
        "image_size": images.image_size,
        "classes": list(images.classes),
        "generate": to_table(images.sampling),
        "latents": None if images.statistics is None else images.statistics.to_table(),
    }
    write_weights(draft, weights)
    draft.write_json("config.json", table)
    with draft.write(f"{TOKENIZER}/model.safetensors") as path:
        save_weights(images.tokenizer.autoencoder, path)
    draft.write_json(f"{TOKENIZER}/config.json", images.tokenizer.to_table())


def write_weights(draft: Draft, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict as `model.safetensors`."""
    with draft.write("model.safetensors") as path:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)


def open_generator(path: Path | str, device: str | torch.device = "cpu") -> ImageGenerator:
    """Open a `generator` artifact. Its files are checked against the manifest.

    Raises:
        ArtifactError: it is missing, unfinished or damaged.
        WeightsError: its weights do not fit its config.
    """
    artifact = open_artifact(path, "generator")
    for name in ("config.json", f"{TOKENIZER}/config.json", f"{TOKENIZER}/model.safetensors"):
        artifact.verified_file(name)
    try:
        table = json.loads(artifact.file("config.json").read_text(encoding="utf-8"))
        config = from_table(GeneratorConfig, table["generator"], "generator")
        space = from_table(Space, table["space"], "space")
        sampling = from_table(SamplingConfig, table["generate"], "generate")
        latents = table["latents"]
        statistics = None if latents is None else LatentStatistics.from_table(latents)
        image_size, classes = int(table["image_size"]), tuple(map(int, table["classes"]))
    except (ValueError, KeyError, TypeError, VqpipeError) as error:
        raise ArtifactError(f"{path}/config.json is damaged ({error})", "Make or copy the artifact again") from None
    generator = build_generator(config, space)  # not on the meta device: non-persistent buffers are computed
    load_weights(generator, load_tensors(artifact.verified_file("model.safetensors")), artifact.path)
    tokenizer = Tokenizer.from_pretrained(artifact.path / TOKENIZER, device)
    generator.eval().requires_grad_(False).to(tokenizer.device)
    return ImageGenerator(generator, tokenizer, image_size, classes, sampling, statistics, artifact)
