"""Tables of numbers that a paper prints, each beside the number measured here.

A table is a TOML file; those of the two papers are in stages/runs/published:

    title = "VQGAN-LC (Zhu et al. 2024), Table 3: reconstruction on FFHQ"
    protocol = "cleanfid-rawval"                    # the protocol of ours that is the paper's
    columns = ["utilization", "rfid"]               # keys of metrics.json; rfid@celeba: of the set of images celeba
    rows = [
        ["", "MQVAE, 1,024", 0.782, 4.55],          # quoted by the paper, or not measured here
        ["ffhq-fc", "VQGAN-FC", 0.109, 4.86],       # measured here under the name ffhq-fc; "-": not printed
    ]
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqpipe.errors import ConfigError
from vqpipe.reports import page
from vqpipe.reports.evaluation import BY_KEY, with_unit, written
from vqpipe.words import first_names

NOT_PRINTED = "-"


@dataclass(frozen=True)
class PublishedRow:
    """A row of a table."""

    name: str
    """Name of the tokenizer or of the samples that reproduce it; empty for numbers that are only quoted."""
    label: str
    values: Mapping[str, float]
    """Column -> the printed number; without the numbers that are not printed."""


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper."""

    title: str
    protocol: str
    columns: Sequence[str]
    rows: Sequence[PublishedRow]


class OurNumbers:
    """The numbers of reports, found by the names that published tables give to their rows."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str, tuple[str, ...], Mapping[str, float | None]]] = []

    def add(self, protocol: str, images: str, names: tuple[str, ...], values: Mapping[str, float | None]) -> None:
        """Add a report: its protocol, set of images, names, and numbers by the key of the measure."""
        self.reports.append((protocol, images, names, values))

    def find(self, protocol: str, images: str, name: str, key: str) -> float | None:
        """A number of the report with this name, or with a name that ends with it: `report-celeba-sd-vae` is `sd-vae`.

        `images` is the name of a set, or empty: that of the first such report. Of several reports on one set, the
        number is that of the first that has it.
        """
        fitting = [(names, i, v) for p, i, names, v in self.reports if p == protocol and images in ("", i)]
        exact = [(i, values) for names, i, values in fitting if name in names]
        ending = [(i, values) for names, i, values in fitting if any(each.endswith(f"-{name}") for each in names)]
        found = exact or ending
        numbers = (values.get(key) for i, values in found if i == found[0][0])
        return next((number for number in numbers if number is not None), None)


def read_table(path: Path) -> PublishedTable:
    """Read a table.

    Raises:
        ConfigError: the file cannot be read, or is no such table.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        columns = [str(column) for column in table["columns"]]
        rows = [parse_row(row, columns) for row in table["rows"]]
        return PublishedTable(str(table["title"]), str(table["protocol"]), columns, rows)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "Check the path of --published") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        hint = "It has title, protocol, columns and rows: name, label, and a number or - for each column"
        raise ConfigError(f"{path} is no table of published numbers ({error})", hint) from None


def parse_row(row: Sequence[object], columns: Sequence[str]) -> PublishedRow:
    """`[name, label, number, ...]`.

    Raises:
        ValueError: it has another length, or a value that is neither a number nor "-".
    """
    name, label, *values = row
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} numbers for {len(columns)} columns: {label}")
    printed = {column: value for column, value in zip(columns, values, strict=True) if value != NOT_PRINTED}
    for column, value in printed.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{column} of {label} is {value!r}")
    return PublishedRow(str(name), str(label), {column: float(value) for column, value in printed.items()})  # type: ignore[arg-type]


def published_table(table: PublishedTable, ours: OurNumbers) -> page.Table:
    """The table with two columns for each number: the paper's and ours.

    Raises:
        ConfigError: a column is no known measure.
    """
    split = [(key, images) for key, _, images in (column.partition("@") for column in table.columns)]
    for key, _ in split:
        if key not in BY_KEY:
            raise ConfigError(f"{table.title}: unknown column {key!r}", f"Known: {', '.join(BY_KEY)}")
    rows, found = [], False
    for row in table.rows:
        cells = [row.label if row.name else f"{row.label} (quoted)"]
        for column, (key, images) in zip(table.columns, split, strict=True):
            number = ours.find(table.protocol, images, row.name, key) if row.name else None
            found |= number is not None
            cells += [written(BY_KEY[key], value, unit=False) for value in (row.values.get(column), number)]
        rows.append(cells)
    labels = [with_unit(BY_KEY[key]) + (f", {images}" if images else "") for key, images in split]
    caption = (
        f"Ours: protocol {table.protocol}, which follows the paper's; see the protocol for what still differs. "
        "The paper's numbers are its authors', on their images and weights."
    )
    if not found:
        names = first_names([row.name for row in table.rows if row.name])
        caption = f"No report of protocol {table.protocol} has the name of a row: {names}. {caption}"
    header = ["row", *["paper", "ours"] * len(split)]
    return page.Table(f"As published: {table.title}", header, rows, caption, spans=[("", 1), *((x, 2) for x in labels)])
