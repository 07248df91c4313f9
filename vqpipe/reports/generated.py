"""Pages of generated images: the numbers of one set of samples, or of several side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vqpipe.artifacts import Artifact
from vqpipe.errors import ArtifactError
from vqpipe.reports import page, plots
from vqpipe.reports.evaluation import (
    FRECHET,
    Measure,
    codes,
    name_of,
    protocols_in_words,
    reasons_of,
    table_rows,
    value_of,
    written,
)
from vqpipe.reports.page import GAP
from vqpipe.words import counted

MEASURES = {
    "fid": Measure("fid", "FID", "lower is better", "", False),
    "sfid": Measure("sfid", "sFID", "lower is better", "", False),
    "inception_score.mean": Measure("inception_score", "Inception Score", "higher is better", "", True, 1),
    "kid.mean": Measure("kid", "KID", "lower is better", "", False, 5),
    "prc.precision": Measure("precision", "precision", "k = 3", "", True, 3),
    "prc.recall": Measure("recall", "recall", "k = 3", "", True, 3),
    "utilization": Measure("utilization", "codes in use", "share chosen at least once over all samples", "%", True, 1),
    "perplexity": Measure("perplexity", "perplexity", "exp of the entropy of the codes, mean over groups", "", True, 1),
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
    def columns(self) -> int:
        """Samples side by side on the sheet."""
        return page.png_size(self.sheet)[0] // (int(self.metrics["image_size"]) + GAP)

    @property
    def cfg_scale(self) -> float | None:
        """The scale of guidance that `vqpipe generate` used; None for other images."""
        scale = self.metrics.get("sampling", {}).get("cfg_scale")
        return None if scale is None else float(scale)

    @property
    def other_settings(self) -> dict[str, Any]:
        """What the samples depend on beside `cfg_scale`: the content of the generator, their number, the settings."""
        sampling = {key: value for key, value in self.metrics["sampling"].items() if key != "cfg_scale"}
        generator = self.metrics["generator"]["content"]
        return {"generator": generator, "num_images": self.metrics["num_images"], **sampling}

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
        what = f"{report.path} is not a report of vqpipe eval-generation, and another one is"
        raise ArtifactError(what, "Compare reports of one kind at a time")
    metrics = report.read_json("metrics.json")
    sheet = report.verified_file("contact-sheet.png").read_bytes()
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
        f"Samples of {first.metrics['image_size']} px against {first.metrics['num_references']:,} references. "
        f"{protocols_in_words([first.metrics['protocol']])}"
    )
    sections: list[page.Section] = [*(numbers(first) if len(several) == 1 else [comparison(several)]), *published]
    if len(several) == 1 and (groups := groups_table(first.metrics)):
        sections.append(groups)
    maps = [
        page.Map(f"{samples_of(each)}, some of them", each.sheet, each.name, f"samples of {each.name}", each.columns)
        for each in several
    ]
    if curve := guidance_curves(several):
        sections.append(page.Plots("Scale of guidance", curve))
    sections.append(page.Maps("Samples", maps))
    missing = {
        f"{each.name}: {name_of(key)}" if len(several) > 1 else name_of(key): reason
        for each in several
        for key, reason in reasons_of(each.metrics).items()
    }
    if missing:
        sections.append(page.Reasons("Not computed", missing))
    sections.append(page.Lineage("Lineage", [each.lineage for each in several]))
    commands = list(dict.fromkeys(command for each in several for command in each.commands))
    if commands:
        sections.append(page.Commands("Reproduce", commands))
    if len(several) == 1:
        title += f", {samples_of(first)}"
    reference = first.lineage.get("inputs", {}).get("reference", {}).get("name")
    return page.ReportPage(f"{title} against {reference}" if reference else title, subtitle, sections)


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


def measures_of(several: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """The measures that at least one `metrics.json` has, by dotted key."""
    named = dict.fromkeys(name for metrics in several for name in metrics.get("frechet", {}))
    known = MEASURES | {f"frechet.{name}": Measure(name, f"Frechet, {name}", FRECHET, "", False) for name in named}
    return {where: m for where, m in known.items() if any(found(metrics, where) is not None for metrics in several)}


def numbers(generated: Generated) -> list[page.Section]:
    """The numbers of one set, if there are any."""
    measured = [page.Number(label, value, "", note) for label, value, note in number_rows(generated.metrics)]
    return [page.Numbers("Numbers", measured)] if measured else []


def number_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and convention of every number of `metrics.json`."""
    rows = []
    for where, measure in measures_of([metrics]).items():
        note = measure.convention
        if where == "utilization":
            note = f"of {codes(metrics)}, over {counted(metrics['num_ids'], 'ids')}"
        rows.append((measure.label, written(measure, found(metrics, where)), note))
    return rows


