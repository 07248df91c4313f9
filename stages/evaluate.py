"""`vqpipe eval`: images and a tokenizer -> a report of metrics by protocol, and a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from stages import console, options
from stages.options import AutoencoderPath, Device, Images, Limit, OptionalBatchSize, Out, Preset, Seed, Set
from vqpipe.errors import ConfigError
from vqpipe.image_size import normal_size

if TYPE_CHECKING:
    from vqpipe.weights import LpipsNet


def evaluate(
    images: Images,
    tokenizer: AutoencoderPath,
    out: Out,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="See above; repeatable; the first one's numbers come first; default: the preset's, else adm.",
            metavar="NAME",
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            help="Side of the center crop, WIDTHxHEIGHT, or native (whole images); default: that of the training.",
            metavar="PIXELS",
            callback=options.known_size,
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option("--tile", help="Reconstruct larger images in tiles of this side.", metavar="PIXELS", min=1),
    ] = None,
    weights: options.Weights = None,
    perceptual: Annotated[
        list[str] | None,
        typer.Option(
            "--perceptual",
            help="Also compute LPIPS's formula on these weights, in torchvision's layout; repeatable. The distance is "
            "named perceptual_NET: with other weights than torchvision's it is not LPIPS.",
            metavar="alex|vgg|squeeze=FILE",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            help="More metrics on Inception features; repeatable, or separated by commas.",
            metavar="kid,prc,sfid,is",
        ),
    ] = None,
    extractor: options.Extractor = None,
    extractor_weights: options.ExtractorWeights = None,
    download: options.Download = False,
    analyze: Annotated[
        list[str] | None,
        typer.Option(
            "--analyze",
            help="Add an analysis of the codes to the report; repeatable.",
            metavar="replacement|embedding|patches",
        ),
    ] = None,
    embedding_codes: Annotated[
        int | None,
        typer.Option(
            "--embedding-codes",
            help="Codes in the t-SNE map of --analyze embedding, over all groups, sampled with --seed; default 2000. "
            "More than 5000 of a group need the package openTSNE (the extra `embedding`).",
            metavar="N",
            min=1,
        ),
    ] = None,
    random_classes: Annotated[
        int | None,
        typer.Option(
            "--random-classes",
            help="Use only the images of N classes, drawn at random with --seed (VQGAN-LC, Figure 5: 100 of ImageNet). "
            "--limit applies after that.",
            metavar="N",
            min=1,
        ),
    ] = None,
    fid_min_images: Annotated[
        int | None,
        typer.Option(
            "--fid-min-images",
            help="Minimum number of images for rFID; default 2049.",
            metavar="N",
            min=2,
        ),
    ] = None,
    limit: Limit = None,
    batch_size: OptionalBatchSize = None,
    num_workers: options.NumWorkers = -1,
    preset: Preset = None,
    overrides: Set = None,
    color: options.ColorOption = "ignore",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure a tokenizer's reconstructions.

    The metrics are PSNR, SSIM, utilization and perplexity of the codebook, and,
    with --weights, rFID and LPIPS. Tokenizers with groups or depths are also
    measured on reconstructions from the first k of them.

    Continuous tokenizers are measured in the same way: SD-VAE, SDXL-VAE, the
    VAEs of SD3 and FLUX, and every other AutoencoderKL of diffusers, with any
    number of latent channels, and DC-AE (AutoencoderDC). Put its config.json and
    diffusion_pytorch_model.safetensors (such as those of
    stabilityai/sd-vae-ft-mse or stabilityai/sdxl-vae) into a folder, and pass
    it as --tokenizer; the report shows the name of the folder.

    Protocols:
    adm (the usual rFID: ADM's crop on both sides, rounded, TF1 resize),
    cleanfid-matched (MGVQ: bicubic crop, truncated; clean-fid, same crops),
    cleanfid-rawval (VQGAN-LC: bilinear crop, truncated; clean-fid, against
    whole images).

    Files in --weights DIR, each optional:
    weights-inception-2015-12-05-6726825d.pth (rFID, and --metrics),
    alexnet-owt-7be5be79.pth and vgg16-397923af.pth (LPIPS).
    """
    options.check_images(images)  # before PyTorch is loaded
    options.check_artifacts(tokenizer)
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from stages import recipe
        from vqpipe import analysis
        from vqpipe.continuous import open_autoencoder
        from vqpipe.evaluation.extractors import add_extractor
        from vqpipe.evaluation.report import evaluate_tokenizer
        from vqpipe.metrics.feature_networks import find_networks
        from vqpipe.reports import evaluation as reports

        if embedding_codes is not None and "embedding" not in (analyze or []):
            raise ConfigError("--embedding-codes without --analyze embedding", "Add --analyze embedding")
        # What is wrong with other options is said before the images are hashed, which may take hours.
        perceptual_weights = perceptual_files(perceptual or [])
        autoencoder = open_autoencoder(tokenizer, torch_device)
        flags: dict[str, Any] = {"protocol": protocol, "tile": tile, "fid_min_images": fid_min_images}
        flags |= {"batch_size": batch_size, "metrics": split_names(metrics)}
        if image_size is None and preset is None and not any("eval.image_size" in each for each in overrides or []):
            flags["image_size"] = autoencoder.image_size
        elif image_size is not None:
            flags["image_size"] = normal_size(image_size)
        config = recipe.load(preset, overrides, reads=["eval"], eval=flags).eval
        networks = find_networks(weights, torch_device, perceptual_weights)
        add_extractor(networks, extractor, extractor_weights, torch_device, download=download, progress=progress)
        analyses = analysis.build(
            analyze or [],
            autoencoder,
            perceptual=networks.perceptual,
            seed=seed,
            embedding_codes=embedding_codes or analysis.EMBEDDING_CODES,
        )
        report, result = evaluate_tokenizer(
            out,
            console.open_images(images, color=color),
            autoencoder,
            config,
            networks,
            analyses=analyses,
            embedding_codes=embedding_codes,
            random_classes=random_classes,
            limit=limit,
            num_workers=num_workers,
            seed=seed,
            progress=progress,
        )
        if result is not None:
            rows = reports.number_rows(result.metrics, reports.OTHER_FORMULAS)
            console.show_numbers(rows, result.metrics["not_computed"])
            first = reports.protocols_in_words([result.metrics["protocol"]])
            console.say(f"{first} The report also has PSNR and SSIM by the formulas of papers.")
            for name, reason in reports.reasons_not_measured(result.metrics, shown=1).items():
                console.say(f"{name} is not measured on {reason}")
            if protocols := reports.protocols_table(result.metrics):
                console.show_table(protocols)
        return console.finished(report, again=result is None)


def perceptual_files(values: list[str]) -> "dict[LpipsNet, Path]":
    """The values of --perceptual: backbone -> file."""
    from vqpipe.weights import LpipsNet

    files: dict[LpipsNet, Path] = {}
    for value in values:
        net, equals, file = value.partition("=")
        if net not in get_args(LpipsNet) or not (equals and file):
            raise ConfigError(f"--perceptual {value} is not NET=FILE", f"NET is {', '.join(get_args(LpipsNet))}")
        if net in files:
            raise ConfigError(f"--perceptual names {net} twice", "Give one file for each network")
        files[cast(LpipsNet, net)] = Path(file)
    return files


def split_names(values: list[str] | None) -> list[str] | None:
    """An option that is repeatable, or takes several names with commas."""
    return [name.strip() for value in values for name in value.split(",")] if values else None
