"""The page of a training run of a tokenizer, a generator or a classifier, during the run and after it.

Shapes: G groups, K codes per group.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from torch import Tensor

from vqpipe.config import flat, toml_value
from vqpipe.reports import page, plots
from vqpipe.reports.codebook_use import MAP_CAPTION, maps_of
from vqpipe.reports.evaluation import EvaluationResult, codes, on_images
from vqpipe.reports.pictures import ERROR_CAPTION, ImagePair, error_pictures
from vqpipe.words import capitalized, counted, percent

RELOAD_SECONDS = 15
"""Seconds after which the page of a run loads itself again."""
OPEN_ROWS = 12
"""Validations up to which their table is not folded."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run at one moment."""

    name: str
    description: str
    """One line on what is trained."""
    step: int
    steps: int
    rows: Sequence[plots.LogRow]
    """The rows of `metrics.jsonl`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The sections of its preset."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    shown: Sequence[ImagePair] = ()
    """The newest reconstructions."""
    shown_note: str = ""
    """Which images they are, and of which step."""
    samples: bytes | None = None
    """The newest samples, a PNG file."""
    samples_step: int = 0
    samples_note: str = ""
    sample_columns: int = 4
    """Samples side by side in the PNG file."""
    counts: Tensor | None = None
    """int64[G, K]: how often each code was chosen."""
    counts_note: str = ""
    """On which images, at which step."""
    best_step: int | None = None
    """The step of the best validation."""
    best_measure: str = "valid/psnr"
    """The number that decides which is the best."""
    written: str = ""
    """When the page was written."""


@dataclass(frozen=True)
class LoggedNumber:
    """A logged number: its format, and the line of the progress display that it is in."""

    key: str
    group: str
    label: str
    format: str
    unit: str = ""
    """With "%" the number is a share, 0..1."""
    note: str = ""
    """How it is measured, where that is not plain from its label."""

    @property
    def short_label(self) -> str:
        """The label beside the name of the group."""
        return self.label.removeprefix(f"{self.group} ")

    def text(self, value: float | None) -> str:
        """The number without its unit; a dash for None. An exponent has no zero before it: `1.1e-6`."""
        if value is not None and self.unit == "%":
            return percent(value, int(self.format[1])).removesuffix(" %")
        return "–" if value is None else re.sub("e([+-])0", r"e\1", format(value, self.format))

    def text_with_unit(self, value: float) -> str:
        """The number with its unit."""
        return f"{self.text(value)} {self.unit}".strip()


BACKBONES = {"vgg": "VGG", "alex": "AlexNet", "squeeze": "SqueezeNet"}
PERCEPTUAL = {
    "lpips": ("LPIPS", ""),
    "perceptual": ("perceptual distance", "LPIPS's formula with other weights than torchvision's. "),
}
"""Kind of distance of a validation -> its name, and what it is."""
NUMBERS = (
    LoggedNumber("loss/total", "loss", "loss", ".4g"),
    LoggedNumber(
        "psnr", "training", "training PSNR", ".2f", "dB", note="of the mean squared error since the last row of the log"
    ),
    LoggedNumber("train/top1", "training", "training top-1", ".1f", "%"),
    LoggedNumber("valid/step", "validation", "validation step", ",.0f"),
    LoggedNumber("valid/total", "validation", "validation loss", ".4g"),
    LoggedNumber("valid/psnr", "validation", "validation PSNR", ".2f", "dB", note="mean over images"),
    LoggedNumber("valid/ssim", "validation", "validation SSIM", ".3f"),
    *(
        LoggedNumber(f"valid/{kind}_{net}", "validation", f"validation {words} ({name})", ".3f")
        for kind, (words, _) in PERCEPTUAL.items()
        for net, name in BACKBONES.items()
    ),
    LoggedNumber("valid/top1", "validation", "validation top-1", ".1f", "%"),
    LoggedNumber("valid/top5", "validation", "validation top-5", ".1f", "%"),
    LoggedNumber("valid/utilization", "validation", "validation codes in use", ".1f", "%"),
    LoggedNumber("valid/perplexity", "validation", "validation perplexity", ",.1f", note="mean over groups"),
    LoggedNumber("utilization", "codes", "codes in use", ".1f", "%", "training images, since the last row of the log"),
    LoggedNumber(
        "perplexity",
        "codes",
        "training perplexity",
        ",.1f",
        note="of the first group of codes, since the last row of the log",
    ),
    LoggedNumber("loss/discriminator", "discriminator", "discriminator loss", ".4g"),
    LoggedNumber(
        "loss/real_logit", "discriminator", "discriminator real", ".4g", note="mean output on training images"
    ),
    LoggedNumber(
        "loss/fake_logit", "discriminator", "discriminator fake", ".4g", note="mean output on their reconstructions"
    ),
    LoggedNumber(
        "loss/adversarial_weight", "discriminator", "adaptive weight", ".4g", note="factor of the adversarial term"
    ),
    LoggedNumber("gradient_norm", "gradients", "gradient norm", ".3g"),
    LoggedNumber("discriminator_gradient_norm", "gradients", "discriminator gradient norm", ".3g"),
    LoggedNumber("nonfinite_steps", "gradients", "skipped steps", ",.0f"),
    LoggedNumber("learning_rate", "gradients", "learning rate", ".3g"),
    LoggedNumber("images_per_second", "speed", "throughput", ",.3g", "images/s"),
    LoggedNumber("seconds_per_step", "speed", "time per step", ".3g", "s"),
    LoggedNumber("data_wait", "speed", "waiting for images", ".0f", "%"),
    LoggedNumber("mfu", "speed", "MFU", ".1f", "%", "share of the device's peak; estimate; bf16, dense"),
    LoggedNumber("tflops", "speed", "arithmetic", ",.3g", "TFLOP/s", note="estimate; each device"),
    LoggedNumber("memory_gb", "speed", "memory", ".1f", "GB"),
    LoggedNumber("compiled_graphs", "speed", "compiled graphs", ",.0f"),
)
"""Every logged number except most loss terms, for the page and for the progress display."""
NOT_TERMS = ("total", "adversarial_weight", "real_logit", "fake_logit")
"""Keys of a log row under `loss/` that are no terms of a loss."""
LOSS_TERMS = {
    "l1": "L1 distance",
    "l2": "squared error",
    "log_l2": "log squared error",
    "charbonnier": "Charbonnier distance",
    "lpips": "perceptual distance",
    "r1": "R1 penalty",
    "lecam": "LeCam penalty",
}
"""Term of a loss -> its name in a legend, where the two differ in more than underscores."""


def in_words(key: str, value: float) -> str:
    """`validation PSNR 23.04 dB`: a logged number by its label, and with its unit."""
    number = next((each for each in NUMBERS if each.key == key), None)
    if number is None:
        return f"{key.replace('valid/', 'validation ').replace('_', ' ')} {value:.4g}"
    return f"{number.label} {number.text_with_unit(value)}"


def describe_tokenizer(facts: Mapping[str, Any]) -> str:
    """One line on quantizer, codes and downsample factor."""
    return f"{facts['quantizer']} quantizer, {codes(facts)}, downsample factor {facts['downsample_factor']}."


def training_page(run: TrainingRun) -> page.ReportPage:
    """Numbers, reconstructions or samples, curves, codes in use, validations, settings, lineage.

    Before the last step the page reloads itself; when the run is published, it opens the published page.
    """
    subtitle = f"{run.description} Step {run.step:,} of {run.steps:,}."
    title = run.name + on_images(run.lineage)
    if run.step == run.steps:
        return page.ReportPage(title, subtitle, list(sections(run)), f"Written {run.written}.")
    subtitle += f" Written {run.written}; this page reloads itself during the run."
    return page.ReportPage(
        title, subtitle, list(sections(run)), f"Written {run.written}.", RELOAD_SECONDS, quote(run.name)
    )


def sections(run: TrainingRun) -> Iterator[page.Section]:
    """The sections of the page for which there is data."""
    yield from newest_numbers(run)
    if run.shown:
        caption = f"{run.shown_note} {ERROR_CAPTION}".strip()
        yield page.Pictures("Originals and reconstructions", error_pictures(run.shown), caption)
    if run.samples is not None:
        sheet = page.Map(run.samples_note, run.samples, f"Step {run.samples_step:,}", "samples", run.sample_columns)
        yield page.Maps("Samples", [sheet])
    if curves := run_curves(run.rows):
        yield page.Plots("Curves", curves)
    if run.counts is not None and run.counts.sum():
        maps = maps_of([EvaluationResult(run.name, {}, run.counts)])
        caption = f"{run.counts_note} {MAP_CAPTION if maps else ''}".strip()
        yield page.Maps("Codebook utilization", maps, caption, [plots.code_frequency(run.counts)])
    if any("valid/images" in row for row in run.rows):
        yield validation_table(run)
    if run.settings:
        values = flat(run.settings)
        rows = [[name, "not set" if value is None else toml_value(value)] for name, value in values]
        yield page.Table("Settings", ["setting", "value"], rows, folded=True)
    if run.lineage:
        yield page.Lineage("Lineage", [run.lineage])
    if run.command:
        yield page.Commands("Command to start or resume the run", [run.command])


def newest_numbers(run: TrainingRun) -> Iterator[page.Section]:
    """The newest finite value of each number that was logged: those of the validation first, where there is one. The
    learning rate of a finished run is left out: a schedule ends near 0."""
    values = {number: newest_number(run.rows, number.key) for number in NUMBERS}
    best = [] if run.best_step is None else [f"best at step {run.best_step:,}"]
    finished = run.step >= run.steps
    shown = {
        number: value
        for number, value in values.items()
        if value is not None
        and not (number.key == "nonfinite_steps" and value == 0)
        and not (number.key == "learning_rate" and finished)
    }

    def tiles(chosen: Iterable[LoggedNumber]) -> list[page.Number]:
        notes = {
            number: "; ".join(filter(None, [number.note, *(best if number.key == run.best_measure else [])]))
            for number in chosen
        }
        return [page.Number(number.label, number.text(shown[number]), number.unit, notes[number]) for number in notes]

    validation = [number for number in shown if number.group == "validation"]
    title = "Final metrics" if finished else "Current metrics"
    if validation:
        newest = [row for row in run.rows if "valid/images" in row][-1:]
        title = "Training"
        caption = (
            f"{counted(newest[0]['valid/images'], 'held-out images')} at step {newest[0]['step']:,}." if newest else ""
        )
        yield page.Numbers("Validation", tiles(validation), caption)
    if others := [number for number in shown if number not in validation]:
        yield page.Numbers(title, tiles(others))


def run_curves(rows: Sequence[plots.LogRow]) -> list[page.Plot]:
    """Losses, quality, codes, learning rate and gradients over images seen; what was not logged has no plot."""
    validations = [row for row in rows if "valid/images" in row]
    window = max((row["window_tokens"] for row in rows if "window_tokens" in row), default=0)
    held_out = counted(validations[-1]["valid/images"], "held-out images") if validations else ""
    tokens = f"among the {window:,} tokens (at most) between two rows of the log."
    own_mean = "Of the mean squared error of the images between two rows of the log: at most the mean of their PSNRs."
    in_use = f"Training: {tokens}" + (f" Validation: among the tokens of {held_out}." if held_out else "")
    accuracies = {"training top-1": "train/top1", "validation top-1": "valid/top1", "top-5": "valid/top5"}
    norms = {"network": "gradient_norm", "discriminator": "discriminator_gradient_norm"}
    perceptual = [
        (f"{capitalized(words)} in validation", {name: f"valid/{kind}_{net}" for net, name in BACKBONES.items()}, about)
        for kind, (words, about) in PERCEPTUAL.items()
    ]
    table: list[tuple[str, dict[str, str], plots.Scale, str]] = [
        ("Training PSNR, dB", {"training": "psnr"}, "linear", own_mean),
        ("Validation PSNR, dB", {"validation": "valid/psnr"}, "linear", f"Mean over {held_out}."),
        *((title, keys, "linear", f"{about}Mean over {held_out}.") for title, keys, about in perceptual),
        ("Accuracy", accuracies, "share", ""),
        ("Codes in use", {"training": "utilization", "validation": "valid/utilization"}, "share", in_use),
        ("Perplexity of the codes in training", {"training": "perplexity"}, "linear", f"Of the first group, {tokens}"),
        (
            "Perplexity of the codes in validation",
            {"validation": "valid/perplexity"},
            "linear",
            f"Mean over groups, among the tokens of {held_out}.",
        ),
        ("Learning rate", {"rate": "learning_rate"}, "linear", ""),
        ("Gradient norm", norms, "log", ""),
        ("Images per second", {"speed": "images_per_second"}, "linear", ""),
    ]
    drawn = (
        plots.curves(title, {name: plots.series(rows, key) for name, key in keys.items()}, scale, caption)
        for title, keys, scale, caption in table
    )
    return [plot for plot in (*loss_curves(rows), *drawn) if plot is not None]


def loss_curves(rows: Sequence[plots.LogRow]) -> list[page.Plot | None]:
    """The terms of a tokenizer's objective on a logarithmic axis; else the total with that of the validation, and its
    parts."""
    logged = dict.fromkeys(name.removeprefix("loss/") for row in rows for name in row if name.startswith("loss/"))
    terms = {
        LOSS_TERMS.get(name, name.replace("_", " ")): plots.series(rows, f"loss/{name}")
        for name in logged
        if name not in NOT_TERMS
    }
    total = plots.series(rows, "loss/total")
    if any("psnr" in row for row in rows):
        return [plots.curves("Loss", {"total": total, **terms}, "log")]
    totals = {"training": total, "validation": plots.series(rows, "valid/total")}
    return [plots.curves("Loss", totals, "linear"), plots.curves("Parts of the loss", terms, "linear")]


def validation_table(run: TrainingRun) -> page.Table:
    """A row for each validation, the best marked."""
    rows = [row for row in run.rows if "valid/images" in row]
    columns = [column for column in NUMBERS if column.group == "validation" and any(column.key in row for row in rows)]
    cells = [
        [f"{row['step']:,}"]
        + [page.Cell(column.text(row.get(column.key)), best=row["step"] == run.best_step) for column in columns]
        for row in rows
    ]
    header = ["step", *(f"{column.short_label}, {column.unit}".removesuffix(", ") for column in columns)]
    caption = f"{counted(rows[-1]['valid/images'], 'held-out images')}, center crops; measured as vqpipe eval does."
    return page.Table("Validations", header, cells, caption, folded=len(rows) > OPEN_ROWS)


def newest_number(rows: Sequence[plots.LogRow], key: str) -> float | None:
    """The newest finite number logged under `key`, or None."""
    values = plots.series(rows, key)[1]
    return float(values[-1]) if len(values) else None
