"""What the commands share: the session they run in, their output, the progress bar.

Results go to stdout, everything else to stderr; ranks above 0 print nothing.
"""

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stages import signals
from stages.options import Color, KeyPrefix
from vqpipe.errors import printable
from vqpipe.words import counted

if TYPE_CHECKING:
    import torch

    from vqpipe.artifacts import Artifact
    from vqpipe.data.images import ImageSet
    from vqpipe.reports.page import Table as ReportTable

OPEN: list["ProgressBar"] = []
"""The progress that is displayed, at the bottom of a terminal: everything else is printed above it."""
READING = "reading and hashing the images"
"""The phase of `open_images`; several sets of images are one phase."""
PLAIN_SECONDS = 10.0
"""Shortest time between two lines of progress where stderr is not a terminal."""
LOG_WIDTH = 200
"""Columns of a table where stderr is not a terminal."""


@contextmanager
def session(device: str, seed: int) -> Iterator["torch.device"]:
    """Set up a command: signal handlers, seed, process group under torchrun. Yields this rank's device.

    A progress bar that is open already shows that PyTorch is loaded, until its first phase; otherwise there is one for
    that long.
    """
    with nullcontext(OPEN[-1]) if OPEN else ProgressBar() as progress:
        if progress.live is not None and "torch" not in sys.modules:
            progress.start("loading PyTorch", None, unit="")  # takes seconds
        import torch

        from vqpipe import distributed
        from vqpipe.device import pick_device

    signals.handle_signals()
    torch_device = pick_device(device)
    torch.manual_seed(seed)
    with distributed.process_group(torch_device):
        yield torch_device


def say(*texts: str) -> None:
    """Print lines on stderr, from rank 0. A closed stderr is not an error."""
    for text in texts if prints() else ():
        with suppress(OSError):
            stderr().print("\n".join(map(printable, text.split("\n"))), highlight=False, markup=False, soft_wrap=True)


def open_images(
    names: Sequence[str], key_prefix: KeyPrefix | None = None, color: Color = "ignore", limit: int | None = None
) -> "ImageSet":
    """Open `--images`, or their first `limit`, and print what is left out, why labels are missing, and which keys occur
    twice.

    An open progress bar shows that images are read until its next phase: they are hashed, which may take hours.
    """
    from vqpipe import data

    if OPEN and OPEN[-1].title != READING:
        OPEN[-1].start(READING, None, unit="")
    images = data.images.first_images(data.images.open_images(names, key_prefix, color), limit)
    remark(images)
    return images


def remark(images: "ImageSet") -> None:
    """Print the remarks of opened images, a line each."""
    say(*images.remarks)


def remark_size(what: str, size: int | str | None, preset: str, trained: int) -> None:
    """Print a line if `what` is of images of another size than the preset trains on; None is an unknown size."""
    if isinstance(size, int) and size != trained:
        say(f"warning: {what} of images of {size} px, and preset {preset} trains at {trained} px (data.image_size)")


def show(renderable: RenderableType) -> None:
    """Print a result, a rich table or tree, on stderr, from rank 0. In a log file it is not limited to a terminal's
    width."""
    end_progress()
    if prints():
        console = stderr()
        if not console.is_terminal:
            console.width = LOG_WIDTH
        console.print(renderable)


def show_table(table: "ReportTable") -> None:
    """Print a table of a report, with the best cells highlighted. The text of a span is above its first column."""
    from vqpipe.reports import page

    above = [each for text, width in table.spans for each in (escape(text), *[""] * (width - 1))]
    header = [f"{text}\n{name}" for text, name in zip(above, table.header, strict=True)] if above else table.header
    shown = Table(*header, box=box.SIMPLE, pad_edge=False, title=escape(table.title), title_justify="left")
    for row in table.rows:
        cells = [page.Cell(cell) if isinstance(cell, str) else cell for cell in row]
        shown.add_row(*(f"[bold green]{escape(cell.text)}[/]" if cell.best else escape(cell.text) for cell in cells))
    shown.columns[0].no_wrap = True
    for name, column in zip(table.header[1:], shown.columns[1:], strict=True):
        column.justify = "left" if name in table.prose else "right"
        column.overflow = "fold"  # a number is never cut
    show(shown)


