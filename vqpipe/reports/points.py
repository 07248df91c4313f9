"""Lines over any quantity, and clouds of points: codes in use against tokens, codes in the plane."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import PercentFormatter

from vqpipe.reports.plots import (
    COLOURS,
    INK,
    STYLE,
    Plot,
    legend_above,
    line_style,
    one_axes,
    plain,
    plain_logarithmic,
    to_svg,
)

KINDS = (COLOURS[0], COLOURS[1], COLOURS[2])
"""Of kinds of points: the first two are easily told apart even as small dots, by colour-blind eyes too."""
MOST_MARKED = 12
"""Points of a line up to which each is marked."""


def usage_growth(curve: Sequence[tuple[float, float, float]], budgets: Sequence[int] = ()) -> Plot | None:
    """Codes in use against tokens seen, beside what a coder reaches that draws its codes evenly.

    Args:
        curve: (tokens of one group, utilization, uniform utilization), the shares 0..1, as `CodeUsage.report` gives.
        budgets: numbers of tokens to mark, where they lie inside the curve.

    Returns:
        None for an empty curve.
    """
    if not curve:
        return None
    tokens = [point[0] for point in curve]
    named = {
        "this tokenizer": [(n, used) for n, used, _ in curve],
        "even coder": [(n, even) for n, _, even in curve],
    }
    used, even = (share if share == 1 else min(share, 0.9999) for share in curve[-1][1:])  # all of them only if so
    ends = f"{used:.2%} of the codes after {tokens[-1]:,} tokens, {even:.2%} by an even coder"
    return lines(
        "Codes in use against tokens",
        named,
        xlabel="tokens, in the order of the set",
        uprights=[budget for budget in budgets if tokens[0] < budget < tokens[-1]],
        logarithmic=True,
        share=True,
        alt=ends,
        caption=f"{ends}: no share counted over so many tokens can be expected above that.",
    )


def lines(
    title: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    level: tuple[str, float | None] = ("", None),
    uprights: Sequence[float] = (),
    logarithmic: bool = False,
    share: bool = False,
    alt: str = "",
    caption: str = "",
) -> Plot:
    """Points (x, y) by name, joined; few are marked.

    Args:
        level: a name and a height drawn across, to compare with.
        uprights: places on the x axis to mark.
        logarithmic: the x axis, whose values are then above 0.
        share: y is 0..1, drawn as percent from 0.
    """
    name, height = level
    names = [*points, *([name] if height is not None else [])]
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(names)
        for number, (line, pairs) in enumerate(points.items()):
            x, y = ([pair[axis] for pair in pairs] for axis in (0, 1))
            axes.plot(
                x, y, **line_style(number), label=plain(line), marker="o" if len(x) <= MOST_MARKED else "", markersize=4
            )
        if height is not None:
            axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=plain(name))
        for place in uprights:
            axes.axvline(place, color=INK, linewidth=0.7)
        if logarithmic:
            axes.set_xscale("log")
            plain_logarithmic(axes.xaxis)
        if share:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25, linewidth=0.4, color=INK)
        legend_above(axes, names)
        svg = to_svg(figure, f"{title}-{'-'.join(names)}")
    ends = [f"{line} {pairs[0][1]:.4g} to {pairs[-1][1]:.4g}" for line, pairs in points.items() if pairs]
    ends += [f"{name} {height:.4g}"] if height is not None else []
    return Plot(title, svg, alt or ", ".join(ends), caption)


def scatter(title: str, points: Mapping[str, np.ndarray], caption: str = "") -> Plot:
    """Two or more kinds of points float[n, 2] in the plane, axes without meaning; the fewest points lie on top."""
    labels = {name: f"{name} ({len(places):,})" for name, places in points.items()}
    with matplotlib.rc_context(STYLE):
        figure, axes = one_axes(labels.values())
        figure.set_size_inches(4.2, 4.2)
        size = min(4.5, max(1.8, 100 / max(1, sum(map(len, points.values()))) ** 0.5))
        for number, (name, places) in enumerate(points.items()):
            order = 3 - len(places) / (1 + sum(map(len, points.values())))
            axes.plot(
                *places.T, "o", color=KINDS[number % len(KINDS)], markersize=size, markeredgewidth=0, zorder=order
            )
            axes.plot([], [], "o", color=KINDS[number % len(KINDS)], markersize=5, label=plain(labels[name]))
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()
        legend_above(axes, labels.values())
        svg = to_svg(figure, f"{title}-{'-'.join(labels.values())}")
    return Plot(title, svg, ", ".join(labels.values()), caption)
