"""What an evaluation found: the measures as people read them, a report read back, and the page of one tokenizer.

Letters: G groups, K codes a group.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqpipe.artifacts import Artifact
from vqpipe.errors import ArtifactError
from vqpipe.metrics.usage import MOST_COUNTERS, as_rows, from_rows, times_chosen
from vqpipe.reports import page, pictures, plots, rates

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
MOST_MAPPED = 2**22
"""Codes, over all groups, up to which the page draws each as a cell."""


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
    """int64[G, K], sparse for very large codebooks; [0, 0] for continuous latents."""
    shown: Sequence[Shown] = ()
    history: Sequence[Row] = ()
    """The log of the tokenizer's training, where there is one."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()

    @property
    def is_discrete(self) -> bool:
        """Whether there are ids; not with continuous latents."""
        return self.counts.shape[0] > 0


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
        counts=counts_from_array(np.load(report.file("counts.npy"), allow_pickle=False), metrics["tokenizer"]),
        shown=shown,
        history=[json.loads(line) for line in log.splitlines()],
        lineage=report.lineage,
        commands=[command_of(report)],
    )


def counts_to_array(counts: Tensor) -> np.ndarray:
    """The content of `counts.npy`: int64[G, K].

    Sparse counts become int64[n, 3]: group, id and how often, of the n codes in use.
    """
    return (as_rows(counts) if counts.is_sparse else counts).numpy()


def counts_from_array(array: np.ndarray, tokenizer: Mapping[str, Any]) -> Tensor:
    """Undoes `counts_to_array`; `tokenizer` is that of `metrics.json`."""
    counts = torch.from_numpy(array)
    num_groups, codebook_size = tokenizer["num_groups"] or 0, tokenizer["codebook_size"] or 0
    return from_rows(counts, num_groups, codebook_size) if num_groups * codebook_size > MOST_COUNTERS else counts


def value_of(metrics: Mapping[str, Any], key: str) -> float | None:
    """A measure's number, or None where it was not computed."""
    if key == "rfid":
        return metrics["rfid"].get(metrics["protocol"])
    if key == "perplexity":
        groups = metrics.get("perplexity_per_group")
        return sum(groups) / len(groups) if groups else None
    return metrics.get(key)


def bits_first(measures: Iterable[Measure]) -> list[Measure]:
    """The measures, what they cost in front."""
    return sorted(measures, key=lambda measure: measure.key != "bits_per_pixel")


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
        page.Number(m.label, written(m, value_of(metrics, m.key), unit=False), m.unit, headline_note(m, evaluated))
        for m in MEASURES[:NUM_HEADLINES]
        if m in present
    ]
    table = [[m.label, written(m, value_of(metrics, m.key)), m.convention] for m in present]
    sections: list[page.Section] = [
        page.Numbers(f"{metrics['num_images']:,} images at {metrics['image_size']} px", headline)
    ]
    if evaluated.is_discrete:
        maps, frequency = maps_of([evaluated]), plots.code_frequency(evaluated.counts)
        sections.append(page.Maps("Which codes are in use", maps, MAP_CAPTION if maps else "", [frequency]))
    if prefixes := metrics.get("prefixes"):
        sections.append(prefix_table(prefixes, metrics))
        sections.append(page.Plots("Quality against bits", rates.k_curves({evaluated.name: prefixes})))
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


def prefix_table(prefixes: Sequence[Row], metrics: Mapping[str, Any]) -> page.Table:
    """The k-curve in numbers: a row for each k."""
    rows = [{"protocol": metrics["protocol"], "rfid": {}, **row} for row in prefixes]
    shown = bits_first([measure for measure in MEASURES if measure.key in prefixes[-1]])
    cells = [[str(row["groups"]), *(written(m, value_of(row, m.key)) for m in shown)] for row in rows]
    caption = (
        f"Each image was encoded once, then decoded from the first k of its {len(rows)} groups alone, the codes of the "
        "others being zero, as in MGVQ's Table 6."
    )
    return page.Table("From the first groups only", ["groups", *(m.label for m in shown)], cells, caption)


def command_of(artifact: Artifact) -> str:
    """The command that published `artifact`."""
    return shlex.join(["vqpipe", *artifact.manifest.provenance["command"][1:]])


def headline_note(measure: Measure, evaluated: Evaluated) -> str:
    """The small line under a headline number: of how many, by which convention."""
    metrics, tokenizer = evaluated.metrics, evaluated.metrics["tokenizer"]
    match measure.key:
        case "utilization":
            return f"{num_used(evaluated.counts):,} of {codes(tokenizer)}, over all images"
        case "perplexity":
            several = tokenizer["num_groups"] > 1
            return f"of at most {tokenizer['codebook_size']:,}" + (", mean over groups" if several else "")
        case "bits_per_pixel":
            return f"{metrics['num_tokens_per_image']:,} tokens an image"
        case "rfid":
            return f"protocol {metrics['protocol']}, against the same crops"
    return measure.convention


MAP_CAPTION = (
    "Each cell is one code, in the codebook's order. Dark: never chosen on these images. "
    "The brighter, the more often chosen (logarithmic)."
)

ERROR_CAPTION = (
    f"Error: mean over R, G and B; black for none, brightest from {pictures.ERROR_PEAK} of 255 grey levels on."
)


def maps_of(evaluations: Sequence[Evaluated]) -> list[page.Map]:
    """The codebook of each tokenizer, a cell a code; of those whose codebook is small enough to be drawn."""
    return [map_of(e) for e in evaluations if e.is_discrete and e.counts.numel() <= MOST_MAPPED]


def map_of(evaluated: Evaluated) -> page.Map:
    used, total = num_used(evaluated.counts), evaluated.counts.numel()
    headline = f"{used:,} of {total:,} codes in use ({used / total:.1%})"
    alt = f"Codebook of {evaluated.name}, a cell a code: {headline}"
    return page.Map(evaluated.name, pictures.data_uri(pictures.codebook_map(evaluated.counts)), headline, alt)


def num_used(counts: Tensor) -> int:
    """How many codes of all groups were chosen at least once."""
    return sum(map(len, times_chosen(counts)))


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
    what = f"{tokenizer['quantizer']} quantizer, {codes(tokenizer)}"
    if tokenizer["codebook_size"] is None:
        what = f"Continuous latents of {' x '.join(map(str, tokenizer['latent_shape']))}"
    return f"{what}, downsample factor {tokenizer['downsample_factor']}. Protocol {metrics['protocol']}."


def codes(tokenizer: Mapping[str, Any]) -> str:
    """ "4,096 codes", or "4 x 1,024 codes" with groups; "no codes" with continuous latents."""
    if tokenizer["codebook_size"] is None:
        return "no codes"
    groups = f"{tokenizer['num_groups']} x " if tokenizer["num_groups"] > 1 else ""
    return f"{groups}{tokenizer['codebook_size']:,} codes"


def decibels(psnr: float | None) -> str:
    return "" if psnr is None else f"{psnr:.1f} dB"
