"""What an evaluation found: the measures as people read them, a report read back, and the page of one tokenizer."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe.artifacts import Artifact
from vqpipe.errors import ArtifactError
from vqpipe.reports import page, pictures, plots

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number of `metrics.json` as people read it."""

    key: str
    label: str
    convention: str
    unit: str = ""
    higher_is_better: bool | None = None
    digits: int = 2


MEASURES = (
    Measure("psnr", "PSNR", "RGB, uint8, mean over images", "dB", True),
    Measure("ssim", "SSIM", "Gaussian window 11, sigma 1.5, RGB", "", True, 3),
    Measure("lpips_alex", "LPIPS (AlexNet)", "lpips v0.1 on [-1, 1]", "", False, 3),
    Measure("lpips_vgg", "LPIPS (VGG)", "lpips v0.1 on [-1, 1]", "", False, 3),
    Measure("rfid", "rFID", "against the same crops, torch-fidelity's Inception", "", False),
    Measure("utilization", "codes in use", "share chosen at least once over all images", "%", True, 1),
    Measure("perplexity", "perplexity", "exp of the entropy of the codes, mean over groups", "", True, 1),
    Measure("bits_per_pixel", "bits per pixel", "tokens x log2(codes) / pixels", "", None, 3),
    Measure("psnr_of_mean_mse", "PSNR of the mean error", "as MGVQ's released evaluation", "dB", True),
    Measure("psnr_y", "PSNR of luma", "BT.601 studio range, as VQGAN-LC's evaluation", "dB", True),
    Measure("ssim_uniform7", "SSIM, uniform window 7", "scikit-image on uint8, as MGVQ's evaluation", "", True, 3),
)
NUM_HEADLINES = 8
"""The first measures are the page's headline, the others conventions to compare papers by."""


@dataclass(frozen=True)
class Shown:
    """One picture of a report, as PNG files."""

    name: str
    original: bytes
    reconstruction: bytes
    psnr: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """A tokenizer's evaluation: what `metrics.json`, `counts.npy`, `pictures/` and the manifest of its report hold."""

    name: str
    metrics: Mapping[str, Any]
    counts: Tensor
    """int64[G, K]."""
    shown: Sequence[Shown] = ()
    history: Sequence[Row] = ()
    """The log of the tokenizer's training, where there is one."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()


def open_evaluation(report: Artifact) -> Evaluated:
    """Read a report artifact back.

    Raises:
        ArtifactError: the report is not one that `eval` made.
    """
    metrics = json.loads(report.file("metrics.json").read_text(encoding="utf-8"))
    if "protocol" not in metrics or "counts.npy" not in report.manifest.files:
        raise ArtifactError(
            f"{report.path} is a report, but not of an evaluation", "Name reports that vqpipe eval made"
        )
    log = report.file("training.jsonl").read_text(encoding="utf-8") if report.names("training.jsonl") else ""
    notes = metrics.get("pictures", [])
    shown = [
        Shown(note["name"], report.file(f"{stem}-original.png").read_bytes(), again.read_bytes(), note["psnr"])
        for note in notes
        for stem in [f"pictures/{note['number']:02d}"]
        for again in [report.file(f"{stem}-reconstruction.png")]
    ]
    return Evaluated(
        name=report.lineage["inputs"].get("tokenizer", {}).get("name") or report.name,
        metrics=metrics,
        counts=torch.from_numpy(np.load(report.file("counts.npy"), allow_pickle=False)),
        shown=shown,
        history=[json.loads(line) for line in log.splitlines()],
        lineage=report.lineage,
        commands=[command_of(report)],
    )


def value_of(metrics: Mapping[str, Any], key: str) -> float | None:
    """A measure's number, or None where it was not computed."""
    if key == "rfid":
        return metrics["rfid"].get(metrics["protocol"])
    if key == "perplexity":
        groups = metrics["perplexity_per_group"]
        return sum(groups) / len(groups)
    return metrics.get(key)


def written(measure: Measure, value: float | None, unit: bool = True) -> str:
    """A number as text: 22.14 dB, 99.5 %; a dash where there is none."""
    if value is None:
        return "–"
    scaled = 100 * value if measure.unit == "%" else value
    return f"{scaled:,.{measure.digits}f}" + (f" {measure.unit}" if unit and measure.unit else "")


