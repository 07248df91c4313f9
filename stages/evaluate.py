"""`vqpipe eval`: images and a tokenizer -> a report: numbers with their protocol, and a page to look at."""

import json
import shlex
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import BatchSize, Device, Images, ImageSize, Limit, Out, Preset, Seed, Set, TokenizerPath

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.continuous import ContinuousAutoencoder
    from vqpipe.data.shards import ImageSet
    from vqpipe.metrics.evaluation import EvalConfig, FeatureNetworks
    from vqpipe.reports.evaluation import Evaluated, Shown
    from vqpipe.tokenizer import Tokenizer

FREE_KEYS = ("batch_size",)
"""Settings of [eval] that do not change what is measured."""


def evaluate(
    images: Images,
    tokenizer: TokenizerPath,
    out: Out,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="The convention of crop, reference and rounding.", metavar="adm")
    ] = None,
    image_size: ImageSize = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Pretrained weights; see above.", metavar="DIR")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    num_workers: console.NumWorkers = 0,
    preset: Preset = None,
    overrides: Set = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure a tokenizer: distortion, rFID and LPIPS where weights are given, and the use of its codebook.

    With groups or depths, also from the first k of them. SD-VAE and SDXL-VAE are measured beside tokenizers: fetch
    config.json and diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse or stabilityai/sdxl-vae into a
    folder, and name that with --tokenizer.

    Looked for in --weights DIR, each optional:
    weights-inception-2015-12-05-6726825d.pth (rFID),
    alexnet-owt-7be5be79.pth and vgg16-397923af.pth (LPIPS).
    """
    with console.session(device, seed) as where:
        from stages import recipe as recipes
        from vqpipe import artifacts
        from vqpipe.config import to_table
        from vqpipe.continuous import open_autoencoder
        from vqpipe.data.shards import open_images
        from vqpipe.metrics.evaluation import find_networks

        image_set = open_images(images)
        opened = open_autoencoder(tokenizer, where)
        flags = {"protocol": protocol, "image_size": image_size, "batch_size": batch_size}
        if preset is None and image_size is None and not any(a.startswith("eval.image_size") for a in overrides or []):
            flags["image_size"] = opened.image_size  # the size it was trained at
        config = recipes.load(preset, overrides, eval=flags).eval
        opened.check_size(config.image_size, config.image_size)
        networks = find_networks(weights, where)
        request = {key: value for key, value in to_table(config).items() if key not in FREE_KEYS}
        request |= {"limit": limit, "weights": networks.sha256}
        inputs = {"images": image_set, "tokenizer": opened.source}
        draft = artifacts.start(out, "report", request, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        command = ["vqpipe", "eval", *(part for where in images for part in ("--images", where))]
        command += ["--tokenizer", str(tokenizer), "--out", "DIR"]
        options = {"--protocol": protocol, "--image-size": image_size, "--weights": weights, "--limit": limit}
        options |= {"--preset": preset}
        command += [str(part) for option, value in options.items() if value is not None for part in (option, value)]
        command += [part for assignment in overrides or [] for part in ("--set", assignment)]
        with draft:
            stop = min(limit or len(image_set), len(image_set))
            evaluated = measure(draft, image_set, stop, opened, config, networks, num_workers, shlex.join(command))
            return console.finished(publish(draft, evaluated))


def measure(
    draft: "Draft",
    image_set: "ImageSet",
    stop: int,
    autoencoder: "Tokenizer | ContinuousAutoencoder",
    config: "EvalConfig",
    networks: "FeatureNetworks",
    num_workers: int,
    command: str,
) -> "Evaluated":
    """Encode and decode the images [0, stop) once, every rank its own contiguous share of whole batches."""
    from vqpipe import distributed
    from vqpipe.data.batches import OrderedBatches, check_skipped
    from vqpipe.errors import DataError
    from vqpipe.metrics.evaluation import Evaluation
    from vqpipe.reports.evaluation import Evaluated, command_of

    size, rank, ranks = config.image_size, distributed.rank(), distributed.world_size()
    num_batches = -(-stop // config.batch_size)
    first, last = (num_batches * r // ranks * config.batch_size for r in (rank, rank + 1))
    batches = OrderedBatches(
        image_set,
        image_size=size,
        batch_size=config.batch_size,
        start=first,
        stop=min(last, stop),
        num_workers=num_workers,
    )
    device, discrete = autoencoder.device, autoencoder.codebook_size is not None
    evaluation = Evaluation(config, networks, autoencoder.codebook_size, autoencoder.num_groups, device)
    chosen = {place * stop // config.num_pictures for place in range(config.num_pictures)}
    shown: list[Shown] = []
    with console.progress("eval", len(batches)) as bar:
        for batch in batches:
            originals = batch.images.to(device)
            code = autoencoder.encode(originals)  # ids, or continuous latents
            reconstructions = autoencoder.decode(code, (size, size))
            prefixes = {k: autoencoder.decode(code, (size, size), groups=k) for k in evaluation.prefixes}
            psnr = evaluation.update(originals, reconstructions, code if discrete else None, prefixes)
            for i, index in enumerate(batch.indices):
                if index in chosen:
                    shown.append(show(batch.keys[i], originals[i], reconstructions[i], psnr[i].item()))
            bar.note(f"psnr {evaluation.whole.distortion.result().get('psnr', float('inf')):.2f} dB")
            bar.advance(len(originals))
    skipped: Counter[str] = sum((Counter(part) for part in distributed.gather_objects(batches.skipped)), Counter())
    check_skipped(dict(skipped), stop, config.max_skipped)
    everything = [picture for part in distributed.gather_objects(shown) for picture in part]
    metrics = evaluation.result()
    if metrics["num_images"] == 0:
        raise DataError("there are no images to evaluate", "Check --images and --limit")
    metrics |= {
        "skipped": dict(sorted(skipped.items())),
        "tokenizer": autoencoder.describe(size),
        "pictures": [{"number": i, "name": s.name, "psnr": s.psnr} for i, s in enumerate(everything)],
        "versions": versions() if discrete else versions("diffusers"),
    }
    return Evaluated(
        name=autoencoder.name,
        metrics=metrics,
        counts=evaluation.counts.cpu(),
        shown=everything,
        history=training_log(autoencoder.artifact),
        lineage={"kind": "report", "name": "(this page)", "content": "", "inputs": draft.lineage},
        commands=[*([command_of(autoencoder.artifact)] if autoencoder.artifact else []), command],
    )


def publish(draft: "Draft", evaluated: "Evaluated") -> "Artifact":
    """Write the report's files and finish it."""
    from vqpipe import distributed
    from vqpipe.reports.evaluation import MEASURES, NUM_HEADLINES, value_of

    metrics = evaluated.metrics
    if distributed.is_main():
        write_files(draft, evaluated)
        console.show(number_table(evaluated))
    headline = {measure.key: value_of(metrics, measure.key) for measure in MEASURES[:NUM_HEADLINES]}
    facts = {key: metrics[key] for key in ("protocol", "num_images", "image_size")}
    return draft.publish(facts | {key: value for key, value in headline.items() if value is not None})


