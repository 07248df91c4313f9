"""`vqpipe generate`: a generator -> images, as tar shards of PNG files, and a contact sheet."""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import BatchSize, Device, Out, Precision, Seed, Set

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vqpipe.artifacts import Draft
    from vqpipe.generation.base import SamplingConfig
    from vqpipe.generation.published import PublishedGenerator

IMAGES_PER_SHARD = 256
"""Fixed: a shard is what a rank draws at a time, what a resumed run begins again, and the same bytes on any rank."""
SHEET_IMAGES, SHEET_COLUMNS = 64, 8
"""The first images, on one picture."""
SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class Order:
    """Which images are wanted, and how they are drawn."""

    num_images: int
    classes: tuple[int, ...]
    """Image i is of class i modulo their number; none: without classes."""
    sampling: "SamplingConfig"
    seed: int
    batch_size: int
    precision: str

    def label(self, image: int) -> int:
        """The image's class, -1 where there are none."""
        return self.classes[image % len(self.classes)] if self.classes else -1

    def shards(self) -> list[range]:
        """The images of each shard."""
        firsts = range(0, self.num_images, IMAGES_PER_SHARD)
        return [range(first, min(first + IMAGES_PER_SHARD, self.num_images)) for first in firsts]


def generate(
    generator: Annotated[Path, typer.Option("--generator", help="A generator artifact.", metavar="DIR")],
    out: Out,
    num_images: Annotated[
        int, typer.Option("--num-images", help="How many; 50,000 for a FID.", metavar="N", min=1)
    ] = 64,
    classes: Annotated[
        str,
        typer.Option(
            "--classes", help="In turn: every class of the training set, or these.", metavar="balanced|N,N-N,..."
        ),
    ] = "balanced",
    cfg_scale: Annotated[
        float | None, typer.Option("--cfg-scale", help="Strength of guidance; 1: none.", metavar="S", min=0)
    ] = None,
    top_k: Annotated[
        str | None,
        typer.Option("--top-k", help="Tokens: the most probable ids, or a share of them all; 0: all.", metavar="N|N%"),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Tokens: ids up to this probability.", metavar="0..1")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Tokens: divides the logits; 0: greedy.", metavar="T", min=0)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Latents: steps of the solver.", metavar="N")] = None,
    batch_size: BatchSize = 64,
    precision: Precision = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Draw new images.

    What is not said is as the generator's preset has it (vqpipe inspect shows
    config.json); --set generate.KEY=VALUE reaches the rest: cfg_schedule,
    cfg_interval, sampler, eta.

    Image i is a function of the seed and i, on any number of ranks. Classes
    come in turn, so that any run of images has equal parts of them.
    """
    with console.session(device, seed) as where:
        from vqpipe import artifacts
        from vqpipe.config import to_table
        from vqpipe.errors import ConfigError
        from vqpipe.generation.published import open_generator

        if precision not in (None, "fp32", "bf16"):
            raise ConfigError(f"--precision {precision} is not a choice", "Use fp32 or bf16")
        opened = open_generator(generator, where)
        flags = {"cfg_scale": cfg_scale, "top_p": top_p, "temperature": temperature, "steps": steps}
        flags |= {"top_k": None if top_k is None else count_or_share(top_k)}
        order = Order(
            num_images=num_images,
            classes=chosen_classes(classes, opened),
            sampling=sampling_of(opened.sampling, overrides or [], flags),
            seed=seed,
            batch_size=batch_size or 64,
            precision=precision or "fp32",
        )
        check(order, opened)
        request = {
            "num_images": num_images,
            "classes": list(order.classes),
            "generate": to_table(order.sampling),
            "seed": seed,
            "batch_size": order.batch_size,  # a batch of another size rounds sums otherwise
            "precision": order.precision,
        }
        assert opened.artifact is not None
        draft = artifacts.start(out, "images", request, {"generator": opened.artifact})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            write_shards(draft, opened, order)
            facts: dict[str, Any] = {"num_images": num_images, "image_size": opened.image_size}
            if opened.generator.num_classes is not None:
                facts["num_classes"] = opened.generator.num_classes
            return console.finished(draft.publish(facts))


def write_shards(draft: "Draft", published: "PublishedGenerator", order: Order) -> None:
    """Draw this rank's shards that are not written yet, and the contact sheet of the first one."""
    from vqpipe import distributed
    from vqpipe.data.tars import write_tar
    from vqpipe.data.transforms import encode_png

    shards = order.shards()
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    missing = [number for number in mine if draft.record(name_of(number)) is None]
    began, made = time.monotonic(), 0
    with console.progress("generate", sum(len(shards[number]) for number in mine)) as bar:
        bar.resume(sum(len(shards[number]) for number in set(mine) - set(missing)))
        for number in missing:
            with draft.write(name_of(number), images=len(shards[number])) as path, write_tar(path) as tar:
                for image, pixels in draw(published, order, shards[number]):
                    tar.write(f"{image:08d}", encode_png(pixels), "png", order.label(image))
                    bar.advance()
            made += len(shards[number])
    seconds = max(time.monotonic() - began, 1e-9)
    total = sum(distributed.gather_objects(made))
    if total:
        console.say(f"{total:,} images in {console.clock(seconds)}, {total / seconds:.3g} images/s")
    if distributed.is_main():
        write_sheet(draft)


