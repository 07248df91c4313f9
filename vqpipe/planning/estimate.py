"""Estimates of a run: memory by part, time, disk, and settings with which it fits a device.

Memory is that of the tensors of a step on fake tensors (`trace.Trace`), plus what is assumed for the device
(`devices.Device`): the CUDA context, cuBLAS's and cuDNN's workspaces, and what the allocator loses.

The time of an operation is the larger of its arithmetic and its traffic, each at a share of the device's peak, and a
step takes their sum, but not less than the time to start so many operations. Copies of images, checkpoints, samples and
validation are not in it, and the loader is assumed to keep up.

The estimate is for eager PyTorch: `train.compile` saves time and memory that it leaves out.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from vqpipe.codebooks.encoders import check_pool
from vqpipe.codebooks.features import BLOCK_ROWS, FeaturesConfig
from vqpipe.codebooks.kmeans import VECTOR_BYTES, KmeansConfig, block_bytes, working_bytes
from vqpipe.errors import ConfigError
from vqpipe.generation.train import GeneratorRecipe
from vqpipe.gpus import MIB
from vqpipe.models import AutoencoderConfig
from vqpipe.planning.devices import Device
from vqpipe.planning.steps import (
    TRACED,
    Step,
    build_encoder,
    extrapolated,
    scaled,
    trace_features,
    trace_generator,
    trace_tokenize,
    trace_tokenizer,
)
from vqpipe.planning.trace import EPILOGUE_DIMENSIONS, Operation, Trace
from vqpipe.search.blocking import CAPACITY
from vqpipe.training.config import TrainConfig
from vqpipe.training.tokenizer_run import TokenizerRecipe

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
    device: Device
    devices: int
    settings: dict[str, Any]
    """What the estimate is for: images per device and step, micro-batches, precision, ..."""
    memory: dict[str, float]
    """Part -> bytes on one device at the peak."""
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
    def needed(self) -> float:
        """Bytes on one device: the parts, and what is assumed for the device."""
        return sum(self.memory.values()) * (1 + self.device.margin) + self.device.context

    @property
    def fits(self) -> bool:
        return self.needed <= self.device.memory

    @property
    def close(self) -> bool:
        """Whether it fits, but so closely that it may not."""
        return self.fits and self.needed > CLOSE * self.device.memory

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
            "device": self.device.name,
            "devices": self.devices,
            "settings": self.settings,
            "memory_gib": gibibytes(self.memory),
            "needed_gib": round(self.needed / GIB, 4),
            "available_gib": round(self.device.memory / GIB, 4),
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
        return with_advice(self.plan_of(self.config, step, device, devices), self, device, devices)

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
                step = extrapolated(few, many, share // parts)
                changed = replace(config, accumulate=parts)
                step = replace(step, operations=scaled(step.operations, parts), first=scaled(step.first, parts))
                plan = self.plan_of(changed, step, device, devices)
                if plan.needed <= CLOSE * device.memory:
                    return plan
        return None

    def plan_of(self, config: TrainConfig, step: Step, device: Device, devices: int) -> Plan:
        """The plan of the settings `config`, of which `step` is the trace."""
        memory: dict[str, float] = {part: float(size) for part, size in step.peak.items() if size > 0}
        sharded = devices > 1 and config.parallel == "fsdp"
        if config.accumulate > 1 or (devices > 1 and not sharded):  # the gradients of all weights are kept
            memory["gradients"] = max(memory.get("gradients", 0.0), step.trained)
        if sharded:
            for part in ("weights", "gradients", "optimizer", "weight average"):
                memory[part] = memory.get(part, 0.0) / devices
        # DDP all-reduces the gradients, which moves them twice, once a step. FSDP gathers the weights for the forward
        # and for the backward pass, and reduce-scatters the gradients, in every micro-batch.
        moves = 3 * config.accumulate if sharded else 2
        traffic = moves * (devices - 1) / devices * step.trained / (1e9 * device.link)
        early, late = (max(step_seconds(each, device), traffic) for each in (step.first, step.operations))
        seconds = (self.starts * early + (config.steps - self.starts) * late) / config.steps
        operations = step.operations if self.starts < config.steps else step.first
        return Plan(
            stage=self.stage,
            device=device,
            devices=devices,
            settings={
                "images per device and step": config.share(devices),
                "images at once": micro_batch(config, devices),
                "accumulate": config.accumulate,
                "activation checkpointing": config.activation_checkpointing,
                "precision": config.precision,
            },
            memory=memory,
            flops=sums_of_flops(operations),
            seconds_per_step=seconds,
            steps=config.steps,
            images_per_step=config.global_batch_size,
            disk={"checkpoints": KEPT_CHECKPOINTS * step.saved, "published": step.published},
        )


def tokenizer_training(recipe: TokenizerRecipe) -> Training:
    """`vqpipe train`."""
    config = recipe.objective
    starts = min(config.disc_start, recipe.train.steps) if config.adversarial > 0 else recipe.train.steps

    def trace(config: Any, images: int, gpu: bool) -> Step:
        return trace_tokenizer(replace(recipe, train=config), images, gpu)

    return Training("train", recipe.train, trace, starts)


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
    trace, bytes_per_image = trace_tokenize(model, image_size, batch_size, precision, device.is_gpu)
    return forward_plan(
        "tokenize",
        trace,
        device,
        devices,
        {"batch size": batch_size, "image size": "{1}x{0}".format(*image_size), "precision": precision},
        images,
        {"tokens": float(images * bytes_per_image)},
    )


def plan_features(config: FeaturesConfig, device: Device, devices: int = 1, *, images: int = IMAGENET) -> Plan:
    """Plan `vqpipe extract-features` of `images` images."""
    images = min(images, config.limit or images)
    encoder = build_encoder(config)
    trace = trace_features(encoder, config, device.is_gpu)
    settings = {"encoder": config.encoder, "batch size": config.batch_size, "precision": config.precision}
    disk = {"features": 2.0 * images * check_pool(encoder, config.pool) ** 2 * encoder.dim}
    return forward_plan("extract-features", trace, device, devices, settings, images, disk)


def features_of(config: FeaturesConfig) -> tuple[int, int]:
    """Channels of a feature, and features per image."""
    encoder = build_encoder(config)
    return encoder.dim, check_pool(encoder, config.pool) ** 2


def plan_kmeans(config: KmeansConfig, vectors: int, dim: int, device: Device, devices: int = 1) -> Plan:
    """Plan `vqpipe kmeans` of `vectors` features of `dim` channels: by formula, with nothing traced.

    A pass compares every vector with every center, and k-means++ takes about as long as one more. Where the features do
    not fit beside the centers, each pass copies them to the device.
    """
    k, stored = config.k, 2.0 * vectors * dim
    blocks = float(block_bytes(vectors, dim))
    memory = {"seeding or iterations": working_bytes(vectors, dim, k) - blocks, "blocks of features": blocks}
    if device.is_gpu:
        memory["search"] = 8.0 * (1 + CAPACITY) * min(BLOCK_ROWS, vectors)
        free = (device.memory - device.context) / (1 + device.margin)
        memory["features"] = max(0.0, min(stored / devices, config.gpu_share * free, free - sum(memory.values())))
    else:
        memory["order of the vectors"] = float(VECTOR_BYTES * vectors)
    flops = 2.0 * vectors * k * max(dim, EPILOGUE_DIMENSIONS)
    # On a GPU the products are screened in bfloat16, and the candidates compared in float32.
    products = Operation(flops / devices, stored / devices, "bf16" if device.is_gpu else "fp32", False, "search")
    sums = Operation(0.0, 12.0 * vectors * dim / devices, "fp32", False, "sums")
    passes = config.iterations + 1 + (config.init == "k-means++")
    return Plan(
        stage="kmeans",
        device=device,
        devices=devices,
        settings={"k": k, "vectors": vectors, "dim": dim, "iterations": config.iterations},
        memory=memory,
        flops={"search": flops / devices},
        seconds_per_step=step_seconds([products, sums], device),
        steps=passes if config.select == "kmeans" else 1,
        images_per_step=0,
        disk={"codebook": 4.0 * k * dim + 8 * k, "checkpoints": 2 * (4.0 * k * dim + 8 * k)},
    )


def micro_batch(config: TrainConfig, devices: int) -> int:
    """Images that a device computes at once."""
    return config.share(devices) // config.accumulate


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
        device=device,
        devices=devices,
        settings=settings,
        memory=memory,
        flops=sums_of_flops(trace.operations),
        seconds_per_step=step_seconds(trace.operations, device),
        steps=-(-images // at_once),
        images_per_step=at_once,
        disk=disk,
    )


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
    if plan.fits and plan.needed < 0.4 * device.memory:
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
    where = f"the {plan.device.name}" if plan.device.is_gpu else "this machine"
    return ConfigError(
        f"out of memory: about {in_bytes(plan.needed)} are needed, {where} has {in_bytes(plan.device.memory)}",
        plan.advice[0] if plan.advice else "Use a smaller batch",
    )
