"""Plots as SVG in the page's text color, so that one drawing is legible on a light and on a dark page.

Drawn on matplotlib Figures without pyplot: no display, no global state, and the same bytes each time.

Shapes: G groups, K codes per group.
"""

import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor

from vqpipe.metrics.usage import times_chosen
from vqpipe.reports.page import Plot
from vqpipe.words import percent

INK = "#0a0b0c"
"""Drawn in place of the page's text color; replaced by `currentColor` in the SVG."""
COLORS = ("#e0772f", "#2f8fd6", "#2ca58d", "#c14f8d", "#8a7bd8", "#b59a1d", "#d1495b", "#6b8e23")
"""Each has a contrast of about 3 or more on white and on near-black."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Line styles, one after the other each time the colors are used up."""
MARKERS = "os^D"
"""Markers of points, in the same way."""
DASHED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 3))}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
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
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}
MAX_POINTS = 600
"""Points of a line; longer series are thinned."""
MAX_VECTOR_POINTS, RASTER_DPI = 5000, 300
"""Points in the plane that are drawn as vectors, about 80 bytes each; more are one raster image."""
MIN_CURVE = 3
"""Points that a curve of a log has at least in one of its lines: fewer are numbers, which the page has as such."""
MAX_MARKED = 12
"""Points of a line up to which each has a marker."""
MAX_SIZES = 4
"""Different codebook sizes up to which each is marked by a vertical line."""

LogRow = Mapping[str, Any]
"""A row of `metrics.jsonl`."""
Line = tuple[np.ndarray, np.ndarray]
"""(x, y), both float64[n]."""
Scale = Literal["linear", "log", "share"]
"""Scale of an axis; a share is 0..1 and written as percent."""


def line_plot(
    title: str,
    lines: Mapping[str, Line],
    *,
    xlabel: str,
    xscale: Scale = "linear",
    yscale: Scale = "linear",
    level: tuple[str, float] | None = None,
    marks: Sequence[float] = (),
    labels: Sequence[str] = (),
    alt: str = "",
    caption: str = "",
) -> Plot | None:
    """Lines by name; None where all are empty.

    Args:
        level: name and height of a dashed horizontal line.
        marks: x positions of vertical lines.
        labels: a text under each point of the first line.
        alt: text for screen readers; by default the last value of each line.
    """
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        return None
    names = [*lines, *([level[0]] if level else [])]
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(names)
        for number, (name, (x, y)) in enumerate(lines.items()):
            marker = "o" if len(x) <= MAX_MARKED else ""
            axes.plot(x, y, **line_style(number), marker=marker, label=untypeset(name))
        if level:
            axes.axhline(level[1], **DASHED, label=untypeset(level[0]))
        for position in marks:
            axes.axvline(position, color=INK, linewidth=0.7)
        for label, point in zip(labels, zip(*next(iter(lines.values())), strict=True), strict=False):
            axes.annotate(label, point, (0, -13), textcoords="offset points", ha="center")
        axes.margins(y=0.14 if labels else 0.05)
        axes.ticklabel_format(useOffset=False)
        if xscale == "log":
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
        if yscale == "log" and all((y > 0).all() for _, y in lines.values()):
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        if yscale == "share":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(xlabel)
        axes.grid()
        legend_above(axes, names)
        svg = to_svg(figure, f"{title}-{'-'.join(names)}")
    ends = [(name, percent(y[-1]) if yscale == "share" else f"{y[-1]:.4g}") for name, (_, y) in lines.items()]
    words = [f"{name or title} ends at {value}" for name, value in ends]
    words += [f"{level[0]} {level[1]:.4g}"] if level else []
    return Plot(title, svg, alt or ", ".join(words), caption)


def curves(title: str, lines: Mapping[str, Line], scale: Scale, caption: str = "") -> Plot | None:
    """Logged quantities over images seen. None where no line has MIN_CURVE points."""
    if max((len(x) for x, _ in lines.values()), default=0) < MIN_CURVE:
        return None
    return line_plot(title, lines, xlabel="images seen", yscale=scale, caption=caption)


