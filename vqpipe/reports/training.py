"""The page of one training run: the same page while it goes on and when it has ended.

Letters: G groups, K codes a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vqpipe.reports import page, plots
from vqpipe.reports.codebook_use import MAP_CAPTION, maps_of
from vqpipe.reports.evaluation import Evaluated, codes
from vqpipe.reports.pictures import ERROR_CAPTION, ImagePair, error_pictures

Row = Mapping[str, Any]
MOST_OPEN = 12
"""Validations up to which their table stands open."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of any run at one moment."""

    name: str
    step: int
    steps: int
    rows: Sequence[Row]
    """Of `metrics.jsonl`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The sections of its preset."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Run):
    """A tokenizer's run."""

    tokenizer: Mapping[str, Any]
    """`quantizer` (its kind), `codebook_size`, `num_groups`, `downsample_factor`."""
    shown: Sequence[ImagePair] = ()
    """The newest pictures."""
    shown_note: str = ""
    """Which images they are, and of which step."""
    counts: Tensor | None = None
    """int64[G, K]: how often each code was chosen, newest."""
    counts_note: str = ""
    """On which images."""
    best_step: int | None = None
    """At which the validation went best."""


@dataclass(frozen=True)
class Column:
    """A logged number as people read it."""

    key: str
    label: str
    format: str
    unit: str = ""
    scale: float = 1.0

    def written(self, value: float | None) -> str:
        """The number as text, without its unit; a dash where there is none."""
        return "–" if value is None else format(self.scale * value, self.format)


NUMBERS = (
    Column("loss/total", "loss", ".4g"),
    Column("psnr", "PSNR", ".2f", "dB"),
    Column("valid/psnr", "validation PSNR", ".2f", "dB"),
    Column("valid/ssim", "validation SSIM", ".3f"),
    Column("valid/lpips_vgg", "validation LPIPS (VGG)", ".3f"),
    Column("valid/lpips_alex", "validation LPIPS (AlexNet)", ".3f"),
    Column("utilization", "codes in use", ".1f", "%", 100),
    Column("perplexity", "perplexity", ",.1f"),
    Column("images_per_second", "speed", ",.3g", "images/s"),
    Column("mfu", "of the device's peak", ".1f", "%", 100),
    Column("tflops", "arithmetic", ",.3g", "TFLOP/s"),
    Column("memory_gb", "memory", ".1f", "GB"),
    Column("nonfinite_steps", "skipped steps", ",.0f"),
)
VALIDATION = (
    Column("valid/psnr", "PSNR, dB", ".2f"),
    Column("valid/ssim", "SSIM", ".3f"),
    Column("valid/lpips_vgg", "LPIPS (VGG)", ".3f"),
    Column("valid/lpips_alex", "LPIPS (AlexNet)", ".3f"),
    Column("valid/utilization", "codes in use, %", ".1f", scale=100),
    Column("valid/perplexity", "perplexity", ",.1f"),
)


def training_page(run: TrainingRun, footer: str = "") -> page.ReportPage:
    """Numbers, pictures, curves, codes, validations, settings, where it came from."""
    return page.ReportPage(run.name, subtitle(run), list(sections(run)), footer)


def sections(run: TrainingRun) -> Iterator[page.Section]:
    """The parts of the page that there is something to say in."""
    yield from headline(run, NUMBERS, notes_of(run))
    if run.shown:
        caption = f"{run.shown_note} {ERROR_CAPTION}".strip()
        yield page.Pictures("Originals and reconstructions", error_pictures(run.shown), caption)
    if curves := run_curves(run.rows):
        yield page.Plots("Curves", curves)
    if run.counts is not None and run.counts.sum():
        maps = maps_of([Evaluated(run.name, {}, run.counts)])
        caption = f"{run.counts_note} {MAP_CAPTION if maps else ''}".strip()
        yield page.Maps("Which codes are in use", maps, caption, [plots.code_frequency(run.counts)])
    if any("valid/images" in row for row in run.rows):
        yield validation_table(run)
    yield from origin(run)


def subtitle(run: TrainingRun) -> str:
    tokenizer = run.tokenizer
    what = f"{tokenizer['quantizer']} quantizer, {codes(tokenizer)}, downsample factor {tokenizer['downsample_factor']}"
    return f"{what}. Step {run.step:,} of {run.steps:,}."


