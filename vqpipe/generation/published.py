"""A generator as an artifact, and as users hold it: labels -> images.

A directory of its own: weights and sizes, the tokenizer that makes pixels of what it draws, how it was meant to be
sampled, which classes it saw, and for latents what they were normalised with.

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
from vqpipe.generation.latents import to_images
from vqpipe.tokenizer import Tokenizer, load_weights, save_weights
from vqpipe.weights import load_tensors

TOKENIZER = "tokenizer"
"""The folder in the artifact that holds the tokenizer, as `Tokenizer.from_pretrained` reads it."""


@dataclass
class PublishedGenerator:
    """A generator and its tokenizer."""

    generator: Generator
    tokenizer: Tokenizer
    image_size: int
    """Side of what it draws, pixels."""
    classes: tuple[int, ...]
    """The labels it was trained on, rising; none where it has no classes."""
    sampling: SamplingConfig
    """How it was meant to be sampled."""
    statistics: LatentStatistics | None = None
    """What its latents were normalised with; None where it draws ids."""
    artifact: Artifact | None = None
    """What it was opened from."""

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.tokenizer.device

    def draw(self, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
        """New images uint8[B, 3, H, W] of the classes int64[B]; image i's randomness is draws[i]'s alone.

        Raises:
            DataError, ConfigError: see `Generator.sample`.
            NumericError: what it drew is not finite.
        """
        return draw_images(self.generator, self, labels, sampling, draws)


@torch.no_grad()
def draw_images(
    generator: Generator,
    published: PublishedGenerator,
    labels: Tensor,
    sampling: SamplingConfig,
    draws: Sequence[torch.Generator],
) -> Tensor:
    """`PublishedGenerator.draw`, with another generator of the same space: one that is still in training."""
    examples = generator.sample(labels.to(published.device), sampling, draws)
    if published.statistics is not None:
        return to_images(examples, published.statistics, published.tokenizer)[0]
    return published.tokenizer.decode(examples, (published.image_size, published.image_size))


def draws_of(seed: int, images: Sequence[int]) -> list[torch.Generator]:
    """For each image a generator on the CPU, a function of (seed, image) alone."""
    states = [np.random.SeedSequence(seed, spawn_key=(image,)).generate_state(1, np.uint64)[0] for image in images]
    return [torch.Generator().manual_seed(int(state) & (2**63 - 1)) for state in states]


def write_generator(draft: Draft, published: PublishedGenerator, weights: Mapping[str, Tensor]) -> None:
    """Write the artifact's files into the draft, the tokenizer's too; `weights` is the state of its generator."""
    table = {
        "generator": to_table(published.generator.config),
        "space": published.generator.space.to_table(),
        "image_size": published.image_size,
        "classes": list(published.classes),
        "generate": to_table(published.sampling),
        "latents": None if published.statistics is None else published.statistics.to_table(),
    }
    with draft.write("model.safetensors") as path:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)
    with draft.write("config.json") as path:
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    with draft.write(f"{TOKENIZER}/model.safetensors") as path:
        save_weights(published.tokenizer.autoencoder, path)
    with draft.write(f"{TOKENIZER}/config.json") as path:
        path.write_text(json.dumps(published.tokenizer.to_table(), indent=2) + "\n", encoding="utf-8")


def open_generator(path: Path | str, device: str | torch.device = "cpu") -> PublishedGenerator:
    """Open a generator artifact.

    Raises:
        ArtifactError: it is absent, unfinished or damaged.
        WeightsError: its weights do not fit its config.
    """
    artifact = open_artifact(path, "generator")
    try:
        table = json.loads(artifact.file("config.json").read_text(encoding="utf-8"))
        config = from_table(GeneratorConfig, table["generator"], "generator")
        space = Space.from_table(table["space"])
        sampling = from_table(SamplingConfig, table["generate"], "generate")
        latents = table["latents"]
        statistics = None if latents is None else LatentStatistics.from_table(latents)
        image_size, classes = int(table["image_size"]), tuple(map(int, table["classes"]))
    except (ValueError, KeyError, TypeError, VqpipeError) as error:
        raise ArtifactError(f"{path}/config.json is damaged ({error})", "Make or copy the artifact again") from None
    generator = build_generator(config, space)  # not on the meta device: what is no parameter has to be made
    load_weights(generator, load_tensors(artifact.whole("model.safetensors")), artifact.path)
    tokenizer = Tokenizer.from_pretrained(artifact.path / TOKENIZER, device)
    generator.eval().requires_grad_(False).to(tokenizer.device)
    return PublishedGenerator(generator, tokenizer, image_size, classes, sampling, statistics, artifact)