def evaluation_page(evaluated: Evaluated, title: str, footer: str = "") -> page.ReportPage:
    """The page of one tokenizer: numbers, codes in use, pictures, plots, what is missing, where it came from."""
    metrics = evaluated.metrics
    present = [measure for measure in MEASURES if value_of(metrics, measure.key) is not None]
    headline = [
        page.Number(m.label, written(m, value_of(metrics, m.key), unit=False), m.unit, headline_note(m, metrics))
        for m in MEASURES[:NUM_HEADLINES]
        if m in present
    ]
    table = [[m.label, written(m, value_of(metrics, m.key)), m.convention] for m in present]
    frequency = plots.code_frequency(evaluated.counts)
    sections: list[page.Section] = [
        page.Numbers(f"{metrics['num_images']:,} images at {metrics['image_size']} px", headline),
        page.Maps("Which codes are in use", [map_of(evaluated)], MAP_CAPTION, [frequency]),
    ]
    if evaluated.shown:
        triples = [triple(shown) for shown in evaluated.shown]
        sections.append(page.Pictures("Originals and reconstructions", triples, ERROR_CAPTION))
    if curves := plots.training_curves(evaluated.history):
        sections.append(page.Plots("How it was trained", curves))
    header = ["measure", "value", "convention"]
    sections.append(page.Table("Every number, with its convention", header, table, prose=header[2:]))
    if metrics["not_computed"]:
        sections.append(page.Reasons("Left out, and why", metrics["not_computed"]))
    sections.append(page.Lineage("Made from", [evaluated.lineage]))
    sections.append(page.Commands("Make it again", evaluated.commands))
    return page.ReportPage(title, subtitle(metrics), sections, footer)


def command_of(artifact: Artifact) -> str:
    """The command that published `artifact`."""
    return shlex.join(["vqpipe", *artifact.manifest.provenance["command"][1:]])


def headline_note(measure: Measure, metrics: Mapping[str, Any]) -> str:
    """The small line under a headline number: of how many, by which convention."""
    size = metrics["tokenizer"]["codebook_size"]
    groups = metrics["tokenizer"]["num_groups"]
    notes = {
        "utilization": f"of {codes(metrics['tokenizer'])}, over all images",
        "perplexity": f"of at most {size:,}" + (", mean over groups" if groups > 1 else ""),
        "bits_per_pixel": f"{metrics['num_tokens_per_image']:,} tokens an image",
        "rfid": f"protocol {metrics['protocol']}, against the same crops",
    }
    return notes.get(measure.key, measure.convention)


MAP_CAPTION = (
    "Each cell is one code, in the codebook's order. Dark: never chosen on these images. "
    "The brighter, the more often chosen (logarithmic)."
)

ERROR_CAPTION = (
    f"Error: mean over R, G and B; black for none, brightest from {pictures.ERROR_PEAK} of 255 grey levels on."
)


def map_of(evaluated: Evaluated) -> page.Map:
    used, total = int((evaluated.counts > 0).sum()), evaluated.counts.numel()
    headline = f"{used:,} of {total:,} codes in use ({used / total:.1%})"
    alt = f"Codebook of {evaluated.name}, a cell a code: {headline}"
    return page.Map(evaluated.name, pictures.data_uri(pictures.codebook_map(evaluated.counts)), headline, alt)


def triple(shown: Shown) -> page.Picture:
    """Original, reconstruction, error."""
    error = pictures.error_picture(pictures.from_png(shown.original), pictures.from_png(shown.reconstruction))
    versions = [
        page.Version("reconstruction", pictures.data_uri(shown.reconstruction), decibels(shown.psnr)),
        page.Version("error", pictures.data_uri(error)),
    ]
    return page.Picture(shown.name, pictures.data_uri(shown.original), versions)


def subtitle(metrics: Mapping[str, Any]) -> str:
    tokenizer = metrics["tokenizer"]
    return (
        f"{tokenizer['quantizer']} quantizer, {codes(tokenizer)}, downsample factor {tokenizer['downsample_factor']}. "
        f"Protocol {metrics['protocol']}."
    )


def codes(tokenizer: Mapping[str, Any]) -> str:
    """ "4,096 codes", or "4 x 1,024 codes" with groups."""
    groups = f"{tokenizer['num_groups']} x " if tokenizer["num_groups"] > 1 else ""
    return f"{groups}{tokenizer['codebook_size']:,} codes"


def decibels(psnr: float | None) -> str:
    return "" if psnr is None else f"{psnr:.1f} dB"
