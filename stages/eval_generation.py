"""`vqpipe eval-generation`: samples and references -> a report of FID and related metrics, and a page."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stages import console, options
from stages.options import BatchSize, Device, ImageSize, Limit, NumWorkers, Out, Seed


def eval_generation(
    images: Annotated[
        list[str],
        typer.Option(
            "--images", help="Generated images, in any form that vqpipe eval takes; repeatable.", metavar="WHERE"
        ),
    ],
    reference: Annotated[
        list[str],
        typer.Option(
            "--reference", help="Real images, their statistics, or ADM's .npz; repeatable.", metavar="WHERE|DIR|FILE"
        ),
    ],
    out: Out,
    protocol: Annotated[Literal["adm", "cleanfid-raw"], typer.Option("--protocol", help="See above.")] = "adm",
    image_size: ImageSize = None,
    weights: options.Weights = None,
    extractor: options.Extractor = None,
    extractor_weights: options.ExtractorWeights = None,
    download: options.Download = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics",
            help="Where the reference statistics are saved, to be reused; default: OUT.reference.",
            metavar="DIR",
        ),
    ] = None,
    fid_min_images: Annotated[
        int,
        typer.Option("--fid-min-images", help="Minimum number of images for FID and sFID.", metavar="N", min=2),
    ] = 2049,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = -1,
    max_skipped: options.MaxSkipped = 0.01,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure generated images.

    The metrics are gFID, sFID, KID, Inception Score, precision and recall.

    Papers measure 50,000 samples, classes in equal parts, against the training
    set. The statistics of the references are computed once, into an artifact of
    their own, which --reference takes too, as it takes ADM's
    VIRTUAL_imagenet256_labeled.npz. For samples of vqpipe generate --keep-ids,
    also the utilization and perplexity of the codebook by their ids.

    vqpipe compare plots FID and Inception Score over the guidance scale, for
    reports of one generator's samples at several --cfg-scale.

    Protocols:
    adm (references in ADM's crop, TF1 resize: LlamaGen, MGVQ, DiT, SiT),
    cleanfid-raw (references whole, clean-fid's resize: VQGAN-LC).

    File in --weights DIR: weights-inception-2015-12-05-6726825d.pth.
    Without it the numbers of Inception are not computed, and the report says why.
    """
    options.check_images([*images, *reference])  # before PyTorch is loaded
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from vqpipe.evaluation.extractors import add_extractor
        from vqpipe.evaluation.generation import GenerationConfig, evaluated_size
        from vqpipe.evaluation.report import evaluate_samples
        from vqpipe.metrics.feature_networks import find_networks
        from vqpipe.reports.generated import groups_table, number_rows

        networks = find_networks(weights, torch_device)
        add_extractor(networks, extractor, extractor_weights, torch_device, download=download, progress=progress)
        config = GenerationConfig(
            protocol=protocol,
            image_size=image_size or evaluated_size(images, reference, progress),
            batch_size=batch_size,
            num_workers=num_workers,
            max_skipped=max_skipped,
            fid_min_images=fid_min_images,
        )
        target = statistics or out.with_name(f"{out.name}.reference")
        report, measured = evaluate_samples(
            out, images, reference, target, config, networks, torch_device, limit=limit, progress=progress
        )
        if measured is not None:
            console.show_numbers(number_rows(measured), measured["not_computed"])
            if groups := groups_table(measured):
                console.show_table(groups)
        return console.finished(report, again=measured is None)
