"""The page of a generator's or a classifier's run: the same while it goes on and when it has ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vqpipe.reports import page, plots
from vqpipe.reports.pictures import data_uri
from vqpipe.reports.training import Column, Row, Run, headline, origin

NUMBERS = (
    Column("loss/total", "loss", ".4g"),
    Column("valid/total", "validation loss", ".4g"),
    Column("train/top1", "training top-1", ".1f", "%", 100),
    Column("valid/top1", "validation top-1", ".1f", "%", 100),
    Column("valid/top5", "validation top-5", ".1f", "%", 100),
    Column("images_per_second", "speed", ",.3g", "images/s"),
    Column("memory_gb", "memory", ".1f", "GB"),
    Column("nonfinite_steps", "skipped steps", ",.0f"),
)


@dataclass(frozen=True, kw_only=True)
class LearningRun(Run):
    """A generator's or a classifier's run."""

    what: str
    """One line: which network, on what."""
    sheet: bytes | None = None
    """The newest samples, a PNG file."""
    sheet_note: str = ""


def learning_page(run: LearningRun, footer: str = "") -> page.ReportPage:
    """Numbers, samples, curves, settings, where it came from."""
    subtitle = f"{run.what} Step {run.step:,} of {run.steps:,}."
    return page.ReportPage(run.name, subtitle, list(sections(run)), footer)


def sections(run: LearningRun) -> Iterator[page.Section]:
    """The parts of the page that there is something to say in."""
    yield from headline(run, NUMBERS)
    if run.sheet is not None:
        samples = page.Map(run.sheet_note, data_uri(run.sheet), f"Step {run.step:,}", "samples")
        yield page.Maps("Samples", [samples])
    if curves := run_curves(run.rows):
        yield page.Plots("Curves", curves)
    yield from origin(run)


def run_curves(rows: Sequence[Row]) -> list[plots.Plot]:
    """Losses, accuracies, learning rate and gradients over images seen; what was not logged has no plot."""

    def lines(**keys: str) -> dict[str, plots.Line]:
        return {name: plots.series(rows, key) for name, key in keys.items()}

    terms = dict.fromkeys(name for row in rows for name in row if name.startswith("loss/") and name != "loss/total")
    parts = {name.removeprefix("loss/"): plots.series(rows, name) for name in terms}
    drawn = (
        plots.curves("Loss", lines(training="loss/total", validation="valid/total"), "linear"),
        plots.curves("Parts of the loss", parts, "linear"),
        plots.curves(
            "Right answers",
            lines(training="train/top1", validation="valid/top1", among_five="valid/top5"),
            "share",
        ),
        plots.curves("Learning rate", lines(rate="learning_rate"), "linear"),
        plots.curves("Gradient norm", lines(norm="gradient_norm"), "log"),
        plots.curves("Images a second", lines(speed="images_per_second"), "linear"),
    )
    return [plot for plot in drawn if plot is not None]
