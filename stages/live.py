"""How a training run looks while it goes on: a table that stays in place on a terminal, plain lines elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stages import console
from stages.console import Bar

Row = Mapping[str, Any]
LOSS, TRAIN = "loss/", "train/"
"""What the names of losses, and of other numbers of what is trained, begin with."""


class Display(Protocol):
    """Where a run's progress is shown."""

    def resume(self, step: int) -> None:
        """The run goes on from `step`."""

    def advance(self) -> None:
        """One more step is done."""

    def show(self, row: Row) -> None:
        """A row of the log, of training or of validation, came in."""


@contextmanager
def display(steps: int) -> Iterator[Display]:
    """The table on a terminal; elsewhere plain lines; nothing on ranks above 0."""
    terminal = console.stderr()
    if console.is_main() and terminal.is_terminal:
        board = Board(steps, terminal)
        with board.live:
            yield board
    else:
        with console.progress("train", steps, "steps") as bar:
            yield Lines(bar)


class Lines:
    """A line now and then: how far, how long still, and the few numbers that fit."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def resume(self, step: int) -> None:
        self.bar.resume(step)

    def advance(self) -> None:
        self.bar.advance()

    def show(self, row: Row) -> None:
        if "learning_rate" in row:
            self.bar.note(headline(row))


class Board:
    """A bar with the time left, and under it every number of the newest rows."""

    def __init__(self, steps: int, terminal: Console) -> None:
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}" + f"/{steps:,} steps"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/dim]"),
            TimeRemainingColumn(),
            console=terminal,
        )
        self.task = self.progress.add_task("train", total=steps)
        self.row: dict[str, Any] = {}
        self.live = Live(console=terminal, get_renderable=self.render, refresh_per_second=2, transient=False)

    def resume(self, step: int) -> None:
        self.progress.reset(self.task, completed=step)

    def advance(self) -> None:
        self.progress.advance(self.task)

    def show(self, row: Row) -> None:
        """Numbers stay until newer ones come; those of a validation say of which step they are."""
        if any(name.startswith("valid/") for name in row):
            newer = {name: value for name, value in row.items() if name.startswith("valid/")}
            row = newer | {"valid/step": row["step"]}
        self.row = self.row | dict(row)  # a new one: another thread may be drawing the old

    def render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        for label, text in lines_of(self.row):
            table.add_row(label, text)
        return Group(self.progress, table)


def headline(row: Row) -> str:
    """The few numbers of a log row that fit beside a bar."""
    known = {"psnr": "psnr {:.2f} dB", "utilization": "codes in use {:.1%}"}
    known = known if "psnr" in row else {"loss/total": "loss {:.4g}"}
    known |= {"images_per_second": "{:.3g} images/s"}
    parts = [text.format(row[name]) for name, text in known.items() if name in row]
    if row.get("nonfinite_steps"):
        parts.append(f"{row['nonfinite_steps']:,} skipped steps")
    return ", ".join(parts)


def lines_of(row: Row) -> list[tuple[str, str]]:
    """What the table says: a label and the numbers of it that are known, as text."""
    terms = [name.removeprefix(LOSS) for name in row if name.startswith(LOSS)]
    terms.sort(key=lambda term: (term != "total", term))
    groups = {
        "loss": [(name, "{:.4g}", LOSS + name) for name in terms],
        "training": [(name.removeprefix(TRAIN), "{:.4g}", name) for name in row if name.startswith(TRAIN)],
        "quality": [("PSNR", "{:.2f} dB", "psnr")],
        "validation": [
            ("PSNR", "{:.2f} dB", "valid/psnr"),
            ("SSIM", "{:.3f}", "valid/ssim"),
            ("LPIPS", "{:.3f}", "valid/lpips_vgg"),
            ("LPIPS", "{:.3f}", "valid/lpips_alex"),
            ("codes in use", "{:.1%}", "valid/utilization"),
            ("step", "{:,}", "valid/step"),
        ],
        "codes": [("in use", "{:.1%}", "utilization"), ("perplexity", "{:,.1f}", "perplexity")],
        "gradients": [
            ("norm", "{:.3g}", "gradient_norm"),
            ("discriminator", "{:.3g}", "discriminator_gradient_norm"),
            ("skipped steps", "{:,}", "nonfinite_steps"),
            ("learning rate", "{:.3g}", "learning_rate"),
        ],
        "speed": [
            ("", "{:,.3g} images/s", "images_per_second"),
            ("", "{:.3g} s a step", "seconds_per_step"),
            ("waiting for images", "{:.0%}", "data_wait"),
            ("MFU", "{:.1%}", "mfu"),
            ("", "{:.3g} TFLOP/s", "tflops"),
            ("memory", "{:.1f} GB", "memory_gb"),
            ("compiled graphs", "{:,}", "compiled_graphs"),
        ],
    }
    lines = []
    for label, entries in groups.items():
        known = [f"{name} {text.format(row[key])}".strip() for name, text, key in entries if key in row]
        if known:
            lines.append((label, "   ".join(known)))
    return lines
