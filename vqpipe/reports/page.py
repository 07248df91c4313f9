"""The HTML frame of every report: one self-contained file that opens offline, on a phone and in dark mode too.

A page is a title and a list of sections. Each kind of section is a dataclass here and a macro of the same name in
`page.html.j2`, which includes `page.css` and `page.js`. Pictures are PNG files, which become `data:` addresses. jinja2
escapes all text; only the SVG of `plots` is marked as safe. The page is complete without JavaScript, except for
sliders, the large view and copy buttons.
"""

import base64
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from vqpipe.files import valid_text

SHEET_SIDE = 128
"""CSS pixels of each image on a sheet of samples, at least; as in page.css."""
GAP = 4
"""Pixels between images on a sheet."""
FILE_SIZE = "\0file size\0"
"""Placeholder of the file's own size."""


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading."""

    title: str

    @property
    def macro(self) -> str:
        """The name of its macro in the template."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Number:
    """A headline number, its unit, and a note on how it was measured."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Numbers(Section):
    """Headline numbers in large type."""

    numbers: Sequence[Number]
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell; `best` highlights it."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table(Section):
    """Rows of cells under a header; the first column is the name of the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    folded: bool = False
    """Collapsed at first."""
    prose: Sequence[str] = ()
    """Columns of text rather than numbers."""
    spans: Sequence[tuple[str, int]] = ()
    """A row above the header: (text, number of columns), left to right."""


@dataclass(frozen=True)
class Map:
    """A picture with a heading and a line below it, such as a codebook map."""

    name: str
    """The line below the heading."""
    png: bytes
    heading: str
    alt: str
    columns: int = 0
    """Square images side by side on a sheet of samples, which the page shows in as many columns as it has room for."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return png_size(self.png)

    @property
    def side(self) -> int:
        """Side of each image of a sheet, pixels."""
        return (self.size[0] - GAP) // self.columns - GAP

    @property
    def corners(self) -> list[tuple[int, int]]:
        """The upper left corner of each image of a sheet, row by row."""
        left, top = (range(GAP, length - self.side, self.side + GAP) for length in self.size)
        return [(x, y) for y in top for x in left]

    @property
    def anchor(self) -> str:
        """The id of a sheet on the page."""
        return f"sheet-{zlib.crc32(self.png):08x}"

    @property
    def is_small(self) -> bool:
        """Whether the images of a sheet have fewer pixels than they are shown in, and are enlarged without blur."""
        return self.side < SHEET_SIDE


@dataclass(frozen=True)
class Plot:
    """A drawing of `plots`: SVG, with its title, its text for screen readers, and its caption."""

    title: str
    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Maps(Section):
    """Pictures side by side, followed by plots."""

    maps: Sequence[Map]
    caption: str = ""
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Version:
    """A reconstruction of an original, or its error map, as a PNG file."""

    label: str
    png: bytes
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An original and its versions, PNG files of the same size."""

    name: str
    original: bytes
    versions: Sequence[Version]
    note: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, so that the layout is fixed before images load."""
        return png_size(self.original)


@dataclass(frozen=True)
class Pictures(Section):
    """Originals with their versions, compared by a slider, and in a large view that zooms.

    All pictures of a section have the same versions, in the same order.
    """

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Plots(Section):
    """Plots in a grid."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Reasons(Section):
    """Name -> reason of each thing that was not computed."""

    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Lineage(Section):
    """Trees {kind, name, content, inputs: {role: tree}} of the artifacts that a report was made from."""

    trees: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Commands(Section):
    """Commands that reproduce the numbers of the page, with copy buttons."""

    commands: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class ReportPage:
    """A page: title, subtitle, sections from top to bottom, and footer."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""
    reload_seconds: int = 0
    """Seconds after which the page loads itself again, because its file is written again; 0: never."""
    successor: str = ""
    """The name, URL-quoted, of the artifact beside the page's folder whose page replaces this one once it exists."""


def render(report: ReportPage) -> str:
    """The page as one HTML document, with the version and its own size in the footer."""
    version = metadata.version("vqpipe")
    html = valid_text(template().render(report=report, version=version, file_size=FILE_SIZE).lstrip())
    return html.replace(FILE_SIZE, megabytes(len(html.encode())))


def png_size(png: bytes) -> tuple[int, int]:
    """(width, height) of a PNG file, from its header."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def breakable(text: str) -> Markup:
    """Text whose lines may also end after a slash or a colon, as in a path."""
    return Markup(re.sub("([/:])(?=[^ ])", r"\1<wbr>", str(escape(text))))


def data_uri(png: bytes) -> str:
    """A PNG file as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def megabytes(num_bytes: int) -> str:
    """A file size as text, at least 0.1 MB."""
    return f"{max(num_bytes / 1e6, 0.1):,.1f} MB"


@cache
def template() -> Template:
    """The page template, loaded once."""
    environment = Environment(
        loader=PackageLoader("vqpipe.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda plot: Markup(plot.svg)  # matplotlib escapes its text
    environment.filters["data_uri"] = data_uri
    environment.filters["breakable"] = breakable
    return environment.get_template("page.html.j2")
