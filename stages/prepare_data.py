"""`vqpipe prepare-data`: a copy of a data set -> tar shards with labels, counted and checked."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import Device, Out, Seed

if TYPE_CHECKING:
    from vqpipe.artifacts import Draft
    from vqpipe.data.shards import ImageSet

PIECE = 32
"""Images that one loader process works on at a time."""

ManifestName = Annotated[
    str,
    typer.Argument(
        help="imagenet-1k, ffhq, imagenette, folder, or a TOML file like those in data_manifests/.", metavar="MANIFEST"
    ),
]
Source = Annotated[Path, typer.Option("--source", help="The folder that holds your copy.", metavar="DIR")]


def prepare_data(
    manifest: ManifestName,
    source: Source,
    out: Out,
    split: Annotated[str | None, typer.Option("--split", help="Default: the manifest's first.", metavar="NAME")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            help="Store ADM centre crops of this side as JPEG (quality 95, 4:4:4) instead of the original files.",
            metavar="PIXELS",
            min=1,
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", help="Images per tar.", metavar="IMAGES", min=1)] = 1000,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept other counts than the manifest's.")
    ] = False,
    max_skipped: console.MaxSkipped = 0.01,
    num_workers: console.NumWorkers = 0,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Pack a data set into WebDataset tars: every image decoded once, counted, and checked against its manifest."""
    with console.session(device, seed):
        from vqpipe import artifacts
        from vqpipe.data.manifests import check_counts, load_manifest, open_split
        from vqpipe.errors import DataError

        described = load_manifest(manifest)
        name, chosen = described.split(split)
        images = open_split(described, chosen, source)
        if not len(images):
            raise DataError(f"{source} holds no images of {described.name}/{name}", "Check --source and --split")
        try:
            check_counts(described, name, chosen, images)
        except DataError as error:
            if not allow_partial:
                raise
            console.say(f"accepted as it is: {error.what}")
        console.say(f"{described.title}, {name}: {len(images):,} images. Licence: {described.licence}")
        config = {
            "manifest": described.name,
            "split": name,
            "image_size": image_size,
            "shard_size": shard_size,
            "max_skipped": max_skipped,
        }
        draft = artifacts.start(out, "dataset", config, {"source": images})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            num_images, skipped = write_shards(draft, images, shard_size, image_size, num_workers, max_skipped)
            facts = {"num_images": num_images, "num_classes": images.num_classes, "skipped": skipped}
            return console.finished(draft.publish(facts))


def write_shards(
    draft: "Draft",
    images: "ImageSet",
    shard_size: int,
    image_size: int | None,
    num_workers: int,
    max_skipped: float,
) -> tuple[int, dict[str, int]]:
    """Write this rank's shards that are not written yet; rank 0 adds the list. Images and skipped ones of all ranks."""
    from vqpipe import distributed
    from vqpipe.data.batches import check_skipped
    from vqpipe.data.tar_writing import tar_keys

    shards = [range(start, min(start + shard_size, len(images))) for start in range(0, len(images), shard_size)]
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    keys = tar_keys(images.key(i) for i in range(len(images)))
    with console.progress("prepare-data", sum(len(shards[number]) for number in mine)) as bar:
        for number in mine:
            if draft.record(shard_name(number)) is None:
                write_shard(draft, number, images, keys, shards[number], image_size, num_workers)
                bar.advance(len(shards[number]))
            else:
                bar.resume(bar.done + len(shards[number]))
    distributed.barrier()
    records = [draft.record(shard_name(number)) or {} for number in range(len(shards))]
    skipped: Counter[str] = sum((Counter(record["skipped"].values()) for record in records), Counter())
    check_skipped(skipped, len(images), max_skipped)
    if distributed.is_main():
        write_list(draft, images, keys, shards, [set(map(int, record["skipped"])) for record in records])
    return len(images) - skipped.total(), dict(sorted(skipped.items()))


def write_shard(
    draft: "Draft",
    number: int,
    images: "ImageSet",
    keys: list[str],
    shard: range,
    image_size: int | None,
    num_workers: int,
) -> None:
    """One tar of the images `shard`. The same bytes whoever writes it, and when."""
    from vqpipe.data.encoding import StoredImages
    from vqpipe.data.tar_writing import write_tar
    from vqpipe.data.workers import through_workers

    work = [list(range(first, min(first + PIECE, shard.stop))) for first in range(shard.start, shard.stop, PIECE)]
    skipped = dict[str, str]()  # position -> reason; filled while the tar is written, recorded after it
    with draft.write(shard_name(number), skipped=skipped) as path, write_tar(path) as tar:
        for stored in through_workers(StoredImages(images, image_size), work, num_workers):
            for image in stored:
                if image.reason:
                    skipped[str(image.index)] = image.reason
                    continue
                label = images.label(image.index)
                members = {"__key__": keys[image.index], image.extension: image.data}
                tar.write(members if label is None else {**members, "cls": label})


def write_list(
    draft: "Draft", images: "ImageSet", keys: list[str], shards: list[range], skipped: list[set[int]]
) -> None:
    """samples.parquet: one row an image, in order: key, label (null: none), shard, and its key in the source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"key": keys[i], "label": images.label(i), "shard": shard_name(number), "source": images.key(i)}
        for number, shard in enumerate(shards)
        for i in shard
        if i not in skipped[number]
    ]
    schema = pa.schema([("key", pa.string()), ("label", pa.int32()), ("shard", pa.string()), ("source", pa.string())])
    with draft.write("samples.parquet", rows=len(rows)) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"
