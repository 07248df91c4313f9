"""`vqpipe train`: images (and a codebook) -> tokenizer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import Device, Images, Out, Preset, Seed, Set

if TYPE_CHECKING:
    import torch

    from stages.recipe import Recipe
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.shards import ImageSet
    from vqpipe.losses.objective import Objective
    from vqpipe.models import Autoencoder, PatchDiscriminator
    from vqpipe.training.config import TrainConfig
    from vqpipe.training.state import TrainState
    from vqpipe.training.validation import Best, Validation

SECTIONS = ("model", "data", "objective", "discriminator", "train")
"""What of a preset this stage reads."""
FREE_KEYS = {
    "train": ("log_every", "save_every", "keep_every", "look_every", "max_bad_steps", "recompute", "compile"),
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
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", metavar="N", min=1)] = None,
    global_batch_size: Annotated[
        int | None, typer.Option("--global-batch-size", help="Images a step, over all ranks.", metavar="N", min=1)
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of the convolutions.", metavar="fp32|bf16")
    ] = None,
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
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="Log there too, in OUT.logs; repeatable.", metavar="tensorboard|wandb"),
    ] = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a tokenizer. Run the same command again to resume it.

    To watch a run, open OUT.partial/report.html: curves, reconstructions,
    codes in use. It is written again every train.look_every steps, and
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
        from vqpipe.codebooks.kmeans import codebook_input
        from vqpipe.config import nearest_name, to_table
        from vqpipe.data.shards import open_images
        from vqpipe.errors import ConfigError
        from vqpipe.files import hash_file
        from vqpipe.losses.perceptual import backbone_file
        from vqpipe.tokenizer import read_config
        from vqpipe.training.loggers import check_loggers

        if preset is None:
            raise ConfigError("no preset was named", "Choose one from `vqpipe presets`, such as --preset small")
        if publish not in ("last", "best"):
            raise ConfigError(f"--publish {publish} is unknown", nearest_name(publish, ("last", "best")))
        if publish == "best" and not validation:
            raise ConfigError("--publish best needs images to judge by", "Name held-out images with --validation")
        check_loggers(log or [])
        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        recipe = recipes.load(preset, overrides, train=flags)
        recipe = replace(recipe, train=with_schedule(recipe.train, bool(validation)))
        image_set = open_images(images)
        inputs: dict[str, Any] = {"images": image_set}
        held_out = open_images(validation) if validation else None
        if held_out is not None:
            inputs["validation"] = held_out
        if codebook is not None:
            inputs["codebook"] = codebook_input(codebook)
        if recipe.objective.perceptual != "none":
            file = backbone_file(recipe.objective.perceptual, recipe.objective.lpips_weights)
            inputs["lpips"] = hash_file(file)
        if source is not None:
            read_config(source / "config.json")  # first: it says what a folder is that is no tokenizer of ours
            inputs["from"] = artifacts.open_artifact(source, "tokenizer")
        sections = {name: to_table(getattr(recipe, name)) for name in SECTIONS}
        for section, keys in FREE_KEYS.items():
            for key in keys:
                del sections[section][key]
        draft = artifacts.start(out, "tokenizer", {**sections, "seed": seed, "publish": publish}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        given = Given(
            images=image_set,
            held_out=held_out,
            codebook=codebook,
            source=source,
            publish=publish,
            loggers=list(dict.fromkeys(log or [])),
            seed=seed,
        )
        with draft:
            return console.finished(run(recipe, draft, given, where))


def with_schedule(config: "TrainConfig", validates: bool) -> "TrainConfig":
    """Validation with each picture where held-out images were named and no schedule was; never without images."""
    from vqpipe.errors import ConfigError

    if config.validate_every and not validates:
        raise ConfigError(
            f"train.validate_every = {config.validate_every} needs held-out images", "Name them with --validation"
        )
    return replace(config, validate_every=config.validate_every or (config.look_every if validates else 0))


def run(recipe: "Recipe", draft: "Draft", given: Given, device: "torch.device") -> "Artifact":
    """Build the two networks, train them in `draft`, publish."""
    from stages.live import display
    from stages.watching import Pictures, Watcher
    from vqpipe import distributed
    from vqpipe.config import to_table
    from vqpipe.data.batches import TrainingStream
    from vqpipe.losses.objective import Objective
    from vqpipe.reports.training import latest
    from vqpipe.training import loop
    from vqpipe.training.state import checkpoints
    from vqpipe.training.throughput import throughput

    config = recipe.train
    model, discriminator = build(recipe, given, device)
    objective = Objective(recipe.objective, model.quantizer.loss_names).to(device)
    if config.matched_start and not checkpoints(draft.path):
        match_start(recipe, model, given, device)
    stream = TrainingStream(
        given.images,
        recipe.data,
        seed=given.seed,
        batch_size=config.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    facts: dict[str, Any] = {
        "quantizer": model.quantizer.config.kind,
        "codebook_size": model.quantizer.codebook_size,
        "num_groups": model.quantizer.num_groups,
        "downsample_factor": model.downsample_factor,
    }
    validation, best = held_out_images(recipe, draft, given, objective, device)
    pictures = Pictures(given.held_out or given.images, recipe.data.image_size, device)
    speed = throughput(config, model, discriminator, objective, recipe.data.image_size, device)
    with console.StopAtStepEnd() as signals, display(config.steps) as shown:
        watcher = Watcher(
            draft,
            settings={name: to_table(getattr(recipe, name)) for name in SECTIONS},
            tokenizer=facts,
            pictures=pictures,
            validation=validation,
            best=best,
            throughput=speed,
            loggers=given.loggers,
            display=shown,
        )
        try:
            state = loop.train(
                config,
                model,
                discriminator,
                objective,
                stream,
                draft.path,
                seed=given.seed,
                device=device,
                on_start=watcher.start,
                on_log=watcher.log,
                on_look=watcher.look,
                on_validate=watcher.validate,
                on_bad=watcher.bad,
                on_step=watcher.advance,
                stop_asked=signals.asked,
            )
        finally:
            watcher.close()
        if state.step < config.steps:
            signals.leave()
    step = state.step if best is None or best.step is None or given.publish == "last" else best.step
    facts |= {
        "images_seen": step * config.global_batch_size,
        "steps": state.step,
        "published_step": step,
    }
    if distributed.is_main():
        save(draft, state, recipe, best if step != state.step else None, facts)
    rows = watcher.history.rows
    measured = {
        "training_psnr": latest(rows, "psnr"),
        "training_utilization": latest(rows, "utilization"),
        "valid_psnr": latest([row for row in rows if row["step"] == step], "valid/psnr"),
    }
    return draft.publish(facts | {name: value for name, value in measured.items() if value is not None})


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


def match_start(recipe: "Recipe", model: "Autoencoder", given: Given, device: "torch.device") -> None:
    """The matched start, on the first images that the run will see; the same ones on every rank."""
    from vqpipe.data.batches import TrainingStream
    from vqpipe.data.transforms import to_float

    count = recipe.train.matched_start_images
    stream = TrainingStream(given.images, recipe.data, seed=given.seed, batch_size=count, rank=0, world_size=1)
    batch = next(iter(stream.from_sample(0)))
    model.match_start(to_float(batch.images.to(device)))


def held_out_images(
    recipe: "Recipe", draft: "Draft", given: Given, objective: "Objective", device: "torch.device"
) -> "tuple[Validation | None, Best | None]":
    """What measures the held-out images and keeps the best weights; nothing where there are no such images."""
    from vqpipe import distributed
    from vqpipe.training.validation import Best, Validation

    config = recipe.train
    if given.held_out is None:
        return None, None
    perceptual = objective.perceptual
    name = f"lpips_{recipe.objective.perceptual}"
    validation = Validation(
        given.held_out,
        image_size=recipe.data.image_size,
        batch_size=config.share(distributed.world_size()) // config.accumulate,
        limit=config.validation_images,
        perceptual={} if perceptual is None else {name: perceptual.lpips},
        num_workers=recipe.data.num_workers,
        device=device,
    )
    file = draft.path / "best.safetensors"
    if perceptual is None:
        return validation, Best(file, "valid/psnr", higher=True)
    return validation, Best(file, f"valid/{name}", higher=False)


def save(draft: "Draft", state: "TrainState", recipe: "Recipe", best: "Best | None", facts: dict[str, Any]) -> None:
    """Write the tokenizer's files into the draft: the last weights, or those that `best` kept."""
    from vqpipe.tokenizer import Tokenizer, load_weights, write_files
    from vqpipe.weights import load_tensors

    network = state.weight_ema.network
    if best is not None:
        load_weights(network, load_tensors(best.path), best.path)
    tokenizer = Tokenizer(network, image_size=recipe.data.image_size, device="cpu")
    critic = state.discriminator if recipe.objective.adversarial > 0 else None
    write_files(draft, tokenizer, critic, **{"images seen": f"{facts['images_seen']:,}"})
    draft.adopt("metrics.jsonl")
