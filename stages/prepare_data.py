"""`vqpipe prepare-data`: a copy of a data set -> tar shards with labels, counted and checked."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import Device, Out, Seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vqpipe.artifacts import Draft
    from vqpipe.data.images import ImageSet
    from vqpipe.data.manifests import DatasetManifest, Split
    from vqpipe.data.prepare import Stored

PIECE = 32
"""Images that one loader process works on at a time."""

ManifestName = Annotated[
    str,
    typer.Argument(
        help="A name of data_manifests/ (imagenet-1k, ffhq, kodak, uhdbench, folder, ...), or a TOML file like those.",
        metavar="MANIFEST",
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
        bool, typer.Option("--allow-partial", help="Accept other counts or names than the manifest's.")
    ] = False,
    verify_archives: Annotated[
        bool, typer.Option("--verify-archives", help="Hash the manifest's archives that lie in --source, too.")
    ] = False,
    max_skipped: console.MaxSkipped = 0.01,
    num_workers: console.NumWorkers = 0,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Pack a data set into WebDataset tars: every image decoded once, counted, and checked against its manifest.

    The manifest says how to get the data set, how a copy lies on disk, and what a whole copy holds. Images smaller than
    it asks for are left out, and counted as excluded.
    """
    with console.session(device, seed):
        from vqpipe import artifacts
        from vqpipe.data.manifests import check_archives, load_manifest, open_split
        from vqpipe.errors import DataError

        described = load_manifest(manifest)
        name, chosen = described.split(split)
        images = open_split(described, chosen, source)
        if not len(images):
            raise DataError(f"{source} holds no images of {described.name}/{name}", "Check --source and --split")
        judge(described, name, chosen, images, allow_partial)
        if verify_archives:
            console.say(f"archives as published: {', '.join(check_archives(described, source)) or 'none found'}")
        console.say(f"{described.title}, {name}: {len(images):,} images. Licence: {described.licence}")
        config = {
            "manifest": described.name,
            "split": name,
            "image_size": image_size,
            "min_size": chosen.min_size,
            "shard_size": shard_size,
            "max_skipped": max_skipped,
        }
        draft = artifacts.start(out, "dataset", config, {"source": images})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            facts = write_shards(draft, images, shard_size, image_size, chosen.min_size, num_workers, max_skipped)
            if not facts["num_images"]:
                raise DataError(f"no image of {described.name}/{name} is left", "Look at its min_size and its files")
            if chosen.num_kept not in (None, facts["num_images"]) and not allow_partial:
                raise DataError(
                    f"{described.name}/{name} should keep {chosen.num_kept:,} images, {facts['num_images']:,} are left",
                    "Take it as it is with --allow-partial",
                )
            return console.finished(draft.publish(facts))


def judge(described: "DatasetManifest", name: str, chosen: "Split", images: "ImageSet", allow_partial: bool) -> None:
    """Raise a DataError where the copy is not whole, or say so where that is allowed."""
    from vqpipe.data.manifests import check_counts
    from vqpipe.errors import DataError

    try:
        check_counts(described, name, chosen, images)
    except DataError as error:
        if not allow_partial:
            raise
        console.say(f"accepted as it is: {error.what}")


def write_shards(
    draft: "Draft",
    images: "ImageSet",
    shard_size: int,
    image_size: int | None,
    min_size: tuple[int, int] | None,
    num_workers: int,
    max_skipped: float,
) -> dict[str, Any]:
    """Write this rank's shards that are not written yet; rank 0 adds the list. The artifact's facts, over all ranks.

    The loader processes start once, for all shards.
    """
    from vqpipe import distributed
    from vqpipe.data.batches import check_skipped, through_workers, worth_starting
    from vqpipe.data.prepare import StoredImages
    from vqpipe.data.tars import tar_keys

    shards = [range(start, min(start + shard_size, len(images))) for start in range(0, len(images), shard_size)]
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    missing = [number for number in mine if draft.record(shard_name(number)) is None]
    work = [piece for number in missing for piece in pieces(shards[number])]
    keys = tar_keys(images.key(i) for i in range(len(images)))
    workers = worth_starting(num_workers, len(work), 1)  # encoded images come through a pipe, not through shared memory
    loaded = through_workers(StoredImages(images, image_size, min_size), work, workers)
    with console.progress("prepare-data", sum(len(shards[number]) for number in mine)) as bar:
        bar.resume(sum(len(shards[number]) for number in set(mine) - set(missing)))
        for number in missing:
            write_shard(draft, number, images, keys, islice(loaded, len(pieces(shards[number]))), bar)
    distributed.barrier()
    records = [draft.record(shard_name(number)) or {} for number in range(len(shards))]
    left_out = {
        kind: sum((Counter(record[kind].values()) for record in records), Counter[str]())
        for kind in ("skipped", "excluded")
    }
    check_skipped(left_out["skipped"], len(images), max_skipped)
    gone = [{int(i) for kind in left_out for i in record[kind]} for record in records]
    if distributed.is_main():
        write_list(draft, images, keys, shards, gone)
    facts: dict[str, Any] = {"num_images": len(images) - sum(map(len, gone)), "num_classes": images.num_classes}
    facts |= {kind: dict(sorted(counts.items())) for kind, counts in left_out.items() if counts or kind == "skipped"}
    return facts


def pieces(shard: range) -> list[range]:
    """The positions of a shard, a few at a time."""
    return [range(first, min(first + PIECE, shard.stop)) for first in shard[::PIECE]]


def write_shard(
    draft: "Draft",
    number: int,
    images: "ImageSet",
    keys: list[str],
    loaded: "Iterator[list[Stored]]",
    bar: console.Bar,
) -> None:
    """One tar of the images that come. The same bytes whoever writes it, and when."""
    from vqpipe.data.tars import write_tar

    skipped, excluded = dict[str, str](), dict[str, str]()  # position -> reason; filled first, recorded after the tar
    with draft.write(shard_name(number), skipped=skipped, excluded=excluded) as path, write_tar(path) as tar:
        for stored in loaded:
            for image in stored:
                if image.reason:
                    (excluded if image.excluded else skipped)[str(image.index)] = image.reason
                    continue
                label = images.label(image.index)
                members = {"__key__": keys[image.index], image.extension: image.data}
                tar.write(members if label is None else {**members, "cls": label})
            bar.advance(len(stored))


def write_list(draft: "Draft", images: "ImageSet", keys: list[str], shards: list[range], gone: list[set[int]]) -> None:
    """samples.parquet: one row an image, in order: key, label (null: none), shard, and its key in the source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"key": keys[i], "label": images.label(i), "shard": shard_name(number), "source": images.key(i)}
        for number, shard in enumerate(shards)
        for i in shard
        if i not in gone[number]
    ]
    schema = pa.schema([("key", pa.string()), ("label", pa.int32()), ("shard", pa.string()), ("source", pa.string())])
    with draft.write("samples.parquet", rows=len(rows)) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"
