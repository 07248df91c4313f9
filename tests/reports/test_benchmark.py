"""The page of a benchmark: nothing is rounded up, the fastest method is highlighted, every reason is stated."""

from typing import Any

import pytest

from vqpipe.reports import page
from vqpipe.reports.benchmark import (
    benchmark_page,
    case_table,
    estimate_table,
    factor,
    facts_of,
    method_table,
    number,
    reasons,
)


def row(name: str, wall: float, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    table = {"name": name, "version": "1", "exact": True, "ours": ratio is None, "note": "", "rounds": 5}
    times = {"wall_ms": wall, "wall_min_ms": wall, "cpu_ms": wall, "peak_mb": None, "rate": 1e3 / wall}
    return table | times | {"ratio_wall": ratio, "ratio_cpu": ratio, "same_ids": None, "extra": {}} | more


def case(title: str, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    table = {"title": title, "unit": "vectors", "settings": {}, "rows": list(rows), "not_run": {}, "facts": {}}
    return table | {"load": 0.5, "measured": "now"} | more


def benchmark(quick: bool = False, **subjects: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"cpu": "A CPU", "cpus": 2, "threads": 2, "instructions": "AVX2"}
    settings = {"quick": quick, "rounds": 5}
    return {"settings": settings, "machine": machine, "versions": {"torch": "2"}, "subjects": subjects}


SEARCH = [
    case("first", row("vqpipe", 10), row("naive expansion", 200, 20.0), row("faiss tuned", 9, 0.9)),
    case("second", row("vqpipe", 10), row("naive expansion", 130, 13.0), row("faiss tuned", 12, 1.2)),
]


def test_the_fastest_method_is_highlighted_whether_ours_or_not() -> None:
    table = case_table(SEARCH[0], wide=False)
    assert table.header == ["method", "wall, ms", "CPU, ms", "over ours"]  # without empty columns
    best = [[cell.text for cell in cells if isinstance(cell, page.Cell) and cell.best] for cells in table.rows]
    assert best == [[], [], ["9", "9"]]
    ratios = [cells[-1] for cells in table.rows]
    assert ratios == [page.Cell("–"), page.Cell("20.0x"), page.Cell("0.90x")]


def test_facts_take_the_worst_shape_and_are_absent_for_quick_sizes() -> None:
    assert facts_of(benchmark(search=SEARCH)) == {"search_over_naive": 13.0, "search_over_faiss_tuned": 0.9}
    facts = {"cost_of_k": 1.07, "cost_of_k_cpu": 1.1, "over_released": 10.2, "over_released_cpu": 9.0}
    found = facts_of(benchmark(train=[case("step", row("vqpipe", 10), unit="images", facts=facts)]))
    assert found == {"cost_of_k": 1.07, "step_over_released": 10.2}
    ratios = [{"lc_over_vq": wall, "lc_over_vq_cpu": 1.0} for wall in (2.2, 1.9)]
    steps = [case("step", row("vqpipe, lc", 10), facts=facts) for facts in ratios]
    assert facts_of(benchmark(quantizer=steps)) == {"lc_over_vq": 1.9}  # of the largest codebook
    assert "lc over vq: 1.90 in wall time, 1.00 in CPU time." in case_table(steps[1], wide=False).caption
    assert facts_of(benchmark(quick=True, search=SEARCH)) == {}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (number(1234.6), "1,235"),
        (number(0.01234), "0.0123"),
        (factor(0.949), "0.95x"),
        (factor(134.56), "135x"),
    ],
)
def test_numbers_have_three_digits(written: str, text: str) -> None:
    assert written == text


def test_a_reason_common_to_all_cases_is_stated_once() -> None:
    absent = {"faiss": "faiss is not installed"}
    cases = [
        case("a", row("vqpipe", 1), not_run=absent | {"naive": "26 GB"}),
        case("b", row("vqpipe", 1), not_run=absent),
    ]
    assert reasons(benchmark(search=cases)) == {"faiss": "faiss is not installed", "naive (a)": "26 GB"}


def test_the_summary_is_a_sentence_and_numbers_also_of_quick_sizes() -> None:
    search = [case("a", row("vqpipe", 10), row("faiss, default settings", 300, 30.0))]
    search += [case("b", row("vqpipe", 10), row("faiss, default settings", 248, 24.8))]
    train = [case("step", row("vqpipe, 100,000 codes", 25, rate=40.0), unit="images")]
    shown = benchmark_page(benchmark(quick=True, search=search, train=train), "vqpipe bench")
    sentence = "Training: 40 images/s; search: 24.8x as fast as faiss's default."
    assert shown.subtitle == f"{sentence} Measured on A CPU, 2 threads on 2 CPUs (AVX2)."
    first = shown.sections[0]
    assert isinstance(first, page.Numbers)
    assert [(number.label, number.value) for number in first.numbers] == [("training", "40"), ("search", "24.8x")]
    assert benchmark_page(benchmark(), "vqpipe bench").subtitle == "Measured on A CPU, 2 threads on 2 CPUs (AVX2)."


def test_estimates_are_beside_what_was_measured() -> None:
    steps = [row("K = 1", 30, extra={"planned_ms": 20.0, "planned_mb": 8.0}, peak_mb=9.0)]
    steps += [row("K = 2", 30, extra={"planned_ms": 40.0}), row("released", 90, 3.0)]
    measured = benchmark(train=[case("step", *steps, unit="images")])
    table = estimate_table(measured)
    assert table is not None
    assert [list(cells) for cells in table.rows] == [
        ["Step, K = 1", "20", "30", "1.50x", "8", "9"],
        ["Step, K = 2", "40", "30", "0.75x", "–", "–"],
    ]
    shown = benchmark_page(measured, "vqpipe bench")
    assert "training steps: 0.75x to 1.50x the estimated time." in shown.subtitle
    assert "Estimates of vqpipe plan" in page.render(shown)
    assert estimate_table(benchmark(search=SEARCH)) is None


def test_methods_are_listed_once() -> None:
    assert [cells[0] for cells in method_table("search", SEARCH).rows] == ["vqpipe", "naive expansion", "faiss tuned"]


def test_the_page_holds_tables_plots_and_reasons() -> None:
    rows = [row("vqpipe", 10), row("a <peer>", 80, 8.0)]
    cases = [case("nearest code", *rows, not_run={"other": "is <not> here"}, facts={"checked_vectors": 1024})]
    html = page.render(benchmark_page(benchmark(search=cases), "vqpipe bench --out DIR", "foot"))
    for text in (
        *("Benchmark", "A CPU, 2 threads on 2 CPUs (AVX2)", "for the first 1,024 vectors", "a &lt;peer&gt;"),
        *("is &lt;not&gt; here", "8.00x", "vqpipe bench --out DIR"),
    ):
        assert text in html
    assert html.count("<svg") == 1
