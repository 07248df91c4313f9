"""Plots are valid SVG, the same bytes each time, in the page's text color, with names escaped."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from vqpipe.reports import page, plots

GROWTH = [(1, 0.01, 0.01), (10, 0.05, 0.1), (1000, 0.5, 0.99), (2000, 0.6, 1.0)]
REPLACED = {"replaced": (np.array([1.0, 50.0]), np.array([30.0, 25.0]))}


def texts(plot: page.Plot) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(plot.svg).iter() if node.tag.endswith("text")]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the plots that are drawn in the test."""
    drawn: list[Axes] = []
    to_svg = plots.to_svg
    monkeypatch.setattr(plots, "to_svg", lambda figure, salt: (drawn.append(figure.axes[0]), to_svg(figure, salt))[1])
    return drawn


def test_points_are_drawn_at_the_numbers(axes: list[Axes]) -> None:
    plots.rate_distortion({"a": (0.1, 20.0), "b": (0.2, 23.0)})
    plots.k_curves({"mgvq": [{"groups": k, "bits_per_pixel": k / 8, "psnr": 12.0 + k, "ssim": k / 4} for k in (1, 2)]})
    plots.usage_growth(GROWTH)
    tokens, used, uniform = zip(*GROWTH, strict=True)
    expected = [
        [[(0.1, 20.0)], [(0.2, 23.0)]],
        [[(0.125, 13.0), (0.25, 14.0)]],
        [[(0.125, 0.25), (0.25, 0.5)]],
        [list(zip(tokens, used, strict=True)), list(zip(tokens, uniform, strict=True))],
    ]
    assert [[list(map(tuple, line.get_xydata())) for line in each.get_lines()] for each in axes] == expected


def test_codes_are_drawn_by_descending_counts_from_rank_one_beside_the_uniform_count(axes: list[Axes]) -> None:
    plots.code_frequency(torch.tensor([[5, 0, 2, 9]]))
    curve, end, uniform, size = (line.get_xydata().tolist() for line in axes[0].get_lines())
    assert (curve, end) == ([[1, 9], [2, 5], [3, 2]], [[3, 2]])
    assert {y for _, y in uniform} == {16 / 4}
    assert {x for x, _ in size} == {4}