def write_files(draft: "Draft", evaluated: "Evaluated") -> None:
    """`metrics.json`, `counts.npy`, the pictures, the training log that the curves are drawn from, and the page."""
    import numpy as np

    from vqpipe.reports import page
    from vqpipe.reports.evaluation import counts_to_array, evaluation_page

    with draft.write("metrics.json") as path:
        text = json.dumps(evaluated.metrics, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    with draft.write("counts.npy") as path:
        np.save(path, counts_to_array(evaluated.counts))
    for number, shown in enumerate(evaluated.shown):
        for side, png in (("original", shown.original), ("reconstruction", shown.reconstruction)):
            with draft.write(f"pictures/{number:02d}-{side}.png") as path:
                path.write_bytes(png)
    if evaluated.history:
        with draft.write("training.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in evaluated.history), encoding="utf-8")
    footer = f"Made by vqpipe {evaluated.metrics['versions']['vqpipe']}, protocol {evaluated.metrics['protocol']}."
    with draft.write("report.html") as path:
        path.write_text(page.render(evaluation_page(evaluated, evaluated.name, footer)), encoding="utf-8")


def number_table(evaluated: "Evaluated") -> Any:
    """The numbers for the terminal."""
    from rich import box
    from rich.table import Table

    from vqpipe.reports.evaluation import MEASURES, value_of, written

    table = Table("measure", "value", "convention", box=box.SIMPLE, pad_edge=False)
    table.columns[1].justify = "right"
    for each in MEASURES:
        value = value_of(evaluated.metrics, each.key)
        if value is not None:
            table.add_row(each.label, written(each, value), each.convention)
    for name in evaluated.metrics["not_computed"]:
        table.add_row(name, "–", "left out: the report says why")
    return table


def show(name: str, original: Any, reconstruction: Any, psnr: float) -> "Shown":
    """One picture for the report; an infinite PSNR (equal images) is left out."""
    from vqpipe.reports.evaluation import Shown
    from vqpipe.reports.pictures import to_png

    return Shown(name, to_png(original), to_png(reconstruction), psnr if psnr < float("inf") else None)


def training_log(artifact: "Artifact | None") -> list[dict[str, Any]]:
    """The rows that `train` logged, where the tokenizer carries them."""
    from vqpipe.training.history import read_history

    return read_history(artifact.file("metrics.jsonl")) if artifact and artifact.names("metrics.jsonl") else []


def versions(*others: str) -> dict[str, str]:
    """Of what numbers depend on."""
    packages = ("vqpipe", "torch", "lpips", "torch-fidelity", "pillow", *others)
    return {name: metadata.version(name) for name in packages}
