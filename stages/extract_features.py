"""`vqpipe extract-features`: images -> features."""

from typing import Annotated

import typer

from stages import console, options
from stages.options import Device, Images, Limit, OptionalBatchSize, Out, Preset, Seed, Set


def extract_features(
    images: Images,
    out: Out,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            help="Network that encodes the patches; default: the preset's, else patch-pca.",
            metavar="patch-pca|open_clip:NAME/TAG|timm:NAME",
        ),
    ] = None,
    pool: Annotated[
        int | None,
        typer.Option(
            "--pool",
            help="Average the features to N x N per image (adaptive average pooling); N is at most the encoder's grid.",
            metavar="N",
            min=1,
        ),
    ] = None,
    download: options.Download = False,
    batch_size: OptionalBatchSize = None,
    limit: Limit = None,
    precision: options.TrainPrecision = None,
    key_prefix: options.KeyPrefixOption = None,
    num_workers: options.NumWorkers = -1,
    max_skipped: options.MaxSkipped = 0.01,
    plan: options.Plan = False,
    preset: Preset = None,
    overrides: Set = None,
    color: options.ColorOption = "ignore",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Encode image patches as features.

    `vqpipe kmeans` clusters them into a codebook.
    """
    options.check_images(images)  # before PyTorch is loaded
    with console.session(device, seed) as torch_device:
        from stages import estimates, recipe
        from vqpipe import artifacts, distributed
        from vqpipe.codebooks import features
        from vqpipe.config import to_request
        from vqpipe.device import for_inference
        from vqpipe.files import hash_file
        from vqpipe.planning.devices import device_of
        from vqpipe.planning.estimate import plan_features

        flags = {"encoder": encoder, "pool": pool, "batch_size": batch_size, "limit": limit, "precision": precision}
        settings = recipe.load(preset, overrides, reads=["features"], features=flags)
        config = settings.features
        if preset is not None:
            console.remark_size("these are features", config.chosen_size, preset, settings.data.image_size)
        if plan:
            count, ranks = len(console.open_images(images, key_prefix, color)), distributed.world_size()
            return estimates.show(plan_features(config, device_of(torch_device), ranks, images=count))
        with console.ProgressBar() as progress:
            weights = features.encoder_weights(config, download=download, progress=progress)
        opened = features.open_encoder(config, weights)  # before the images: it checks --pool
        opened = for_inference(opened, torch_device)
        image_set = console.open_images(images, key_prefix, color)
        inputs: dict[str, artifacts.Input | str] = {"images": image_set}
        if weights is not None:
            inputs["weights"] = hash_file(weights)
        request = {**to_request(config), "max_skipped": max_skipped, "seed": seed}
        request |= {} if key_prefix is None else {"key_prefix": key_prefix}
        draft = artifacts.start(out, "features", request, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft, console.ProgressBar() as progress:
            features.fit_encoder(
                opened, draft, image_set, config, seed=seed, num_workers=num_workers, progress=progress
            )
            facts = features.write_features(
                draft, image_set, opened, config, num_workers=num_workers, max_skipped=max_skipped, progress=progress
            )
            artifact = draft.publish(facts)
        return console.finished(artifact)
