"""What evaluations found, as pages: one tokenizer (`evaluation_page`), several together (`comparison_page`)."""

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
from vqpipe.metrics.evaluation import comparable
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
    Measure("perplexity", "perplexity", "exp of the entropy of the codes, mean over groups", "", True, 0),
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


def refuse_unlike(evaluations: Sequence[Evaluated], places: Sequence[str]) -> None:
    """Numbers of different protocols, sizes or images never share a column.

    Raises:
        ArtifactError: two evaluations differ; both are named, and the key.
    """
    for other, place in zip(evaluations[1:], places[1:], strict=True):
        key = comparable(evaluations[0].metrics, other.metrics)
        if key is not None:
            values = [short(evaluation.metrics.get(key)) for evaluation in (evaluations[0], other)]
            raise ArtifactError(
                f"{places[0]} and {place} cannot be compared: their {key} differs ({values[0]} and {values[1]})",
                "Evaluate both on the same images with the same protocol and image size",
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


def comparison_page(evaluations: Sequence[Evaluated], title: str, footer: str = "") -> page.ReportPage:
    """The page of several tokenizers on the same images: one table, maps, pictures and curves side by side."""
    first = evaluations[0].metrics
    named = {evaluated.name: evaluated for evaluated in evaluations}
    headline, others = measured(evaluations, MEASURES[:NUM_HEADLINES]), measured(evaluations, MEASURES[NUM_HEADLINES:])
    caption = f"Protocol {first['protocol']}, the same images for all. The best of each column is set off."
    conventions = ". ".join(f"{measure.label}: {measure.convention}" for measure in others) + "."
    sections: list[page.Section] = [
        comparison_table(f"{first['num_images']:,} images at {first['image_size']} px", evaluations, headline, caption),
        page.Maps("Which codes are in use", [map_of(evaluated) for evaluated in evaluations], MAP_CAPTION),
    ]
    if together := side_by_side(evaluations):
        sections.append(page.Pictures("The same images, reconstructed by each", together))
    used = {name: evaluated.metrics["utilization"] for name, evaluated in named.items()}
    drawn = [
        plots.bars("Codes in use", used, "Share chosen at least once over all images.", share=True),
        plots.code_frequency({name: evaluated.counts for name, evaluated in named.items()}),
        *plots.training_curves({name: evaluated.history for name, evaluated in named.items() if evaluated.history}),
    ]
    sections.append(page.Plots("Codes and training", drawn))
    sections.append(comparison_table("Other conventions", evaluations, others, conventions))
    if missing := reasons(evaluations):
        sections.append(page.Reasons("Left out, and why", missing))
    sections.append(page.Lineage("Made from", [evaluated.lineage for evaluated in evaluations]))
    commands = list(dict.fromkeys(command for evaluated in evaluations for command in evaluated.commands))
    sections.append(page.Commands("Make it again", commands))
    return page.ReportPage(title, f"{len(evaluations)} tokenizers, measured alike", sections, footer)


def comparison_table(
    title: str, evaluations: Sequence[Evaluated], measures: Sequence[Measure], caption: str
) -> page.Table:
    """A row per tokenizer, a column per measure."""
    header = ["tokenizer", "codebook", *(measure.label for measure in measures)]
    rows = [[page.Cell(text, best) for text, best in row] for row in comparison_rows(evaluations, measures)]
    return page.Table(title, header, rows, caption)


def comparison_rows(evaluations: Sequence[Evaluated], measures: Sequence[Measure]) -> list[list[tuple[str, bool]]]:
    """(text, whether it is its column's best) of every cell: the tokenizer, its codebook, and each measure."""
    best = {}
    for measure in measures:
        values = [v for e in evaluations if (v := value_of(e.metrics, measure.key)) is not None]
        if measure.higher_is_better is not None and len(set(values)) > 1:
            best[measure.key] = max(values) if measure.higher_is_better else min(values)
    rows = []
    for evaluated in evaluations:
        values = [value_of(evaluated.metrics, measure.key) for measure in measures]
        cells = [
            (written(measure, value), value is not None and value == best.get(measure.key))
            for measure, value in zip(measures, values, strict=True)
        ]
        rows.append([(evaluated.name, False), (codes(evaluated.metrics["tokenizer"]), False), *cells])
    return rows


def measured(evaluations: Sequence[Evaluated], measures: Sequence[Measure] = MEASURES) -> list[Measure]:
    """The measures that at least one evaluation has."""
    return [m for m in measures if any(value_of(evaluated.metrics, m.key) is not None for evaluated in evaluations)]


def reasons(evaluations: Sequence[Evaluated]) -> dict[str, str]:
    """Why numbers are absent: once where it is the same for all, else under each one's name."""
    missing = [evaluated.metrics["not_computed"] for evaluated in evaluations]
    shared = {key: reason for key, reason in missing[0].items() if all(each.get(key) == reason for each in missing)}
    own = {
        f"{evaluated.name}: {key}": reason
        for evaluated, each in zip(evaluations, missing, strict=True)
        for key, reason in each.items()
        if key not in shared
    }
    return shared | own


def command_of(artifact: Artifact) -> str:
    """The command that published `artifact`."""
    return shlex.join(["vqpipe", *artifact.manifest.provenance["command"][1:]])


def headline_note(measure: Measure, metrics: Mapping[str, Any]) -> str:
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


def side_by_side(evaluations: Sequence[Evaluated]) -> list[page.Picture]:
    """The originals that every report shows, with each one's reconstruction."""
    by_original = [{shown.original: shown for shown in evaluated.shown} for evaluated in evaluations]
    return [
        page.Picture(
            shown.name,
            pictures.data_uri(original),
            [
                page.Version(e.name, pictures.data_uri(known[original].reconstruction), decibels(known[original].psnr))
                for e, known in zip(evaluations, by_original, strict=True)
            ],
        )
        for original, shown in by_original[0].items()
        if all(original in known for known in by_original)
    ]


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


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
