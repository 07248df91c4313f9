"""`vqpipe compare`: several reports of `eval`, or of `eval-generation` -> their numbers in tables, and one page."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console, options
from stages.options import Out, UnusedDevice, UnusedSeed
from vqpipe.errors import ConfigError


def compare(
    reports: Annotated[
        list[Path], typer.Argument(help="Reports of vqpipe eval, or of eval-generation.", metavar="REPORT")
    ],
    out: Out,
    published: Annotated[
        list[Path] | None,
        typer.Option(
            "--published",
            help="A paper's table, shown beside these numbers; repeatable; see stages/runs/published.",
            metavar="FILE.toml",
        ),
    ] = None,
    device: UnusedDevice = "auto",
    seed: UnusedSeed = 0,
) -> None:
    """Compare reports side by side.

    There is one table for each protocol, image size and set of images.

    Tokenizers measured on several sets of images also get a table of rFID and
    PSNR over the sets, as in MGVQ's Tables 2 and 3. Each report must share images
    and protocol, or its tokenizer, with another one.

    Reports of vqpipe eval-generation share one table; they must have the same
    protocol, image size and references.
    """
    options.check_artifacts(*reports)  # before PyTorch is loaded
    with console.session("cpu", seed):
        from vqpipe import artifacts
        from vqpipe.files import hash_file
        from vqpipe.reports import comparison
        from vqpipe.reports.published import read_table

        if len(reports) < 2:
            raise ConfigError("a comparison needs at least two reports", "Name more reports")
        opened = [artifacts.open_artifact(path, "report") for path in reports]
        tables = [read_table(path) for path in published or []]
        compared = comparison.compare(opened, tables)
        inputs: dict[str, artifacts.Input | str]
        inputs = {f"report-{number}": report for number, report in enumerate(opened, start=1)}
        inputs |= {f"table-{number}": hash_file(path) for number, path in enumerate(published or [], start=1)}
        request: dict[str, object] = {"compare": compared.names}
        request |= {"published": [table.title for table in tables]} if tables else {}
        draft = artifacts.start(out, "report", request, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            artifact = comparison.publish_comparison(draft, compared)
        for table in compared.tables:
            console.show_table(table)
        return console.finished(artifact)
