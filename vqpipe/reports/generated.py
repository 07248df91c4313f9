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
    BY_KEY,
    Measure,
    Metrics,
    convention_of,
    frechet_measures,
    input_of,
    not_computed,
    protocols_in_words,
    table_rows,
    value_of,
    written,
)
from vqpipe.reports.page import GAP
from vqpipe.words import counted

MEASURES = tuple(
    BY_KEY[key] for key in ("fid", "sfid", "inception_score", "kid", "precision", "recall", "utilization", "perplexity")
)
"""In the order of tables."""
KEYS = ("protocol", "image_size", "num_references")
"""Keys of `metrics.json`: if these and the references are equal, numbers may share a column."""


@dataclass(frozen=True)
class Generated:
    """The result of one evaluation of samples."""

    name: str
    metrics: Metrics
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
        """What the samples depend on beside `cfg_scale`: the content of the generator, their number and classes, the
        settings. Reports of earlier versions do not have the classes."""
        sampling = {key: value for key, value in self.metrics["sampling"].items() if key != "cfg_scale"}
        known = {key: self.metrics[key] for key in ("num_images", "classes") if key in self.metrics}
        return {"generator": self.metrics["generator"]["content"][:12], **known, **sampling}

    @property
    def shared(self) -> tuple[Any, ...]:
        """The values that must be equal for numbers to share a column."""
        return (*(self.metrics[key] for key in KEYS), input_of(self.lineage, "reference").get("content", ""))


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
    sheet = report.verified_bytes("contact-sheet.png")
    name = input_of(report.lineage, "images").get("name") or report.name
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
    sections += not_computed([(each.name, each.metrics) for each in several])
    sections.append(page.Lineage("Lineage", [each.lineage for each in several]))
    commands = list(dict.fromkeys(command for each in several for command in each.commands))
    if commands:
        sections.append(page.Commands("Reproduce", commands))
    if len(several) == 1:
        title += f", {samples_of(first)}"
    reference = input_of(first.lineage, "reference").get("name")
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


def measures_of(several: Sequence[Metrics]) -> list[Measure]:
    """The measures that at least one `metrics.json` has."""
    known = [*MEASURES, *frechet_measures(several)]
    return [measure for measure in known if any(value_of(metrics, measure.key) is not None for metrics in several)]


def numbers(generated: Generated) -> list[page.Section]:
    """The numbers of one set, if there are any."""
    measured = [page.Number(label, value, "", note) for label, value, note in number_rows(generated.metrics)]
    return [page.Numbers("Numbers", measured)] if measured else []


def number_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Label, value and convention of every number of `metrics.json`."""
    return [
        (measure.label, written(measure, value_of(metrics, measure.key)), convention_of(measure, metrics))
        for measure in measures_of([metrics])
    ]


def groups_table(metrics: Metrics) -> page.Table | None:
    """The use of the codes of each group; None without several groups."""
    if metrics.get("num_groups", 1) == 1:
        return None
    columns = [(BY_KEY[key], metrics[f"{key}_per_group"]) for key in ("utilization", "perplexity")]
    rows = [
        [str(group + 1), *(written(measure, values[group]) for measure, values in columns)]
        for group in range(metrics["num_groups"])
    ]
    return page.Table("Codes in use by group", ["group", *(measure.label for measure, _ in columns)], rows)


def comparison(several: Sequence[Generated]) -> page.Table:
    """A row for each set, the best of each column marked."""
    measures = measures_of([each.metrics for each in several])
    labels = [[each.name, samples_of(each)] for each in several]
    header = ["samples", "number"]
    if len({each.cfg_scale for each in several} - {None}) > 1:
        header.append("guidance")
        for label, each in zip(labels, several, strict=True):
            label.append("–" if each.cfg_scale is None else f"{each.cfg_scale:g}")
    values = [[value_of(each.metrics, measure.key) for measure in measures] for each in several]
    header += [measure.label for measure in measures]
    caption = "The same references for all. FID falls with the number of samples: compare equal numbers."
    return page.Table("Numbers", header, table_rows(labels, measures, values), caption)


def guidance_curves(several: Sequence[Generated]) -> list[page.Plot]:
    """FID and Inception Score over the scale of guidance.

    A line is a generator with several scales and otherwise the same settings, classes and number of samples.
    """
    grouped: dict[str, list[Generated]] = {}
    for each in several:
        if each.cfg_scale is not None:
            grouped.setdefault(json.dumps(each.other_settings, sort_keys=True), []).append(each)
    lines = [line for line in grouped.values() if len({each.cfg_scale for each in line}) > 1]
    drawn = []
    for key in ("fid", "inception_score"):
        curves = {}
        for name, line in zip(line_names([line[0] for line in lines]), lines, strict=True):
            measured = [(each.cfg_scale, value_of(each.metrics, key)) for each in line]
            points = sorted((scale, value) for scale, value in measured if scale is not None and value is not None)
            curves[name] = (np.array([x for x, _ in points]), np.array([y for _, y in points]))
        plot = plots.line_plot(BY_KEY[key].label, curves, xlabel="scale of classifier-free guidance")
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
        ", ".join([name, *(f"{key} {str(table[key])[:40]}" for key in differing if key in table)])
        for name, table in zip(names, settings, strict=True)
    ]


def samples_of(generated: Generated) -> str:
    """ "50,000 samples"."""
    return counted(generated.metrics["num_images"], "samples")
