"""Plots as SVG that take the page's text colour, so that one drawing reads on white and on black.

matplotlib rather than plotly: a plot is some 20 kB of SVG that any browser shows and prints, with JavaScript or
without, and that goes into a paper as it is; plotly's offline script alone is several megabytes in every file. What a
plot would tell under the pointer stands in a table beside it.

Drawn on matplotlib Figures without pyplot: no display, no global state, the same bytes every time.
"""

import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor

from vqpipe.metrics.usage import times_chosen

INK = "#0a0b0c"
"""Stands for the page's text colour while drawing; replaced by `currentColor` in the SVG."""
COLOURS = ("#e0772f", "#2f8fd6", "#2ca58d", "#c14f8d", "#8a7bd8", "#b59a1d", "#d1495b", "#6b8e23")
"""Mid-bright on purpose: each keeps a contrast of about 3 or more on white and on near-black."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Of lines, one after the other where the colours begin again."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vqpipe",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.5,
}
MOST_POINTS = 600
MOST_UPRIGHTS = 4
"""Codebook sizes up to which each is marked by an upright."""

LOSS_TERMS = (
    *("total", "l1", "l2", "charbonnier", "lpips", "codebook", "commitment", "entropy"),
    *("adversarial", "discriminator"),
)
"""What a log row holds under `loss/`, in the order of their colours."""

Row = Mapping[str, Any]
Line = tuple[np.ndarray, np.ndarray]
"""(images seen, value), both float64[n]."""


@dataclass(frozen=True)
class Plot:
    """A drawing and the words around it."""

    title: str
    svg: str
    alt: str
    caption: str = ""


def code_frequency(counts: Tensor | Mapping[str, Tensor]) -> Plot:
    """How often each code is chosen, most chosen first, on two logarithmic axes.

    One int64[G, K]: a line per group. Several by name: a line per name, its groups together.
    """
    if isinstance(counts, Mapping):
        lines = {name: (torch.cat(times_chosen(each)), each.numel()) for name, each in counts.items()}
    else:
        groups = enumerate(times_chosen(counts), start=1)
        lines = {f"group {number}": (times, counts.shape[1]) for number, times in groups}
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(lines)
        uprights = len({size for _, size in lines.values()}) <= MOST_UPRIGHTS
        for number, (name, (times, size)) in enumerate(lines.items()):
            chosen = np.sort(times.cpu().numpy())[::-1]
            ranks = thinned(len(chosen))
            axes.plot(ranks + 1, chosen[ranks], **line_style(number), label=plain(name))
            axes.plot(ranks[-1:] + 1, chosen[-1:], "o", color=colour(number), markersize=4)
            if uprights:
                axes.axvline(size, color=INK, linewidth=0.7)
        first, size = next(iter(lines.values()))
        even = first.sum().item() / size
        if even > 0 and len(lines) == 1:
            axes.axhline(even, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        largest = max(size if uprights else len(times) for times, size in lines.values())
        most = max(1, *(int(times.max()) for times, _ in lines.values() if len(times)), 1)
        axes.set(xscale="log", yscale="log", xlim=(0.9, 1.2 * largest), ylim=(0.8, 1.5 * most))
        axes.set(xlabel="code, most chosen first", ylabel="times")
        plain_logarithmic(axes.xaxis)
        plain_logarithmic(axes.yaxis)
        axes.grid(alpha=0.25, linewidth=0.4, color=INK)
        legend_above(axes, lines)
        svg = to_svg(figure, f"frequency-{'-'.join(lines)}")
    shares = [f"{name} uses {len(times) / size:.1%} of {size:,} codes" for name, (times, size) in lines.items()]
    alt = ", ".join(shares) if len(lines) > 1 else shares[0].removeprefix("group 1 ")
    caption = "A line ends at the last code in use."
    caption += " Upright: the size of the codebook." if uprights else ""
    caption += " Dashed: if all were chosen alike." if len(lines) == 1 else ""
    return Plot("How often each code is chosen", svg, alt, caption)


def training_curves(runs: Mapping[str, Sequence[Row]] | Sequence[Row]) -> list[Plot]:
    """Loss terms, PSNR and utilization over images seen, from the rows of one `metrics.jsonl` or of several, by name.

    One run: every loss term is a line. Several: a line per run, of the total. A quantity no run logged has no plot.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {"": runs}
    if len(named) == 1:
        (rows,) = named.values()
        losses = {term: series(rows, f"loss/{term}") for term in LOSS_TERMS}
    else:
        losses = {name: series(rows, "loss/total") for name, rows in named.items()}
    psnr = {name: series(rows, "psnr") for name, rows in named.items()}
    utilization = {name: series(rows, "utilization") for name, rows in named.items()}
    windows = sorted({row["window_tokens"] for rows in named.values() for row in rows if "window_tokens" in row})
    window = f"Among the {windows[-1]:,} tokens (at most) between two rows of the log." if windows else ""
    plots = (
        curves("Loss" if len(named) == 1 else "Total loss", losses, scale="log"),
        curves("PSNR while training, dB", psnr, scale="linear"),
        curves("Codes in use while training", utilization, scale="share", caption=window),
    )
    return [plot for plot in plots if plot is not None]


