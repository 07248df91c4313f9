"""The job behind `vqpipe train`: train a tokenizer in a draft, and publish it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vqpipe import artifacts, distributed
from vqpipe.artifacts import Artifact, Draft, Input
from vqpipe.config import difference, flat, to_request, to_table, toml_value
from vqpipe.data.batches import TrainingStream, check_set_weights
from vqpipe.data.images import ImageSet
from vqpipe.data.transforms import DataConfig, to_float
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.files import hash_file
from vqpipe.losses.objective import Objective, ObjectiveConfig
from vqpipe.losses.perceptual import backbone_file, distance_name
from vqpipe.models import Autoencoder, AutoencoderConfig, DiscriminatorConfig, PatchDiscriminator, build_autoencoder
from vqpipe.quantizers import MultiGroupConfig, QuantizerConfig
from vqpipe.reports.training import describe_tokenizer
from vqpipe.tokenizer import Tokenizer
from vqpipe.tokenizer_files import DISCRIMINATOR, model_facts, write_tokenizer
from vqpipe.training.callbacks import MetricsLog, ReconstructionGrid, SkippedImages
from vqpipe.training.checkpoint import TrainState, checkpoints
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.run import Run
from vqpipe.training.throughput import Throughput, count_flops, peak_of
from vqpipe.training.tokenizer_task import TokenizerTask
from vqpipe.training.validation import BestWeights, Validation
from vqpipe.weights import load_tensors, load_weights
from vqpipe.words import counted

Publish = Literal["last", "best"]
"""Which weights to publish: those of the last step, or of the best validation."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """The sections of a tokenizer's preset that its training reads."""

    model: AutoencoderConfig
    objective: ObjectiveConfig
    data: DataConfig = field(default_factory=DataConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run reads."""

    images: ImageSet
    validation: ImageSet | None = None
    """Images for validation."""
    codebook: Input | str | None = None
    """A codebook artifact, or the sha256 of a codebook file."""
    source: Tokenizer | None = None
    """A tokenizer to fine-tune, on the CPU."""


def check_run(
    recipe: TokenizerRecipe,
    *,
    codebook: Tensor | None = None,
    source: Tokenizer | None = None,
    validates: bool = False,
    publish: Publish = "last",
) -> None:
    """Check the settings before the images are opened.

    Args:
        codebook: float[K, dim].
        source: a tokenizer to fine-tune.
        validates: whether there are images for validation.

    Raises:
        ConfigError: a setting needs held-out images and there are none, or does not go with fine-tuning; the images are
            too small for the discriminator; and the errors of `build_networks`.
        WeightsError: the weights of the perceptual loss are absent.
    """
    train, side = recipe.train, recipe.data.image_size
    if recipe.objective.adversarial and side < recipe.discriminator.smallest_side:
        raise ConfigError(
            f"data.image_size = {side} is too small for the discriminator, which needs"
            f" {recipe.discriminator.smallest_side} pixels",
            "Lower discriminator.num_layers, or set objective.adversarial = 0",
        )
    if publish == "best" and not validates:
        raise ConfigError("--publish best needs held-out images", "Name them with --validation")
    if train.validate_every and not validates:
        raise ConfigError(
            f"train.validate_every = {train.validate_every} needs held-out images", "Name them with --validation"
        )
    if source is not None and train.whiten_init:
        raise ConfigError(
            f"train.whiten_init would change the latents and the codebook of {source.name}, which belong together",
            "Add --set train.whiten_init=false",
        )
    check_networks(recipe, source, codebook)
    if recipe.objective.perceptual != "none":
        backbone_file(recipe.objective.perceptual, recipe.objective.lpips_weights)


def check_networks(recipe: TokenizerRecipe, source: Tokenizer | None, codebook: Tensor | None) -> None:
    """Check that tokenizer to fine-tune and codebook fit the settings, without memory for the networks.

    Raises:
        ConfigError: as of `build_networks`.
    """
    with torch.device("meta"):
        build_networks(recipe, source, codebook)


def check_codebook_given(quantizer: QuantizerConfig) -> None:
    """Raise a ConfigError where the codes of the quantizer are those of a codebook: there is none."""
    if quantizer.needs_codebook:
        group = quantizer.group if isinstance(quantizer, MultiGroupConfig) else quantizer
        raise ConfigError(
            f"the {group.kind} quantizer has no codebook yet", "Pass --codebook DIR (vqpipe kmeans makes one)"
        )


def start_tokenizer_run(
    out: Path, recipe: TokenizerRecipe, inputs: RunInputs, *, seed: int, publish: Publish = "last"
) -> Draft | Artifact:
    """Start or resume the tokenizer `out`, or return it if it is already published.

    Raises:
        ConfigError: `data.set_weights` does not fit the image sets.
    """
    check_set_weights(inputs.images, recipe.data.set_weights)
    roles: dict[str, Input | str] = {"images": inputs.images}
    if inputs.validation is not None:
        roles["validation"] = inputs.validation
    if inputs.codebook is not None:
        roles["codebook"] = inputs.codebook
    if recipe.objective.perceptual != "none":
        roles["lpips"] = hash_file(backbone_file(recipe.objective.perceptual, recipe.objective.lpips_weights))
    if inputs.source is not None:
        roles["from"] = inputs.source.source
    request = {**to_request(recipe), "seed": seed, "publish": publish}
    if publish == "best" and not recipe.train.validate_every:
        request["train"]["sample_every"] = recipe.train.sample_every  # validates too, and so decides which are the best
    whitened = ", --set train.whiten_init=false" if recipe.train.whiten_init else ""
    further = f"To train it further: --from {out} in place of --codebook{whitened}, and another --out"
    return artifacts.start(
        out, "tokenizer", request, roles, tolerance="--set data.max_skipped", remedies={"train.steps": further}
    )


def train_tokenizer(
    run: Run,
    recipe: TokenizerRecipe,
    inputs: RunInputs,
    *,
    codebook: Tensor | None = None,
    publish: Publish = "last",
) -> Artifact | None:
    """Train a tokenizer in the draft of `run` and publish it. Every rank calls it.

    Returns None where `run.stop_requested` ended the run early: a checkpoint is saved, and the same call resumes.

    Args:
        codebook: float[K, dim], the content of `inputs.codebook`.

    Raises:
        DataError: more than `data.max_skipped` of the images cannot be used. A checkpoint is saved, and a larger one
            continues from there.
    """
    draft, device, progress = run.draft, run.device, run.progress
    if len(inputs.images) < recipe.train.global_batch_size:
        found, wanted = counted(len(inputs.images), "images"), recipe.train.global_batch_size
        progress.message(f"{found} for the {wanted:,} of a step: each is drawn several times")
    if codebook is not None and inputs.source is not None:
        progress.message(f"the codes of --codebook replace those of {inputs.source.name}")
    if inputs.images.whole_groups:
        progress.message(
            "each image of a Parquet file is read with its whole row group, which makes shuffled reading slow; "
            "vqpipe prepare-data folder --source PARQUET --out DATA packs them into tars"
        )
    progress.start("building the network", None, unit="")
    model, discriminator = build_networks(recipe, inputs.source, codebook)
    for network in (model, discriminator):
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        network.to(device)
    objective = Objective(recipe.objective, model.quantizer.loss_names).to(device)
    if objective.unused:
        names = " and ".join(f"objective.{name}" for name in objective.unused)
        progress.message(f"no effect of {names}: the {recipe.model.quantizer.kind} quantizer has no such loss")
    task = TokenizerTask(model, discriminator, objective)
    if recipe.train.whiten_init and not checkpoints(draft.path).paths():
        # On the first images of the run; the same images on every rank.
        whitened = False
        progress.start("fitting the first weights and codes to images", None, unit="")
        with run.interruptible():
            first = next(training_stream(recipe, inputs, run.seed, recipe.train.whiten_images).from_sample(0))
            model.whiten_init(to_float(first.images.to(device)))
            whitened = True
        if not whitened:
            return None
    progress.start("preparing to train", None, unit="")
    rank, ranks = distributed.rank(), distributed.world_size()
    stream = training_stream(recipe, inputs, run.seed, recipe.train.global_batch_size, rank, ranks)
    side, held_out = recipe.data.image_size, inputs.validation is not None
    skipped = SkippedImages(draft, inputs.images, recipe.data.max_skipped, progress)
    grid = ReconstructionGrid(draft, inputs.validation or inputs.images, side, device, held_out=held_out)
    validation = validation_of(run, recipe, inputs, objective)
    measures = [skipped, grid, *([validation] if validation else [])]
    flops = count_flops(recipe.train, model, discriminator, objective, side)
    run = replace(run, callbacks=[Throughput(flops, peak_of(device, recipe.train)), *run.callbacks])
    state, metrics = run.train(task, recipe, stream, measures, describe_tokenizer(model_facts(model)))
    skipped.check()
    if state.step < recipe.train.steps:
        return None
    best = validation.best if validation is not None and publish == "best" else None
    if best is not None and best.step is None:
        progress.message(f"no validation gave a number {best.measure}: the weights of the last step are published")
    return publish_tokenizer(draft, recipe, inputs, task, state, metrics, best, skipped.publish())


def build_networks(
    recipe: TokenizerRecipe, source: Tokenizer | None, codebook: Tensor | None
) -> tuple[Autoencoder, PatchDiscriminator]:
    """The autoencoder and the discriminator, fresh or from the tokenizer to fine-tune, with the codebook loaded.

    Raises:
        ConfigError: the tokenizer to fine-tune is another model than the preset's, or the model cannot take images of
            `data.image_size`.
    """
    model = build_autoencoder(recipe.model)
    side, factor = recipe.data.image_size, model.downsample_factor
    if side % factor:
        raise ConfigError(
            f"data.image_size = {side} is not divisible by the downsample factor of the model, {factor}",
            f"Set data.image_size={max(1, side // factor) * factor}",
        )
    discriminator = PatchDiscriminator(recipe.discriminator)
    if source is not None:
        device = model.last_layer.device  # meta where the networks are only checked
        weights = {name: value.to(device, copy=True) for name, value in source.autoencoder.state_dict().items()}
        try:
            load_weights(model, weights, source.name)
        except WeightsError:
            theirs, ours = to_table(source.config), to_table(recipe.model)
            what = f"{source.name} is another model than the preset's: {difference(theirs, ours, 'model')}"
            raise ConfigError(what, f"Choose the preset of that tokenizer{as_options(theirs, ours)}") from None
        if recipe.objective.adversarial > 0 and source.artifact and DISCRIMINATOR in source.artifact.manifest.files:
            file = source.artifact.verified_file(DISCRIMINATOR)
            try:
                load_weights(discriminator, load_tensors(file), file)
            except WeightsError as error:
                raise ConfigError(
                    f"{error.what}, which is the preset's",
                    "Set discriminator.num_layers and discriminator.base_channels",
                ) from None
    if codebook is not None:
        model.quantizer.load_codebook(codebook)
    return model, discriminator


def as_options(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """`, or add --set model.KEY=VALUE ...`: how to make the section [model] `given` the one that is wanted. Empty where
    their kinds differ, or a setting is to be left out."""
    values, own = dict(flat(wanted, "model")), dict(flat(given, "model"))
    differing = {name: value for name, value in values.items() if value != own.get(name)}
    if values.keys() != own.keys() or None in differing.values():
        return ""
    words = (f"{name}={value if isinstance(value, str) else toml_value(value)}" for name, value in differing.items())
    return ", or add " + " ".join(f"--set {shlex.quote(word)}" for word in words)


def training_stream(
    recipe: TokenizerRecipe, inputs: RunInputs, seed: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> TrainingStream:
    """The training images in batches of `batch_size` over all ranks; by default, all of them on this one."""
    return TrainingStream(
        inputs.images, recipe.data, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size
    )


def validation_of(run: Run, recipe: TokenizerRecipe, inputs: RunInputs, objective: Objective) -> Validation | None:
    """The validation of a run, None without held-out images. The best weights are chosen by LPIPS, or its formula with
    other weights, if it is part of the objective, otherwise by PSNR."""
    if inputs.validation is None:
        return None
    perceptual, measure = {}, "valid/psnr"
    if recipe.objective.perceptual != "none" and objective.perceptual is not None:
        distance = distance_name(recipe.objective.perceptual, recipe.objective.lpips_weights)
        perceptual, measure = {distance: objective.perceptual.lpips}, f"valid/{distance}"
    return Validation(
        inputs.validation,
        image_size=recipe.data.image_size,
        batch_size=recipe.train.share(distributed.world_size()) // recipe.train.accumulate,
        limit=recipe.train.validation_images,
        perceptual=perceptual,
        num_workers=recipe.data.num_workers,
        device=run.device,
        best=BestWeights(run.draft.path / "best.safetensors", measure, higher_is_better=not perceptual),
        progress=run.progress,
    )


def publish_tokenizer(
    draft: Draft,
    recipe: TokenizerRecipe,
    inputs: RunInputs,
    task: TokenizerTask,
    state: TrainState,
    metrics: MetricsLog,
    best: BestWeights | None,
    facts: dict[str, Any],
) -> Artifact:
    """Publish the weights of the last step, or those that `best` kept, with the numbers measured during training, and
    more `facts`."""
    step = state.step if best is None or best.step is None else best.step
    images_seen = step * recipe.train.global_batch_size
    if distributed.is_main():
        network = state.weight_ema.network
        assert isinstance(network, Autoencoder)
        if best is not None and step != state.step:
            load_weights(network, load_tensors(best.path), best.path)
        discriminator = task.discriminator if task.adversarial else None
        rows = {"images seen": f"{images_seen:,}"}
        write_tokenizer(draft, network, recipe.data.image_size, discriminator, **rows)
        draft.record_existing("metrics.jsonl")
    measured = {
        "training_psnr": metrics.latest("psnr"),
        "training_utilization": metrics.latest("utilization"),
        "valid_psnr": metrics.latest("valid/psnr", step),
    }
    seen = {"images_seen": images_seen, "steps": state.step, "published_step": step}
    known = {name: value for name, value in measured.items() if value is not None}
    weights = recipe.data.set_weights
    sets = [
        {"name": source.name, "num_images": len(images), "weight": weight}
        for source, images, weight in zip(inputs.images.sources, inputs.images.sets, weights, strict=bool(weights))
    ]
    made_from = {"image_sets": sets} if sets else {}
    return draft.publish(model_facts(task.model) | seen | known | made_from | facts | inputs.images.facts)
