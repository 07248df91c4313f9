"""Pages of generated images: the numbers of one set of samples, or of several side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vqpipe.artifacts import Artifact
from vqpipe.errors import ArtifactError
from vqpipe.reports import page, plots
from vqpipe.reports.evaluation import FRECHET, Measure, table_rows, written

MEASURES = {
    "fid": Measure("fid", "FID", "lower is better", "", False),
    "sfid": Measure("sfid", "sFID", "lower is better", "", False),
    "inception_score.mean": Measure("inception_score", "Inception Score", "higher is better", "", True, 1),
    "kid.mean": Measure("kid", "KID", "lower is better", "", False, 5),
    "prc.precision": Measure("precision", "precision", "k = 3", "", True, 3),
    "prc.recall": Measure("recall", "recall", "k = 3", "", True, 3),
    "utilization": Measure("utilization", "codes in use", "share chosen at least once over all samples", "%", True, 1),
}
"""Dotted key of `metrics.json` -> measure."""
KEYS = ("protocol", "image_size", "num_references")
"""Keys of `metrics.json`: if these and the references are equal, numbers may share a column."""


@dataclass(frozen=True)
class Generated:
    """The result of one evaluation of samples."""

    name: str
    metrics: Mapping[str, Any]
    sheet: bytes
    """PNG file of some samples."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()

    @property
    def cfg_scale(self) -> float | None:
        """The scale of guidance that `vqpipe generate` used; None for other images."""
        scale = self.metrics.get("sampling", {}).get("cfg_scale")
        return None if scale is None else float(scale)

    @property
    def generator(self) -> str:
        """Name of the generator that made the samples; empty for other images."""
        samples = self.lineage.get("inputs", {}).get("images", {})
        return str(samples.get("inputs", {}).get("generator", {}).get("name", ""))

    @property
    def shared(self) -> tuple[Any, ...]:
        """The values that must be equal for numbers to share a column."""
        reference = self.lineage.get("inputs", {}).get("reference", {}).get("content", "")
        return (*(self.metrics[key] for key in KEYS), reference)


def is_generated(report: Artifact) -> bool:
    """Whether a report is of `eval-generation`."""
    return "contact-sheet.png" in report.manifest.files


def open_generated(report: Artifact) -> Generated:
    """Read a report of `eval-generation`.

    Raises:
        ArtifactError: it is a report of another command.
    """
    if not is_generated(report):
        raise ArtifactError(f"{report.path} is a report, but not of samples", "Compare reports of one kind at a time")
    metrics = json.loads(report.file("metrics.json").read_text(encoding="utf-8"))
    sheet = report.file("contact-sheet.png").read_bytes()
    name = report.lineage["inputs"].get("images", {}).get("name") or report.name
    return Generated(name, metrics, sheet, report.lineage, metrics.pop("commands", ()))


def generated_page(several: Sequence[Generated], title: str, published: Sequence[page.Table] = ()) -> page.ReportPage:
    """The page of one set of samples, or of several with the same protocol, size and references.

    Args:
        published: tables of papers beside these numbers.

    Raises:
        ArtifactError: protocols, sizes or references differ.
    """
    first = several[0]
    check_alike(several)
    subtitle = (
        f"Samples of {first.metrics['image_size']} px against {first.metrics['num_references']:,} references, protocol "
        f"{first.metrics['protocol']}."
    )
    sections: list[page.Section] = [*(numbers(first) if len(several) == 1 else [comparison(several)]), *published]
    maps = [page.Map(f"{counted(each)}, some of them", each.sheet, each.name, each.name) for each in several]
    if curve := guidance_curves(several):
        sections.append(page.Plots("Scale of guidance", curve))
    sections.append(page.Maps("Samples", maps))
    missing = {
        f"{each.name}: {name}" if len(several) > 1 else name: reason
        for each in several
        for name, reason in each.metrics["not_computed"].items()
    }
    if missing:
        sections.append(page.Reasons("Not computed", missing))
    sections.append(page.Lineage("Lineage", [each.lineage for each in several]))
    commands = list(dict.fromkeys(command for each in several for command in each.commands))
    if commands:
        sections.append(page.Commands("Reproduce", commands))
    return page.ReportPage(title, subtitle, sections)


def check_alike(several: Sequence[Generated]) -> None:
    """Raise an ArtifactError if numbers may not share a column."""
    for other in several[1:]:
        for key, one, two in zip((*KEYS, "reference"), several[0].shared, other.shared, strict=True):
            if one != two:
                raise ArtifactError(
                    f"{several[0].name} and {other.name} cannot be compared: their {key} differs "
                    f"({str(one)[:12]} and {str(two)[:12]})",
                    "Measure both by one protocol, at one size, against the same references",
                )


def measures_of(several: Sequence[Generated]) -> dict[str, Measure]:
    """The measures that at least one of them has, by dotted key of `metrics.json`."""
    named = dict.fromkeys(name for each in several for name in each.metrics.get("frechet", {}))
    known = MEASURES | {f"frechet.{name}": Measure(name, f"Frechet, {name}", FRECHET, "", False) for name in named}
    return {where: m for where, m in known.items() if any(found(each.metrics, where) is not None for each in several)}


def numbers(generated: Generated) -> list[page.Section]:
    """The numbers of one set, if there are any."""
    measured = [
        page.Number(measure.label, written(measure, found(generated.metrics, where)), "", measure.convention)
        for where, measure in measures_of([generated]).items()
    ]
    return [page.Numbers("Numbers", measured)] if measured else []


def comparison(several: Sequence[Generated]) -> page.Table:
    """A row for each set, the best of each column marked."""
    header, rows = comparison_rows(several)
    caption = "The same references for all. FID falls with the number of samples: compare equal numbers."
    return page.Table("Numbers", header, [[page.Cell(text, best) for text, best in row] for row in rows], caption)


def comparison_rows(several: Sequence[Generated]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """A header, and (text, whether it is its column's best) of every cell."""
    measures = measures_of(several)
    labels = [[each.name, counted(each)] for each in several]
    header = ["samples", "number"]
    if len({each.cfg_scale for each in several} - {None}) > 1:
        header.append("guidance")
        for label, each in zip(labels, several, strict=True):
            label.append("–" if each.cfg_scale is None else f"{each.cfg_scale:g}")
    values = [[found(each.metrics, where) for where in measures] for each in several]
    header += [measure.label for measure in measures.values()]
    return header, table_rows(labels, list(measures.values()), values)


def guidance_curves(several: Sequence[Generated]) -> list[page.Plot]:
    """FID and Inception Score over the scale of guidance, a line per generator sampled with several scales."""
    drawn = []
    for where in ("fid", "inception_score.mean"):
        points: dict[str, list[tuple[float, float]]] = {}
        for each in several:
            value = found(each.metrics, where)
            if each.cfg_scale is not None and value is not None:
                points.setdefault(each.generator, []).append((each.cfg_scale, value))
        lines = {
            name: (np.array([x for x, _ in rows]), np.array([y for _, y in rows]))
            for name, rows in ((name, sorted(rows)) for name, rows in points.items())
            if len({x for x, _ in rows}) > 1
        }
        plot = plots.line_plot(MEASURES[where].label, lines, xlabel="scale of classifier-free guidance")
        drawn += [] if plot is None else [plot]
    return drawn


def counted(generated: Generated) -> str:
    """ "50,000 samples"."""
    return f"{generated.metrics['num_images']:,} samples"


def found(metrics: Mapping[str, Any], where: str) -> float | None:
    """The number of a dotted key such as "kid.mean", or None."""
    value: Any = metrics
    for key in where.split(".", 1):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
