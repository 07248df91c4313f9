"""Estimates of a run: memory by part, time, disk, and settings with which it fits a device.

Memory is that of the tensors of a step on fake tensors (`trace.Trace`), plus what is assumed for the device
(`devices.Device`): the CUDA context, cuBLAS's and cuDNN's workspaces, and what the allocator loses.

The time of an operation is the larger of its arithmetic and its traffic, each at a share of the device's peak, and a
step takes their sum, but not less than the time to start so many operations. Copies of images, checkpoints, samples and
validation are not in it, and the loader is assumed to keep up.

The estimate is for eager PyTorch: `train.compile` saves time and memory that it leaves out.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vqpipe.codebooks import features as feature_files
from vqpipe.codebooks.encoders import PatchEncoder, check_pool
from vqpipe.codebooks.features import FeaturesConfig
from vqpipe.codebooks.kmeans import KmeansConfig
from vqpipe.errors import ConfigError
from vqpipe.generation.base import Space, build_generator
from vqpipe.generation.train import GeneratorRecipe
from vqpipe.losses.objective import Objective
from vqpipe.losses.perceptual import Perceptual
from vqpipe.models import Autoencoder, AutoencoderConfig, PatchDiscriminator, build_autoencoder
from vqpipe.planning.devices import MIB, Device
from vqpipe.planning.trace import EPILOGUE_DIMENSIONS, CudaAutocast, Operation, Trace
from vqpipe.quantizers.lc import FrozenCodebookQuantizer
from vqpipe.quantizers.multi_group import MultiGroupConfig
from vqpipe.quantizers.vqbridge import BridgedQuantizer
from vqpipe.training.config import TrainConfig
from vqpipe.training.examples_task import ExamplesTask
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.weights import Frozen, build_lpips

NetworkT = TypeVar("NetworkT", bound=nn.Module)
GIB = 1024 * MIB
IMAGENET = 1_281_167
"""Images of ImageNet's training set: the default number of images of a job."""
CLOSE = 0.9
"""Share of a device's memory above which a run that fits is called close."""
DECODED_PER_CORE = 375
"""Images per second that one core decodes and crops with PIL: photographs of ImageNet at their original size."""
KEPT_CHECKPOINTS = 3
"""The last two, and the one being written."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimate of one run."""

    stage: str
    device: str
    devices: int
    settings: dict[str, Any]
    """What the estimate is for: images per device and step, micro-batches, precision, ..."""
    memory: dict[str, float]
    """Part -> bytes on one device at the peak."""
    needed: float
    """Bytes on one device: the parts, and what is assumed for the device."""
    available: float
    """Bytes of one device."""
    flops: dict[str, float]
    """FLOPs of a step on one device: "forward", "backward", and of each part."""
    seconds_per_step: float
    steps: int
    images_per_step: int
    """Over all devices."""
    disk: dict[str, float]
    """Bytes of what the run writes."""
    advice: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    @property
    def close(self) -> bool:
        """Whether it fits, but so closely that it may not."""
        return self.fits and self.needed > CLOSE * self.available

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    @property
    def images_per_second(self) -> float:
        """Images that the loader has to deliver, over all devices."""
        return self.images_per_step / self.seconds_per_step

    def to_table(self) -> dict[str, Any]:
        """The plan as JSON: memory and disk in GiB."""

        def gibibytes(sizes: dict[str, float]) -> dict[str, float]:
            return {name: round(size / GIB, 4) for name, size in sizes.items()}

        return {
            "stage": self.stage,
            "device": self.device,
            "devices": self.devices,
            "settings": self.settings,
            "memory_gib": gibibytes(self.memory),
            "needed_gib": round(self.needed / GIB, 4),
            "available_gib": round(self.available / GIB, 4),
            "fits": self.fits,
            "flops_per_step": self.flops,
            "seconds_per_step": self.seconds_per_step,
            "steps": self.steps,
            "hours": self.hours,
            "images_per_second": self.images_per_second,
            "disk_gib": gibibytes(self.disk),
            "advice": self.advice,
        }


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


