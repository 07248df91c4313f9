"""`vqpipe train`: images (and a codebook) -> tokenizer."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import Device, Images, Out, Preset, Seed, Set

if TYPE_CHECKING:
    import torch

    from stages.recipe import Recipe
    from stages.watching import TokenizerWatcher
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.batches import TrainingStream
    from vqpipe.data.images import ImageSet
    from vqpipe.errors import ConfigError
    from vqpipe.models import Autoencoder, PatchDiscriminator
    from vqpipe.training.config import TokenizerTrainConfig
    from vqpipe.training.state import TrainState
    from vqpipe.training.tokenizer_task import TokenizerTask
    from vqpipe.training.validation import Best

SECTIONS = ("model", "data", "objective", "discriminator", "train")
"""What of a preset this stage reads."""
FREE_KEYS = {
    "train": (
        "log_every",
        "save_every",
        "keep_every",
        "sample_every",
        "max_nonfinite_steps",
        "activation_checkpointing",
        "compile",
        "parallel",
    ),
    "data": ("num_workers", "worker_timeout"),
    "objective": ("lpips_weights",),
}
"""Settings that do not change what comes out but for the rounding of sums (the weights of LPIPS count by content, as an
input): a run may be resumed with other values of these."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command was given beside its preset."""

    images: "ImageSet"
    held_out: "ImageSet | None"
    codebook: Path | None
    source: Path | None
    publish: str
    loggers: list[str]
    seed: int


