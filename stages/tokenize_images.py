"""`vqpipe tokenize`: images and a tokenizer -> tokens.

(Not `tokenize.py`: run by path, it would shadow the standard library's module of this name.)
"""

from typing import Annotated, Any, Literal

import typer

from stages import console
from stages.console import BatchSize, Device, Images, Limit, Out, Seed, TokenizerPath
from vqpipe.errors import DataError


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
    precision: console.Precision = "fp32",
    key_prefix: console.KeyPrefixOption = None,
    num_workers: console.NumWorkers = -1,
    max_skipped: console.MaxSkipped = 0.01,
    color: console.ColorOption = "ignore",
    plan: console.Plan = False,
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
    memory does not suffice. Generators are trained on images of one size.
    """
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from stages import estimates
        from vqpipe import artifacts, distributed
        from vqpipe.data.tokens import check_crops, check_max_pixels, views_per_image, write_tokens
        from vqpipe.data.transforms import fixed_size
        from vqpipe.planning.devices import device_of
        from vqpipe.planning.estimate import plan_tokenize
        from vqpipe.tokenizer import Tokenizer

        native = image_size == "native"
        asked = None if image_size is None or native else fixed_size(image_size)
        check_crops(crops, flip, image_size)
        check_max_pixels(max_pixels, image_size)
        image_set = console.open_images(images, key_prefix, color, limit)
        opened = Tokenizer.from_pretrained(tokenizer, torch_device)
        size: int | str = "native"
        if not native:
            if asked is None and opened.image_size is None:
                what = "this tokenizer's config does not name the image size of its training"
                raise DataError(what, "Give --image-size")
            height, width = asked or fixed_size(str(opened.image_size))
            opened.check_size(height, width)
            size = width if height == width else f"{width}x{height}"
        if plan:
            if native:
                raise DataError("--plan estimates images of one size", "Give --image-size a number")
            views = views_per_image({"flip": flip, "crops": crops})
            return estimates.show(
                plan_tokenize(
                    opened.autoencoder.config,
                    (height, width),
                    batch_size,
                    device_of(torch_device),
                    distributed.world_size(),
                    precision=precision,
                    images=views * len(image_set),
                )
            )
        # The default is fp32 on every device: bf16 changes a few percent of the ids.
        config: dict[str, Any] = {"image_size": size, "flip": flip, "precision": precision, "max_skipped": max_skipped}
        if crops != "center":  # left out, as in the requests of earlier versions
            config["crops"] = crops
        if max_pixels is not None:
            config["max_pixels"] = max_pixels
        request = config if key_prefix is None else {**config, "key_prefix": key_prefix}
        draft = artifacts.start(out, "tokens", request, {"images": image_set, "tokenizer": opened.source})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            facts = write_tokens(
                draft,
                image_set,
                opened,
                batch_size=batch_size,
                num_workers=num_workers,
                progress=progress,
                **config,
            )
            return console.finished(draft.publish(facts))
