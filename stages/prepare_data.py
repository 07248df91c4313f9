"""`vqpipe prepare-data`: a copy of a data set -> tar shards with labels, counted and checked."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console, options
from stages.options import Out, UnusedDevice, UnusedSeed
from vqpipe.errors import ConfigError
from vqpipe.words import counted

ManifestName = Annotated[
    str,
    typer.Argument(
        help="The name of one of data_manifests/ (imagenet-1k, ffhq, kodak, folder, ...), or a TOML file.",
        metavar="MANIFEST",
    ),
]
SourceFolder = Annotated[
    str,
    typer.Option(
        "--source",
        help="Folder with your copy of the data set; for the manifest `folder`, anything that --images takes.",
        metavar="DIR",
    ),
]


def prepare_data(
    manifest: ManifestName,
    source: SourceFolder,
    out: Out,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Split of the data set; default: the manifest's first.", metavar="NAME"),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            help="Store ADM center crops of this side as JPEG (quality 95, 4:4:4) instead of the original files.",
            metavar="PIXELS",
            min=1,
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", help="Images per tar.", metavar="IMAGES", min=1)] = 1000,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept counts and names other than the manifest's.")
    ] = False,
    verify_archives: Annotated[
        bool, typer.Option("--verify-archives", help="Check the MD5 of the manifest's archives in --source.")
    ] = False,
    limit: options.Limit = None,
    key_prefix: options.KeyPrefixOption = None,
    num_workers: options.NumWorkers = -1,
    max_skipped: options.MaxSkipped = 0.01,
    color: options.ColorOption = "ignore",
    device: UnusedDevice = "cpu",
    seed: UnusedSeed = 0,
) -> None:
    """Pack a data set into WebDataset tars.

    The manifest describes how to get the data set, its layout on disk and its
    contents. Every image is decoded once, counted, and checked against it.
    Images below the manifest's smallest size are excluded, and counted.
    --limit packs the first images of a copy that is checked as a whole.
    """
    with console.ProgressBar() as progress, console.session("cpu", seed):
        from vqpipe import artifacts
        from vqpipe.data.images import ImageSet, first_images
        from vqpipe.data.manifests import check_archives, check_copy, check_kept, load_manifest, open_split
        from vqpipe.data.prepare import pack_images

        if color != "ignore" and image_size is None:
            raise ConfigError(f"--color {color} has no effect on files that are stored as they are", "Add --image-size")
        described = load_manifest(manifest)
        name, chosen = described.split(split)
        images = ImageSet(open_split(described, chosen, source).sources, key_prefix, color)
        console.remark(images)
        check_copy(described, name, images, allow_partial, progress)
        if verify_archives:
            console.say(
                f"archives with the published MD5: {', '.join(check_archives(described, Path(source))) or 'none'}"
            )
        images = first_images(images, limit)
        console.say(f"{described.title}, {name}: {counted(len(images), 'images')}. Licence: {described.licence}")
        config = {
            "manifest": described.name,
            "split": name,
            "image_size": image_size,
            "min_size": chosen.min_size,
            "shard_size": shard_size,
            "max_skipped": max_skipped,
        }
        config |= {} if key_prefix is None else {"key_prefix": key_prefix}
        draft = artifacts.start(out, "dataset", config, {"source": images})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            facts = pack_images(
                draft,
                images,
                shard_size=shard_size,
                image_size=image_size,
                min_size=chosen.min_size,
                num_workers=num_workers,
                max_skipped=max_skipped,
                progress=progress,
            )
            check_kept(described, name, facts["num_images"], allow_partial or limit is not None)
            return console.finished(draft.publish(facts))