def code_frequency(counts: Tensor | Mapping[str, Tensor]) -> Plot:
    """How often each code is chosen, most frequent first, on two logarithmic axes.

    int64[G, K]: a line per group. Several by name: a line per name, its groups together.
    """
    if isinstance(counts, Mapping):
        lines = {name: (torch.cat(times_chosen(each)), each.numel()) for name, each in counts.items()}
    else:
        groups = enumerate(times_chosen(counts), start=1)
        lines = {f"group {number}": (times, counts.shape[1]) for number, times in groups}
    single = len(lines) == 1
    levels = ["codebook size", *(["uniform distribution"] if single else [])]
    sizes = {size for _, size in lines.values()} if len({size for _, size in lines.values()}) <= MAX_SIZES else set()
    with matplotlib.rc_context(STYLE):
        names = [*(["codes in use"] if single else lines), *(levels if sizes else levels[1:])]
        figure, axes = one_axes(names)
        for number, (name, (times, size)) in enumerate(lines.items()):
            chosen = np.sort(times.cpu().numpy())[::-1]
            ranks = thinned(len(chosen), logarithmic=True)
            axes.plot(ranks + 1, chosen[ranks], **line_style(number), label=untypeset(names[0] if single else name))
            axes.plot(ranks[-1:] + 1, chosen[-1:], "o", color=color(number))
            if single and len(chosen):
                axes.axhline(chosen.sum() / size, **DASHED, label="uniform distribution")
        for place, size in enumerate(sizes):
            axes.axvline(size, color=INK, linewidth=0.7, label="" if place else "codebook size")
        last = max(*sizes, *(len(times) for times, _ in lines.values()), 1)
        most = max(1, *(int(times.max()) for times, _ in lines.values() if len(times)), 1)
        axes.set(xscale="log", yscale="log", xlim=(0.9, 1.2 * last), ylim=(0.8, 1.5 * most))
        axes.set(xlabel="rank of the code", ylabel="count")
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.grid()
        legend_above(axes, names)
        svg = to_svg(figure, f"frequency-{'-'.join(lines)}")
    shares = [f"{name} uses {percent(len(times) / size)} of {size:,} codes" for name, (times, size) in lines.items()]
    alt = shares[0].removeprefix("group 1 ") if single else ", ".join(shares)
    return Plot("Frequency of the codes", svg, alt, "A line ends at the last code in use.")


def usage_growth(curve: Sequence[tuple[float, float, float]], budgets: Sequence[int] = ()) -> Plot | None:
    """Utilization against the number of tokens, beside that of codes drawn uniformly. None for an empty curve.

    Args:
        curve: (tokens of one group, utilization, uniform utilization), shares 0..1, as `CodeUsage.report` returns.
        budgets: numbers of tokens to mark, where they lie inside the curve.
    """
    if not curve:
        return None
    tokens, used, uniform = map(np.array, zip(*curve, strict=True))
    ends, uniform_ends = (percent(share) for share in curve[-1][1:])
    alt = f"{ends} of the codes after {tokens[-1]:,} tokens, {uniform_ends} with codes drawn uniformly"
    marks = [budget for budget in budgets if tokens[0] < budget < tokens[-1]]
    return line_plot(
        "Utilization against tokens",
        {"this tokenizer": (tokens, used), "uniform codes": (tokens, uniform)},
        xlabel="tokens, in the order of the set",
        xscale="log",
        yscale="share",
        marks=marks,
        alt=alt,
        caption=f"{alt}." + (" Vertical lines: the numbers of tokens in the table." if marks else ""),
    )


