"""Subjects that run a network: the training step and `Tokenizer.encode`.

A training step of a preset with a frozen codebook is timed at a small and a large codebook size, beside the released
step of VQGAN-LC; of others (no training code of MGVQ is released) as it is. It is the training loop itself, on images
in memory, with the discriminator from the first step on, as in most steps of a run, and without LPIPS, whose weights
are not included.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vqpipe.benchmarks.planned import Planned, planned_encoding, planned_step
from vqpipe.benchmarks.released_step import ReleasedStep
from vqpipe.benchmarks.search import CHECKED, MATRICES, expansion, need_matrices, reference_ids, share_equal
from vqpipe.benchmarks.timing import Case, Measurement, Method, Settings, quotient, timed, version_of
from vqpipe.data.batches import Batch
from vqpipe.data.decoding import decode
from vqpipe.data.images import open_images
from vqpipe.data.transforms import center_crop, to_float
from vqpipe.losses.objective import Objective
from vqpipe.models import Autoencoder, AutoencoderConfig, PatchDiscriminator, build_autoencoder
from vqpipe.progress import Progress
from vqpipe.quantizers.base import to_rows
from vqpipe.quantizers.lc import FrozenCodebookQuantizer, LcConfig
from vqpipe.search import engine_name
from vqpipe.tokenizer import Tokenizer
from vqpipe.training.loop import train
from vqpipe.training.tokenizer_run import TokenizerRecipe
from vqpipe.training.tokenizer_task import TokenizerTask

TRAIN_SIZES, QUICK_TRAIN_SIZES = (1000, 100_000), (100, 2000)
"""Codebook sizes of the training step, the small one first."""
TOKENIZE_SIZES, QUICK_TOKENIZE_SIZES = (1000, 16_384, 100_000), (100, 2000)
STEPS, CUDA_STEPS = 2, 10
"""Training steps a call."""
WHITEN_IMAGES = 16


def train_cases(settings: Settings, recipes: Mapping[str, TokenizerRecipe]) -> list[Callable[[Progress], Case]]:
    """A case per preset, with both codebook sizes in the same rounds."""
    return [partial(time_training_step, settings, preset, recipe) for preset, recipe in recipes.items()]


def time_training_step(settings: Settings, preset: str, recipe: TokenizerRecipe, progress: Progress) -> Case:
    """Our training step, with a frozen codebook at both sizes and beside the released step."""
    on_gpu = settings.device.type == "cuda"
    batch = 2 if settings.quick else 32 if on_gpu else recipe.train.global_batch_size
    title = f"training step: preset {preset}, {recipe.data.image_size} px, batch {batch}"
    steps = 1 if settings.quick else CUDA_STEPS if on_gpu else STEPS
    images = photographs(batch, recipe.data.image_size)
    sides = {"image_size": recipe.data.image_size, "batch": batch, "steps": steps}
    case = Case(title, "images", sides)
    if isinstance(recipe.model.quantizer, LcConfig):
        sizes = case.settings["codebook_sizes"] = list(QUICK_TRAIN_SIZES if settings.quick else TRAIN_SIZES)
        recipes = [replace(recipe, model=with_codes(recipe.model, k)) for k in sizes]
    else:
        recipes = [recipe]
    runs = [MeasuredTraining(settings, each, images, steps) for each in recipes]
    released = {run.released_name: run.released for run in runs} if len(runs) > 1 else {}
    rows_of_calls = timed([run.ours() for run in runs], released, case, settings, progress, batch * steps)
    case.rows = [per_step(row, steps) for row in rows_of_calls]
    for run, row in zip(runs, case.rows, strict=False):
        row.extra.update(run.planned())
    if len(runs) > 1:
        rows = {row.name: row for row in case.rows}
        small, large = (rows[run.name] for run in runs)
        case.facts = ratio_facts("cost_of_k", large, small)
        if baseline := rows.get(runs[-1].released_name):
            case.facts |= ratio_facts("over_released", baseline, large)
    return case


def ratio_facts(name: str, row: Measurement, base: Measurement) -> dict[str, float | None]:
    """The ratios of wall time and of CPU time."""
    return {name: quotient(row.wall_ms, base.wall_ms), f"{name}_cpu": quotient(row.cpu_ms, base.cpu_ms)}


def per_step(row: Measurement, steps: int) -> Measurement:
    """The times of a step."""
    return replace(row, wall_ms=row.wall_ms / steps, wall_min_ms=row.wall_min_ms / steps, cpu_ms=row.cpu_ms / steps)


class MeasuredTraining:
    """Training of a recipe, `steps` steps a call, continued from call to call."""

    def __init__(self, settings: Settings, recipe: TokenizerRecipe, images: Tensor, steps: int) -> None:
        self.settings, self.steps, self.images = settings, steps, images
        self.config = replace(
            recipe.train,
            steps=steps,
            warmup_steps=0,
            global_batch_size=len(images),
            log_every=steps,
            save_every=steps,
            sample_every=steps,
        )
        device = settings.device
        self.model = build(recipe.model, recipe.data.image_size, device, settings.seed)
        self.k = self.model.quantizer.codebook_size
        self.name, self.released_name = f"vqpipe, K = {self.k:,}", f"released step, K = {self.k:,}"
        self.discriminator = PatchDiscriminator(recipe.discriminator).to(device)
        if device.type == "cuda":
            self.discriminator.to(memory_format=torch.channels_last)
        objective = replace(recipe.objective, disc_start=0, lpips=0.0, perceptual="none")
        self.objective = Objective(objective, self.model.quantizer.loss_names).to(device)
        self.recipe = replace(recipe, train=self.config, objective=objective)
        side = recipe.data.image_size // self.model.downsample_factor
        self.num_vectors = len(images) * self.model.quantizer.layout(side, side).num_tokens

    def ours(self) -> Method:
        """Our step; its own time is the unit of its ratios."""
        version = f"{version_of('vqpipe')}, {engine_name(self.settings.device)}"
        return Method(name=self.name, call=self.train, version=version, ours=True, baseline=self.name)

    def released(self) -> Method:
        """The released step, from the same weights on the same images; Unavailable for lack of memory."""
        need_matrices(MATRICES, self.num_vectors, self.k, self.settings)
        released = ReleasedStep(self.model, self.discriminator, self.objective.config, self.config)
        images = to_float(self.images).to(self.settings.device)

        def call() -> None:
            for _ in range(self.steps):
                released.step(images)

        note = "VQGAN-LC's, in float32"
        return Method(call=call, version=version_of("torch"), baseline=self.name, note=note)

    def planned(self) -> Planned:
        """The estimates of a step."""
        return planned_step(self.recipe, self.settings, self.model, self.discriminator)

    def train(self) -> None:
        """The training loop, with new optimizers, and without a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            task = TokenizerTask(self.model, self.discriminator, self.objective)
            seed, device = self.settings.seed, self.settings.device
            train(task, self.config, Repeated(self.images), Path(folder), seed=seed, device=device)


