"""What quality costs, drawn: PSNR and SSIM over bits per pixel."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from vqpipe.reports.plots import COLOURS, INK, STYLE, Plot, colour, legend_above, line_style, one_axes, plain, to_svg

FONT = 9.5
"""Points, of labels inside a drawing."""
LETTER, LINE = 0.56 * FONT, 1.15 * FONT
"""Points a letter is wide and a line high, in whatever font the page is shown; a little more than most need."""
MARK = 4.0
"""Points from the middle of a mark to where a label may begin."""
SHAPES = "os^D"
"""Of marks, one after the other where the colours begin again."""
ALL_AROUND = ((1, 0), (-1, 0), (1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0, 1), (0, -1), (1, 1.4), (1, -1.4))
"""Where a label may stand from its mark, as (right, up), most wanted first."""
LEFT = ((-1, 0.65), (-1, -0.65))
"""The same of a line, from its right end."""


class Box(NamedTuple):
    """A rectangle, in points from the figure's lower left."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: "Box") -> bool:
        """Whether the two overlap."""
        apart = self.right <= other.left or other.right <= self.left or self.top <= other.bottom
        return not (apart or other.top <= self.bottom)

    def within(self, other: "Box") -> bool:
        """Whether it lies inside the other."""
        sides = self.left >= other.left and self.right <= other.right
        return sides and self.bottom >= other.bottom and self.top <= other.top