@dataclass(frozen=True)
class Training:
    """A training run to plan."""

    stage: str
    config: TrainConfig
    trace: Callable[[TrainConfig, int, bool], Step]
    """Settings, images at once, and whether it is a GPU -> the step."""
    starts: int = 0
    """Steps without the discriminator."""

    def plan(self, device: Device, devices: int = 1) -> Plan:
        """The plan of the settings as they are, with advice.

        Raises:
            ConfigError: the global batch is not divisible by the devices and micro-batches.
        """
        step = self.trace(self.config, micro_batch(self.config, devices), device.is_gpu)
        return with_advice(self.finish(self.config, step, device, devices), self, device, devices)

    def fitting(self, device: Device, devices: int = 1) -> Plan | None:
        """The plan with settings that fit: the fewest micro-batches, which compute nothing twice; where not even one
        image at once fits, also activation checkpointing, and then bf16. None where nothing fits.

        Memory and operations are traced for two numbers of images at once, and grow evenly between and beyond them.
        """
        share = replace(self.config, accumulate=1).share(devices)
        changes: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
        if device.bf16 > device.fp32:
            changes.append({"activation_checkpointing": True, "precision": "bf16"})
        for change in changes:
            config = replace(self.config, accumulate=1, **change)
            few, many = (self.trace(config, count, device.is_gpu) for count in TRACED)
            for parts in (number for number in range(1, share + 1) if share % number == 0):
                step = grown(few, many, share // parts)
                changed = replace(config, accumulate=parts)
                step = replace(step, operations=times(step.operations, parts), first=times(step.first, parts))
                plan = self.finish(changed, step, device, devices)
                if plan.needed <= CLOSE * plan.available:
                    return plan
        return None

    def finish(self, config: TrainConfig, step: Step, device: Device, devices: int) -> Plan:
        """The plan of these settings."""
        return training_plan(self.stage, config, step, device, devices, starts=self.starts)


TRACED = (1, 16)
"""Images at once of two traces that others follow from."""


def grown(few: Step, many: Step, images: int) -> Step:
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


def tokenizer_training(recipe: TokenizerRecipe) -> Training:
    """`vqpipe train`."""

    def trace(config: Any, images: int, gpu: bool) -> Step:
        return trace_tokenizer(replace(recipe, train=config), images, gpu)

    return Training("train", recipe.train, trace, start_of_discriminator(recipe))


def generator_training(recipe: GeneratorRecipe, tokenizer: AutoencoderConfig, image_size: int) -> Training:
    """`vqpipe train-generator` on tokens or latents that are stored already."""

    def trace(config: Any, images: int, gpu: bool) -> Step:
        return trace_generator(replace(recipe, train=config), tokenizer, image_size, images, gpu)

    return Training("train-generator", recipe.train, trace)


def plan_tokenize(
    model: AutoencoderConfig,
    image_size: tuple[int, int],
    batch_size: int,
    device: Device,
    devices: int = 1,
    *,
    precision: str = "fp32",
    images: int = IMAGENET,
) -> Plan:
    """Plan `vqpipe tokenize` of `images` images (or views of them) of (height, width) pixels."""
    network = build(model)
    with fake_tensors(device.is_gpu) as (trace, on_cuda):
        start(network, trace)
        batch = torch.empty(batch_size, 3, *image_size)
        trace.operations.clear()
        with torch.no_grad(), on_cuda, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            network.quantizer.train()  # in evaluation, numbers are read to check them
            latent = network.latent(batch)
            ids = network.quantizer(latent).ids
        tokens = ids.shape[1]
        width = 2 if network.quantizer.codebook_size <= 2**16 else 4
    return forward_plan(
        "tokenize",
        trace,
        device,
        devices,
        {"batch size": batch_size, "image size": "{1}x{0}".format(*image_size), "precision": precision},
        images,
        {"tokens": float(images * tokens * width)},
    )


def plan_features(config: FeaturesConfig, device: Device, devices: int = 1, *, images: int = IMAGENET) -> Plan:
    """Plan `vqpipe extract-features` of `images` images."""
    images = min(images, config.limit or images)
    encoder = build_encoder(config)
    with fake_tensors(device.is_gpu) as (trace, on_cuda):
        as_fake(encoder, trace, "weights")
        batch = torch.empty(config.batch_size, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
        trace.operations.clear()
        with torch.no_grad(), on_cuda, torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            encoder(batch)
    pool = check_pool(encoder, config.pool)
    settings = {"encoder": config.encoder, "batch size": config.batch_size, "precision": config.precision}
    disk = {"features": 2.0 * images * pool**2 * encoder.dim}
    return forward_plan("extract-features", trace, device, devices, settings, images, disk)


def features_of(config: FeaturesConfig) -> tuple[int, int]:
    """Channels of a feature, and features per image."""
    encoder = build_encoder(config)
    return encoder.dim, check_pool(encoder, config.pool) ** 2


def build_encoder(config: FeaturesConfig) -> PatchEncoder:
    """An encoder on the meta device."""
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    try:
        with torch.device("meta"):
            return feature_files.open_encoder(replace(config, allow_random_weights=True, weights=None), None)
    finally:
        logging.disable(logging.NOTSET)


def plan_kmeans(config: KmeansConfig, vectors: int, dim: int, device: Device, devices: int = 1) -> Plan:
    """Plan `vqpipe kmeans` of `vectors` features of `dim` channels: by formula, with nothing traced.

    A pass compares every vector with every center, and k-means++ takes about as long as one more. Where the features do
    not fit beside the centers, each pass copies them to the device.
    """
    k, block = config.k, 65_536
    centers, blocks = 24.0 * k * dim, 16.0 * block * dim
    memory = {"centers and sums": centers, "blocks of features": blocks}
    stored = 2.0 * vectors * dim
    room = config.gpu_share * device.memory - centers - blocks
    if device.is_gpu:
        memory["features"] = min(stored / devices, max(0.0, room))
        memory["search"] = 264.0 * block
    else:
        memory["order of the vectors"] = 36.0 * vectors
    flops = 2.0 * vectors * k * max(dim, EPILOGUE_DIMENSIONS)
    # On a GPU the products are screened in bfloat16, and the candidates compared in float32.
    products = Operation(flops / devices, stored / devices, "bf16" if device.is_gpu else "fp32", False, "search")
    sums = Operation(0.0, 12.0 * vectors * dim / devices, "fp32", False, "sums")
    passes = config.iterations + 1 + (config.init == "k-means++")
    return Plan(
        stage="kmeans",
        device=device.name,
        devices=devices,
        settings={"k": k, "vectors": vectors, "dim": dim, "iterations": config.iterations},
        memory=memory,
        needed=with_assumptions(memory, device),
        available=device.memory,
        flops={"search": flops / devices},
        seconds_per_step=step_seconds([products, sums], device),
        steps=passes if config.select == "kmeans" else 1,
        images_per_step=0,
        disk={"codebook": 4.0 * k * dim + 8 * k, "checkpoints": 2 * (4.0 * k * dim + 8 * k)},
    )


def micro_batch(config: TrainConfig, devices: int) -> int:
    """Images that a device computes at once."""
    return config.share(devices) // config.accumulate


def start_of_discriminator(recipe: TokenizerRecipe) -> int:
    """The step in which the discriminator starts, at most the last one."""
    config = recipe.objective
    return min(config.disc_start, recipe.train.steps) if config.adversarial > 0 else recipe.train.steps


def as_fake(network: NetworkT, trace: Trace, part: str) -> NetworkT:
    """Make the tensors of a network on the meta device fake ones, and count them as `part`."""
    with trace.inside(part):
        network.to_empty(device="cpu")
    trace.own(network, part)
    return network


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


def build(config: AutoencoderConfig) -> Autoencoder:
    """An autoencoder on the meta device, with all groups kept."""
    with torch.device("meta"):
        return build_autoencoder(without_masking(config))


def start(network: Autoencoder, trace: Trace) -> Autoencoder:
    """Make its tensors fake ones and count them, those of the quantizer as "codebook", which counts as loaded."""
    as_fake(network, trace, "weights")
    trace.own_tensors(network.quantizer, "codebook")
    for module in network.modules():
        if isinstance(module, FrozenCodebookQuantizer | BridgedQuantizer):
            module.loaded = True
    return network


def without_masking(config: AutoencoderConfig) -> AutoencoderConfig:
    """The network with all groups kept, which needs the most memory: masking reads random numbers."""
    if not isinstance(config.quantizer, MultiGroupConfig):
        return config
    return replace(config, quantizer=replace(config.quantizer, masking="off"))


@cache
def trace_tokenizer(recipe: TokenizerRecipe, images_at_once: int, gpu: bool) -> Step:
    """Trace steps of a tokenizer's training as they are on one process: with the autoencoder alone, with both networks,
    and where it is set, with the R1 penalty."""
    parts = min(2, recipe.train.accumulate)  # more micro-batches need no more memory
    config = replace(recipe.train, accumulate=parts, compile=False, sync_batch_norm=False)
    side, objective_config = recipe.data.image_size, recipe.objective
    model = build(recipe.model)
    with torch.device("meta"):
        discriminator = PatchDiscriminator(recipe.discriminator)
    with fake_tensors(gpu) as (trace, on_cuda):
        start(model, trace)
        as_fake(discriminator, trace, "discriminator")
        perceptual = None
        if objective_config.perceptual != "none":
            with trace.inside("LPIPS"):
                perceptual = Perceptual(
                    objective_config.perceptual, network=Frozen(build_lpips(objective_config.perceptual))
                )
            trace.own(perceptual, "LPIPS")
            trace.count_calls(perceptual, "LPIPS")
        objective = Objective(objective_config, model.quantizer.loss_names, perceptual=perceptual)
        task = TokenizerTask(model, discriminator, objective)
        average = WeightAverage(model, config, trace)
        task.prepare(config, torch.device("cpu"), model)
        task.connect()
        if task.adversarial:
            trace.count_calls(discriminator, "discriminator")
        for optimizer in task.optimizers.values():
            trace.count_steps(optimizer)
        images = torch.empty(parts * images_at_once, 3, side, side)

        def step(number: int) -> list[Operation]:
            trace.operations = []
            reconstruction, _, _ = task.autoencoder_step(images, number)
            if objective.adversarial_at(number):
                task.discriminator_step(images, reconstruction, number)
            if task.moves_codebook:
                traced_update(task, reconstruction)
            average.update()
            return trace.operations

        with on_cuda:
            first = step(0)
            every = objective_config.r1_every
            later = (objective_config.disc_start // every + 1) * every + 1
            both = step(later) if objective.adversarial_at(later) else step(0)
            if objective.r1_at(later - 1):
                step(later - 1)
        repeats = recipe.train.accumulate / parts
        trained = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
        weights = size_of_network(model)
        other = size_of_network(discriminator) if task.adversarial else 0.0
        states = sum(size_of_state(optimizer) for optimizer in task.optimizers.values())
        saved = weights + other + states + (weights if config.weight_ema else 0.0)
        return Step(trace.peak, times(both, repeats), times(first, repeats), trained, saved, weights + other)


class WeightAverage:
    """The memory and the operations of `WeightEma`, which copies a network: fake tensors cannot be copied so."""

    def __init__(self, network: nn.Module, config: TrainConfig, trace: Trace) -> None:
        self.parameters = list(network.parameters()) if config.weight_ema else []
        self.averages = [torch.empty_like(each) for each in self.parameters]
        self.buffers = [torch.empty_like(each) for each in network.buffers() if config.weight_ema]
        for tensor in (*self.averages, *self.buffers):
            trace.add(tensor, "weight average")

    @torch.no_grad()
    def update(self) -> None:
        if self.averages:
            torch._foreach_lerp_(self.averages, [*self.parameters], 0.1)


def traced_update(task: TokenizerTask, reconstruction: Any) -> None:
    """The update of a codebook. Some of them read numbers, which fake tensors do not have: those need little."""
    try:
        task.model.quantizer.update(reconstruction.latent, reconstruction.quantized.ids)
    except (RuntimeError, NotImplementedError):
        return


@cache
def trace_generator(
    recipe: GeneratorRecipe, tokenizer: AutoencoderConfig, image_size: int, examples_at_once: int, gpu: bool
) -> Step:
    """Trace steps of a generator's training. The tokenizer is in memory too, for samples."""
    parts = min(2, recipe.train.accumulate)
    config = replace(recipe.train, accumulate=parts, compile=False, parallel="ddp")
    autoencoder = build(tokenizer)
    quantizer, side = autoencoder.quantizer, image_size // autoencoder.downsample_factor
    classes = (recipe.examples.num_classes or 1000) if recipe.examples.conditional else None
    space = Space.of(quantizer, side, side, classes)
    with torch.device("meta"):
        network = build_generator(recipe.generator, space)
    with fake_tensors(gpu) as (trace, on_cuda):
        start(autoencoder, trace)
        trace.own_tensors(autoencoder, "tokenizer")
        as_fake(network.requires_grad_(True), trace, "weights")
        with suppress(ConfigError):  # of a generator that uses no codebook
            network.load_codebook(quantizer.train().all_codes().detach())
        task = ExamplesTask(network)
        average = WeightAverage(network, config, trace)
        task.prepare(config, torch.device("cpu"), network)
        task.connect()
        trace.count_steps(task.optimizers["optimizer"])
        count = parts * examples_at_once
        if network.trained_on == "tokens":
            examples = torch.zeros(count, space.num_tokens, dtype=torch.int64)
        else:
            examples = torch.zeros(count, space.latent_dim, space.height, space.width)
        batch = Examples(examples, torch.zeros(count, dtype=torch.int64))
        with on_cuda:
            task.step(batch, 0)
            trace.operations = []
            task.step(batch, 1)
            average.update()
        operations = times(trace.operations, recipe.train.accumulate / parts)
        weights = size_of_network(network)
        trained = sum(size_of(parameter) for parameter in network.parameters())
        saved = weights * (2 if config.weight_ema else 1) + size_of_state(task.optimizers["optimizer"])
        published = weights + size_of_network(autoencoder)
        return Step(trace.peak, operations, operations, trained, saved, published)


@dataclass
class Examples:
    """A batch of a generator."""

    examples: Tensor
    labels: Tensor
    keys: list[str] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)


def training_plan(
    stage: str, config: TrainConfig, step: Step, device: Device, devices: int, *, starts: int = 0
) -> Plan:
    """The plan of a training run. Steps before `starts` are without the discriminator."""
    memory: dict[str, float] = {part: float(size) for part, size in step.peak.items() if size > 0}
    if devices > 1 and config.parallel == "fsdp":
        for part in ("weights", "gradients", "optimizer", "weight average"):
            memory[part] = memory.get(part, 0.0) / devices
    elif devices > 1:  # DistributedDataParallel keeps the gradients of all weights
        memory["gradients"] = max(memory.get("gradients", 0.0), step.trained)
    traffic = 2 * (devices - 1) / devices * step.trained / (1e9 * device.link)
    early, late = (max(step_seconds(each, device), traffic) for each in (step.first, step.operations))
    seconds = (starts * early + (config.steps - starts) * late) / config.steps
    operations = step.operations if starts < config.steps else step.first
    return Plan(
        stage=stage,
        device=device.name,
        devices=devices,
        settings={
            "images per device and step": config.share(devices),
            "images at once": micro_batch(config, devices),
            "accumulate": config.accumulate,
            "activation checkpointing": config.activation_checkpointing,
            "precision": config.precision,
        },
        memory=memory,
        needed=with_assumptions(memory, device),
        available=device.memory,
        flops=sums_of_flops(operations),
        seconds_per_step=seconds,
        steps=config.steps,
        images_per_step=config.global_batch_size,
        disk={"checkpoints": KEPT_CHECKPOINTS * step.saved, "published": step.published},
    )


def forward_plan(
    stage: str,
    trace: Trace,
    device: Device,
    devices: int,
    settings: dict[str, Any],
    images: int,
    disk: dict[str, float],
) -> Plan:
    """The plan of a job that encodes `images` images, a batch a step."""
    memory: dict[str, float] = {part: float(size) for part, size in trace.peak.items() if size > 0}
    at_once = settings["batch size"] * devices
    return Plan(
        stage=stage,
        device=device.name,
        devices=devices,
        settings=settings,
        memory=memory,
        needed=with_assumptions(memory, device),
        available=device.memory,
        flops=sums_of_flops(trace.operations),
        seconds_per_step=step_seconds(trace.operations, device),
        steps=-(-images // at_once),
        images_per_step=at_once,
        disk=disk,
    )


def with_assumptions(memory: dict[str, float], device: Device) -> float:
    """The bytes of a process on the device."""
    return sum(memory.values()) * (1 + device.margin) + device.context


def step_seconds(operations: Iterable[Operation], device: Device) -> float:
    """Seconds of these operations, one after another."""
    peaks = {kind: 1e12 * getattr(device, kind) * device.product_share for kind in ("bf16", "conv32", "fp32")}
    bandwidth = 1e9 * device.bandwidth * device.memory_share
    busy, count = 0.0, 0
    for operation in operations:
        busy += max(operation.flops / peaks[operation.kind], operation.bytes / bandwidth)
        count += 1
    return max(busy, count * device.launch)


def sums_of_flops(operations: Iterable[Operation]) -> dict[str, float]:
    """FLOPs forward and backward, and of each part."""
    sums = {"forward": 0.0, "backward": 0.0}
    for operation in operations:
        if operation.flops:
            sums["backward" if operation.backward else "forward"] += operation.flops
            name = "networks" if operation.part == "activations" else operation.part
            sums[name] = sums.get(name, 0.0) + operation.flops
    return sums


def times(operations: list[Operation], count: float) -> list[Operation]:
    """`count` times as much of each operation: of a step with more micro-batches."""
    if count == 1:
        return operations
    return [each._replace(flops=count * each.flops, bytes=count * each.bytes) for each in operations]


def size_of(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def size_of_network(network: nn.Module) -> float:
    return sum(size_of(tensor) for tensor in network.state_dict().values())


def size_of_state(optimizer: torch.optim.Optimizer) -> float:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(size_of(value) for value in tensors if isinstance(value, Tensor))


def with_advice(plan: Plan, training: Training, device: Device, devices: int) -> Plan:
    """The plan, with settings to change."""
    config, advice = training.config, []
    if not plan.fits:
        other = training.fitting(device, devices)
        advice.append("no settings fit: use a device with more memory, or a smaller model or image size")
        if other is not None:
            options = {
                name: (getattr(config, name), other.settings[name.replace("_", " ")])
                for name in ("accumulate", "activation_checkpointing", "precision")
            }
            changed = [f"--set train.{name}={str(new).lower()}" for name, (old, new) in options.items() if old != new]
            advice[0] = f"{' '.join(changed)} fits"
    elif config.accumulate > 1 or config.activation_checkpointing:
        plain = replace(training, config=replace(config, activation_checkpointing=False)).fitting(device, devices)
        if plain is not None and not plain.settings["activation checkpointing"]:
            parts = plain.settings["accumulate"]
            if config.activation_checkpointing:
                advice.append(f"train.activation_checkpointing=false fits with train.accumulate={parts}, and is faster")
            elif parts < config.accumulate:
                advice.append(f"train.accumulate={parts} fits: fewer, larger operations")
    if plan.fits and plan.needed < 0.4 * plan.available:
        advice.append("the device has room for a larger train.global_batch_size")
    if config.precision == "fp32" and device.bf16 > device.conv32:
        advice.append("train.precision=bf16 needs less memory, and takes less time where products bound it")
    if config.precision == "bf16" and device.bf16 <= device.fp32:
        advice.append("this device computes bf16 no faster than fp32: train.precision=fp32")
    cores = plan.images_per_second / DECODED_PER_CORE
    if plan.stage == "train" and cores > 1:
        advice.append(
            f"the loader needs about {math.ceil(cores):,} CPU cores for {plan.images_per_second:,.0f} images/s"
        )
    return replace(plan, advice=advice)


def in_bytes(size: float) -> str:
    """`31.2 GiB`, or `512 MiB`: the units of nvidia-smi and of PyTorch's messages."""
    unit, name = (MIB, "MiB") if size < GIB - MIB / 2 else (GIB, "GiB")
    count = size / unit
    digits = 0 if count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:,.{digits}f} {name}"


def refusal(plan: Plan) -> ConfigError:
    """The error of a run that does not fit."""
    where = "this machine" if plan.device == "cpu" else f"the {plan.device}"
    return ConfigError(
        f"out of memory: about {in_bytes(plan.needed)} are needed, {where} has {in_bytes(plan.available)}",
        plan.advice[0] if plan.advice else "Use a smaller batch",
    )
