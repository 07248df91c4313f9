"""The job of `vqpipe generate`: sample images from a generator into tar shards, and a contact sheet of the first ones.

Image i is a function of (seed, i) alone, not of its shard or rank.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.config import to_request
from vqpipe.data.batches import chunks
from vqpipe.data.decoding import encode_png
from vqpipe.data.made_images import FOLDER, Form, shard_file, write_labels, write_shard
from vqpipe.data.tokens import id_dtype, write_token_file
from vqpipe.device import autocast
from vqpipe.generation.base import SamplingConfig
from vqpipe.generation.image_generator import ImageGenerator, image_rngs
from vqpipe.progress import SILENT, Progress
from vqpipe.reports.pictures import contact_sheet, from_png

IMAGES_PER_SHARD = 256
"""Fixed: a shard is the unit of resuming, and has the same bytes for any number of ranks."""
SHEET_IMAGES, SHEET_COLUMNS = 64, 8
"""The contact sheet: so many of the first images, and columns."""
SHEET = "contact-sheet.png"
IDS_NAME = "ids-{:06d}.parquet"
"""The ids of the images of a shard."""


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Which images to sample, and how."""

    num_images: int
    classes: tuple[int, ...]
    """Image i has the class `classes[i % len(classes)]`; empty: no classes."""
    sampling: SamplingConfig
    seed: int = 0
    batch_size: int = 64
    precision: str = "fp32"
    keep_ids: bool = False
    """Write the ids of the images too, as Parquet files beside the tars."""
    form: Form = "tar"
    """Tars of PNG files, or one PNG file per image."""

    def label(self, image: int) -> int:
        """Return the image's class, or -1 without classes."""
        return self.classes[image % len(self.classes)] if self.classes else -1

    def labels(self, images: range) -> Tensor:
        """Return the labels of images for `Generator.sample`, int64[B]; zeros without classes."""
        return torch.tensor([max(self.label(image), 0) for image in images])

    def shards(self) -> list[range]:
        """Return the images of each shard."""
        return chunks(range(self.num_images), IMAGES_PER_SHARD)

    def check(self, generator: ImageGenerator) -> None:
        """Raise at once the errors of sampling: a class out of range, or guidance without a null class."""
        images = range(max(1, len(self.classes)))
        generator.generator.check_sampling(self.labels(images), self.sampling, image_rngs(0, images))

    def to_request(self) -> dict[str, Any]:
        """Return the settings that the images depend on, including the batch size: it changes how sums are rounded."""
        return {
            "num_images": self.num_images,
            "classes": list(self.classes),
            "generate": to_request(self.sampling),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "precision": self.precision,
            **({"keep_ids": True} if self.keep_ids else {}),
            **({"as": self.form} if self.form != "tar" else {}),
        }


def generate_images(
    draft: Draft, generator: ImageGenerator, plan: SamplePlan, progress: Progress = SILENT
) -> dict[str, Any]:
    """Sample this rank's missing shards of an `images` artifact, and the contact sheet; returns its facts."""
    shards = plan.shards()
    own = range(distributed.rank(), len(shards), distributed.world_size())
    missing = [number for number in own if draft.record(shard_file(number, plan.form)) is None]
    total, left = (sum(len(shards[number]) for number in numbers) for numbers in (own, missing))
    progress.start(distributed.share_title("generate"), total, done=total - left)
    for number in missing:
        with write_shard(draft, number, plan.form, len(shards[number])) as shard:
            ids: list[Tensor] = []
            for image, pixels, tokens in sample_shard(generator, plan, shards[number]):
                shard.write(key_of(image), encode_png(pixels), "png", plan.label(image))
                ids.append(tokens)
                progress.advance()
            if plan.keep_ids:
                write_ids(draft, number, shards[number], plan, torch.stack(ids), generator.tokenizer.codebook_size)
    write_labels(draft, plan.form)
    if distributed.is_main():
        write_sheet(draft, plan)
    facts: dict[str, Any] = {"num_images": plan.num_images, "image_size": generator.image_size}
    if generator.generator.num_classes is not None:
        facts["num_classes"] = generator.generator.num_classes
    if plan.keep_ids:
        tokenizer = generator.tokenizer
        facts |= {"codebook_size": tokenizer.codebook_size, "num_groups": tokenizer.num_groups}
    return facts


def sample_shard(generator: ImageGenerator, plan: SamplePlan, images: range) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the number, the pixels uint8[3, H, W] and the ids int64[N], on the CPU, of each image of a shard."""
    device = generator.tokenizer.device
    for batch in chunks(images, plan.batch_size):
        with autocast(device, plan.precision):
            ids = generator.sample_ids(plan.labels(batch), plan.sampling, image_rngs(plan.seed, batch))
            pixels = generator.decode(ids)
        yield from zip(batch, pixels.cpu(), ids.cpu(), strict=True)


def key_of(image: int) -> str:
    """Return the key of an image in its tar and its file of ids."""
    return f"{image:08d}"


def write_ids(draft: Draft, number: int, images: range, plan: SamplePlan, ids: Tensor, codebook_size: int) -> None:
    """Write the ids int64[n, N] of a shard as the Parquet file of `vqpipe tokenize`."""
    rows = ids[:, None].numpy().astype(id_dtype(codebook_size))
    with draft.write(IDS_NAME.format(number)) as path:
        write_token_file(path, [key_of(image) for image in images], [plan.label(image) for image in images], rows)


def write_sheet(draft: Draft, plan: SamplePlan) -> None:
    """Write the contact sheet of the first shard's first images."""
    shown = range(min(SHEET_IMAGES, len(plan.shards()[0])))
    if plan.form == "png":
        pngs = [(draft.path / FOLDER / f"{key_of(image)}.png").read_bytes() for image in shown]
    else:
        with tarfile.open(draft.path / shard_file(0, "tar")) as tar:
            files = [tar.extractfile(f"{key_of(image)}.png") for image in shown]
            pngs = [file.read() for file in files if file is not None]
    draft.write_bytes(SHEET, contact_sheet(torch.stack([from_png(png) for png in pngs]), SHEET_COLUMNS))