class Repeated:
    """A stream of the same batch."""

    def __init__(self, images: Tensor) -> None:
        count = len(images)
        self.batch = Batch(images, torch.full((count,), -1), [""] * count, list(range(count)))

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        """The batch, without end."""
        while True:
            yield self.batch


def tokenize_cases(settings: Settings, recipe: TokenizerRecipe) -> list[Callable[[Progress], Case]]:
    """A case per codebook size."""
    batch, size = (2, 64) if settings.quick else (64, 256) if settings.device.type == "cuda" else (8, 128)
    sizes = QUICK_TOKENIZE_SIZES if settings.quick else TOKENIZE_SIZES
    return [partial(time_encoding, settings, recipe, k, batch, size) for k in sizes]


def time_encoding(
    settings: Settings, recipe: TokenizerRecipe, k: int, batch: int, size: int, progress: Progress
) -> Case:
    """`Tokenizer.encode`, and the same network followed by the published search."""
    title = f"images to ids: K = {k:,}, {batch} images of {size} px"
    case = Case(title, "images", {"codebook_size": k, "batch": batch, "image_size": size})
    model = build(with_codes(recipe.model, k), size, settings.device, settings.seed)
    tokenizer = Tokenizer(model, image_size=size, device=settings.device)
    images = photographs(batch, size).to(settings.device)
    num_vectors = case.settings["vectors"] = batch * tokenizer.layout(size, size).num_tokens

    @torch.no_grad()
    def vectors() -> Tensor:
        return to_rows(model.latent(to_float(images)))

    def naive() -> Method:
        need_matrices(MATRICES, num_vectors, k, settings)
        codes = model.quantizer.codebook().detach()
        return Method(call=lambda: expansion(vectors(), codes), version=version_of("torch"))

    version = f"{version_of('vqpipe')}, {engine_name(settings.device)}"
    ours = Method(name="vqpipe", call=lambda: tokenizer.encode(images).flatten(), version=version, ours=True)
    truth = reference_ids(vectors()[:CHECKED], model.quantizer.codebook())
    case.facts = {"checked_vectors": len(truth)}
    case.rows = timed([ours], {"naive search": naive}, case, settings, progress, batch, partial(share_equal, truth))
    case.rows[0].extra.update(planned_encoding(with_codes(recipe.model, k), size, batch, settings, model))
    return case


def photographs(count: int, size: int) -> Tensor:
    """uint8[B, 3, S, S]: crops of builtin:photos at even intervals, repeated where there are too few."""
    images = open_images("builtin:photos")
    stride = max(1, len(images) // count)
    chosen = [(number * stride) % len(images) for number in range(count)]
    return torch.stack([center_crop(decode(images.read(i)), size) for i in chosen])


def with_codes(config: AutoencoderConfig, codebook_size: int) -> AutoencoderConfig:
    """The network with a frozen codebook of another size."""
    assert isinstance(config.quantizer, LcConfig)
    return replace(config, quantizer=replace(config.quantizer, codebook_size=codebook_size))


def build(config: AutoencoderConfig, image_size: int, device: torch.device, seed: int) -> Autoencoder:
    """A network with random weights and normally distributed codes, its latents whitened on photographs.

    Without `whiten_init` the latents would lie far from the codes and share a few of them.
    """
    torch.manual_seed(seed)
    model = build_autoencoder(config)
    if isinstance(model.quantizer, FrozenCodebookQuantizer) and not model.quantizer.loaded:
        model.quantizer.load_codebook(torch.randn_like(model.quantizer.codes))
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    model.to(device)
    model.whiten_init(to_float(photographs(WHITEN_IMAGES, image_size).to(device)))
    return model
