"""A training step at K = 1,000 and at K = 100,000, with our search, with the published expansion in its place, and as
the released VQGAN-LC makes it.

What runs is the training loop itself, on images that are in memory already, and the released step on the same images
from the same weights. The discriminator takes part from the first step, as it does in most steps of a run. LPIPS, whose
weights are not shipped, is left out of all.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vqpipe.benchmarks import networks
from vqpipe.benchmarks.measure import (
    Case,
    Method,
    Plan,
    Row,
    Samples,
    Settings,
    Stopwatch,
    need_memory,
    offered,
    version_of,
)
from vqpipe.benchmarks.released_step import ReleasedStep
from vqpipe.benchmarks.search import MATRICES
from vqpipe.data.batches import Batch
from vqpipe.data.transforms import to_float
from vqpipe.losses.objective import Objective, ObjectiveConfig
from vqpipe.models import Autoencoder, AutoencoderConfig, PatchDiscriminator
from vqpipe.models.discriminator import DiscriminatorConfig
from vqpipe.search import engine_name, nearest
from vqpipe.search.nearest import Metric
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.loop import train
from vqpipe.training.tokenizer_task import TokenizerTask

SIZES = (1000, 100_000)
BOUND = 1.25
"""What a step with the large codebook may take, in units of one with the small."""
WANTED = 2.0
"""What the released step may take at least, in units of ours, with the large codebook."""
OURS, NAIVE, RELEASED = "vqpipe", "naive search", "released step"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a preset says about a step."""

    preset: str
    model: AutoencoderConfig
    objective: ObjectiveConfig
    discriminator: DiscriminatorConfig
    train: TokenizerTrainConfig
    image_size: int


class Repeated:
    """A stream that gives the same batch for ever."""

    def __init__(self, images: Tensor) -> None:
        count = len(images)
        self.batch = Batch(images, torch.full((count,), -1), [""] * count, list(range(count)))

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        """The batch, wherever the run stands."""
        while True:
            yield self.batch


def plans(settings: Settings, experiment: Experiment) -> list[Plan]:
    """One case: both codebook sizes, either search and the released step, in the same rounds."""
    return [Plan(title(experiment, batch_size(settings, experiment)), 6, partial(compare, settings, experiment))]


def title(experiment: Experiment, batch: int) -> str:
    return f"training step: preset {experiment.preset}, {experiment.image_size} px, batch {batch}"


def batch_size(settings: Settings, experiment: Experiment) -> int:
    """32 images on a GPU, the preset's batch on a CPU."""
    return 2 if settings.quick else 32 if settings.device.type == "cuda" else experiment.train.global_batch_size


def compare(settings: Settings, experiment: Experiment, stopwatch: Stopwatch) -> Case:
    """Steps per second, what K costs, and what the released step does."""
    batch, steps = batch_size(settings, experiment), 1 if settings.quick else 2
    sizes = (100, 2000) if settings.quick else SIZES
    images = networks.photographs(batch, experiment.image_size)
    case = Case(
        title=title(experiment, batch),
        unit="images",
        settings={"image_size": experiment.image_size, "batch": batch, "codebook_sizes": list(sizes), "steps": steps},
    )
    runs = {k: Run(settings, experiment, k, images, steps) for k in sizes}
    makers: dict[str, Callable[[], Method]] = {}
    for k, run in runs.items():
        makers[f"{OURS}, K = {k:,}"] = partial(run.method, OURS)
        makers[f"{NAIVE}, K = {k:,}"] = partial(run.method, NAIVE)
        makers[f"{RELEASED}, K = {k:,}"] = run.released
    methods = offered(makers, case)
    samples = stopwatch.measure(methods, case)
    case.rows = [per_step(row, steps) for row in stopwatch.rows(methods, samples, batch * steps)]
    for k, run in runs.items():
        share_of_search(case, f"{OURS}, K = {k:,}", run, stopwatch)
    small, large = (samples[f"{OURS}, K = {k:,}"] for k in sizes)
    case.facts = {"cost_of_k": cost(large, small), "cost_of_k_cpu": cost(large, small, "cpu"), "bound": BOUND}
    if released := samples.get(f"{RELEASED}, K = {max(sizes):,}"):
        case.facts |= {
            "over_released": cost(released, large),
            "over_released_cpu": cost(released, large, "cpu"),
            "over_released_wanted": WANTED,
        }
    return case


