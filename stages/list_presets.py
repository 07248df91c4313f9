"""`vqpipe presets`: which experiments come with vqpipe, and what each should give."""

from rich import box
from rich.console import Console
from rich.table import Table

from vqpipe.presets import heads


def presets() -> None:
    """List the presets by paper: table row, expected numbers."""
    papers: dict[str, Table] = {}
    for name, head in heads():
        paper = head.get("paper", "For a look, and for a CPU")
        table = papers.setdefault(paper, Table("preset", "what", "row", "expected", box=box.SIMPLE, pad_edge=False))
        table.columns[0].no_wrap = True
        table.add_row(name, head.get("what", ""), head.get("row", ""), head.get("expected", ""))
    console = Console(highlight=False)
    for paper, table in sorted(papers.items(), key=lambda item: -item[1].row_count):
        console.print(paper, style="bold")
        console.print(table)
