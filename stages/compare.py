"""`vqpipe compare`: several evaluations of the same images -> one table and one page."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import console
from stages.console import Device, Out, Seed

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.reports.evaluation import Evaluated


def compare(
    reports: Annotated[list[Path], typer.Argument(help="Reports that vqpipe eval made.", metavar="REPORT...")],
    out: Out,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Put several reports on the same images and protocol side by side; others are refused."""
    with console.session(device, seed):
        from vqpipe import artifacts, distributed
        from vqpipe.errors import ConfigError
        from vqpipe.reports.comparison import refuse_unlike
        from vqpipe.reports.evaluation import open_evaluation

        if len(reports) < 2:
            raise ConfigError("a comparison needs at least two reports", "Name more reports")
        opened = [artifacts.open_artifact(path, "report") for path in reports]
        evaluations = distinct([open_evaluation(report) for report in opened], opened)
        refuse_unlike(evaluations, [str(path) for path in reports])
        inputs = {f"report-{number}": report for number, report in enumerate(opened, start=1)}
        draft = artifacts.start(out, "report", {"compare": [e.name for e in evaluations]}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            if distributed.is_main():
                write_files(draft, evaluations)
                console.show(number_table(evaluations))
            first = evaluations[0].metrics
            facts = {key: first[key] for key in ("protocol", "num_images", "image_size")}
            utilization = {e.name: e.metrics.get("utilization") for e in evaluations}
            psnr = {e.name: e.metrics.get("psnr") for e in evaluations}
            return console.finished(draft.publish({**facts, "psnr": psnr, "utilization": utilization}))


def distinct(evaluations: "Sequence[Evaluated]", reports: "Sequence[Artifact]") -> "list[Evaluated]":
    """The evaluations under names that differ: the tokenizer's, else the report's, else numbered."""
    for names in ([e.name for e in evaluations], [report.name for report in reports]):
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return [replace(evaluated, name=name) for evaluated, name in zip(evaluations, names, strict=True)]


def write_files(draft: "Draft", evaluations: "Sequence[Evaluated]") -> None:
    """`metrics.json`, every report's numbers under its name, and the page."""
    from vqpipe.reports import page
    from vqpipe.reports.comparison import comparison_page

    with draft.write("metrics.json") as path:
        numbers = {e.name: e.metrics for e in evaluations}
        text = json.dumps({"compared": numbers}, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    footer = f"Made by vqpipe {metadata.version('vqpipe')}."
    title = " and ".join(e.name for e in evaluations) if len(evaluations) == 2 else f"{len(evaluations)} tokenizers"
    with draft.write("report.html") as path:
        path.write_text(page.render(comparison_page(evaluations, title, footer)), encoding="utf-8")


def number_table(evaluations: "Sequence[Evaluated]") -> Any:
    """The comparison for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from vqpipe.reports.comparison import comparison_rows, measured
    from vqpipe.reports.evaluation import MEASURES, NUM_HEADLINES

    header, rows = comparison_rows(evaluations, measured(evaluations, MEASURES[:NUM_HEADLINES]))
    table = Table(*header, box=box.SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(*(f"[bold green]{text}[/]" if best else escape(text) for text, best in row))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