def curves(title: str, lines: Mapping[str, Line], scale: str, caption: str = "") -> Plot | None:
    """Lines over images seen; `scale` is "linear", "log" or "share" (0..1 as percent). None where all are empty."""
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(lines)
        for number, (name, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, **line_style(number), label=plain(name), marker="o" if len(x) == 1 else "")
        if scale == "log" and all((y > 0).all() for _, y in lines.values()):
            axes.set_yscale("log")
            plain_logarithmic(axes.yaxis)
        if scale == "share":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("images seen")
        axes.grid(alpha=0.25, linewidth=0.4, color=INK)
        legend_above(axes, lines)
        svg = to_svg(figure, f"{title}-{'-'.join(lines)}")
    last = (f"{y[-1]:.1%}" if scale == "share" else f"{y[-1]:.4g}" for _, y in lines.values())
    ends = ", ".join(f"{name or title} ends at {value}" for name, value in zip(lines, last, strict=True))
    return Plot(title, svg, ends, caption)


def bars(title: str, values: Mapping[str, float], caption: str = "", share: bool = False) -> Plot:
    """One horizontal bar a name, its value at the end; a `share` is drawn on 0..100 %."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 0.5 + 0.56 * len(values)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(values))[::-1]
        axes.barh(places, list(values.values()), height=0.42, color=list(map(colour, range(len(values)))))
        top = 1.0 if share else max(*values.values(), 1e-9)
        for place, (name, value) in zip(places, values.items(), strict=True):
            axes.text(0, place + 0.28, plain(name), va="bottom")
            axes.text(value + top * 0.01, place, f"{value:.1%}" if share else f"{value:.4g}", va="center")
        axes.set(xlim=(0, top * 1.14), ylim=(-0.5, len(values) - 0.2))
        axes.set_axis_off()
        svg = to_svg(figure, title)
    alt = ", ".join(f"{name} {value:.1%}" if share else f"{name} {value:.4g}" for name, value in values.items())
    return Plot(title, svg, alt, caption)


def series(rows: Iterable[Row], key: str) -> Line:
    """(images seen, value) of the rows that log a finite `key`, thinned to what a plot can show."""
    points = [
        (row.get("images_seen", row.get("step", 0)), row[key])
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    points = [points[i] for i in thinned(len(points), by_magnitude=False)]
    x, y = (np.array([point[axis] for point in points], dtype=float) for axis in (0, 1))
    return x, y


def thinned(length: int, by_magnitude: bool = True) -> np.ndarray:
    """At most MOST_POINTS places of 0..length - 1, ends included, evenly (or evenly in their logarithm)."""
    if length <= MOST_POINTS:
        return np.arange(length)
    places = np.geomspace(1, length, MOST_POINTS) - 1 if by_magnitude else np.linspace(0, length - 1, MOST_POINTS)
    return np.unique(places.round().astype(int))


class PlainNumbers(LogFormatter):
    """Ticks of a logarithmic axis as 1,000 rather than 10^3; which ticks carry a number stays matplotlib's choice."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,.6g}" if super().__call__(x, pos) else ""


def plain_logarithmic(axis: Axis) -> None:
    """Make an axis logarithmic with plain numbers."""
    axis.set_major_formatter(PlainNumbers(labelOnlyBase=False))
    axis.set_minor_formatter(PlainNumbers(labelOnlyBase=False, minor_thresholds=(1.2, 0.4)))


def colour(number: int) -> str:
    """Of the `number`-th thing in a drawing."""
    return COLOURS[number % len(COLOURS)]


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the `number`-th line, which tell more lines apart than there are colours."""
    return {"color": colour(number), "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def one_axes(names: Collection[str] = ()) -> tuple[Figure, Axes]:
    """A figure small enough that its letters stay legible on a phone, with room for `names` in `legend_above`."""
    rows = -(-len(names) // abreast(names)) if len(names) > 1 else 0
    figure = Figure(figsize=(4.2, 2.8 + 0.2 * rows), layout="constrained")
    return figure, figure.subplots()


def legend_above(axes: Axes, names: Collection[str]) -> None:
    """Names over the plot, where no line runs; one alone needs none."""
    if len(names) > 1:
        columns = abreast(names)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.2)


def abreast(names: Collection[str]) -> int:
    """How many names a row of the legend holds."""
    longest = max(map(len, names))
    return 3 if longest <= 12 else 2 if longest <= 20 else 1


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an `<svg>` element, without fixed size; `salt` keeps ids of two figures on one page apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # names of parts, the same in every figure
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawing)


def plain(text: str) -> str:
    """`text` as matplotlib should print it, not typeset it: dollars are no mathematics."""
    return text.replace("$", r"\$")