def k_curves(prefixes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """PSNR and SSIM over bits per pixel when only the first k groups are decoded, a line per tokenizer.

    `prefixes` holds by name the rows {groups, bits_per_pixel, psnr, ssim, ...} of `metrics.json`.
    """
    return [
        plot
        for key, title in (("psnr", "PSNR from the first k groups, dB"), ("ssim", "SSIM from the first k groups"))
        if (plot := k_curve(title, key, prefixes)) is not None
    ]


def k_curve(title: str, key: str, prefixes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot | None:
    """One measure over bits per pixel; None where no row has it."""
    lines = {name: [row for row in rows if key in row] for name, rows in prefixes.items()}
    lines = {name: rows for name, rows in lines.items() if rows}
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(lines)
        for number, (name, rows) in enumerate(lines.items()):
            x, y = [row["bits_per_pixel"] for row in rows], [row[key] for row in rows]
            axes.plot(x, y, **line_style(number), marker="o", markersize=4, label=plain(name))
            if len(lines) == 1:
                for row in rows:
                    place = (row["bits_per_pixel"], row[key])
                    axes.annotate(str(row["groups"]), place, (0, -1.3 * FONT), textcoords="offset points", ha="center")
        axes.margins(y=0.14)
        axes.ticklabel_format(useOffset=False)
        axes.set_xlim(left=0)
        axes.set_xlabel("bits per pixel")
        axes.grid(alpha=0.25, linewidth=0.4, color=INK)
        legend_above(axes, lines)
        svg = to_svg(figure, f"{title}-{'-'.join(lines)}")
    words = [
        (f"{name}: " if len(lines) > 1 else "") + ", ".join(f"k = {row['groups']}: {row[key]:.4g}" for row in rows)
        for name, rows in lines.items()
    ]
    return Plot(title, svg, "; ".join(words), "Under each point, k." if len(lines) == 1 else "")


def rate_distortion(points: Mapping[str, tuple[float | None, float]]) -> Plot:
    """PSNR over bits per pixel: a labelled point per tokenizer, and a dashed line for one without bits.

    `points` holds by name (bits per pixel, PSNR in dB).
    """
    discrete = {name: (bits, psnr) for name, (bits, psnr) in points.items() if bits is not None}
    continuous = {name: psnr for name, (bits, psnr) in points.items() if bits is None}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, max(3.2, 0.3 * len(points))), layout="constrained", dpi=72)
        axes = figure.subplots()
        set_range(axes, [bits for bits, _ in discrete.values()], [psnr for _, psnr in points.values()])
        axes.set(xlabel="bits per pixel", ylabel="PSNR, dB")
        axes.grid(alpha=0.25, linewidth=0.4, color=INK)
        for number, (bits, psnr) in enumerate(discrete.values()):
            axes.plot(bits, psnr, SHAPES[number // len(COLOURS) % len(SHAPES)], color=colour(number), markersize=6)
        for psnr in continuous.values():
            axes.axhline(psnr, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        figure.draw_without_rendering()  # settles where the axes stand
        place_labels(axes, discrete, continuous)
        svg = to_svg(figure, f"rate-{'-'.join(points)}")
    words = [f"{name} {psnr:.2f} dB at {bits:.3g}" for name, (bits, psnr) in discrete.items()]
    words += [f"{name} {psnr:.2f} dB with continuous latents" for name, psnr in continuous.items()]
    caption = "Upper left is better." + (" Dashed: continuous latents, which have no bits." if continuous else "")
    return Plot("PSNR over bits per pixel", svg, ", ".join(words), caption)


def set_range(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Room around the points for their labels; a logarithmic x axis where they spread."""
    low, high = min(x, default=0.5), max(x, default=0.5)
    if high > 4 * low:
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / 1.6, high * 1.6)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = max(0.35 * (high - low), 0.15 * high)
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    room = max(0.08 * (max(y) - min(y)), 0.2)
    axes.set_ylim(min(y) - room, max(y) + room)


def place_labels(axes: Axes, points: Mapping[str, tuple[float, float]], lines: Mapping[str, float]) -> None:
    """Write each name beside its mark, or at the end of its line, where nothing else is; tied to it where far."""
    edges = axes.get_window_extent()
    inside = Box(edges.x0, edges.y0, edges.x1, edges.y1)
    marks = [on_figure(axes, bits, psnr) for bits, psnr in points.values()]
    heights = [on_figure(axes, 1.0, psnr)[1] for psnr in lines.values()]
    named = enumerate(zip(points, marks, strict=True))
    taken = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in marks]
    taken += [Box(inside.left, y - 1, inside.right, y + 1) for y in heights]
    for y, name in sorted(zip(heights, lines, strict=True), reverse=True):
        taken.append(free_box(name, inside.right, y, LEFT, inside, taken))
        write(axes, name, taken[-1])
    for y, x, number, name in sorted(((y, x, i, name) for i, (name, (x, y)) in named), reverse=True):
        box = free_box(name, x, y, ALL_AROUND, inside, taken)
        taken.append(box)
        write(axes, name, box)
        end = (min(max(x, box.left + 2), box.right - 2), min(max(y, box.bottom + 2), box.top - 2))
        if math.dist((x, y), end) > 2.5 * MARK:
            tie = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*tie.T, color=colour(number), linewidth=0.9)


def free_box(
    name: str,
    x: float,
    y: float,
    directions: Iterable[tuple[float, float]],
    inside: Box,
    taken: Sequence[Box],
) -> Box:
    """Where a name beside (x, y) meets nothing, as near as possible; at the nearest place where all are taken."""
    half_width, half_height = LETTER * len(name) / 2, LINE / 2
    boxes = []
    for distance in (MARK + 2, 10, 16, 24, 34, 46, 60, 80, 100, 120):
        for right, up in directions:
            middle_x = x + right * (distance + half_width)
            middle_y = y + up * (distance + half_height)
            box = Box(middle_x - half_width, middle_y - half_height, middle_x + half_width, middle_y + half_height)
            if box.within(inside) and not any(box.meets(other) for other in taken):
                return box
            boxes.append(box)
    return boxes[0]


def write(axes: Axes, name: str, box: Box) -> None:
    middle = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
    axes.text(*middle, plain(name), transform=None, fontsize=FONT, ha="center", va="center")


def on_figure(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """A point of the data in points from the figure's lower left."""
    left, bottom = axes.transData.transform((x, y))
    return float(left), float(bottom)
