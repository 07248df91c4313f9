"""Lines and clouds of points: what is drawn, what is said of it, and the same bytes each time."""

import xml.etree.ElementTree as ET

import numpy as np

from vqpipe.reports import plots, points

CURVE = [(1, 0.01, 0.01), (10, 0.05, 0.1), (1000, 0.5, 0.99), (2000, 0.6, 1.0)]


def texts(plot: plots.Plot) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(plot.svg).iter() if node.tag.endswith("text")]


def test_growth_says_where_it_ends_and_what_even_draws_would_reach() -> None:
    plot = points.usage_growth(CURVE, budgets=[500, 5000])
    assert plot is not None
    assert plot.alt == "60.00% of the codes after 2,000 tokens, 100.00% by an even coder"
    assert {"this tokenizer", "even coder", "1,000", "100%"} <= set(texts(plot))
    without = points.usage_growth(CURVE)
    assert without is not None
    assert plot.svg.count("<path") == without.svg.count("<path") + 1  # the one budget inside the curve
    assert points.usage_growth([]) is None
    nearly = points.usage_growth([(1, 0.01, 0.01), (10, 0.5, 0.999999)])
    assert nearly is not None
    assert nearly.alt.endswith("99.99% by an even coder")


def test_a_level_is_drawn_and_named_only_where_there_is_one() -> None:
    curve = {"replaced": [(1, 30.0), (50, 25.0)]}
    with_level = points.lines("PSNR", curve, xlabel="k", level=("as they are", 31.5), logarithmic=True)
    without = points.lines("PSNR", curve, xlabel="k", level=("as they are", None), logarithmic=True)
    assert with_level.alt == "replaced 30 to 25, as they are 31.5"
    assert without.alt == "replaced 30 to 25"
    assert "as they are" in texts(with_level)
    assert points.lines("PSNR", {"replaced": []}, xlabel="k").alt == ""


def test_every_point_of_a_cloud_is_drawn_with_the_fewest_on_top() -> None:
    few, many = np.zeros((3, 2)), np.ones((7, 2))
    plot = points.scatter("t", {"in use": few, "not in use": many}, "words")
    assert plot.alt == "in use (3), not in use (7)"
    assert plot.svg == points.scatter("t", {"in use": few, "not in use": many}, "words").svg
    fills = [plot.svg.index(colour) for colour in (points.KINDS[1], points.KINDS[0])]
    assert fills == sorted(fills)
    assert plot.svg.count("<use") == 3 + 7 + 2  # and two in the legend
    points.scatter("t", {"in use": few, "not in use": many[:0]})