def train(
    images: Images,
    out: Out,
    codebook: Annotated[
        Path | None, typer.Option("--codebook", help="A codebook artifact, or a .npy of [K, dim].", metavar="DIR|FILE")
    ] = None,
    preset: Preset = None,
    steps: console.Steps = None,
    global_batch_size: console.GlobalBatchSize = None,
    precision: console.TrainPrecision = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Fine-tune this tokenizer; see above.", metavar="TOKENIZER")
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option("--validation", help="Held-out images, as in --images; repeatable; see above.", metavar="WHERE"),
    ] = None,
    publish: Annotated[
        str, typer.Option("--publish", help="Which weights: those of the last step, or the best.", metavar="last|best")
    ] = "last",
    log: console.Log = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a tokenizer. Run the same command again to resume it.

    To watch a run, open OUT.partial/report.html: curves, reconstructions,
    codes in use. It is written again every train.sample_every steps, and
    published with the tokenizer; all numbers are in metrics.jsonl beside it.

    With --validation, train.validation_images held-out images are measured
    every train.validate_every steps (or with each picture). The weights that
    did best on them are kept: by LPIPS in a run trained with it, else by PSNR.

    --from starts from another tokenizer of the same model, ours or imported,
    and from its discriminator where it has one. It may be frozen in part:
    --set 'train.freeze=["encoder"]' keeps the encoder as it is, "codebook" the
    quantizer; both may be named. The second stage of MGVQ is the preset
    mgvq-f16-g4-finetune, --from the tokenizer of the first.
    """
    with console.session(device, seed) as where:
        from stages import recipe as recipes
        from vqpipe import artifacts
        from vqpipe.data.images import open_images

        if preset is None:
            raise no_preset()
        check_words(publish, validation or [], log or [])
        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        recipe = recipes.load(preset, overrides, train=flags)
        recipe = replace(recipe, train=with_schedule(recipe.train, bool(validation)))
        check_start(recipe.train, source)
        given = Given(
            images=open_images(images),
            held_out=open_images(validation) if validation else None,
            codebook=codebook,
            source=source,
            publish=publish,
            loggers=list(dict.fromkeys(log or [])),
            seed=seed,
        )
        draft = artifacts.start(out, "tokenizer", asked(recipe, given), inputs_of(recipe, given))
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            return console.finished(run(recipe, draft, given, where))


def no_preset() -> "ConfigError":
    """What to say where no preset was named."""
    from vqpipe.errors import ConfigError

    return ConfigError("no preset was named", "Choose one from `vqpipe presets`, such as --preset small")


def check_words(publish: str, validation: list[str], log: list[str]) -> None:
    """Raise a ConfigError where --publish or --log ask for what there is not."""
    from vqpipe.config import nearest_name
    from vqpipe.errors import ConfigError
    from vqpipe.training.loggers import check_loggers

    if publish not in ("last", "best"):
        raise ConfigError(f"--publish {publish} is unknown", nearest_name(publish, ("last", "best")))
    if publish == "best" and not validation:
        raise ConfigError("--publish best needs images to judge by", "Name held-out images with --validation")
    check_loggers(log)


def check_start(config: "TokenizerTrainConfig", source: Path | None) -> None:
    """Raise a ConfigError where a tokenizer to go on from would be whitened: its decoder knows its latents as they
    are."""
    from vqpipe.errors import ConfigError

    if source is not None and config.whiten_init:
        raise ConfigError(
            f"train.whiten_init would change the latents and the codebook of --from {source}, which belong together",
            "Add --set train.whiten_init=false",
        )


def asked(recipe: "Recipe", given: Given) -> dict[str, Any]:
    """The settings that count: with the inputs, what makes two runs the same."""
    from vqpipe.config import to_table

    sections = {name: to_table(getattr(recipe, name)) for name in SECTIONS}
    for section, keys in FREE_KEYS.items():
        for key in keys:
            del sections[section][key]
    return {**sections, "seed": given.seed, "publish": given.publish}


def inputs_of(recipe: "Recipe", given: Given) -> dict[str, Any]:
    """What the run reads, by role."""
    from vqpipe import artifacts
    from vqpipe.codebooks.kmeans import codebook_input
    from vqpipe.files import hash_file
    from vqpipe.losses.perceptual import backbone_file
    from vqpipe.tokenizer import read_config

    inputs: dict[str, Any] = {"images": given.images}
    if given.held_out is not None:
        inputs["validation"] = given.held_out
    if given.codebook is not None:
        inputs["codebook"] = codebook_input(given.codebook)
    if recipe.objective.perceptual != "none":
        inputs["lpips"] = hash_file(backbone_file(recipe.objective.perceptual, recipe.objective.lpips_weights))
    if given.source is not None:
        read_config(given.source / "config.json")  # first: it says what a folder is that is no tokenizer of ours
        inputs["from"] = artifacts.open_artifact(given.source, "tokenizer")
    return inputs


def with_schedule(config: "TokenizerTrainConfig", validates: bool) -> "TokenizerTrainConfig":
    """Validation with each picture where held-out images were named and no schedule was; never without images."""
    from vqpipe.errors import ConfigError

    if config.validate_every and not validates:
        raise ConfigError(
            f"train.validate_every = {config.validate_every} needs held-out images", "Name them with --validation"
        )
    return replace(config, validate_every=config.validate_every or (config.sample_every if validates else 0))


def run(recipe: "Recipe", draft: "Draft", given: Given, device: "torch.device") -> "Artifact":
    """Build the two networks, train them in `draft`, publish."""
    from stages.watching import train_watched, watch
    from vqpipe.losses.objective import Objective
    from vqpipe.training.state import checkpoints
    from vqpipe.training.tokenizer_task import TokenizerTask

    config = recipe.train
    model, discriminator = build(recipe, given, device)
    task = TokenizerTask(model, discriminator, Objective(recipe.objective, model.quantizer.loss_names).to(device))
    if config.whiten_init and not checkpoints(draft.path):
        whiten_init(recipe, model, given, device)
    stream = training_images(recipe, given, config.global_batch_size, shared=True)
    watching = partial(watch, recipe, draft, given, task, device, sections=SECTIONS, facts=facts_of(model))
    state, watcher = train_watched(draft, task, config, stream, seed=given.seed, device=device, watcher=watching)
    return publish_tokenizer(recipe, draft, given, task, state, watcher)


def training_images(recipe: "Recipe", given: Given, batch_size: int, *, shared: bool) -> "TrainingStream":
    """The run's images in batches: this rank's share of each where `shared`, else the whole of it."""
    from vqpipe import distributed
    from vqpipe.data.batches import TrainingStream

    rank, ranks = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    return TrainingStream(
        given.images, recipe.data, seed=given.seed, batch_size=batch_size, rank=rank, world_size=ranks
    )


def facts_of(model: "Autoencoder") -> dict[str, Any]:
    """What a tokenizer is, in short."""
    return {
        "quantizer": model.quantizer.config.kind,
        "codebook_size": model.quantizer.codebook_size,
        "num_groups": model.quantizer.num_groups,
        "downsample_factor": model.downsample_factor,
    }


def publish_tokenizer(
    recipe: "Recipe",
    draft: "Draft",
    given: Given,
    task: "TokenizerTask",
    state: "TrainState",
    watcher: "TokenizerWatcher",
) -> "Artifact":
    """The last weights, or those that did best, with what was measured on the way."""
    from vqpipe import distributed
    from vqpipe.reports.training import latest

    best, step = watcher.best, state.step
    if best is not None and best.step is not None and given.publish == "best":
        step = best.step
    seen = {"images_seen": step * recipe.train.global_batch_size, "steps": state.step, "published_step": step}
    if distributed.is_main():
        save(draft, task, state, recipe, best if step != state.step else None, seen["images_seen"])
    rows = watcher.history.rows
    measured = {
        "training_psnr": latest(rows, "psnr"),
        "training_utilization": latest(rows, "utilization"),
        "valid_psnr": latest([row for row in rows if row["step"] == step], "valid/psnr"),
    }
    known = {name: value for name, value in measured.items() if value is not None}
    return draft.publish(facts_of(task.model) | seen | known)


def build(recipe: "Recipe", given: Given, device: "torch.device") -> "tuple[Autoencoder, PatchDiscriminator]":
    """The two networks, fresh or from the tokenizer to fine-tune, with the codebook in place."""
    import torch

    from vqpipe.codebooks.kmeans import load_codebook
    from vqpipe.config import difference, to_table
    from vqpipe.errors import ConfigError, WeightsError
    from vqpipe.models import PatchDiscriminator, build_autoencoder
    from vqpipe.tokenizer import Tokenizer, load_weights
    from vqpipe.weights import load_tensors

    source = given.source
    model = build_autoencoder(recipe.model)
    discriminator = PatchDiscriminator(recipe.discriminator)
    if source is not None:
        tuned = Tokenizer.from_pretrained(source)
        try:
            load_weights(model, tuned.autoencoder.state_dict(), source)
        except WeightsError:
            where = difference(to_table(tuned.config), to_table(recipe.model), "model")
            hint = "Choose the preset of that tokenizer, or --set what differs"
            raise ConfigError(f"{source} is another model than the preset's: {where}", hint) from None
        file = source / "discriminator.safetensors"
        if recipe.objective.adversarial > 0 and file.is_file():
            try:
                load_weights(discriminator, load_tensors(file), file)
            except WeightsError as error:
                raise ConfigError(
                    f"{error.what}, which is the preset's",
                    "Set discriminator.num_layers and discriminator.base_channels",
                ) from None
    if given.codebook is not None:
        model.quantizer.load_codebook(load_codebook(given.codebook))
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
        discriminator.to(memory_format=torch.channels_last)
    return model.to(device), discriminator.to(device)


def whiten_init(recipe: "Recipe", model: "Autoencoder", given: Given, device: "torch.device") -> None:
    """The matched start, on the first images that the run will see; the same ones on every rank."""
    from vqpipe.data.transforms import to_float

    stream = training_images(recipe, given, recipe.train.whiten_images, shared=False)
    batch = next(iter(stream.from_sample(0)))
    model.whiten_init(to_float(batch.images.to(device)))


def save(
    draft: "Draft", task: "TokenizerTask", state: "TrainState", recipe: "Recipe", best: "Best | None", images_seen: int
) -> None:
    """Write the tokenizer's files into the draft: the last weights, or those that `best` kept."""
    from vqpipe.models import Autoencoder
    from vqpipe.tokenizer import Tokenizer, load_weights, write_files
    from vqpipe.weights import load_tensors

    network = state.weight_ema.network
    assert isinstance(network, Autoencoder)
    if best is not None:
        load_weights(network, load_tensors(best.path), best.path)
    tokenizer = Tokenizer(network, image_size=recipe.data.image_size, device="cpu")
    write_files(
        draft, tokenizer, task.discriminator if task.adversarial else None, **{"images seen": f"{images_seen:,}"}
    )
    draft.adopt("metrics.jsonl")
