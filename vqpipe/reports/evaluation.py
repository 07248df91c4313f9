"""The result of an evaluation: its measures with labels and units, by protocol, and reading a report.

Shapes: G groups, K codes per group.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vqpipe.artifacts import Artifact
from vqpipe.errors import ArtifactError
from vqpipe.files import read_rows
from vqpipe.metrics.distortion import MAX_LISTED
from vqpipe.metrics.protocols import IN_WORDS
from vqpipe.metrics.usage import MAX_COUNTERS, as_rows, from_rows
from vqpipe.reports.page import Cell, Reasons, Section, Table
from vqpipe.reports.pictures import ImagePair
from vqpipe.weights import PUBLISHED_FILES
from vqpipe.words import counted, percent

Metrics = Mapping[str, Any]
"""The content of `metrics.json`."""


@dataclass(frozen=True)
class Measure:
    """A number of `metrics.json` with its label, convention and unit."""

    key: str
    label: str
    convention: str
    unit: str = ""
    higher_is_better: bool | None = None
    digits: int = 2

    def best(self, values: Iterable[float | None]) -> float | None:
        """The best value, or None if fewer than two differ or the measure has no direction."""
        present = {value for value in values if value is not None}
        if self.higher_is_better is None or len(present) < 2:
            return None
        return max(present) if self.higher_is_better else min(present)


MEASURES = (
    Measure("psnr", "PSNR", "RGB, uint8, mean over images", "dB", True),
    Measure("ssim", "SSIM", "Gaussian window 11, sigma 1.5, RGB", "", True, 3),
    Measure("lpips_alex", "LPIPS (AlexNet)", "lpips v0.1 on [-1, 1]", "", False, 3),
    Measure("lpips_vgg", "LPIPS (VGG)", "lpips v0.1 on [-1, 1]", "", False, 3),
    Measure("rfid", "rFID", "against the references of the protocol, torch-fidelity's Inception", "", False),
    Measure("utilization", "codes in use", "share chosen at least once over all images", "%", None, 1),
    Measure("perplexity", "perplexity", "exp of the entropy of the codes, mean over groups", "", None, 1),
    Measure("bits_per_pixel", "bits per pixel", "tokens x log2(codes) / pixels", "", None, 3),
    Measure("lpips", "LPIPS", "lpips v0.1 on [-1, 1]", "", False, 3),
    Measure("perceptual_squeeze", "perceptual (SqueezeNet)", "LPIPS's formula on the weights given", "", False, 3),
    Measure("perceptual_alex", "perceptual (AlexNet)", "LPIPS's formula on the weights given", "", False, 3),
    Measure("perceptual_vgg", "perceptual (VGG)", "LPIPS's formula on the weights given", "", False, 3),
    Measure("fid", "FID", "against the references, torch-fidelity's Inception", "", False),
    Measure("sfid", "sFID", "Frechet distance of spatial features", "", False),
    Measure("kid", "KID", "mean over draws, torch-fidelity", "", False, 5),
    Measure("precision", "precision", "share within the references' third neighbors", "", True, 3),
    Measure("recall", "recall", "share of the references within the third neighbors", "", True, 3),
    Measure("inception_score", "Inception Score", "over splits, torch-fidelity", "", True, 1),
    Measure("bits_per_pixel_entropy", "bits per pixel, coded", "by each group's entropy (order 0)", "", None, 3),
    Measure("psnr_of_mean_mse", "PSNR of the mean error", "as MGVQ's released evaluation", "dB", True),
    Measure("psnr_y", "PSNR of luma", "BT.601 studio range, as VQGAN-LC's evaluation", "dB", True),
    Measure("psnr_y_full", "PSNR of full-range luma", "pyiqa's default color space", "dB", True),
    Measure("ssim_uniform7", "SSIM, uniform window 7", "scikit-image on uint8, as MGVQ's evaluation", "", True, 3),
    Measure("ssim_y", "SSIM of luma", "Gaussian window, full range", "", True, 3),
    Measure("ssim_range2", "SSIM, data range doubled", "as LlamaGen's evaluation; too high", "", True, 3),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
PRINTED = ("rfid", "psnr", "ssim", "lpips", "utilization")
"""Measures that papers print, in the order of their tables."""
OTHER_FORMULAS = ("psnr_of_mean_mse", "psnr_y", "psnr_y_full", "ssim_uniform7", "ssim_y", "ssim_range2")
"""Measures that are PSNR or SSIM by other formulas, for comparison with papers."""
SET_MEASURES = ("sfid", "kid", "precision", "recall", "inception_score")
"""Measures of `eval --metrics`: `metrics.json` has them under each protocol alone."""
OTHER_NAMES = {"prc": "precision, recall", "is": "Inception Score"}
"""Key of `not_computed` -> its name for readers, where it is that of no measure."""
NUM_HEADLINES = 8
"""The first of MEASURES are the page's headline; the others are conventions for comparison with papers."""
CODE_MEASURES = ("utilization", "perplexity", "bits_per_pixel", "bits_per_pixel_entropy")
"""Measures that are the same in all protocols."""
PROTOCOL_KEYS = {
    *(measure.key for measure in MEASURES if measure.key not in CODE_MEASURES),
    *("prc", "inception_score_of_originals", "frechet", "prefixes", "num_identical"),
}
"""Keys of `metrics.json` whose values depend on a protocol's crop and rounding."""
FRECHET = "Frechet distance over the named extractor; not FID"