def k_curves(prefixes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """PSNR and SSIM over bits per pixel when only the first k groups are decoded, a line per tokenizer.

    `prefixes` holds by name the rows {groups, bits_per_pixel, psnr, ssim, ...} of `metrics.json`.
    """
    found = []
    for key, title in (("psnr", "PSNR (dB) from the first k groups"), ("ssim", "SSIM from the first k groups")):
        measured = {name: [row for row in rows if key in row] for name, rows in prefixes.items()}
        measured = {name: rows for name, rows in measured.items() if rows}
        single = len(measured) == 1
        words = [
            ("" if single else f"{name}: ") + ", ".join(f"k = {row['groups']}: {row[key]:.4g}" for row in rows)
            for name, rows in measured.items()
        ]
        lines = {
            name: (np.array([row["bits_per_pixel"] for row in rows]), np.array([row[key] for row in rows]))
            for name, rows in measured.items()
        }
        plot = line_plot(
            title,
            lines,
            xlabel="bits per pixel",
            labels=[str(row["groups"]) for rows in measured.values() for row in rows] if single else (),
            alt="; ".join(words),
            caption="Under each point: k." if single else "",
        )
        if plot is not None:
            found.append(plot)
    return found


def rate_distortion(points: Mapping[str, tuple[float | None, float]]) -> Plot | None:
    """PSNR over bits per pixel: a point per tokenizer, and a dashed line for one with continuous latents.

    `points` holds by name (bits per pixel, PSNR in dB).
    """
    discrete = {name: [(bits, psnr, 0.0)] for name, (bits, psnr) in points.items() if bits is not None}
    continuous = {name: psnr for name, (bits, psnr) in points.items() if bits is None}
    caption = "Upper left is better." + (" Dashed: continuous latents, which have no bits." if continuous else "")
    title = "PSNR (dB) over bits per pixel"
    return points_with_spread(title, discrete, xlabel="bits per pixel", levels=continuous, caption=caption)


def points_with_spread(
    title: str,
    methods: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    xlabel: str,
    is_share: bool = False,
    log: bool = False,
    unjoined: Collection[str] = (),
    levels: Mapping[str, float] | None = None,
    caption: str = "",
) -> Plot | None:
    """Means with their standard deviations by method; None without points.

    Points of a method are joined by a line unless two have the same x, or the method is one of `unjoined`.

    Args:
        methods: by name (x, mean, standard deviation).
        is_share: y is in 0..1, written as percent.
        log: a logarithmic x axis.
        levels: names and heights of dashed horizontal lines.
    """
    levels = levels or {}
    methods = {name: sorted(points) for name, points in methods.items() if points}
    if not methods:
        return None
    with matplotlib.rc_context(STYLE):
        names = [*methods, *levels]
        figure, axes = one_axes(names)
        for number, (name, points) in enumerate(methods.items()):
            x, y, spread = map(np.array, zip(*points, strict=True))
            joined = len(set(x)) == len(x) and name not in unjoined
            style = line_style(number) | ({} if joined else {"linestyle": "none"})
            marker = MARKERS[number // len(COLORS) % len(MARKERS)]
            axes.errorbar(
                x, y, yerr=spread if spread.any() else None, marker=marker, capsize=3, label=untypeset(name), **style
            )
        for number, (name, height) in enumerate(levels.items(), start=len(methods)):
            axes.axhline(height, color=color(number), linestyle=DASHED["linestyle"], label=untypeset(name))
        if log:
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        if is_share:
            axes.set_ylim(0, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.08)
        axes.set_xlabel(xlabel)
        axes.grid()
        legend_above(axes, names, min_names=1)
        svg = to_svg(figure, f"{title}-{'-'.join(names)}")
    words = [
        f"{name} {percent(mean) if is_share else f'{mean:.2f}'} at {x:,.6g}"
        for name, points in methods.items()
        for x, mean, _ in points
    ]
    words += [f"{name} {height:.2f}: a dashed line" for name, height in levels.items()]
    return Plot(title, svg, ", ".join(words), caption)


def bars(title: str, values: Mapping[str, float], caption: str = "") -> Plot:
    """A horizontal bar per name for shares in 0..1, written as percent."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 0.5 + 0.56 * len(values)), layout="constrained")
        axes = figure.subplots()
        for number, (name, value) in enumerate(values.items()):
            y = len(values) - 1 - number
            axes.barh(y, value, height=0.42, color=color(number))
            axes.text(0, y + 0.28, untypeset(name), va="bottom")
            axes.text(value + 0.01, y, percent(value), va="center")
        axes.set(xlim=(0, 1.14), ylim=(-0.5, len(values) - 0.2))
        axes.set_axis_off()
        svg = to_svg(figure, title)
    return Plot(title, svg, ", ".join(f"{name} {percent(value)}" for name, value in values.items()), caption)


def scatter(title: str, points: Mapping[str, np.ndarray], caption: str = "") -> Plot:
    """Classes of points float[n, 2] in the plane, on axes without meaning; the smallest class is drawn on top. More
    than MAX_VECTOR_POINTS are rasterized, which bounds the size of the file."""
    labels = {name: f"{name} ({len(places):,})" for name, places in points.items()}
    total = 1 + sum(map(len, points.values()))
    rasterized = total > MAX_VECTOR_POINTS
    size = min(4.5, max(0.5 if rasterized else 1.8, 100 / total**0.5))
    caption = f"{caption} The points are a raster image of {RASTER_DPI} dpi.".strip() if rasterized else caption
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(labels.values())
        figure.set_size_inches(4.2, 4.2)
        for number, (name, places) in enumerate(points.items()):
            style: dict[str, Any] = {"color": color(number), "markeredgewidth": 0}
            axes.plot(*places.T, "o", markersize=size, zorder=3 - len(places) / total, rasterized=rasterized, **style)
            axes.plot([], [], "o", markersize=5, label=untypeset(labels[name]), **style)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()
        legend_above(axes, labels.values())
        svg = to_svg(figure, f"{title}-{'-'.join(labels.values())}")
    return Plot(title, svg, ", ".join(labels.values()), caption)


def series(rows: Iterable[LogRow], key: str) -> Line:
    """(images seen, value) of the rows that log a finite `key`, thinned to MAX_POINTS."""
    points = [
        (row.get("images_seen", row.get("step", 0)), row[key])
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    points = [points[i] for i in thinned(len(points))]
    x, y = (np.array([point[axis] for point in points], dtype=float) for axis in (0, 1))
    return x, y


def thinned(length: int, logarithmic: bool = False) -> np.ndarray:
    """At most MAX_POINTS indices of 0..length - 1, both ends included, evenly spaced (or in their logarithm)."""
    if length <= MAX_POINTS:
        return np.arange(length)
    places = np.geomspace(1, length, MAX_POINTS) - 1 if logarithmic else np.linspace(0, length - 1, MAX_POINTS)
    return np.unique(places.round().astype(int))


class PlainNumbers(LogFormatter):
    """Tick labels of a logarithmic axis as 1,000 instead of 10^3."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,.10g}" if super().__call__(x, pos) else ""


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers."""
    axis.set_major_formatter(PlainNumbers(labelOnlyBase=False))
    axis.set_minor_formatter(PlainNumbers(labelOnlyBase=False, minor_thresholds=(1.2, 0.4)))


def color(number: int) -> str:
    """The color of the line, point or bar of that number."""
    return COLORS[number % len(COLORS)]


def line_style(number: int) -> dict[str, Any]:
    """Color and dashes of a line: together they distinguish more lines than there are colors."""
    return {"color": color(number), "linestyle": DASHES[number // len(COLORS) % len(DASHES)]}


def one_axes(names: Collection[str]) -> tuple[Figure, Axes]:
    """A figure small enough to be legible on a phone, with room for the legend of `names`."""
    rows = -(-len(names) // columns_of(names)) if len(names) > 1 else 0
    figure = Figure(figsize=(4.2, 2.8 + 0.2 * rows), layout="constrained")
    return figure, figure.subplots()


def legend_above(axes: Axes, names: Collection[str], min_names: int = 2, columns: int | None = None) -> None:
    """A legend over the plot, from `min_names` names on."""
    if len(names) >= min_names:
        columns = columns or columns_of(names)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.2)


def columns_of(names: Collection[str]) -> int:
    """Columns of the legend."""
    longest = max(map(len, names))
    return 3 if longest <= 12 else 2 if longest <= 20 else 1


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an `<svg>` element that scales; `salt` keeps the ids of two figures on one page apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "savefig.dpi": RASTER_DPI}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # names of parts, the same in every figure
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawing)


def untypeset(text: str) -> str:
    """`text` as matplotlib draws it unchanged: dollar signs begin mathematics there, and names that begin with an
    underscore are left out of legends."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # a space without width
