"""One HTML file that opens offline: everything inside it, nothing loaded, readable on a phone and in the dark.

A page is a title and a list of sections; each kind of section is a dataclass here and a block of the same name in
`page.html.j2`, which takes in `page.css` and `page.js`. All text is escaped by jinja2; what is marked safe is SVG drawn
by `plots`. Without JavaScript everything is still there to read; sliders, the large view and copying need it.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vqpipe.reports.plots import Plot

SIZE_HERE = "\0size of this file\0"
"""Stands where the page tells its size, until it is known; no text of a page holds a NUL."""
MOST_UNLISTED = 4
"""Sections up to which a page has no table of contents."""
MOST_OPEN = 18
"""Sections up to which the table of contents stands open."""


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading; `block` names its macro in the template."""

    block: ClassVar[str]


@dataclass(frozen=True)
class Number:
    """One headline number: `22.1`, its unit, and the convention it was measured by."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Numbers(Section):
    """Headline numbers, large."""

    block = "numbers"
    title: str
    numbers: Sequence[Number]
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell; `best` sets it off."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table(Section):
    """Rows of cells under a header; the first column names the row."""

    block = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    folded: bool = False
    """Shown on request only."""
    prose: Sequence[str] = ()
    """Columns of words rather than numbers."""
    spans: Sequence[tuple[str, int]] = ()
    """A line over the header: (text, over how many columns), left to right."""


@dataclass(frozen=True)
class Map:
    """Which codes one tokenizer uses, as a picture (`pictures.codebook_map`, a data URI)."""

    name: str
    uri: str
    headline: str
    alt: str


@dataclass(frozen=True)
class Maps(Section):
    """Codebook maps side by side, and drawings beside them."""

    block = "maps"
    title: str
    maps: Sequence[Map]
    caption: str = ""
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Version:
    """What stands beside an original: a reconstruction, or its error; `uri` is a data URI."""

    label: str
    uri: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An original and its versions, all PNG files of one size; `original` is a data URI."""

    name: str
    original: str
    versions: Sequence[Version]
    note: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), pixels, from the head of the PNG file: the page keeps the place of pictures to come."""
        head = base64.b64decode(self.original.partition(",")[2][:32])
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@dataclass(frozen=True)
class Pictures(Section):
    """Originals beside their versions; a slider uncovers one under the other, and a large view shows every pixel.

    All pictures of a section have the same versions, in the same order.
    """

    block = "pictures"
    title: str
    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Plots(Section):
    """Drawings, two abreast where there is room."""

    block = "plots"
    title: str
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Reasons(Section):
    """What is not on the page, and why."""

    block = "reasons"
    title: str
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Lineage(Section):
    """Trees {kind, name, content, inputs: {role: tree}}: what was made from what."""

    block = "lineage"
    title: str
    trees: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Commands(Section):
    """Commands that make the page's numbers again."""

    block = "commands"
    title: str
    commands: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class ReportPage:
    """A page: its title, a line under it, its sections from top to bottom, and a line at its foot."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""


def render(report: ReportPage) -> str:
    """The page as one HTML document, which tells its own size at its foot."""
    html = template().render(report=report, file_size=SIZE_HERE).lstrip()
    return html.replace(SIZE_HERE, megabytes(len(html.encode())))


def megabytes(num_bytes: int) -> str:
    """A file size as text, never rounded down to nothing: 0.1 MB, 12.3 MB."""
    return f"{max(num_bytes / 1e6, 0.1):,.1f} MB"


@cache
def template() -> Template:
    """The page's template, read once, with escaping on."""
    environment = Environment(
        loader=PackageLoader("vqpipe.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"most_unlisted": MOST_UNLISTED, "most_open": MOST_OPEN}
    environment.filters["svg"] = lambda plot: Markup(plot.svg)  # drawn by us, its text escaped by matplotlib
    return environment.get_template("page.html.j2")