def groups_table(metrics: Mapping[str, Any]) -> page.Table | None:
    """The use of the codes of each group; None without several groups."""
    if metrics.get("num_groups", 1) == 1:
        return None
    columns = [("utilization", metrics["utilization_per_group"]), ("perplexity", metrics["perplexity_per_group"])]
    rows = [
        [str(group), *(written(MEASURES[name], values[group]) for name, values in columns)]
        for group in range(metrics["num_groups"])
    ]
    return page.Table("Codes in use by group", ["group", *(MEASURES[name].label for name, _ in columns)], rows)


def comparison(several: Sequence[Generated]) -> page.Table:
    """A row for each set, the best of each column marked."""
    header, rows = comparison_rows(several)
    caption = "The same references for all. FID falls with the number of samples: compare equal numbers."
    return page.Table("Numbers", header, [[page.Cell(text, best) for text, best in row] for row in rows], caption)


def comparison_rows(several: Sequence[Generated]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """A header, and (text, whether it is its column's best) of every cell."""
    measures = measures_of([each.metrics for each in several])
    labels = [[each.name, samples_of(each)] for each in several]
    header = ["samples", "number"]
    if len({each.cfg_scale for each in several} - {None}) > 1:
        header.append("guidance")
        for label, each in zip(labels, several, strict=True):
            label.append("–" if each.cfg_scale is None else f"{each.cfg_scale:g}")
    values = [[found(each.metrics, where) for where in measures] for each in several]
    header += [measure.label for measure in measures.values()]
    return header, table_rows(labels, list(measures.values()), values)


def guidance_curves(several: Sequence[Generated]) -> list[page.Plot]:
    """FID and Inception Score over the scale of guidance.

    A line is a generator with several scales and otherwise the same settings and number of samples.
    """
    grouped: dict[str, list[Generated]] = {}
    for each in several:
        if each.cfg_scale is not None:
            grouped.setdefault(json.dumps(each.other_settings, sort_keys=True), []).append(each)
    lines = [line for line in grouped.values() if len({each.cfg_scale for each in line}) > 1]
    drawn = []
    for where in ("fid", "inception_score.mean"):
        curves = {}
        for name, line in zip(line_names([line[0] for line in lines]), lines, strict=True):
            measured = [(each.cfg_scale, found(each.metrics, where)) for each in line]
            points = sorted((scale, value) for scale, value in measured if scale is not None and value is not None)
            curves[name] = (np.array([x for x, _ in points]), np.array([y for _, y in points]))
        plot = plots.line_plot(MEASURES[where].label, curves, xlabel="scale of classifier-free guidance")
        drawn += [] if plot is None else [plot]
    return drawn


def line_names(several: Sequence[Generated]) -> list[str]:
    """The name of each one's generator, with the settings that differ between them."""
    settings = [each.other_settings for each in several]
    keys = dict.fromkeys(key for table in settings for key in table)
    differing = [key for key in keys if any(table.get(key) != settings[0].get(key) for table in settings)]
    names = [each.metrics["generator"]["name"] for each in several]
    if len(set(names)) == len({table["generator"] for table in settings}):
        differing = [key for key in differing if key != "generator"]
    return [
        ", ".join([name, *(f"{key} {str(table[key])[:12]}" for key in differing if key in table)])
        for name, table in zip(names, settings, strict=True)
    ]


def samples_of(generated: Generated) -> str:
    """ "50,000 samples"."""
    return counted(generated.metrics["num_images"], "samples")


def found(metrics: Mapping[str, Any], where: str) -> float | None:
    """The number of a dotted key such as "kid.mean", or None."""
    if where == "perplexity":
        return value_of(metrics, where)
    value: Any = metrics
    for key in where.split(".", 1):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