@dataclass(frozen=True)
class EvaluationResult:
    """The result of a tokenizer's evaluation: the content of `metrics.json`, `counts.npy`, `pictures/` and the manifest
    of its report."""

    name: str
    metrics: Mapping[str, Any]
    counts: Tensor
    """int64[G, K], sparse for very large codebooks; [0, 0] for continuous latents."""
    shown: Sequence[ImagePair] = ()
    history: Sequence[Mapping[str, Any]] = ()
    """The rows of the tokenizer's training log, if it has one."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    analyses: Sequence[Section] = ()
    """The sections of further analyses on the page."""
    named_by: Literal["tokenizer", "report"] = "tokenizer"
    """What `name` is the name of."""

    @property
    def is_discrete(self) -> bool:
        """Whether the autoencoder has ids; False for continuous latents."""
        return self.counts.shape[0] > 0


def open_evaluation(report: Artifact) -> EvaluationResult:
    """Read a report artifact.

    Raises:
        ArtifactError: it is not a report of `eval`.
    """
    metrics = report.read_json("metrics.json")
    if "protocol" not in metrics or "counts.npy" not in report.manifest.files:
        raise ArtifactError(
            f"{report.path} is a report, but not one of vqpipe eval", "Name reports that vqpipe eval made"
        )
    notes = metrics.get("pictures", [])
    shown = [
        ImagePair(
            note["name"],
            report.file(f"{stem}-original.png").read_bytes(),
            reconstruction.read_bytes(),
            note["psnr"],
            note.get("why", "spread"),
        )
        for note in notes
        for stem in [f"pictures/{note['number']:02d}"]
        for reconstruction in [report.file(f"{stem}-reconstruction.png")]
    ]
    return EvaluationResult(
        name=input_of(report.lineage, "tokenizer").get("name") or report.name,
        metrics=metrics,
        counts=counts_from_array(np.load(report.verified_file("counts.npy"), allow_pickle=False), metrics["tokenizer"]),
        shown=shown,
        history=read_rows(report.verified_file("training.jsonl")) if report.names("training.jsonl") else [],
        lineage=report.lineage,
        commands=metrics.pop("commands", None) or [command_of(report)],
    )


def counts_to_array(counts: Tensor) -> np.ndarray:
    """The content of `counts.npy`: int64[G, K].

    Sparse counts become int64[n, 3]: group, id and how often, of the n codes in use.
    """
    return (as_rows(counts) if counts.is_sparse else counts).numpy()


def counts_from_array(array: np.ndarray, tokenizer: Mapping[str, Any]) -> Tensor:
    """Undo `counts_to_array`; `tokenizer` is that of `metrics.json`."""
    counts = torch.from_numpy(array)
    num_groups, codebook_size = tokenizer["num_groups"] or 0, tokenizer["codebook_size"] or 0
    return from_rows(counts, num_groups, codebook_size) if num_groups * codebook_size > MAX_COUNTERS else counts


def by_protocol(metrics: Metrics) -> list[dict[str, Any]]:
    """A copy of `metrics.json` for each of its protocols, with that protocol's numbers in place of the first one's.

    `psnr`, `ssim`, `lpips`, `rfid` and distances between sets are the protocol's own, `reference` is the digest of its
    crops, `conventions` names its formulas; numbers of codes, tokens and images are the same in all.
    """
    tables = []
    for name, own in (metrics.get("protocols") or {metrics["protocol"]: {}}).items():
        first = name == metrics["protocol"]
        shared = metrics if first else {key: value for key, value in metrics.items() if key not in PROTOCOL_KEYS}
        table = {**shared, **own, "protocol": name}
        table["reference"] = own.get("reference_digest", metrics["reference"])
        table["reference_kind"] = own.get("reference", "")
        table["rfid"] = {name: own["rfid"]} if "rfid" in own else metrics["rfid"] if first else {}
        if first and not metrics.keys().isdisjoint(("lpips_alex", "lpips_vgg")):
            table.pop("lpips", None)  # a copy of one of these
        tables.append(table)
    return tables


def name_of(key: str) -> str:
    """`LPIPS (AlexNet)` for `lpips_alex`: a key of `not_computed` as its readers name it."""
    return BY_KEY[key].label if key in BY_KEY else OTHER_NAMES.get(key, key.replace("_", " "))


def not_computed(results: Sequence[tuple[str, Metrics]]) -> list[Section]:
    """The section of numbers that are absent in these named results, each with the reason, followed by the address of
    the file of weights that it names. A reason that does not hold for all is under the name of the result."""
    missing = [
        {
            key: " ".join([reason, *(f"It is at {url}" for file, url in PUBLISHED_FILES.items() if file in reason)])
            for key, reason in metrics["not_computed"].items()
        }
        for _, metrics in results
    ]
    shared = {key for key, reason in missing[0].items() if all(each.get(key) == reason for each in missing)}
    reasons = {name_of(key): reason for key, reason in missing[0].items() if key in shared}
    for (name, _), each in zip(results, missing, strict=True):
        own = {key: reason for key, reason in each.items() if key not in shared}
        for reason in dict.fromkeys(own.values()):
            names = ", ".join(name_of(key) for key, other in own.items() if other == reason)
            reasons[f"{name}: {names}"] = reason
    return [Reasons("Not computed", reasons)] if reasons else []


def measures_of(*metrics: Metrics) -> list[Measure]:
    """MEASURES, and those of `frechet_measures`."""
    return [*MEASURES, *frechet_measures(metrics)]


def frechet_measures(several: Iterable[Metrics]) -> list[Measure]:
    """A measure for each extractor with a Frechet distance in any of these metrics."""
    named = dict.fromkeys(name for metrics in several for name in metrics.get("frechet", {}))
    return [Measure(f"frechet {name}", f"Frechet, {name}", FRECHET, "", False) for name in named]


def value_of(metrics: Metrics, key: str) -> float | None:
    """The number of a measure, of a report or of one of its `protocols`; None if it was not computed."""
    if key == "rfid":
        rfid = metrics.get("rfid")
        return rfid.get(metrics["protocol"]) if isinstance(rfid, Mapping) else rfid
    if key == "perplexity":
        groups = metrics.get("perplexity_per_group")
        return sum(groups) / len(groups) if groups else None
    if key.startswith("frechet "):
        return metrics.get("frechet", {}).get(key.removeprefix("frechet "))
    value = metrics.get(key, metrics.get("prc", {}).get(key))
    return value.get("mean") if isinstance(value, Mapping) else value


def number_rows(metrics: Metrics, without: Collection[str] = ()) -> list[tuple[str, str, str]]:
    """Label, value and convention of the numbers of a protocol, `without` measures of these keys."""
    own = metrics.get("protocols", {}).get(metrics["protocol"], metrics)
    rows = []
    for measure in measures_of(metrics):
        value = value_of(own if measure.key in SET_MEASURES else metrics, measure.key)
        if measure.key not in without and value is not None:
            rows.append((measure.label, written(measure, value), convention_of(measure, metrics)))
    return rows


def protocols_table(metrics: Metrics) -> Table | None:
    """The main numbers of each protocol, a column each; None for a single one."""
    protocols = metrics["protocols"]
    if len(protocols) == 1:
        return None
    rows = []
    for name in ("psnr", "ssim", "lpips", "rfid", *SET_MEASURES):
        values = [value_of(own, name) for own in protocols.values()]
        if any(value is not None for value in values):
            rows.append([name, *("–" if value is None else f"{value:.4g}" for value in values)])
    return Table("", ["own convention", *protocols], rows)


def over_images(measure: Measure, metrics: Metrics) -> str:
    """ "; over 4 of 5 images" for a mean that leaves out images which are too small for the measure, else ""."""
    left_out = metrics.get("not_measured", {}).get(metric_of(measure, metrics))
    total = metrics["num_images"]
    return f"; over {total - left_out['count']:,} of {counted(total, 'images')}" if left_out else ""


def metric_of(measure: Measure, metrics: Metrics) -> str:
    """The key of `distortion.CONVENTIONS` that a measure has under the protocol of these numbers."""
    return str(metrics.get("conventions", {}).get(measure.key, measure.key)).partition(":")[0]


def reasons_not_measured(metrics: Metrics, shown: int = MAX_LISTED) -> dict[str, str]:
    """Metric -> how many images it does not measure, and of the first `shown` of them which, and why."""
    return {
        name: f"{left_out['count']:,} of {counted(metrics['num_images'], 'images')}: "
        + "; ".join(f"{image['key']} ({image['reason']})" for image in left_out["images"][:shown])
        + ("; ..." if left_out["count"] > shown else "")
        for name, left_out in metrics.get("not_measured", {}).items()
    }


def convention_of(measure: Measure, metrics: Metrics) -> str:
    """The formula and the reference of a measure under the protocol of these numbers; over how many images, if not over
    all."""
    text, named = measure.convention, metrics.get("conventions", {}).get(measure.key)
    if named is not None:
        text = str(named).partition(": ")[2] or str(named)
    elif measure.key == "rfid" and "resize" in metrics:
        text = f"against {metrics['reference_kind']}; {metrics['resize']}"
    elif measure.key == "utilization" and "num_ids" in metrics:
        text = f"of {codes(metrics)}, over {counted(metrics['num_ids'], 'ids')}"
    return text + over_images(measure, metrics)


def input_of(lineage: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    """The lineage of an input; empty without one of this role."""
    return lineage.get("inputs", {}).get(role, {})


def on_images(lineage: Mapping[str, Any], num_images: int | None = None) -> str:
    """ " on imagenette, 1,000 images": the end of a title, by the lineage of the artifact; "" without images."""
    names = (input_of(lineage, role).get("name", "") for role in ("images", "tokens", "latents"))
    name = next(filter(None, names), "")
    number = "" if num_images is None else f", {counted(num_images, 'images')}"
    return f" on {name}{number}" if name else ""


def protocols_in_words(names: Iterable[str]) -> str:
    """ "Protocol adm: ADM's crop and rFID.": what protocols are, a sentence for each."""
    texts = {name: IN_WORDS.get(name, "") for name in names}
    return " ".join(f"Protocol {name}: {text}." if text else f"Protocol {name}." for name, text in texts.items())


def size_in_words(metrics: Metrics) -> str:
    """ "256 px", "2560 x 1440 px", or "their own size"."""
    size = str(metrics["image_size"])
    return "their own size" if size == "native" else f"{size.replace('x', ' x ')} px"


def with_unit(measure: Measure) -> str:
    """ "PSNR, dB": a measure at the head of a column."""
    return f"{measure.label}, {measure.unit}" if measure.unit else measure.label


def bits_first(measures: Iterable[Measure]) -> list[Measure]:
    """The measures, bits per pixel first."""
    return sorted(measures, key=lambda measure: measure.key != "bits_per_pixel")


def written(measure: Measure, value: float | None, unit: bool = True) -> str:
    """A number as text: "22.14 dB", "99.5 %"; a dash for None."""
    if value is None:
        return "–"
    share = measure.unit == "%"
    text = percent(value, measure.digits) if share else f"{value:,.{measure.digits}f} {measure.unit}".strip()
    return text if unit else text.removesuffix(f" {measure.unit}")


def table_rows(
    labels: Sequence[Sequence[str]],
    measures: Sequence[Measure],
    values: Sequence[Sequence[float | None]],
    unit: bool = True,
) -> list[list[str | Cell]]:
    """Rows of a table: each one's labels, then its values, the best of each column marked."""
    best = [measure.best(column) for measure, column in zip(measures, zip(*values, strict=True), strict=True)]
    rows: list[list[str | Cell]] = []
    for names, row in zip(labels, values, strict=True):
        cells = [
            Cell(written(measure, value, unit), value is not None and value == most)
            for measure, value, most in zip(measures, row, best, strict=True)
        ]
        rows.append([*names, *cells])
    return rows


def codes(tokenizer: Mapping[str, Any]) -> str:
    """ "4,096 codes", or "4 x 1,024 codes" with groups; "no codes" with continuous latents."""
    if tokenizer["codebook_size"] is None:
        return "no codes"
    groups = f"{tokenizer['num_groups']} x " if tokenizer["num_groups"] > 1 else ""
    return f"{groups}{counted(tokenizer['codebook_size'], 'codes')}"


def command_of(artifact: Artifact) -> str:
    """The command that published `artifact`."""
    return shlex.join(["vqpipe", *artifact.manifest.provenance["command"][1:]])
