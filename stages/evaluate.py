"""`vqpipe eval`: images and a tokenizer -> a report: numbers with their protocol, and a page to look at."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import BatchSize, Device, Images, Limit, Out, Preset, Seed, Set, TokenizerPath

if TYPE_CHECKING:
    import torch

    from vqpipe.analysis import Analysis
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.continuous import ContinuousAutoencoder
    from vqpipe.data.images import ImageSet
    from vqpipe.metrics import EvalConfig
    from vqpipe.metrics.networks import FeatureNetworks
    from vqpipe.reports.evaluation import Evaluated
    from vqpipe.reports.page import Section
    from vqpipe.tokenizer import Tokenizer

FREE_KEYS = ("batch_size", "save_seconds")
"""Settings of [eval] that do not change what is measured."""


def evaluate(
    images: Images,
    tokenizer: TokenizerPath,
    out: Out,
    protocol: Annotated[
        list[str] | None,
        typer.Option("--protocol", help="See above; repeatable, the first gives the headline.", metavar="NAME"),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", help="Side of the centre crop, WIDTHxHEIGHT, or native.", metavar="PIXELS"),
    ] = None,
    tile: Annotated[
        int | None, typer.Option("--tile", help="Larger images go through in tiles.", metavar="PIXELS", min=1)
    ] = None,
    weights: console.Weights = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", help="More from Inception; repeatable, or with commas.", metavar="kid,prc,sfid,is"),
    ] = None,
    extractor: console.Extractor = None,
    extractor_weights: console.ExtractorWeights = None,
    analyze: Annotated[
        list[str] | None,
        typer.Option(
            "--analyze", help="A closer look at the codes; repeatable.", metavar="replacement|embedding|patches"
        ),
    ] = None,
    fid_min_images: Annotated[
        int | None,
        typer.Option("--fid-min-images", help="Fewer leave rFID out; 2049 unless said.", metavar="N", min=2),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    num_workers: console.NumWorkers = -1,
    preset: Preset = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure a tokenizer: distortion, rFID and LPIPS where weights are given, and the use of its codebook.

    With groups or depths, also from the first k of them. SD-VAE and SDXL-VAE are measured beside tokenizers: fetch
    config.json and diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse or stabilityai/sdxl-vae into a
    folder, and name that with --tokenizer.

    Protocols:
    adm (ADM's crop on both sides, rounded, TF1 resize; the usual rFID),
    cleanfid-matched (MGVQ: bicubic crop, truncated, clean-fid against the same crops),
    cleanfid-rawval (VQGAN-LC: bilinear crop, truncated, clean-fid against the raw uncropped images).

    Looked for in --weights DIR, each optional:
    weights-inception-2015-12-05-6726825d.pth (rFID, and --metrics),
    alexnet-owt-7be5be79.pth and vgg16-397923af.pth (LPIPS).
    """
    with console.session(device, seed) as where:
        from stages.eval_report import publish
        from vqpipe import analysis, artifacts
        from vqpipe.config import to_table
        from vqpipe.continuous import open_autoencoder
        from vqpipe.data.images import open_images
        from vqpipe.metrics.networks import find_networks

        image_set = open_images(images)
        opened = open_autoencoder(tokenizer, where)
        flags = {"protocol": protocol, "tile": tile, "fid_min_images": fid_min_images, "batch_size": batch_size}
        config = configured(opened, preset, overrides or [], image_size, metrics or [], flags)
        networks = find_networks(weights, where)
        named = add_extractor(networks, extractor, extractor_weights, where)
        analyses = analysis.build(analyze or [], opened, perceptual=networks.perceptual, seed=seed)
        request = {key: value for key, value in to_table(config).items() if key not in FREE_KEYS}
        request |= {"limit": limit, "weights": networks.sha256, "extractor": named}
        request |= {"analyze": [each.name for each in analyses], "seed": seed} if analyses else {}
        inputs = {"images": image_set, "tokenizer": opened.source}
        draft = artifacts.start(out, "report", request, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            stop = min(limit or len(image_set), len(image_set))
            evaluated, sections = measure(draft, image_set, stop, opened, config, networks, analyses, num_workers)
            return console.finished(publish(draft, evaluated, sections))


def configured(
    autoencoder: "Tokenizer | ContinuousAutoencoder",
    preset: str | None,
    overrides: list[str],
    image_size: str | None,
    metrics: list[str],
    flags: dict[str, Any],
) -> "EvalConfig":
    """[eval] as the options have it; where none speaks of it, images are as large as those of the training."""
    from stages import recipe as recipes

    if image_size is not None:
        flags["image_size"] = in_pixels(image_size)
    elif preset is None and not any(each.startswith("eval.image_size") for each in overrides):
        flags["image_size"] = autoencoder.image_size
    if metrics:
        flags["metrics"] = [name.strip() for group in metrics for name in group.split(",")]
    config = recipes.load(preset, overrides, eval=flags).eval
    check_size(autoencoder, config)
    return config


def in_pixels(image_size: str | int) -> int | str:
    """`--image-size` as [eval] holds it: a square's side as a number."""
    from vqpipe.data.transforms import parse_size

    size = parse_size(str(image_size))
    if size is None:
        return "native"
    return size[0] if size[0] == size[1] else f"{size[1]}x{size[0]}"


def check_size(autoencoder: "Tokenizer | ContinuousAutoencoder", config: "EvalConfig") -> None:
    """Raise what is wrong with `eval.image_size` before any work. A square has to divide into the network's cells;
    other sizes are padded and cut back."""
    from vqpipe.data.transforms import parse_size

    size = parse_size(str(config.image_size))
    if size is None:
        return
    factor = autoencoder.downsample_factor
    height, width = size if size[0] == size[1] else (-(-side // factor) * factor for side in size)
    autoencoder.check_size(height, width)


def add_extractor(
    networks: "FeatureNetworks", spec: str | None, weights: Path | None, device: "torch.device"
) -> dict[str, str]:
    """Build the network of `--extractor` and add it to `networks`; name -> hash of its weights."""
    from vqpipe.codebooks import features
    from vqpipe.errors import ConfigError, WeightsError
    from vqpipe.files import hash_file
    from vqpipe.metrics.networks import PooledMaps

    if spec is None:
        if weights is not None:
            raise ConfigError("--extractor-weights was given without --extractor", "Name the network they belong to")
        return {}
    if spec == "patch-pca":
        raise ConfigError("patch-pca is fitted to images, so it measures no distance", "Name open_clip: or timm:")
    config = features.FeaturesConfig(encoder=spec, weights=weights, pool=1)
    try:
        file = features.find_weights(config)
    except WeightsError as error:
        raise WeightsError(
            error.what, "Fetch them where there is a network, and name --extractor-weights FILE"
        ) from None
    encoder = features.open_encoder(config, file)
    if file is None or encoder.transform is None:
        raise ConfigError(f"{spec} has no weights or no preprocessing of its own", "Name open_clip: or timm:")
    networks.extractors[spec] = PooledMaps(encoder, encoder.transform).to(device)
    digest = hash_file(file)
    networks.sha256[f"{spec}: {file.name}"] = digest
    return {spec: digest}


def measure(
    draft: "Draft",
    image_set: "ImageSet",
    stop: int,
    autoencoder: "Tokenizer | ContinuousAutoencoder",
    config: "EvalConfig",
    networks: "FeatureNetworks",
    analyses: "Sequence[Analysis]",
    num_workers: int,
) -> "tuple[Evaluated, list[Section]]":
    """Everything about the images [0, stop), in one pass; also the analyses' part of the page."""
    from stages.evaluating import Pass, described
    from vqpipe.metrics.evaluation import Evaluation
    from vqpipe.provenance import command_again
    from vqpipe.reports.evaluation import Evaluated, command_of

    evaluation = Evaluation(config, networks, autoencoder.codebook_size, autoencoder.num_groups, autoencoder.device)
    images = Pass(autoencoder, config, evaluation, analyses, stop)
    images.run(draft, image_set, num_workers)
    metrics = evaluation.result()
    shown = images.pictures.result()
    metrics |= images.tiles()
    if analyses:
        metrics["analyses"] = {each.name: each.result() for each in analyses}
    metrics |= {
        "skipped": images.skipped,
        "tokenizer": described(autoencoder, images.size),
        "pictures": [{"number": i, "name": s.name, "psnr": s.psnr, "why": s.why} for i, s in enumerate(shown)],
        "versions": versions() if autoencoder.codebook_size is not None else versions("diffusers"),
    }
    evaluated = Evaluated(
        name=autoencoder.name,
        metrics=metrics,
        counts=evaluation.counts.cpu(),
        shown=shown,
        history=training_log(autoencoder.artifact),
        lineage={"kind": "report", "name": "(this page)", "content": "", "inputs": draft.lineage},
        commands=[*([command_of(autoencoder.artifact)] if autoencoder.artifact else []), command_again()],
    )
    return evaluated, [section for each in analyses for section in each.sections(metrics["analyses"][each.name])]


def training_log(artifact: "Artifact | None") -> list[dict[str, Any]]:
    """The rows that `train` logged, where the tokenizer carries them."""
    from vqpipe.training.callbacks import read_metrics

    return read_metrics(artifact.file("metrics.jsonl")) if artifact and artifact.names("metrics.jsonl") else []


def versions(*others: str) -> dict[str, str]:
    """Of what numbers depend on."""
    packages = ("vqpipe", "torch", "lpips", "torch-fidelity", "pillow", *others)
    return {name: metadata.version(name) for name in packages}
