"""Sampling images from a generator: ids one after another, or latents by steps, then decoding. Weights are random."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vqpipe.benchmarks.step_and_encode import build
from vqpipe.benchmarks.timing import Case, Method, Settings, timed, version_of
from vqpipe.device import autocast
from vqpipe.generation import Space, build_generator
from vqpipe.generation.image_generator import ImageGenerator, image_rngs
from vqpipe.generation.train import GeneratorRecipe
from vqpipe.progress import Progress
from vqpipe.tokenizer import Tokenizer
from vqpipe.training.tokenizer_run import TokenizerRecipe

CLASSES = 1000


def cases(
    settings: Settings, preset: str, recipe: GeneratorRecipe, tokenizer: TokenizerRecipe
) -> list[Callable[[Progress], Case]]:
    """The one case."""
    return [partial(time_sampling, settings, preset, recipe, tokenizer)]


def time_sampling(
    settings: Settings, preset: str, recipe: GeneratorRecipe, tokenizer: TokenizerRecipe, progress: Progress
) -> Case:
    """Sample a batch of images with the preset's settings of sampling, in bfloat16 on a GPU."""
    device, size = settings.device, tokenizer.data.image_size
    batch = 2 if settings.quick else 32 if device.type == "cuda" else 8
    precision = "bf16" if device.type == "cuda" else "fp32"
    model = build(tokenizer.model, size, device, settings.seed)
    side = size // model.downsample_factor
    space = Space.of(model.quantizer, side, side, CLASSES if recipe.examples.conditional else None)
    title = f"images from a generator: preset {preset}, {space.num_tokens} tokens, batch {batch}"
    sizes = {"tokens": space.num_tokens, "codebook_size": space.codebook_size, "batch": batch, "precision": precision}
    case = Case(title, "images", sizes)
    generator = build_generator(recipe.generator, space).to(device).eval()
    if generator.needs_codebook:
        generator.load_codebook(model.quantizer.all_codes())
    images = ImageGenerator(generator, Tokenizer(model, image_size=size, device=device), size, (), recipe.generate)
    labels = torch.arange(batch) % CLASSES

    def sample() -> Tensor:
        with autocast(device, precision):
            return images.sample(labels, recipe.generate, image_rngs(settings.seed, range(batch)))

    ours = Method(name="vqpipe", call=sample, version=version_of("vqpipe"), ours=True, note=precision)
    case.rows = timed([ours], {}, case, settings, progress, batch)
    return case
