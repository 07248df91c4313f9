"""One step of each job on fake tensors, from which `estimate` computes memory and time."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vqpipe.codebooks import features as feature_files
from vqpipe.codebooks.encoders import PatchEncoder
from vqpipe.codebooks.features import FeaturesConfig
from vqpipe.data.examples import ExampleBatch
from vqpipe.data.tokens import id_dtype
from vqpipe.device import autocast
from vqpipe.errors import ConfigError
from vqpipe.generation.base import Space, build_generator
from vqpipe.generation.train import GeneratorRecipe
from vqpipe.losses.objective import Objective
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import Autoencoder, AutoencoderConfig, PatchDiscriminator, build_autoencoder
from vqpipe.planning.trace import OPTIMIZER, CudaAutocast, Operation, Trace
from vqpipe.quantizers.derived import DerivedCodebook
from vqpipe.quantizers.multi_group import MultiGroupConfig
from vqpipe.training.examples_task import ExamplesTask
from vqpipe.training.optim import WeightEma
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips

CPU = torch.device("cpu")
TRACED = (1, 16)
"""Images at once of two traces that others follow from."""


@dataclass(frozen=True)
class Step:
    """What a trace found."""

    peak: dict[str, int]
    operations: list[Operation]
    """Of the step that most of the run consists of."""
    first: list[Operation]
    """Of a step before the discriminator starts."""
    trained: float
    """Bytes of the weights that train."""
    saved: float
    """Bytes of a checkpoint."""
    published: float
    """Bytes of the published weights."""


def scaled(operations: list[Operation], count: float) -> list[Operation]:
    """The operations with `count` times the FLOPs and bytes each: those of a step with more micro-batches."""
    if count == 1:
        return operations
    return [each._replace(flops=count * each.flops, bytes=count * each.bytes) for each in operations]


def extrapolated(few: Step, many: Step, images: int) -> Step:
    """The step with `images` at once, from those with the numbers of TRACED."""
    distance = (images - TRACED[0]) / (TRACED[1] - TRACED[0])

    def between(a: float, b: float) -> float:
        return max(0.0, a + distance * (b - a))

    def operations(a: list[Operation], b: list[Operation]) -> list[Operation]:
        return [
            more._replace(flops=between(less.flops, more.flops), bytes=between(less.bytes, more.bytes))
            for less, more in zip(a, b, strict=False)
        ]

    parts = {*few.peak, *many.peak}
    return replace(
        many,
        peak={part: int(between(few.peak.get(part, 0), many.peak.get(part, 0))) for part in parts},
        operations=operations(few.operations, many.operations),
        first=operations(few.first, many.first),
    )


@cache
def trace_tokenizer(recipe: TokenizerRecipe, images_at_once: int, gpu: bool) -> Step:
    """Trace steps of a tokenizer's training as they are on one process: with the autoencoder alone, with both networks,
    and where it is set, with the R1 penalty."""
    parts = min(2, recipe.train.accumulate)  # more micro-batches need no more memory
    config = replace(recipe.train, accumulate=parts, compile=False, sync_batch_norm=False)
    side, objective_config = recipe.data.image_size, recipe.objective
    model = meta_autoencoder(recipe.model)
    average = WeightEma(model, config.weight_ema)
    with torch.device("meta"):
        discriminator = PatchDiscriminator(recipe.discriminator)
    with fake_tensors(gpu) as (trace, on_cuda):
        count_autoencoder(model, trace)
        if average.network is not model:
            as_fake(average.network, trace, "weight average")
        as_fake(discriminator, trace, "discriminator")
        perceptual = None
        if objective_config.perceptual != "none":
            with trace.inside("LPIPS"):
                perceptual = Perceptual(
                    objective_config.perceptual, network=Frozen(build_lpips(objective_config.perceptual))
                )
            trace.own(perceptual, "LPIPS")
            trace.count_calls(perceptual, "forward", "LPIPS")
        objective = Objective(objective_config, model.quantizer.loss_names, perceptual=perceptual)
        task = TokenizerTask(model, discriminator, objective)
        task.prepare(config, CPU, average.network)
        task.connect()
        if task.adversarial:
            trace.count_calls(discriminator, "forward", "discriminator")
        for optimizer in task.optimizers.values():
            trace.count_calls(optimizer, "step", OPTIMIZER)
        images = torch.empty(parts * images_at_once, 3, side, side)

        def step(number: int) -> list[Operation]:
            trace.operations = []
            reconstruction, _, _ = task.autoencoder_step(images, number)
            if objective.adversarial_at(number):
                task.discriminator_step(images, reconstruction, number)
            if task.moves_codebook:
                with suppress(RuntimeError, NotImplementedError):  # of an update that reads numbers: it needs little
                    model.quantizer.update(reconstruction.latent, reconstruction.quantized.ids)
            average.update(number)
            return trace.operations

        with on_cuda:
            average.update(0)  # copies a frozen codebook, once
            first = step(0)
            every = objective_config.r1_every
            later = (objective_config.disc_start // every + 1) * every + 1
            both = step(later) if objective.adversarial_at(later) else step(0)
            if objective.r1_at(later - 1):
                step(later - 1)
        repeats = recipe.train.accumulate / parts
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        weights = size_of_network(model)
        other = size_of_network(discriminator) if task.adversarial else 0.0
        states = sum(size_of_state(optimizer) for optimizer in task.optimizers.values())
        saved = weights + other + states + (weights if config.weight_ema else 0.0)
        return Step(trace.peak, scaled(both, repeats), scaled(first, repeats), trained, saved, weights + other)


@cache
def trace_generator(
    recipe: GeneratorRecipe, tokenizer: AutoencoderConfig, image_size: int, examples_at_once: int, gpu: bool
) -> Step:
    """Trace steps of a generator's training. The tokenizer is in memory too, for samples."""
    parts = min(2, recipe.train.accumulate)
    config = replace(recipe.train, accumulate=parts, compile=False, parallel="ddp")
    autoencoder = meta_autoencoder(tokenizer)
    quantizer, side = autoencoder.quantizer, image_size // autoencoder.downsample_factor
    classes = (recipe.examples.num_classes or 1000) if recipe.examples.conditional else None
    space = Space.of(quantizer, side, side, classes)
    with torch.device("meta"):
        network = build_generator(recipe.generator, space)
    average = WeightEma(network, config.weight_ema)
    with fake_tensors(gpu) as (trace, on_cuda):
        count_autoencoder(autoencoder, trace)
        trace.own_tensors(autoencoder, "tokenizer")
        as_fake(network.requires_grad_(True), trace, "weights")
        if average.network is not network:
            as_fake(average.network, trace, "weight average")
        with suppress(ConfigError):  # of a generator that uses no codebook
            network.load_codebook(quantizer.train().all_codes().detach())
        task = ExamplesTask(network)
        task.prepare(config, CPU, average.network)
        task.connect()
        trace.count_calls(task.optimizers["optimizer"], "step", OPTIMIZER)
        count = parts * examples_at_once
        if network.trained_on == "tokens":
            examples = torch.zeros(count, space.num_tokens, dtype=torch.int64)
        else:
            examples = torch.zeros(count, space.latent_dim, space.height, space.width)
        batch = ExampleBatch(examples, torch.zeros(count, dtype=torch.int64), [])
        with on_cuda:
            task.step(batch, 0)
            average.update(0)
            trace.operations = []
            task.step(batch, 1)
            average.update(1)
        operations = scaled(trace.operations, recipe.train.accumulate / parts)
        weights = size_of_network(network)
        trained = sum(parameter.nbytes for parameter in network.parameters())
        saved = weights * (2 if config.weight_ema else 1) + size_of_state(task.optimizers["optimizer"])
        published = weights + size_of_network(autoencoder)
        return Step(trace.peak, operations, operations, trained, saved, published)


