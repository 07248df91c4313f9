"""`vqpipe zoo`: list the published tokenizers, or print all about one."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.console import wrapped
from vqpipe import zoo as published
from vqpipe.zoo import Entry
from vqpipe.zoo.fetch import cached

LOG_WIDTH = 240
"""Columns of the output where stdout is not a terminal."""
LABEL_WIDTH = 16
"""Columns of the labels before what is known about one entry."""


def zoo(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="The name of an entry, to print all about it; or list only the entries that contain these words.",
            metavar="[NAME|WORD]...",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """List the published tokenizers, or print all about one.

    `vqpipe import-checkpoint NAME --out DIR` downloads and converts one.
    The numbers are those of the stated sources, measured by their protocols: those
    of two protocols are not comparable. Bits per pixel are those of an image of 256
    x 256 pixels. Nothing is downloaded.
    """
    named = published.get(" ".join(words or []))
    entries = [named] if named is not None else published.find(words or [])
    imported = imported_here(Path())
    if as_json:
        print(json.dumps([record(entry, imported) for entry in entries], indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    if len(entries) == 1:
        for label, text in all_about(entries[0], imported):
            print(wrapped(f"{label:{LABEL_WIDTH}}{text}", console.width, LABEL_WIDTH))
        return
    console.print(overview(sorted(entries, key=lambda entry: (bool(entry.refused), in_order(entry.name))), imported))
    print(LEGEND)


LEGEND = """\
f       an id is of a square of f x f pixels
codes   8 x 2,048: 8 ids per square, each of 2,048 codes; ? and –: not known
ids     of an image of 256 x 256 pixels, and their bits per pixel
import  by hand: download the files in a browser; no: vqpipe zoo NAME says why
vqpipe zoo NAME prints all about one: licence, size, PSNR and rFID as published."""


def in_order(name: str) -> list[str | int]:
    """A key that sorts names by family, then by their numbers: f8 before f16, 8k before 16k."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def overview(entries: list[Entry], imported: dict[str, list[str]]) -> Table:
    """A line per entry."""
    shown = Table("name", "f", "codes", "ids", "bits/pixel", "import", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in shown.columns[1:5]:
        column.justify = "right"
    for entry in entries:
        cells = (
            entry.name,
            factor(entry),
            codes(entry),
            "–" if entry.num_tokens is None else f"{entry.num_tokens:,}",
            bits_per_pixel(entry),
            "no" if entry.refused else state(entry, imported).partition(":")[0],
        )
        shown.add_row(*map(escape, cells))
    return shown


def all_about(entry: Entry, imported: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Everything that is known about an entry: (label, text)."""
    yield "name", entry.name
    yield "title", entry.title
    yield "paper", entry.paper
    yield "licence", entry.licence
    yield "page", entry.page
    yield "factor", factor(entry)
    yield "codes", codes(entry)
    yield "bits per pixel", bits_per_pixel(entry)
    yield "size", megabytes(entry)
    for file in entry.files:
        yield "file", file.source or f"{file.name}, at the page"
    for each in entry.published:
        yield "numbers", f"{each.numbers()} ({each.protocol}; {each.source})"
    if entry.notes:
        yield "notes", entry.notes
    yield "import", state(entry, imported)
    if not entry.refused:
        yield "next:", f"vqpipe import-checkpoint {entry.name} --out {entry.name}"


def factor(entry: Entry) -> str:
    """The downsample factor."""
    return "–" if entry.downsample_factor is None else str(entry.downsample_factor)


def codes(entry: Entry) -> str:
    """`16,384`, or `8 x 2,048` with groups."""
    if entry.codes is None:
        return "–" if entry.tokens or not entry.groups else "continuous"
    groups = {0: "? x ", 1: ""}.get(entry.groups, f"{entry.groups} x ")
    return f"{groups}{entry.codes:,}"


def bits_per_pixel(entry: Entry) -> str:
    """Bits per pixel of an image of 256 x 256 pixels."""
    return "–" if entry.bits_per_pixel is None else f"{entry.bits_per_pixel:.3f}"


def megabytes(entry: Entry) -> str:
    """The size of the files."""
    return "–" if entry.size is None else f"{entry.size / 1e6:,.0f} MB"


def state(entry: Entry, imported: dict[str, list[str]]) -> str:
    """Whether the entry was imported or downloaded here, or can be: by a program, by hand, or why not."""
    if entry.refused:
        return f"no: {entry.refused}"
    if entry.name in imported:
        return f"imported: {', '.join(imported[entry.name])}"
    if cached(entry):
        return "downloaded"
    return "yes" if entry.files and all(file.source for file in entry.files) else "by hand"


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
