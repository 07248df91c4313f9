"""`vqpipe plan`: what a run will need, before it begins."""

from typing import Annotated, Literal

import typer

from stages.options import Preset, Set
from vqpipe.errors import ConfigError
from vqpipe.gpus import GPUS

Stage = Literal["train", "train-generator", "kmeans", "extract-features", "tokenize", "presets"]
DEVICES = (*(gpu.name for gpu in GPUS if gpu.memory), "cpu")
DEFAULT_DEVICE = "h100"
RUNS: tuple[Stage, ...] = ("train", "train-generator", "kmeans", "extract-features", "tokenize")
READ_BY: dict[str, tuple[Stage, ...]] = {
    "--preset": RUNS,
    "--set": RUNS,
    "--gpu": RUNS,
    "--gpus": RUNS,
    "--tokenizer": ("train-generator",),
    "--num-images": ("kmeans", "extract-features", "tokenize"),
    "--batch-size": ("tokenize",),
}
"""Option -> the stages that read it. Given with another one it is an error."""


def plan(
    stage: Annotated[
        Stage,
        typer.Argument(help="The command to plan; presets: all presets, as a table in Markdown.", metavar="STAGE"),
    ],
    preset: Preset = None,
    overrides: Set = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help=f"The device; cpu: this machine's, measured for a moment; default: {DEFAULT_DEVICE}.",
            metavar="|".join(DEVICES),
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Number of devices; default: 1.", metavar="N", min=1)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="train-generator: preset of the tokenizer; default: vqgan-lc-f16-100k.",
            metavar="NAME|FILE.toml",
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            help="tokenize, extract-features, kmeans: number of images; default: ImageNet's 1,281,167.",
            metavar="N",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", help="tokenize: images per batch of a device; default: 32.", metavar="IMAGES", min=1
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, in GiB.")] = False,
) -> None:
    """Estimate memory, time and disk of a run.

    No GPU is needed. The step of the run is executed on PyTorch's fake tensors: they have shapes
    but no data, so nothing is allocated or computed. That gives the memory by
    part and the FLOPs; the time follows from the peak arithmetic and bandwidth
    of the device, at stated shares of them. docs/planning.md says how.

    Nothing is read but the preset. --plan of a command, such as
    vqpipe train ... --plan, is for its inputs and for the device it would use.
    """
    from stages import estimates, recipe
    from vqpipe.planning import estimate
    from vqpipe.planning.devices import device_named

    given = {"--preset": preset, "--set": overrides, "--gpu": gpu, "--gpus": gpus, "--tokenizer": tokenizer}
    given |= {"--num-images": num_images, "--batch-size": batch_size}
    for option, stages in READ_BY.items():
        if given[option] is not None and stage not in stages:
            raise ConfigError(f"plan {stage} does not read {option}", f"Omit it: it is for {', '.join(stages)}")
    if stage == "presets":
        estimates.show_presets(as_json=as_json)
        return
    device, gpus, images = device_named(gpu or DEFAULT_DEVICE), gpus or 1, num_images or estimate.IMAGENET
    if stage == "train":
        result = estimate.tokenizer_training(recipe.load_tokenizer(preset, overrides)).plan(device, gpus)
    elif stage == "train-generator":
        tokens = recipe.load_tokenizer(tokenizer or recipe.PAPER)
        generator = recipe.load_generator(preset, overrides)
        training = estimate.generator_training(generator, tokens.model, tokens.data.image_size)
        result = training.plan(device, gpus)
    elif stage == "tokenize":
        trained = recipe.load_tokenizer(preset, overrides)
        size = (trained.data.image_size, trained.data.image_size)
        result = estimate.plan_tokenize(trained.model, size, batch_size or 32, device, gpus, images=images)
    elif stage == "extract-features":
        features = recipe.load(preset, overrides, reads=["features"]).features
        result = estimate.plan_features(features, device, gpus, images=images)
    else:
        settings = recipe.load(preset, overrides, reads=["features", "kmeans"])
        dim, per_image = estimate.features_of(settings.features)
        vectors = min(images, settings.features.limit or images) * per_image
        result = estimate.plan_kmeans(settings.kmeans, vectors, dim, device, gpus)
    estimates.show(result, as_json=as_json)
