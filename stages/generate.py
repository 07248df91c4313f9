"""`vqpipe generate`: a generator -> images, as PNG files in tar shards or a folder, and a contact sheet."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console, options
from stages.options import BatchSize, Device, Out, Precision, Seed, Set
from vqpipe.errors import ConfigError
from vqpipe.words import first_names

if TYPE_CHECKING:
    from vqpipe.generation.base import SamplingConfig
    from vqpipe.generation.image_generator import ImageGenerator


def generate(
    generator: Annotated[Path, typer.Option("--generator", help="A generator artifact.", metavar="DIR")],
    out: Out,
    num_images: Annotated[
        int, typer.Option("--num-images", help="Number of images; papers measure FID on 50,000.", metavar="N", min=1)
    ] = 64,
    classes: Annotated[
        str,
        typer.Option(
            "--classes",
            help="Classes, in turn: all of the training set (balanced), or these.",
            metavar="balanced|N,N-N,...",
        ),
    ] = "balanced",
    cfg_scale: Annotated[
        float | None,
        typer.Option("--cfg-scale", help="Scale of classifier-free guidance; 1: none.", metavar="S", min=0),
    ] = None,
    top_k: Annotated[
        str | None,
        typer.Option(
            "--top-k", help="Tokens: sample from the N most probable ids, or a share; 0: all.", metavar="N|N%"
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Tokens: nucleus sampling, up to this probability.", metavar="0..1")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Tokens: divides the logits; 0: greedy.", metavar="T", min=0)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Latents: steps of the solver.", metavar="N")] = None,
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids", help="Write the images' token ids too, as Parquet files.")
    ] = False,
    form: options.As = "tar",
    batch_size: BatchSize = 64,
    precision: Precision = "fp32",
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Sample new images from a generator.

    Settings that are not given are those of the generator's preset (vqpipe
    inspect shows config.json); --set generate.KEY=VALUE sets the others:
    cfg_schedule, cfg_interval, cfg_channels (guide the first n channels of a
    latent only), sampler, eta.

    With --keep-ids, the ids are written as by vqpipe tokenize (those of latent
    generators are the ids that their latents are quantized to), and
    eval-generation reports the utilization of the codebook by the images.

    Image i is a function of the seed and i, on any number of ranks. Classes
    come in turn, so that consecutive images have equal parts of them.
    """
    options.check_artifacts(generator)  # before PyTorch is loaded
    with console.session(device, seed) as torch_device:
        from vqpipe import artifacts
        from vqpipe.generation.generate import SamplePlan, generate_images
        from vqpipe.generation.image_generator import open_generator

        opened = open_generator(generator, torch_device)
        flags = {"cfg_scale": cfg_scale, "top_p": top_p, "temperature": temperature, "steps": steps}
        flags |= {"top_k": None if top_k is None else parse_top_k(top_k)}
        plan = SamplePlan(
            num_images=num_images,
            classes=parse_classes(classes, opened),
            sampling=override_sampling(opened, overrides or [], flags),
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            keep_ids=keep_ids,
            form=form,
        )
        plan.check(opened)
        assert opened.artifact is not None
        draft = artifacts.start(out, "images", plan.to_request(), {"generator": opened.artifact})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft, console.ProgressBar() as progress:
            made = draft.publish(generate_images(draft, opened, plan, progress))
        return console.finished(made)


def parse_classes(text: str, generator: "ImageGenerator") -> tuple[int, ...]:
    """Return the classes of --classes: those of "balanced", or numbers and ranges.

    Raises:
        ConfigError: it is neither, or the generator was not trained on such a class.
    """
    if text == "balanced":
        return generator.classes
    known = generator.classes
    if not known:
        raise ConfigError(f"--classes {text}: this generator has no classes", "Leave --classes out")
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--classes {text}: {part!r} is not a class or range", "Use balanced, or 3,7,20-29")
        for number in range(int(first), int(last or first) + 1):
            if number not in known:
                hint = f"This generator was trained on the classes {first_names(known, 5)}"
                raise ConfigError(f"--classes {text}: there is no class {number}", hint)
            chosen.append(number)
    return tuple(chosen)


def parse_top_k(text: str) -> int | float:
    """`4096` -> 4096; `10%` -> 0.1; `0.1` -> 0.1.

    Raises:
        ConfigError: it is neither.
    """
    number = text.removesuffix("%")
    try:
        return int(number) if number == text and number.isdecimal() else float(number) / (100 if text != number else 1)
    except ValueError:
        raise ConfigError(
            f"--top-k {text} is not a number", "Use a count such as 4096, or a share such as 10%"
        ) from None


def override_sampling(generator: "ImageGenerator", overrides: list[str], flags: dict[str, Any]) -> "SamplingConfig":
    """Return the generator's sampling settings, changed by --set, then by named flags.

    Raises:
        ConfigError: a setting of another section, an invalid one, or one that this kind of generator does not use.
    """
    from vqpipe import config
    from vqpipe.generation.base import check_used
    from vqpipe.generation.train import GeneratorRecipe

    for assignment in overrides:
        if not assignment.startswith("generate."):
            raise ConfigError(
                f"--set {assignment}: only [generate] can be set here", "Other settings are fixed by training"
            )
    table = config.override(GeneratorRecipe, {"generate": config.to_table(generator.sampling)}, overrides)["generate"]
    table |= {name: value for name, value in flags.items() if value is not None}
    sampling = config.from_table(type(generator.sampling), table, "generate")
    options = {name: f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None}
    check_used(sampling, generator.sampling, generator.generator.config, options)
    codes = generator.tokenizer.codebook_size
    if generator.sampling.top_k != sampling.top_k > codes:  # a preset's is for codebooks of any size
        raise ConfigError(f"top_k = {sampling.top_k}, and there are {codes:,} ids", "Use 0 for all of them")
    return sampling
