"""`vqpipe tokenize`: images and a tokenizer -> tokens.

(Not `tokenize.py`: run by path, it would shadow the standard library's module of this name.)
"""

from typing import Annotated, Any, Literal

import typer

from stages import console, options
from stages.options import BatchSize, Device, Images, Limit, Out, Seed, TokenizerPath
from vqpipe.errors import DataError
from vqpipe.image_size import fixed_size


def tokenize(
    images: Images,
    tokenizer: TokenizerPath,
    out: Out,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            help="Side of the center crop; WIDTHxHEIGHT: resized until both sides are covered, then the center; "
            "native: each image at its own size, see above.",
            metavar="PIXELS",
            callback=options.known_size,
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Store the tokens of each image's horizontal flip too.")] = False,
    crops: Annotated[
        Literal["center", "ten"],
        typer.Option("--crops", help="Store the center crop of each image, or ten crops (flips included); see above."),
    ] = "center",
    limit: Limit = None,
    batch_size: BatchSize = 32,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels", help="With --image-size native: leave larger images out.", metavar="PIXELS", min=1
        ),
    ] = None,
    precision: options.Precision = "fp32",
    key_prefix: options.KeyPrefixOption = None,
    num_workers: options.NumWorkers = -1,
    max_skipped: options.MaxSkipped = 0.01,
    color: options.ColorOption = "ignore",
    plan: options.Plan = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Encode images as tokens.

    The tokens are Parquet files with one row per image or view.

    For data augmentation of a generator's training, store several views of
    each image: train-generator draws one of them in each epoch, at random.
    --flip stores two rows per image, the center crop and its horizontal flip.
    --crops ten stores ten, as LlamaGen does: torchvision's TenCrop (center, four
    corners, and the same of the horizontal flip) of a center crop 1.1 times as
    wide as --image-size. Validation uses the center, not flipped.

    --image-size native keeps the size of each image: only the center is cropped
    to multiples of the tokenizer's downsample factor, and smaller images are left
    out. Each size has files of its own, tokens-WIDTHxHEIGHT-*.parquet. A batch
    has --batch-size images of up to 256x256 pixels, fewer of larger ones, and at
    least one image, the largest first: --max-pixels leaves out those for which
    memory does not suffice. Images that are left out for their size are listed,
    and do not count for --max-skipped. Generators are trained on images of one
    size.
    """
    options.check_images(images)  # before PyTorch is loaded
    options.check_artifacts(tokenizer)
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from stages import estimates
        from vqpipe import distributed
        from vqpipe.data.tokens import TokensConfig, views_per_image
        from vqpipe.planning.devices import device_of
        from vqpipe.planning.estimate import plan_tokenize
        from vqpipe.tokenizer import Tokenizer

        # The default is fp32 on every device: bf16 changes a few percent of the ids.
        settings: dict[str, Any] = {"image_size": image_size, "flip": flip, "crops": crops, "precision": precision}
        settings |= {"max_pixels": max_pixels, "max_skipped": max_skipped}
        config = TokensConfig(**settings)  # what excludes each other is refused before anything is opened
        if plan and config.native:
            raise DataError("--plan estimates images of one size", "Give --image-size a number")
        opened = Tokenizer.from_pretrained(tokenizer, torch_device)
        config = config.sized_by(opened)
        image_set = console.open_images(images, key_prefix, color, limit)
        if plan:
            return estimates.show(
                plan_tokenize(
                    opened.autoencoder.config,
                    fixed_size(str(config.image_size)),
                    batch_size,
                    device_of(torch_device),
                    distributed.world_size(),
                    precision=precision,
                    images=views_per_image(config.request()) * len(image_set),
                )
            )
        again = out.is_dir()
        artifact = opened.write_tokens(
            image_set, out, **settings, batch_size=batch_size, num_workers=num_workers, progress=progress
        )
        return console.finished(artifact, again=again)