def cost(these: Samples, those: Samples, clock: str = "wall") -> float:
    """The median over the rounds of these steps over those of the same round: with the large codebook over with the
    small, say."""
    pairs = zip(getattr(these, clock), getattr(those, clock), strict=False)
    return statistics.median(a / b for a, b in pairs)


def per_step(row: Row, steps: int) -> Row:
    """Times of a step, where a call makes several."""
    return replace(row, wall_ms=row.wall_ms / steps, wall_min_ms=row.wall_min_ms / steps, cpu_ms=row.cpu_ms / steps)


class Run:
    """Training with one codebook size, a few steps a call; it goes on from call to call."""

    def __init__(self, settings: Settings, experiment: Experiment, k: int, images: Tensor, steps: int) -> None:
        self.settings, self.steps, self.k = settings, steps, k
        device = settings.device
        objective = replace(experiment.objective, disc_start=0, lpips=0.0, perceptual="none")
        self.config = replace(
            experiment.train,
            steps=steps,
            warmup_steps=0,
            global_batch_size=len(images),
            log_every=steps,
            save_every=steps,
            sample_every=steps,
        )
        model_config = networks.with_codes(experiment.model, k)
        self.model: Autoencoder = networks.build(model_config, experiment.image_size, device, settings.seed)
        self.discriminator = PatchDiscriminator(experiment.discriminator).to(device)
        if device.type == "cuda":
            self.discriminator.to(memory_format=torch.channels_last)
        self.objective = Objective(objective, self.model.quantizer.loss_names).to(device)
        self.images, self.stream = images, Repeated(images)
        tokens = self.model.quantizer.layout(*[experiment.image_size // self.model.downsample_factor] * 2).num_tokens
        self.vectors = len(images) * tokens

    def method(self, search: str) -> Method:
        """The steps, with our search or with the published one."""
        if search == NAIVE:
            self.need_matrices()
        ours = search == OURS
        return Method(
            name=f"{search}, K = {self.k:,}",
            call=self.train if ours else partial(self.train, networks.naive),
            version=f"{version_of('vqpipe')}, {engine_name(self.settings.device)}" if ours else version_of("torch"),
            ours=ours,
            baseline=f"{OURS}, K = {self.k:,}",
        )

    def released(self) -> Method:
        """The released step, from the same weights on the same images."""
        self.need_matrices()
        plain = ReleasedStep(self.model, self.discriminator, self.objective.config, self.config)
        images = to_float(self.images).to(self.settings.device)

        def steps() -> None:
            for _ in range(self.steps):
                plain.step(images)

        return Method(
            name=f"{RELEASED}, K = {self.k:,}",
            call=steps,
            version=version_of("torch"),
            baseline=f"{OURS}, K = {self.k:,}",
            note="VQGAN-LC's, in float32, without LPIPS as all here",
        )

    def need_matrices(self) -> None:
        """Raise Unavailable where the N x K matrices of the published expansion do not fit the budget."""
        gigabytes = MATRICES * 4e-9 * self.vectors * self.k
        need_memory(gigabytes, self.settings, f"{MATRICES} matrices of N x K = {self.vectors:,} x {self.k:,}")

    def train(self, search: networks.Search = nearest) -> None:
        """The training loop, from step 0 of a fresh optimizer, without a log or a checkpoint."""
        self.discriminator.requires_grad_(True)  # a method that failed in the middle of a step leaves it frozen
        with tempfile.TemporaryDirectory() as folder, networks.searching_with(search):
            train(
                TokenizerTask(self.model, self.discriminator, self.objective),
                self.config,
                self.stream,
                Path(folder),
                seed=self.settings.seed,
                device=self.settings.device,
            )


def share_of_search(case: Case, name: str, run: Run, stopwatch: Stopwatch) -> None:
    """One call more, in which the search is timed by itself: its share of the wall time goes into the method's row."""
    spent = 0.0

    def timed(vectors: Tensor, codes: Tensor, metric: Metric = "l2", *, check: bool = True) -> Tensor:
        nonlocal spent
        stopwatch.wait()
        began = time.perf_counter()
        ids = nearest(vectors, codes, metric, check=check)
        stopwatch.wait()
        spent += time.perf_counter() - began
        return ids

    began = time.perf_counter()
    run.train(timed)
    stopwatch.wait()
    whole = time.perf_counter() - began
    row = next(row for row in case.rows if row.name == name)
    row.extra["search_share"] = spent / whole
