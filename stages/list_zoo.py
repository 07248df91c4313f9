"""`vqpipe zoo`: list the published tokenizers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vqpipe import zoo as published
from vqpipe.zoo import Entry
from vqpipe.zoo.fetch import cached

LOG_WIDTH = 240
"""Columns of a table where stdout is not a terminal."""


def zoo(
    words: Annotated[
        list[str] | None, typer.Argument(help="List only the entries that contain these words.", metavar="[WORD]...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """List the published tokenizers.

    `vqpipe import-checkpoint NAME --out DIR` downloads and converts one.
    The numbers are those of the stated sources, measured by their protocols: those
    of two protocols are not comparable. Bits per pixel are those of an image of 256
    x 256 pixels. Nothing is downloaded.
    """
    entries = published.find(words or [])
    imported = imported_here(Path())
    if as_json:
        print(json.dumps([record(entry, imported) for entry in entries], indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    importable_first = sorted(entries, key=lambda entry: bool(entry.refused))
    for paper in dict.fromkeys(entry.paper for entry in importable_first):
        own = [entry for entry in entries if entry.paper == paper]
        console.print(paper, style="bold", markup=False)
        console.print(sizes(own, imported))
        console.print(details(own))
        console.print()


def sizes(entries: list[Entry], imported: dict[str, list[str]]) -> Table:
    """The sizes, licence and state of each entry."""
    shown = Table("name", "f", "codes", "bits/px", "size", "licence", "here", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown.columns[:5]:
        column.no_wrap = True
    for column in shown.columns[1:5]:
        column.justify = "right"
    for column in shown.columns[5:]:
        column.overflow = "fold"
    for entry in entries:
        cells = (
            entry.name,
            "–" if entry.downsample_factor is None else str(entry.downsample_factor),
            codes(entry),
            "–" if entry.bits_per_pixel is None else f"{entry.bits_per_pixel:.3f}",
            megabytes(entry),
            entry.licence,
            state(entry, imported),
        )
        shown.add_row(*map(escape, cells))
    return shown


def details(entries: list[Entry]) -> Table:
    """Where each entry is, its published numbers with their protocol and source, and its notes."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for entry in entries:
        names = " and ".join(file.name for file in entry.files)
        lines = [file.source for file in entry.files if file.source]
        lines = lines or [f"{names} at {entry.page}" if names else entry.page]
        lines += [f"{each.numbers()} ({each.protocol}; {each.source})" for each in entry.published]
        lines += [entry.notes] if entry.notes else []
        shown.add_row(escape(entry.name), escape("\n".join(lines)), style="dim")
    return shown


def codes(entry: Entry) -> str:
    """`16,384`, or `8 x 2,048` with groups."""
    if entry.codes is None:
        return "–" if entry.tokens or not entry.groups else "continuous"
    groups = {0: "? x ", 1: ""}.get(entry.groups, f"{entry.groups} x ")
    return f"{groups}{entry.codes:,}"


def megabytes(entry: Entry) -> str:
    """The size of the files."""
    return "–" if entry.size is None else f"{entry.size / 1e6:,.0f} MB"


def state(entry: Entry, imported: dict[str, list[str]]) -> str:
    """Whether the entry was imported or downloaded here, or why it cannot be."""
    if entry.refused:
        return f"no: {entry.refused}"
    if entry.name in imported:
        return f"imported: {', '.join(imported[entry.name])}"
    if cached(entry):
        return "downloaded"
    return "–" if entry.files and all(file.source for file in entry.files) else "–, by hand only"


def imported_here(folder: Path) -> dict[str, list[str]]:
    """The artifacts directly in `folder` that were imported from the zoo, by the name of their entry."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/manifest.json")):
        try:
            name = json.loads(path.read_text(encoding="utf-8"))["facts"]["zoo"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(name, str):
            found.setdefault(name, []).append(path.parent.name)
    return found


def record(entry: Entry, imported: dict[str, list[str]]) -> dict[str, Any]:
    """An entry for --json, without what is not known."""
    table = {
        **asdict(entry),
        "source": entry.source,
        "num_tokens": entry.num_tokens,
        "bits_per_pixel": entry.bits_per_pixel,
        "size": entry.size,
        "importable": not entry.refused,
        "downloaded": cached(entry),
        "imported": imported.get(entry.name, []),
    }
    for key in ("files", "published"):
        table[key] = [known(each) for each in table[key]]
    return known(table) if entry.groups else {key: value for key, value in known(table).items() if key != "groups"}


def known(table: dict[str, Any]) -> dict[str, Any]:
    """A table without the values that are not known."""
    return {key: value for key, value in table.items() if value not in (None, "")}
