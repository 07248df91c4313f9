"""`vqpipe compare`: several evaluations of tokenizers, or of samples -> their numbers in tables, and one page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import Device, Out, Seed

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.reports.evaluation import Evaluated
    from vqpipe.reports.grouping import Group
    from vqpipe.reports.page import ReportPage


def compare(
    reports: Annotated[
        list[Path], typer.Argument(help="Reports of vqpipe eval, or of eval-generation.", metavar="REPORT...")
    ],
    out: Out,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Put several reports side by side: one table for each protocol, image size and set of images, never one for two.

    The same tokenizers on several sets of images make a table of rFID and PSNR over the sets, as MGVQ's Tables 2 and 3.
    A report that shares neither images and protocol nor its tokenizer with any other is refused.

    Reports of vqpipe eval-generation share one table: same protocol, size and references, or they are refused.
    """
    with console.session(device, seed):
        from vqpipe import artifacts
        from vqpipe.errors import ConfigError
        from vqpipe.reports.generated import is_generated

        if len(reports) < 2:
            raise ConfigError("a comparison needs at least two reports", "Name more reports")
        opened = [artifacts.open_artifact(path, "report") for path in reports]
        parts = of_samples(opened) if any(map(is_generated, opened)) else of_tokenizers(opened)
        inputs = {f"report-{number}": report for number, report in enumerate(opened, start=1)}
        draft = artifacts.start(out, "report", {"compare": parts.names}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            write_files(draft, parts)
            return console.finished(draft.publish(parts.facts))


@dataclass(frozen=True)
class Compared:
    """What a comparison is made of."""

    names: list[str]
    """Of the reports, in their order."""
    numbers: dict[str, Any]
    """Every report's metrics."""
    facts: dict[str, Any]
    """What the artifact says of itself."""
    page: "Callable[[], ReportPage]"
    """Makes the page: it opens every picture, for which there is no need where all is published already."""
    tables: "Callable[[], list[Any]]"
    """For the terminal."""


def of_tokenizers(reports: "Sequence[Artifact]") -> Compared:
    """Reports of `vqpipe eval`."""
    from vqpipe.reports.comparison import comparison_page
    from vqpipe.reports.evaluation import open_evaluation
    from vqpipe.reports.grouping import distinct, named_groups, refuse_unlike

    evaluations = distinct([open_evaluation(each) for each in reports], [report.name for report in reports])
    refuse_unlike(evaluations, [str(report.path) for report in reports])
    names = list(dict.fromkeys(e.name for e in evaluations))
    title = " and ".join(names) if len(names) <= 2 else f"{len(names)} tokenizers"
    return Compared(
        names=[e.name for e in evaluations],
        numbers=numbers_of(evaluations),
        facts=facts_of(evaluations),
        page=lambda: comparison_page(evaluations, title, f"Made by vqpipe {metadata.version('vqpipe')}."),
        tables=lambda: [number_table(group) for group in named_groups(evaluations)],
    )


def of_samples(reports: "Sequence[Artifact]") -> Compared:
    """Reports of `vqpipe eval-generation`."""
    from vqpipe.reports.generated import check_alike, comparison_rows, generated_page, open_generated

    opened = [open_generated(report) for report in reports]
    names, others = [each.name for each in opened], [report.name for report in reports]
    if len(set(names)) < len(names):
        numbered = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
        names = others if len(set(others)) == len(others) else numbered
    opened = [replace(each, name=name) for each, name in zip(opened, names, strict=True)]
    check_alike(opened)
    return Compared(
        names=names,
        numbers={each.name: each.metrics for each in opened},
        facts={key: opened[0].metrics[key] for key in ("protocol", "image_size", "num_references")},
        page=lambda: generated_page(opened, " and ".join(names)),
        tables=lambda: [terminal_table("", *comparison_rows(opened))],
    )


def write_files(draft: "Draft", compared: Compared) -> None:
    """Rank 0: `metrics.json`, every report's numbers under its name and, where several sets are, its images; the page;
    and the tables on screen."""
    from vqpipe import distributed
    from vqpipe.reports import page

    if not distributed.is_main():
        return
    with draft.write("metrics.json") as path:
        text = json.dumps({"compared": compared.numbers}, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    with draft.write("report.html") as path:
        path.write_text(page.render(compared.page()), encoding="utf-8")
    for table in compared.tables():
        console.show(table)


def facts_of(evaluations: "Sequence[Evaluated]") -> dict[str, Any]:
    """What the artifact says of itself: one group's protocol, images and numbers; of several, what each holds."""
    from vqpipe.reports.grouping import named_groups

    groups = named_groups(evaluations)
    if len(groups) > 1:
        return {"groups": {group.title: [each.name for each in group.members] for group in groups}}
    members = groups[0].members
    facts = {key: members[0].metrics[key] for key in ("protocol", "num_images", "image_size")}
    return facts | {key: {e.name: e.metrics.get(key) for e in members} for key in ("psnr", "utilization")}


def numbers_of(evaluations: "Sequence[Evaluated]") -> dict[str, Any]:
    """Each report's metrics, under its name; under "name, on images" where a name stands for several sets."""
    from vqpipe.reports.grouping import set_names

    names = [e.name for e in evaluations]
    sets = set_names(evaluations)
    keys = [name if names.count(name) == 1 else f"{name}, on {where}" for name, where in zip(names, sets, strict=True)]
    if len(set(keys)) < len(keys):  # one tokenizer, one set, other protocols
        keys = [f"{number}: {key}" for number, key in enumerate(keys, start=1)]
    return {key: e.metrics for key, e in zip(keys, evaluations, strict=True)}


def number_table(group: "Group") -> Any:
    """One group of the comparison for the terminal."""
    from vqpipe.reports.comparison import HEADLINES, comparison_rows, measured

    return terminal_table(group.title, *comparison_rows(group.members, measured(group.members, HEADLINES)))


def terminal_table(title: str, header: list[str], rows: "list[list[tuple[str, bool]]]") -> Any:
    """(text, whether it is its column's best) of every cell, as a table for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE, pad_edge=False, title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*(f"[bold green]{escape(text)}[/]" if best else escape(text) for text, best in row))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
