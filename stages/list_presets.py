"""`vqpipe presets`: which experiments come with vqpipe, and what each should give."""

from rich import box
from rich.console import Console
from rich.table import Table

from vqpipe.presets import heads


def presets() -> None:
    """List the presets: paper, table row, expected numbers."""
    table = Table("preset", "what", "paper and row", "expected", box=box.SIMPLE, pad_edge=False)
    for name, head in heads():
        source = ", ".join(head[key] for key in ("paper", "row") if key in head)
        table.add_row(name, head.get("what", ""), source, head.get("expected", ""))
    Console(highlight=False).print(table)
