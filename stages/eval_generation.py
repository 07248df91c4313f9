"""`vqpipe eval-generation`: samples and references -> a report: gFID and its kin, with the protocol, and a page."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import BatchSize, Device, ImageSize, Limit, NumWorkers, Out, Seed

if TYPE_CHECKING:
    import torch

    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.data.images import ImageSet
    from vqpipe.metrics.generation import GenerationProtocol, Reference
    from vqpipe.metrics.networks import FeatureNetworks
    from vqpipe.metrics.populations import Population

SHEET_IMAGES, SHEET_COLUMNS = 64, 8
FEATURE_GB = 8.0
"""Of features kept of the samples over all ranks; 50,000 samples take 0.6."""


@dataclass(frozen=True)
class Measuring:
    """How both sides are looked at."""

    protocol: "GenerationProtocol"
    image_size: int
    networks: "FeatureNetworks"
    extractors: dict[str, int]
    """The user's, with their number of features."""
    batch_size: int
    num_workers: int
    max_skipped: float
    device: "torch.device"

    @property
    def looks(self) -> bool:
        """Whether there is any network to look with."""
        return self.networks.inception is not None or bool(self.extractors)

    def population(self, kept: tuple[str, ...], moments: bool = True) -> "Population":
        """An empty one."""
        from vqpipe import distributed
        from vqpipe.metrics.generation import MOMENTS
        from vqpipe.metrics.populations import Asked, Population

        asked = Asked(
            moments=tuple(MOMENTS.values()) if moments else (),
            kept=kept,
            most_bytes=FEATURE_GB * 1e9 / 2 / distributed.world_size(),
            extractor_sizes=self.extractors if moments else {},
        )
        return Population(self.networks, self.protocol.resize, asked, self.device)

    def batches(self, images: "ImageSet", stop: int, rule: str, raw: bool) -> "Iterator[tuple[list[int], Any, Any]]":
        """This rank's images: (their places, uint8[B, 3, S, S], float32[B, 3, 299, 299] where `raw`).

        Raises:
            DataError: more than the share that is allowed cannot be read.
        """
        from collections import Counter

        from stages.evaluating import Views
        from vqpipe import distributed
        from vqpipe.data.batches import OrderedBatches, check_skipped

        rank, ranks = distributed.rank(), distributed.world_size()
        num_batches = -(-stop // self.batch_size)
        first, last = (num_batches * r // ranks * self.batch_size for r in (rank, rank + 1))
        views = Views([rule], (self.image_size, self.image_size), raw)
        ordered = OrderedBatches(
            images,
            image_size=self.image_size,
            batch_size=self.batch_size,
            start=first,
            stop=min(last, stop),
            num_workers=self.num_workers,
            transform=views,
        )
        for batch in ordered:
            crops, whole = views.split(batch.images)
            yield batch.indices, crops[rule].to(self.device), None if whole is None else whole.to(self.device)
        skipped: Counter[str] = sum((Counter(part) for part in distributed.gather_objects(ordered.skipped)), Counter())
        check_skipped(dict(skipped), stop, self.max_skipped)


def eval_generation(
    images: Annotated[list[str], typer.Option("--images", help="The samples: as in vqpipe eval.", metavar="WHERE")],
    reference: Annotated[
        list[str],
        typer.Option(
            "--reference", help="Photographs, as --images; their statistics; or ADM's .npz.", metavar="WHERE|DIR|FILE"
        ),
    ],
    out: Out,
    protocol: Annotated[str, typer.Option("--protocol", help="See above.", metavar="adm|cleanfid-raw")] = "adm",
    image_size: ImageSize = None,
    weights: console.Weights = None,
    extractor: console.Extractor = None,
    extractor_weights: console.ExtractorWeights = None,
    statistics: Annotated[
        Path | None, typer.Option("--statistics", help="Where the references' go: OUT.reference.", metavar="DIR")
    ] = None,
    fid_min_images: Annotated[
        int, typer.Option("--fid-min-images", help="Fewer leave FID and sFID out.", metavar="N", min=2)
    ] = 2049,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = -1,
    max_skipped: console.MaxSkipped = 0.01,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Measure generated images: gFID, sFID, KID, Inception Score, precision and recall.

    Papers measure 50,000 samples, classes in equal parts, against the training
    set. What is known of the references is computed once, into an artifact of
    its own, which --reference takes too, as it takes ADM's
    VIRTUAL_imagenet256_labeled.npz.

    Protocols:
    adm (references cut by ADM's crop, TF1 resize: LlamaGen, MGVQ, DiT, SiT),
    cleanfid-raw (references whole, clean-fid's resize: VQGAN-LC).

    Looked for in --weights DIR: weights-inception-2015-12-05-6726825d.pth.
    Without it every number it gives is left out, with the reason.
    """
    with console.session(device, seed) as where:
        from stages.evaluate import add_extractor
        from vqpipe import artifacts
        from vqpipe.data.images import open_images
        from vqpipe.metrics.generation import protocol_of
        from vqpipe.metrics.networks import feature_size, find_networks

        samples = open_images(images)
        networks = find_networks(weights, where)
        named = add_extractor(networks, extractor, extractor_weights, where)
        measuring = Measuring(
            protocol=protocol_of(protocol),
            image_size=image_size or size_of(images),
            networks=networks,
            extractors={name: feature_size(name, network, where) for name, network in networks.extractors.items()},
            batch_size=batch_size or 32,
            num_workers=num_workers,
            max_skipped=max_skipped,
            device=where,
        )
        looked = {"protocol": protocol, "image_size": measuring.image_size, "weights": inception_of(networks)}
        looked |= {"extractor": named}
        target = statistics or out.with_name(f"{out.name}.reference")
        known, source = references(reference, target, measuring, looked)
        request = looked | {"limit": limit, "fid_min_images": fid_min_images, "max_skipped": max_skipped}
        draft = artifacts.start(out, "report", request, {"images": samples, "reference": source})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            stop = min(limit or len(samples), len(samples))
            metrics, sheet = measure(samples, stop, known, measuring, fid_min_images)
            return console.finished(publish(draft, metrics, sheet))


def size_of(images: list[str]) -> int:
    """What `generate` made them at, where all say so alike; else 256."""
    from vqpipe import artifacts
    from vqpipe.data.images import is_artifact

    folders = [Path(each) for each in images]
    if not all("://" not in str(folder) and folder.is_dir() and is_artifact(folder) for folder in folders):
        return 256
    sizes = {artifacts.open_artifact(folder).facts.get("image_size") for folder in folders}
    found = sizes.pop()
    return found if not sizes and isinstance(found, int) else 256


def inception_of(networks: "FeatureNetworks") -> dict[str, str]:
    """The hashes of the weights that are looked with."""
    from vqpipe.weights import LPIPS_BACKBONES

    perceptual = {name for name, _ in LPIPS_BACKBONES.values()}
    return {name: digest for name, digest in networks.sha256.items() if name not in perceptual}


def references(
    names: list[str], target: Path, measuring: Measuring, looked: dict[str, Any]
) -> "tuple[Reference, Artifact | ImageSet | str]":
    """What is known of the references, and what it was read from: computed and published where it is not known yet.

    Raises:
        ConfigError: the statistics are of another protocol, size or network.
    """
    from vqpipe import artifacts
    from vqpipe.config import difference
    from vqpipe.data.images import is_artifact, open_images
    from vqpipe.errors import ConfigError
    from vqpipe.files import hash_file
    from vqpipe.metrics.generation import Reference

    first = Path(names[0])
    if len(names) == 1 and first.suffix == ".npz":
        if measuring.extractors or measuring.protocol.name != "adm":
            raise ConfigError(f"{first} is for the protocol adm and Inception alone", "Give the images themselves")
        return adm_reference(first, measuring), hash_file(first)
    if len(names) == 1 and first.is_dir() and is_artifact(first):
        artifact = artifacts.open_artifact(first)
        if artifact.kind == "statistics":
            if (before := {key: artifact.config[key] for key in looked}) != looked:
                raise ConfigError(f"{first} is otherwise than asked: {difference(before, looked)}", "Measure it alike")
            return Reference.load(artifact.whole("statistics.safetensors"), measuring.device), artifact
    images = open_images(names)
    if not measuring.looks:
        return Reference(len(images)), images
    draft = artifacts.start(target, "statistics", looked, {"images": images})
    if isinstance(draft, artifacts.Draft):
        with draft:
            found = look_at(images, measuring)
            published = save_reference(draft, found)
            console.say(f"reference statistics: {published.path}")
    else:
        published = draft
    return Reference.load(published.whole("statistics.safetensors"), measuring.device), published


def save_reference(draft: "Draft", found: "Reference") -> "Artifact":
    from vqpipe import distributed

    if distributed.is_main():
        with draft.write("statistics.safetensors") as path:
            found.save(path)
    return draft.publish({"num_images": found.num_images})


def look_at(images: "ImageSet", measuring: Measuring) -> "Reference":
    """Means, covariances and some kept features of the references."""
    import numpy as np

    from vqpipe import distributed
    from vqpipe.metrics.generation import NUM_KEPT, Reference

    everything, some = measuring.population(()), measuring.population(("pool",), moments=False)
    chosen = set(np.linspace(0, len(images) - 1, min(NUM_KEPT, len(images))).round().astype(int).tolist())
    raw = measuring.protocol.raw and measuring.networks.inception is not None
    count = 0
    with console.progress("references", len(images) // distributed.world_size()) as bar:
        for places, crops, whole in measuring.batches(images, len(images), "adm", raw):
            everything.update(crops, whole)
            kept = [i for i, place in enumerate(places) if place in chosen]
            if kept:
                some.update(crops[kept], None if whole is None else whole[kept])
            count += len(places)
            bar.advance(len(places))
    total = sum(distributed.gather_objects(count))
    inception = measuring.networks.inception is not None
    features = some.merged_kept(("pool",))["pool"] if inception else None
    return Reference(total, everything.merged_moments(), everything.merged_named(), features)


def adm_reference(path: Path, measuring: Measuring) -> "Reference":
    """ADM's file, with the features of its images, all of them on every rank."""
    import torch

    from vqpipe.metrics.generation import read_adm_file

    found, images = read_adm_file(path, measuring.device)
    if measuring.networks.inception is not None:
        parts = images.split(measuring.batch_size)
        features = [measuring.networks.inception(part.to(measuring.device))["pool"].cpu() for part in parts]
        found.kept = torch.cat(features)
    return found


def measure(
    images: "ImageSet", stop: int, reference: "Reference", measuring: Measuring, least: int
) -> "tuple[dict[str, Any], bytes]":
    """The content of metrics.json, and a contact sheet of the samples."""
    import torch

    from vqpipe import distributed
    from vqpipe.errors import DataError
    from vqpipe.metrics.generation import compare
    from vqpipe.reports.pictures import contact_sheet

    inception = measuring.networks.inception is not None
    seen = measuring.population(("pool", "logits") if inception else ())
    shown = {place * stop // min(SHEET_IMAGES, stop) for place in range(min(SHEET_IMAGES, stop))}
    count, pictures = 0, list[torch.Tensor]()
    with console.progress("samples", stop // distributed.world_size()) as bar:
        for places, crops, _ in measuring.batches(images, stop, "cover", raw=False):
            if measuring.looks:
                seen.update(crops)
            pictures += [crop.cpu() for place, crop in zip(places, crops, strict=True) if place in shown]
            count += len(places)
            bar.advance(len(places))
    total = sum(distributed.gather_objects(count))
    if total == 0:
        raise DataError("there are no samples to measure", "Check --images and --limit")
    absent = None if inception else measuring.networks.absent["rfid"].replace("rFID needs", "these need")
    numbers, reasons = compare(seen, reference, total, least=least, absent=absent)
    everything = [picture for part in distributed.gather_objects(pictures) for picture in part]
    metrics = {
        "protocol": measuring.protocol.name,
        "num_images": total,
        "num_references": reference.num_images,
        "image_size": measuring.image_size,
        **numbers,
        "not_computed": reasons,
        "weights": inception_of(measuring.networks),
    }
    return metrics, contact_sheet(torch.stack(everything), SHEET_COLUMNS)


def publish(draft: "Draft", metrics: dict[str, Any], sheet: bytes) -> "Artifact":
    """Write the report's files and finish it."""
    from vqpipe import distributed
    from vqpipe.provenance import command_again
    from vqpipe.reports import page
    from vqpipe.reports.generated import Generated, generated_page

    if distributed.is_main():
        command = command_again()
        lineage = {"kind": "report", "name": "(this page)", "content": "", "inputs": draft.lineage}
        with draft.write("metrics.json") as path:
            text = json.dumps({**metrics, "commands": [command]}, indent=2, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        with draft.write("contact-sheet.png") as path:
            path.write_bytes(sheet)
        with draft.write("report.html") as path:
            samples = Generated(draft.lineage["images"]["name"], metrics, sheet, lineage, [command])
            path.write_text(page.render(generated_page([samples], draft.out.name)), encoding="utf-8")
        for name, value in metrics.items():
            if isinstance(value, float | dict) and name in ("fid", "sfid", "inception_score", "kid", "prc", "frechet"):
                console.say(f"{name}: {json.dumps(value)}")
        for name in metrics["not_computed"]:
            console.say(f"{name}: left out, the report says why")
    headline = ("protocol", "num_images", "image_size", "fid", "sfid")
    return draft.publish({str(name): metrics[name] for name in headline if name in metrics})