def test_bars_have_their_own_names_and_numbers_and_error_bars_one_standard_deviation(axes: list[Axes]) -> None:
    plots.bars("use", {"a": 0.5, "b": 0.25})
    plots.points_with_spread("psnr", {"lc": [(2.0, 21.0, 0.5), (1.0, 20.0, 0.25)]}, xlabel="K")
    shown = [(bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in axes[0].patches]
    texts = [(text.get_text(), text.get_position()[1]) for text in axes[0].texts]
    assert shown == [(0.5, pytest.approx(1)), (0.25, pytest.approx(0))]
    assert texts == [("a", pytest.approx(1.28)), ("50.0 %", 1), ("b", pytest.approx(0.28)), ("25.0 %", 0)]
    (bars,) = axes[1].collections
    assert [each.tolist() for each in bars.get_segments()] == [[[1, 19.75], [1, 20.25]], [[2, 20.5], [2, 21.5]]]


def test_svg_is_reproducible_and_takes_the_text_color() -> None:
    counts = torch.tensor([[5, 0, 2, 9]])
    first, second = (plots.code_frequency(counts).svg for _ in range(2))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")
    assert "currentColor" in first
    assert plots.INK not in first


def test_ids_of_plots_on_one_page_are_distinct() -> None:
    drawn = [plots.code_frequency(torch.tensor([[1, 2]]))]
    drawn += [plots.bars("a", {"b": 1.0}), plots.rate_distortion({"a": (0.1, 20.0)})]
    ids = [{node.get("id") for node in ET.fromstring(plot.svg).iter()} - {None} for plot in drawn]
    assert len(set().union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize("plot", ["bars", "rate_distortion", "code_frequency"])
@pytest.mark.parametrize("name", ["<script>$x$</script>", "_private"])
def test_names_are_escaped_and_not_typeset(plot: str, name: str) -> None:
    values = {"bars": 0.5, "rate_distortion": (0.1, 20.0), "code_frequency": torch.tensor([[1, 2]])}[plot]
    arguments = ("use", {name: values}) if plot == "bars" else ({name: values, "other": values},)
    drawing = ET.fromstring(getattr(plots, plot)(*arguments).svg)
    assert not [node for node in drawing.iter() if node.tag.endswith("script")]
    texts = ["".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text")]
    assert name in [text.removeprefix("\u200b") for text in texts]


def test_code_frequency_states_the_utilization_and_accepts_unused_groups() -> None:
    counts = torch.zeros(2, 8, dtype=torch.int64)
    counts[0, :4] = 3
    assert plots.code_frequency(counts).alt == "group 1 uses 50.0 % of 8 codes, group 2 uses 0.0 % of 8 codes"
    several = plots.code_frequency({"a": counts, "b": counts[:1]})
    assert several.alt == "a uses 25.0 % of 16 codes, b uses 50.0 % of 8 codes"
    plots.code_frequency(torch.zeros(1, 8, dtype=torch.int64))


def test_series_are_thinned_with_both_ends_and_skip_what_is_not_finite() -> None:
    x, _ = plots.series([{"step": i // 8, "images_seen": i, "psnr": 1.0} for i in range(10_000)], "psnr")
    assert len(x) <= plots.MAX_POINTS
    assert (x[0], x[-1]) == (0, 9_999)
    rows: list[plots.LogRow] = [{"images_seen": 1, "psnr": float("nan")}, {"images_seen": 2, "psnr": None}]
    assert len(plots.series(rows, "psnr")[0]) == 0
    places = plots.thinned(1_000_000, logarithmic=True)
    assert (places[0], places[-1]) == (0, 999_999)
    assert (np.diff(places) > 0).all()


def test_usage_growth_is_compared_with_uniform_codes() -> None:
    plot, without = plots.usage_growth(GROWTH, budgets=[500, 5000]), plots.usage_growth(GROWTH)
    nearly = plots.usage_growth([(1, 0.01, 0.01), (10, 0.5, 0.999999)])
    assert plot is not None
    assert without is not None
    assert nearly is not None
    assert plot.alt == "60.0 % of the codes after 2,000 tokens, 100 % with codes drawn uniformly"
    assert {"this tokenizer", "uniform codes", "1,000", "100%"} <= set(texts(plot))
    assert plot.svg.count("<path") == without.svg.count("<path") + 1  # only the budget inside the curve
    assert nearly.alt.endswith("99.9 % with codes drawn uniformly")  # not rounded up to all
    below = plots.usage_growth(GROWTH, budgets=[5000])
    assert below is not None
    assert ["Vertical lines" in each.caption for each in (plot, below)] == [True, False]
    assert plots.usage_growth([]) is None


def test_a_level_is_drawn_with_its_name() -> None:
    plot = plots.line_plot("PSNR", REPLACED, xlabel="k", level=("reconstruction", 31.5), xscale="log")
    without = plots.line_plot("PSNR", REPLACED, xlabel="k", xscale="log")
    assert plot is not None
    assert without is not None
    assert plot.alt == "replaced ends at 25, reconstruction 31.5"
    assert without.alt == "replaced ends at 25"
    assert "reconstruction" in texts(plot)
    assert plots.line_plot("PSNR", {"replaced": (np.zeros(0), np.zeros(0))}, xlabel="k") is None


def test_scatter_draws_every_point_and_the_smallest_class_on_top() -> None:
    few, many = np.zeros((3, 2)), np.ones((7, 2))
    plot = plots.scatter("t", {"in use": few, "not in use": many}, "caption")
    assert plot.alt == "in use (3), not in use (7)"
    assert plot.svg == plots.scatter("t", {"in use": few, "not in use": many}, "caption").svg
    fills = [plot.svg.index(color) for color in (plots.COLORS[1], plots.COLORS[0])]
    assert fills == sorted(fills)
    assert plot.svg.count("<use") == 3 + 7 + 2  # and two in the legend
    plots.scatter("t", {"in use": few, "not in use": many[:0]})


def test_rate_distortion_lists_every_tokenizer_and_continuous_latents_apart() -> None:
    points = {f"tokenizer {number}": (0.05 * 1.3**number, 18.0 + number % 5) for number in range(12)}
    plot = plots.rate_distortion({**points, "sd-vae": (None, 23.0)})
    assert {*points, "sd-vae"} <= set(texts(plot))
    assert "tokenizer 0 18.00 at 0.05" in plot.alt
    assert plot.alt.endswith("sd-vae 23.00: a dashed line")
    assert plots.rate_distortion({"sd-vae": (None, 23.0)}) is None
    assert "one" in texts(plots.rate_distortion({"one": (0.1, 20.0)}))


def test_k_curves_state_every_k_and_are_absent_where_nothing_was_measured() -> None:
    rows = [{"groups": k, "bits_per_pixel": 0.05 * k, "psnr": 12.0 + 4 * k, "ssim": 0.2 * k} for k in (1, 2, 3)]
    psnr, ssim = plots.k_curves({"mgvq": rows})
    assert psnr.alt == "k = 1: 16, k = 2: 20, k = 3: 24"
    assert {"1", "2", "3"} <= set(texts(psnr))
    assert "0.6" in ssim.alt
    both = plots.k_curves({"mgvq": rows, "rq": rows[:2]})[0]
    assert "rq: k = 1: 16, k = 2: 20" in both.alt
    assert not set(re.findall(r'id="([^"]+)"', psnr.svg)) & set(re.findall(r'id="([^"]+)"', ssim.svg))
    assert plots.k_curves({"same": [{"groups": 1, "bits_per_pixel": 0.1}]}) == []


def test_sizes_of_codebooks_are_written_out() -> None:
    plot = plots.points_with_spread("use", {"lc": [(4096, 1.0, 0.0), (1_000_000, 0.2, 0.0)]}, xlabel="codes", log=True)
    assert {"10,000", "1,000,000"} <= set(texts(plot))