def labelled(rows: Mapping[str, str]) -> Table:
    """Labels and values as a table; an empty value is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in rows.items():
        if value:
            table.add_row(escape(label), escape("\n".join(map(printable, value.split("\n")))))
    return table


def wrapped(line: str, columns: int | None, indent: int) -> str:
    """The line, broken between words where it is longer than `columns`; None: as it is. An address is never broken."""
    if columns is None:
        return line
    return textwrap.fill(line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def show_numbers(numbers: Iterable[tuple[str, str, str]], not_computed: Mapping[str, str]) -> None:
    """Print the label, value and convention of each measure, then why others were not computed: the address of each
    file of weights that is missing, and each other reason once."""
    from vqpipe.reports import page
    from vqpipe.reports.evaluation import name_of
    from vqpipe.weights import PUBLISHED_FILES

    header = ["measure", "value", "convention"]
    if rows := [list(row) for row in numbers]:
        show_table(page.Table("", header, rows, prose=header[2:]))
    missing: list[str] = []
    for reason in dict.fromkeys(not_computed.values()):
        names = ", ".join(name_of(key) for key, why in not_computed.items() if why == reason)
        addresses = [url for file, url in PUBLISHED_FILES.items() if file in reason]
        missing += [f"  {names}: {url}" for url in addresses]
        if not addresses:
            say(f"not computed: {names}: {reason}")
    if missing:
        say("\n".join(["not computed: put these files into a folder, and pass it as --weights DIR", *missing]))


def finished(artifact: "Artifact", again: bool = False) -> None:
    """Print the last lines of a command: what was published, and what to do next. A program that reads stdout gets the
    path alone."""
    from stages import facts

    end_progress()
    if not prints():
        return
    path, about = str(artifact.path), facts.summary(artifact.kind, artifact.facts)
    say(f"{'already published' if again else 'published'}: {path}" + (f" ({about})" if about else ""))
    say_next(artifact)
    if not sys.stdout.isatty():
        print(path, flush=True)


def say_next(artifact: "Artifact") -> None:
    """Print what to do after a command: what to open, and the next commands."""
    from stages import next_steps

    if prints():
        say(*next_steps.lines(artifact))


class ProgressBar:
    """Displays the progress of a job (`vqpipe.progress.Progress`): on a terminal a bar with rate and time left, and
    a table of details under it; elsewhere a plain line every ten seconds; on ranks above 0 nothing."""

    def __init__(self) -> None:
        self.visible = prints()
        self.live: Live | None = None
        self.details: Sequence[tuple[str, str]] = ()
        self.title = self.unit = ""

    def __enter__(self) -> "ProgressBar":
        terminal = stderr()
        if self.visible and terminal.is_terminal and not terminal.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                RateColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
            )
            self.bars = Progress(*columns, console=terminal)
            # stdout is for results, which rich would print on stderr
            self.live = Live(console=terminal, get_renderable=self.render, refresh_per_second=4, redirect_stdout=False)
            self.live.start()
        OPEN.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the display as it is, and print below it from now on."""
        self.end_phase()
        if self in OPEN:
            OPEN.remove(self)
            if self.live is not None:
                self.live.transient = not self.bars.tasks
                self.live.stop()

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        self.end_phase()
        self.title, self.total, self.unit = title, total, unit
        self.done = self.earlier = done
        self.text = ""
        self.began = self.printed = time.monotonic()
        if self.live is not None:
            self.task = self.bars.add_task(title, total=total, completed=done, unit=unit, note="", count=self.count())
            self.live.refresh()  # at once: what follows may keep the thread that refreshes from running
        elif self.visible and not unit:
            say(title)

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.live is not None:
            self.bars.update(self.task, completed=self.done, count=self.count())
        elif self.visible and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            say(self.line())

    def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
        self.text, self.details = text, details
        if self.live is not None:
            self.bars.update(self.task, note="" if details else text)

    def message(self, text: str) -> None:
        say(text)

    def end_phase(self) -> None:
        """Remove a phase without a count from the display. Where stderr is not a terminal, print how long another one
        took."""
        if self.title and self.live is not None and not self.unit:
            self.bars.remove_task(self.task)
        elif self.title and self.visible and self.live is None and self.done > self.earlier:
            seconds = clock(time.monotonic() - self.began)
            note = f"  {self.text}" if self.text else ""
            say(f"{self.title}: {counted(self.done - self.earlier, self.unit)} in {seconds}{note}")
        self.title = ""

    def count(self) -> str:
        """`done/total`, or `done` where the total is unknown; empty for a phase without a count."""
        return "" if not self.unit else f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")

    def line(self) -> str:
        """The progress as a plain line."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.earlier) / seconds
        left = f", {clock((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
        note = f"  {self.text}" if self.text else ""
        done = f"{self.done:,}/" if self.total else ""
        return f"{self.title}: {done}{counted(self.total or self.done, self.unit)}, {rate:.3g}/s{left}{note}"

    def render(self) -> RenderableType:
        """The bars, and the table of details below them."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        for label, text in self.details:
            table.add_row(label, Columns(text.split("   "), padding=(0, 3)))
        return Group(self.bars, table)


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} {task.fields['unit']}/s" if task.speed else "")


def prints() -> bool:
    """Whether this process prints. Reads RANK from the environment: it works before the process group exists too."""
    return os.environ.get("RANK", "0") == "0"


def stderr() -> Console:
    """The console of everything but results. While a display is open it is that display's, which prints above it."""
    return next((bar.live.console for bar in reversed(OPEN) if bar.live is not None), None) or Console(file=sys.stderr)


def end_progress() -> None:
    """Leave the progress as it is displayed, and print below it from now on."""
    while OPEN:
        OPEN[-1].close()


def clock(seconds: float) -> str:
    """`75` -> `1:15`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
