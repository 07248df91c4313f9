"""`vqpipe train`: images (and a codebook) -> tokenizer."""

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
    from vqpipe.models import Autoencoder
    from vqpipe.training.history import Row
    from vqpipe.training.state import TrainState

SECTIONS = ("model", "data", "objective", "discriminator", "train")
"""What of a preset this stage reads."""
FREE_KEYS = {
    "train": ("log_every", "save_every", "look_every"),
    "data": ("num_workers", "worker_timeout"),
    "objective": ("lpips_weights",),
}
"""Settings that do not change what comes out (the weights of LPIPS count by content, as an input): a run may be resumed
with other values of these."""
LOOK_AT = 8
"""Images in a reconstruction grid."""


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
        Path | None, typer.Option("--from", help="Fine-tune this tokenizer.", metavar="TOKENIZER")
    ] = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Train a tokenizer. Run the same command again to resume it."""
    with console.session(device, seed) as where:
        from stages import recipe as recipes
        from vqpipe import artifacts
        from vqpipe.codebooks.kmeans import codebook_input
        from vqpipe.config import to_table
        from vqpipe.data.shards import open_images
        from vqpipe.errors import ConfigError
        from vqpipe.files import hash_file
        from vqpipe.losses.perceptual import backbone_file
        from vqpipe.tokenizer import read_config

        if preset is None:
            raise ConfigError("no preset was named", "Choose one from `vqpipe presets`, such as --preset small")
        flags = {"steps": steps, "global_batch_size": global_batch_size, "precision": precision}
        recipe = recipes.load(preset, overrides, train=flags)
        image_set = open_images(images)
        inputs: dict[str, Any] = {"images": image_set}
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
        draft = artifacts.start(out, "tokenizer", {**sections, "seed": seed}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            return console.finished(run(recipe, draft, image_set, codebook, source, seed, where))


def run(
    recipe: "Recipe",
    draft: "Draft",
    image_set: "ImageSet",
    codebook: Path | None,
    source: Path | None,
    seed: int,
    device: "torch.device",
) -> "Artifact":
    """Build the two networks, train them in `draft`, publish."""
    from vqpipe import distributed
    from vqpipe.data.batches import TrainingStream
    from vqpipe.losses.objective import Objective
    from vqpipe.training import loop
    from vqpipe.training.history import History, read_history

    config = recipe.train
    model, discriminator = build(recipe, codebook, source, device)
    objective = Objective(recipe.objective, model.quantizer.loss_names).to(device)
    if config.matched_start and not (draft.path / "checkpoints").exists():
        match_start(recipe, model, image_set, seed, device)
    stream = TrainingStream(
        image_set,
        recipe.data,
        seed=seed,
        batch_size=config.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    looker = Looker(draft, image_set, recipe.data.image_size, device)
    log = draft.path / "metrics.jsonl"
    with console.StopAtStepEnd() as signals, console.progress("train", config.steps, "steps") as bar:
        history: History

        def on_start(state: "TrainState") -> None:
            nonlocal history
            history = History(log, state.step)
            bar.resume(state.step)
            if state.step:
                console.say(f"resuming at step {state.step:,}")

        def on_log(row: "Row") -> None:
            history.append(row)
            bar.note(headline(row))

        state = loop.train(
            config,
            model,
            discriminator,
            objective,
            stream,
            draft.path,
            seed=seed,
            device=device,
            on_start=on_start,
            on_log=on_log,
            on_look=looker.look,
            on_step=lambda state: bar.advance(),
            stop_asked=signals.asked,
        )
        if state.step < config.steps:
            signals.leave()
    if distributed.is_main():
        save(draft, state, recipe)
    rows = read_history(log)
    quantizer = model.quantizer
    return draft.publish(
        {
            "quantizer": quantizer.config.kind,
            "codebook_size": quantizer.codebook_size,
            "num_groups": quantizer.num_groups,
            "downsample_factor": model.downsample_factor,
            "images_seen": state.images_seen,
            "steps": state.step,
            "training_psnr": rows[-1]["psnr"],
            "training_utilization": rows[-1]["utilization"],
        }
    )


def build(
    recipe: "Recipe", codebook: Path | None, source: Path | None, device: "torch.device"
) -> "tuple[Autoencoder, torch.nn.Module]":
    """The two networks, fresh or from the tokenizer to fine-tune, with the codebook in place."""
    import torch

    from vqpipe.codebooks.kmeans import load_codebook
    from vqpipe.config import difference, to_table
    from vqpipe.errors import ConfigError, WeightsError
    from vqpipe.models import PatchDiscriminator, build_autoencoder
    from vqpipe.tokenizer import Tokenizer, load_weights
    from vqpipe.weights import load_tensors

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
    if codebook is not None:
        model.quantizer.load_codebook(load_codebook(codebook))
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
        discriminator.to(memory_format=torch.channels_last)
    return model.to(device), discriminator.to(device)


def match_start(
    recipe: "Recipe", model: "Autoencoder", image_set: "ImageSet", seed: int, device: "torch.device"
) -> None:
    """The matched start, on the first images that the run will see; the same ones on every rank."""
    from vqpipe.data.batches import TrainingStream
    from vqpipe.data.transforms import to_float

    count = recipe.train.matched_start_images
    stream = TrainingStream(image_set, recipe.data, seed=seed, batch_size=count, rank=0, world_size=1)
    batch = next(iter(stream.from_sample(0)))
    model.match_start(to_float(batch.images.to(device)))


class Looker:
    """Writes a grid of originals and reconstructions of the same few images, now and then."""

    def __init__(self, draft: "Draft", image_set: "ImageSet", image_size: int, device: "torch.device") -> None:
        import torch

        from vqpipe.data.batches import OrderedBatches

        self.draft, self.device = draft, device
        stride = max(1, len(image_set) // LOOK_AT)
        chosen = range(0, len(image_set), stride)[:LOOK_AT]
        parts = [
            batch.images
            for start in chosen
            for batch in OrderedBatches(image_set, image_size=image_size, batch_size=1, start=start, stop=start + 1)
        ]
        self.originals = torch.cat(parts) if parts else None

    def look(self, step: int, model: "Autoencoder") -> None:
        """One picture, `pictures/step-*.png`."""
        import torch

        from vqpipe import distributed
        from vqpipe.data.transforms import to_float, to_uint8
        from vqpipe.reports.pictures import reconstruction_grid

        if self.originals is None or not distributed.is_main():
            return
        model.eval()
        with torch.no_grad():
            again = model(to_float(self.originals.to(self.device))).images
        with self.draft.write(f"pictures/step-{step:08d}.png") as path:
            path.write_bytes(reconstruction_grid(self.originals, to_uint8(again).cpu(), columns=len(self.originals)))


def save(draft: "Draft", state: "TrainState", recipe: "Recipe") -> None:
    """Write the tokenizer's files into the draft."""
    from vqpipe.tokenizer import Tokenizer, write_files

    tokenizer = Tokenizer(state.weight_ema.network, image_size=recipe.data.image_size, device="cpu")
    critic = state.discriminator if recipe.objective.adversarial > 0 else None
    write_files(draft, tokenizer, critic, **{"images seen": f"{state.images_seen:,}"})
    draft.adopt("metrics.jsonl")


def headline(row: "Row") -> str:
    """The few numbers of a log row that fit beside the bar."""
    return f"psnr {row['psnr']:.2f} dB, codes in use {row['utilization']:.1%}, {row['images_per_second']:.3g} images/s"
