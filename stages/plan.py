"""`vqpipe plan`: what a run will need, before it begins."""

from typing import Annotated, Literal

import typer

from stages.options import Preset, Set
from vqpipe.gpus import GPUS

Stage = Literal["train", "train-generator", "kmeans", "extract-features", "tokenize", "presets"]
DEVICES = (*(gpu.name for gpu in GPUS if gpu.memory), "cpu")


def plan(
    stage: Annotated[
        Stage,
        typer.Argument(help="The command to plan; presets: all presets, as a table in Markdown.", metavar="STAGE"),
    ],
    preset: Preset = None,
    overrides: Set = None,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu", help="The device; cpu: this machine's, measured for a moment.", metavar="|".join(DEVICES)
        ),
    ] = "h100",
    gpus: Annotated[int, typer.Option("--gpus", help="Number of devices.", metavar="N", min=1)] = 1,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer", help="Preset of the tokenizer that a generator is trained with.", metavar="NAME|FILE.toml"
        ),
    ] = "vqgan-lc-f16-100k",
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images", help="Images to encode or to cluster; default: ImageNet's 1,281,167.", metavar="N", min=1
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="tokenize: images per batch of a device.", metavar="IMAGES", min=1)
    ] = 32,
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

    if stage == "presets":
        estimates.show_presets(as_json=as_json)
        return
    device, images = device_named(gpu), num_images or estimate.IMAGENET
    if stage == "train":
        result = estimate.tokenizer_training(recipe.load_tokenizer(preset, overrides)).plan(device, gpus)
    elif stage == "train-generator":
        tokens = recipe.load_tokenizer(tokenizer)
        generator = recipe.load_generator(preset, overrides)
        training = estimate.generator_training(generator, tokens.model, tokens.data.image_size)
        result = training.plan(device, gpus)
    elif stage == "tokenize":
        trained = recipe.load_tokenizer(preset, overrides)
        size = (trained.data.image_size, trained.data.image_size)
        result = estimate.plan_tokenize(trained.model, size, batch_size, device, gpus, images=images)
    elif stage == "extract-features":
        features = recipe.load(preset, overrides).features
        result = estimate.plan_features(features, device, gpus, images=images)
    else:
        settings = recipe.load(preset, overrides)
        dim, per_image = estimate.features_of(settings.features)
        vectors = min(images, settings.features.limit or images) * per_image
        result = estimate.plan_kmeans(settings.kmeans, vectors, dim, device, gpus)
    estimates.show(result, as_json=as_json)