def trace_tokenize(
    model: AutoencoderConfig, image_size: tuple[int, int], batch_size: int, precision: str, gpu: bool
) -> tuple[Trace, int]:
    """Trace the encoding of a batch of images of (height, width) pixels; with it, the bytes of the ids of an image."""
    network = meta_autoencoder(model)
    with fake_tensors(gpu) as (trace, on_cuda):
        count_autoencoder(network, trace)
        batch = torch.empty(batch_size, 3, *image_size)
        trace.operations.clear()
        with torch.no_grad(), on_cuda, autocast(CPU, precision):
            network.quantizer.train()  # in evaluation, numbers are read to check them
            latent = network.latent(batch)
            ids = network.quantizer(latent).ids
    return trace, ids.shape[1] * id_dtype(network.quantizer.codebook_size).itemsize


def trace_features(encoder: PatchEncoder, config: FeaturesConfig, gpu: bool) -> Trace:
    """Trace the encoding of a batch of images by an encoder of `build_encoder`."""
    with fake_tensors(gpu) as (trace, on_cuda):
        as_fake(encoder, trace, "weights")
        batch = torch.empty(config.batch_size, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
        trace.operations.clear()
        with torch.no_grad(), on_cuda, autocast(CPU, config.precision):
            encoder(batch)
    return trace


def build_encoder(config: FeaturesConfig) -> PatchEncoder:
    """An encoder on the meta device."""
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    try:
        with torch.device("meta"):
            return feature_files.open_encoder(replace(config, allow_random_weights=True, weights=None), None)
    finally:
        logging.disable(logging.NOTSET)


def meta_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """An autoencoder on the meta device, with all groups kept."""
    with torch.device("meta"):
        return build_autoencoder(without_masking(config))


def without_masking(config: AutoencoderConfig) -> AutoencoderConfig:
    """The network with all groups kept, which needs the most memory: masking reads random numbers."""
    if not isinstance(config.quantizer, MultiGroupConfig):
        return config
    return replace(config, quantizer=replace(config.quantizer, masking="off"))


def count_autoencoder(network: Autoencoder, trace: Trace) -> None:
    """Make its tensors fake ones and count them, those of the quantizer as "codebook", which counts as loaded."""
    as_fake(network, trace, "weights")
    trace.own_tensors(network.quantizer, "codebook")
    for module in network.modules():
        if isinstance(module, DerivedCodebook):
            module.loaded = True


def as_fake(network: nn.Module, trace: Trace, part: str) -> None:
    """Make the tensors of a network on the meta device fake ones, and count them as `part`."""
    with trace.inside(part):
        network.to_empty(device="cpu")
    trace.own(network, part)


@contextmanager
def fake_tensors(gpu: bool) -> Iterator[tuple[Trace, AbstractContextManager[Any]]]:
    """Fake tensors with a `Trace`. Yields it, and what to enter around the step: the rules of autocast on CUDA.

    The step is that of a single process: other ranks, if there are any, do not take part in it.
    """
    initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Trace(gpu=gpu) as trace:
            yield trace, CudaAutocast() if gpu else nullcontext()
    finally:
        dist.is_initialized = initialized


def size_of_network(network: nn.Module) -> float:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def size_of_state(optimizer: torch.optim.Optimizer) -> float:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))
