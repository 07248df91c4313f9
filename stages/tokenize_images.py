"""`vqpipe tokenize`: images and a tokenizer -> tokens.

(Not `tokenize.py`: run by path, that would shadow the standard library's module of this name.)
"""

from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import BatchSize, Device, Images, Out, Seed, TokenizerPath

if TYPE_CHECKING:
    from vqpipe.artifacts import Draft
    from vqpipe.data.images import ImageSet
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
    precision: console.Precision = None,
    num_workers: console.NumWorkers = -1,
    max_skipped: console.MaxSkipped = 0.01,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Turn images into tokens, one Parquet row an image."""
    with console.session(device, seed) as where:
        from vqpipe import artifacts
        from vqpipe.data.images import open_images
        from vqpipe.errors import ConfigError, DataError
        from vqpipe.tokenizer import Tokenizer

        image_set = open_images(images)
        opened = Tokenizer.from_pretrained(tokenizer, where)
        size = image_size or opened.image_size
        if size is None:
            raise DataError("this tokenizer does not say at which size it was trained", "Give --image-size")
        layout = opened.layout(size, size)
        if precision not in (None, "fp32", "bf16"):
            raise ConfigError(f"--precision {precision} is not a choice", "Use fp32 or bf16")
        precision = precision or "fp32"  # bf16 changes some ids in a hundred, so it is only ever asked for
        config = {"image_size": size, "flip": flip, "precision": precision, "max_skipped": max_skipped}
        inputs = {"images": image_set, "tokenizer": opened.source}
        draft = artifacts.start(out, "tokens", config, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            num_images, skipped = write_tokens(
                draft,
                image_set,
                opened,
                size,
                flip=flip,
                precision=precision,
                batch_size=batch_size or 32,
                num_workers=num_workers,
                max_skipped=max_skipped,
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


def write_tokens(
    draft: "Draft",
    image_set: "ImageSet",
    tokenizer: "Tokenizer",
    size: int,
    *,
    flip: bool,
    precision: str,
    batch_size: int,
    num_workers: int,
    max_skipped: float,
) -> tuple[int, dict[str, int]]:
    """Write this rank's shards that are not written yet. Returns images and skipped ones, over all ranks."""
    import torch

    from vqpipe.data import tokens
    from vqpipe.data.encode import EncodedShard, Stopwatch, share, write_shards

    def name(number: int) -> str:
        return f"tokens-{number:05d}.parquet"

    def write(number: int, shard: EncodedShard) -> None:
        with draft.write(name(number), images=len(shard.keys), skipped=dict(shard.skipped)) as path:
            tokens.write_tokens(path, shard.keys, shard.labels, shard.rows)

    if precision == "bf16" and tokenizer.device.type == "cuda":
        tokenizer.autoencoder.to(memory_format=torch.channels_last)
    encoder = tokens.token_encoder(
        tokenizer.encode,
        tokenizer.device,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.layout(size, size).num_tokens,
        flips=flip,
        precision=precision,
    )
    stopwatch = Stopwatch()
    with console.progress("tokenize", share(len(image_set), IMAGES_PER_SHARD)) as bar:
        records, skipped = write_shards(
            draft,
            image_set,
            encoder,
            write,
            name=name,
            shard_size=IMAGES_PER_SHARD,
            stop=len(image_set),
            max_skipped=max_skipped,
            stopwatch=stopwatch,
            progress=bar,
            image_size=size,
            batch_size=batch_size,
            num_workers=num_workers,
        )
    console.timing(stopwatch)
    return sum(record["images"] for record in records), skipped
