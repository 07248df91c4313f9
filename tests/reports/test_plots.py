"""Plots as SVG: valid, repeatable, in the page's own text colour, with the words of the data escaped."""

import xml.etree.ElementTree as ET

import numpy as np
import torch

from vqpipe.reports import plots

ROWS = [
    {
        "step": i,
        "images_seen": 16 * i,
        "loss/total": 3 / i,
        "loss/l1": 2 / i,
        "psnr": 20 + i / 10,
        "utilization": i / 50,
    }
    for i in range(1, 51)
]


def test_one_run_shows_all_its_losses_and_several_their_totals() -> None:
    one = plots.training_curves(ROWS)
    assert [plot.title.split()[0] for plot in one] == ["Loss", "PSNR", "Codes"]
    assert "total ends at 0.06, l1 ends at 0.04" in one[0].alt
    assert "100.0%" in one[2].alt
    several = plots.training_curves({"lc": ROWS, "fc": ROWS[:9]})
    assert several[0].alt == "lc ends at 0.06, fc ends at 0.3333"
    assert plots.training_curves([{"step": 1}]) == []


def test_drawings_are_svg_of_the_same_bytes_each_time_and_take_the_text_colour() -> None:
    counts = torch.tensor([[5, 0, 2, 9]])
    first, second = (plots.code_frequency(counts).svg for _ in range(2))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")
    assert "currentColor" in first
    assert plots.INK not in first


def test_ids_of_two_drawings_do_not_meet() -> None:
    drawings = [*plots.training_curves(ROWS), plots.code_frequency(torch.tensor([[1, 2]])), plots.bars("a", {"b": 1.0})]
    ids = [{node.get("id") for node in ET.fromstring(plot.svg).iter()} - {None} for plot in drawings]
    assert len(set().union(*ids)) == sum(map(len, ids))


def test_names_are_printed_not_typeset_and_cannot_become_elements() -> None:
    drawing = ET.fromstring(plots.bars("use", {"<script>$x$</script>": 0.5}, share=True).svg)
    assert not [node for node in drawing.iter() if node.tag.endswith("script")]
    assert "<script>$x$</script>" in ["".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text")]


def test_frequency_says_the_share_in_use_and_draws_empty_groups() -> None:
    counts = torch.zeros(2, 8, dtype=torch.int64)
    counts[0, :4] = 3
    assert plots.code_frequency(counts).alt == "group 1 uses 50.0% of 8 codes, group 2 uses 0.0% of 8 codes"
    assert (
        plots.code_frequency({"a": counts, "b": counts[:1]}).alt == "a uses 25.0% of 16 codes, b uses 50.0% of 8 codes"
    )
    plots.code_frequency(torch.zeros(1, 8, dtype=torch.int64))


def test_long_series_are_thinned_with_their_ends_kept() -> None:
    x, _ = plots.series([{"images_seen": i, "psnr": 1.0} for i in range(10_000)], "psnr")
    assert len(x) <= plots.MOST_POINTS
    assert (x[0], x[-1]) == (0, 9_999)
    assert (
        len(plots.series([{"images_seen": 1, "psnr": float("nan")}, {"images_seen": 2, "psnr": None}], "psnr")[0]) == 0
    )
    places = plots.thinned(1_000_000)
    assert (places[0], places[-1]) == (0, 999_999)
    assert (np.diff(places) > 0).all()
