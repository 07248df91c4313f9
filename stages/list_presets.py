"""`vqpipe presets`: list the presets, or print one."""

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vqpipe.presets import heads


def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset as TOML.", metavar="NAME|FILE.toml")] = None,
) -> None:
    """List the presets, or print one.

    The list is sorted by paper, with the table rows and their numbers. A preset
    is printed as TOML, including the settings of the presets that it extends.
    """
    if name is not None:
        from stages.recipe import resolved_toml  # imports PyTorch, which the list does not need

        print(resolved_toml(name), end="")
        return
    papers: dict[str, Table] = {}
    for preset, head in heads():
        paper = head.get("paper", "Small, for a CPU")
        table = papers.setdefault(paper, Table("preset", "what", "row", "expected", box=box.SIMPLE, pad_edge=False))
        table.columns[0].no_wrap = True
        table.add_row(preset, head.get("what", ""), head.get("row", ""), head.get("expected", ""))
    console = Console(highlight=False)
    for paper, table in sorted(papers.items(), key=lambda item: -item[1].row_count):
        console.print(paper, style="bold")
        console.print(table)
