"""`vqpipe tokenize`: images and a tokenizer -> tokens.

(Not `tokenize.py`: run by path, that would shadow the standard library's module of this name.)
"""

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import BatchSize, Device, Images, Out, Seed, TokenizerPath

if TYPE_CHECKING:
    from vqpipe.artifacts import Draft
    from vqpipe.data.shards import ImageSet
    from vqpipe.tokenizer import Tokenizer

IMAGES_PER_SHARD = 4096
"""Fixed, so that shards are the same bytes whatever the number of ranks and workers."""


def tokenize(
    images: Images,
    tokenizer: TokenizerPath,
    out: Out,
    image_size: console.ImageSize = None,
    flip: Annotated[bool, typer.Option("--flip", help="Store each image's mirror image too.")] = False,
    batch_size: BatchSize = 32,
    num_workers: console.NumWorkers = 0,
    max_skipped: console.MaxSkipped = 0.01,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Turn images into tokens, one Parquet row an image."""
    with console.session(device, seed) as where:
        from vqpipe import artifacts
        from vqpipe.data.shards import open_images
        from vqpipe.errors import DataError
        from vqpipe.tokenizer import Tokenizer

        image_set = open_images(images)
        opened = Tokenizer.from_pretrained(tokenizer, where)
        size = image_size or opened.image_size
        if size is None:
            raise DataError("this tokenizer does not say at which size it was trained", "Give --image-size")
        layout = opened.layout(size, size)
        config = {"image_size": size, "flip": flip, "max_skipped": max_skipped}
        inputs = {"images": image_set, "tokenizer": opened.source}
        draft = artifacts.start(out, "tokens", config, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            num_images, skipped = write_shards(
                draft, image_set, opened, size, flip, batch_size or 32, num_workers, max_skipped
            )
            facts = {
                "num_images": num_images,
                "num_tokens": layout.num_tokens,
                "codebook_size": opened.codebook_size,
                "image_size": size,
                "layout": layout.to_table(),
                "skipped": skipped,
            }
            return console.finished(draft.publish(facts))


def write_shards(
    draft: "Draft",
    image_set: "ImageSet",
    tokenizer: "Tokenizer",
    size: int,
    flip: bool,
    batch_size: int,
    num_workers: int,
    max_skipped: float,
) -> tuple[int, dict[str, int]]:
    """Write this rank's shards that are not written yet. Returns images and skipped ones, over all ranks."""
    from vqpipe import distributed
    from vqpipe.data.batches import OrderedBatches, check_skipped
    from vqpipe.data.tokens import Tokens, write_tokens

    num_tokens = tokenizer.layout(size, size).num_tokens
    shards = range(0, len(image_set), IMAGES_PER_SHARD)
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    total = sum(min(IMAGES_PER_SHARD, len(image_set) - shards[number]) for number in mine)
    records = []
    with console.progress("tokenize", total) as bar:
        for number in mine:
            name = f"tokens-{number:05d}.parquet"
            start = shards[number]
            stop = min(start + IMAGES_PER_SHARD, len(image_set))
            record = draft.record(name)
            if record is not None:
                bar.resume(bar.done + stop - start)
                records.append(record)
                continue
            parts = []
            batches = OrderedBatches(
                image_set,
                image_size=size,
                batch_size=batch_size,
                start=start,
                stop=stop,
                num_workers=num_workers,
            )
            for batch in batches:
                views = [batch.images, batch.images.flip(-1)] if flip else [batch.images]
                for mirrored, view in enumerate(views):
                    flags = batch.labels.new_full((len(view),), mirrored).bool()
                    parts.append(Tokens(batch.keys, batch.labels, tokenizer.encode(view).cpu(), flags))
                bar.advance(len(batch.images))
            record = {"images": sum(len(part.keys) for part in parts) // (1 + flip), "skipped": batches.skipped}
            with draft.write(name, **record) as path:
                write_tokens(path, parts, tokenizer.codebook_size, num_tokens, flips=flip)
            records.append(record)
    everything = [record for part in distributed.gather_objects(records) for record in part]
    skipped: Counter[str] = sum((Counter(record["skipped"]) for record in everything), Counter())
    check_skipped(dict(skipped), len(image_set), max_skipped)
    return sum(record["images"] for record in everything), dict(sorted(skipped.items()))