def draw(published: "PublishedGenerator", order: Order, images: range) -> "Iterator[tuple[int, Any]]":
    """Each image of a shard and its pixels uint8[3, H, W]."""
    import torch

    from vqpipe.generation.published import draws_of

    device = published.device
    for first in images[:: order.batch_size]:
        numbers = range(first, min(first + order.batch_size, images.stop))
        labels = torch.tensor([max(order.label(image), 0) for image in numbers])
        with torch.autocast(device.type, torch.bfloat16, enabled=order.precision == "bf16"):
            made = published.draw(labels, order.sampling, draws_of(order.seed, numbers))
        yield from zip(numbers, made.cpu(), strict=True)


def check(order: Order, published: "PublishedGenerator") -> None:
    """Raise now what drawing would raise later: a class or guidance that the generator does not know."""
    import torch

    from vqpipe.generation.published import draws_of

    labels = torch.tensor([max(label, 0) for label in order.classes or (0,)])
    published.generator.check_sampling(labels, order.sampling, draws_of(0, range(len(labels))))


def write_sheet(draft: "Draft") -> None:
    """The first images, as they lie in the first shard, on one picture."""
    import tarfile

    import numpy as np
    import torch
    from PIL import Image

    from vqpipe.reports.pictures import contact_sheet

    pictures: list[torch.Tensor] = []
    with tarfile.open(draft.path / name_of(0)) as tar:
        for member in tar:
            if member.name.endswith(".png") and len(pictures) < SHEET_IMAGES:
                file = tar.extractfile(member)
                assert file is not None
                pictures.append(torch.from_numpy(np.array(Image.open(io.BytesIO(file.read())))).permute(2, 0, 1))
    with draft.write(SHEET) as path:
        path.write_bytes(contact_sheet(torch.stack(pictures), SHEET_COLUMNS))


def name_of(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def chosen_classes(text: str, published: "PublishedGenerator") -> tuple[int, ...]:
    """What --classes names: "balanced", or numbers and ranges of them.

    Raises:
        ConfigError: it is neither, or the generator has no classes.
    """
    from vqpipe.errors import ConfigError

    if text == "balanced":
        return published.classes
    if published.generator.num_classes is None:
        raise ConfigError(f"--classes {text}: this generator has no classes", "Leave --classes out")
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--classes {text}: {part!r} is no class", "Write balanced, or such as 3,7,20-29")
        if int(last or first) >= published.generator.num_classes:
            hint = f"This generator knows the classes 0 to {published.generator.num_classes - 1}"
            raise ConfigError(f"--classes {text}: there is no class {last or first}", hint)
        chosen += range(int(first), int(last or first) + 1)
    return tuple(chosen)


def count_or_share(text: str) -> int | float:
    """`4096` -> 4096; `10%` -> 0.1; `0.1` -> 0.1.

    Raises:
        ConfigError: it is neither.
    """
    from vqpipe.errors import ConfigError

    number = text.removesuffix("%")
    try:
        return int(number) if number == text and number.isdecimal() else float(number) / (100 if text != number else 1)
    except ValueError:
        raise ConfigError(
            f"--top-k {text} is no number", "Write a count such as 4096, or a share such as 10%"
        ) from None


def sampling_of(published: "SamplingConfig", overrides: list[str], flags: dict[str, Any]) -> "SamplingConfig":
    """How it was meant to be sampled, then --set, then named flags."""
    from stages.recipe import GeneratorRecipe
    from vqpipe.config import from_table, override, to_table
    from vqpipe.errors import ConfigError
    from vqpipe.generation.base import SamplingConfig

    for assignment in overrides:
        if not assignment.startswith("generate."):
            raise ConfigError(f"--set {assignment}: only [generate] can be set here", "The rest was trained")
    table = override(GeneratorRecipe, {"generate": to_table(published)}, overrides)["generate"]
    table |= {name: value for name, value in flags.items() if value is not None}
    return from_table(SamplingConfig, table, "generate")