def notes_of(run: TrainingRun) -> dict[str, str]:
    """What stands below a number."""
    return {
        "psnr": "training images, since the row before",
        "utilization": "training images, since the row before",
        "valid/psnr": "" if run.best_step is None else f"best at step {run.best_step:,}",
        "mfu": "estimate; bf16, dense",
        "tflops": "estimate; each device",
    }


def headline(run: Run, columns: Sequence[Column], notes: Mapping[str, str] | None = None) -> Iterator[page.Section]:
    """The newest of each number that is logged; `notes` by key."""
    share = latest(run.rows, "data_wait")
    waiting = {} if share is None else {"images_per_second": f"{share:.0%} of the time waiting for images"}
    notes = waiting | dict(notes or {})
    values = {column: latest(run.rows, column.key) for column in columns}
    numbers = [
        page.Number(column.label, column.written(value), column.unit, notes.get(column.key, ""))
        for column, value in values.items()
        if value is not None and not (column.key == "nonfinite_steps" and value == 0)
    ]
    if numbers:
        yield page.Numbers("Now" if run.step < run.steps else "At the end", numbers)


def origin(run: Run) -> Iterator[page.Section]:
    """Its settings, what it was made from, and the command."""
    if run.settings:
        rows = [[name, text] for name, text in flat(run.settings)]
        yield page.Table("Settings", ["setting", "value"], rows, folded=True)
    if run.lineage:
        yield page.Lineage("Made from", [run.lineage])
    if run.command:
        yield page.Commands("Go on, or make it again", [run.command])


def run_curves(rows: Sequence[Row]) -> list[plots.Plot]:
    """Losses, quality, codes, learning rate and gradients over images seen; what was not logged has no plot."""

    def lines(**keys: str) -> dict[str, plots.Line]:
        return {name: plots.series(rows, key) for name, key in keys.items()}

    validations = [row for row in rows if "valid/images" in row]
    window = max((row["window_tokens"] for row in rows if "window_tokens" in row), default=0)
    held_out = f" Validation: {validations[-1]['valid/images']:,} images." if validations else ""
    drawn = (
        plots.curves("Loss", {term: plots.series(rows, f"loss/{term}") for term in plots.LOSS_TERMS}, "log"),
        plots.curves("PSNR, dB", lines(training="psnr", validation="valid/psnr"), "linear", held_out.strip()),
        plots.curves("LPIPS", lines(VGG="valid/lpips_vgg", AlexNet="valid/lpips_alex"), "linear", held_out.strip()),
        plots.curves(
            "Codes in use",
            lines(training="utilization", validation="valid/utilization"),
            "share",
            f"Training: among the {window:,} tokens (at most) between two rows of the log.{held_out}",
        ),
        plots.curves("Perplexity of the codes", lines(training="perplexity", validation="valid/perplexity"), "linear"),
        plots.curves("Learning rate", lines(rate="learning_rate"), "linear"),
        plots.curves(
            "Gradient norm", lines(tokenizer="gradient_norm", discriminator="discriminator_gradient_norm"), "log"
        ),
        plots.curves("Images a second", lines(speed="images_per_second"), "linear"),
    )
    return [plot for plot in drawn if plot is not None]


def validation_table(run: TrainingRun) -> page.Table:
    """A row for each validation, the best set off."""
    rows = [row for row in run.rows if "valid/images" in row]
    columns = [column for column in VALIDATION if any(column.key in row for row in rows)]
    cells = [
        [f"{row['step']:,}"]
        + [page.Cell(column.written(row.get(column.key)), best=row["step"] == run.best_step) for column in columns]
        for row in rows
    ]
    header = ["step", *(column.label for column in columns)]
    caption = f"{rows[-1]['valid/images']:,} held-out images, centre crops; measured as vqpipe eval does."
    return page.Table("Validation", header, cells, caption, folded=len(rows) > MOST_OPEN)


def latest(rows: Sequence[Row], key: str) -> float | None:
    """The newest finite number logged under `key`, or None."""
    values = plots.series(rows, key)[1]
    return float(values[-1]) if len(values) else None


def flat(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `section.key` and text."""
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if isinstance(value, Mapping):
            yield from flat(value, name)
        else:
            yield name, str(value)
