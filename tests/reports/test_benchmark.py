"""A benchmark's numbers as text: nothing rounded up, whoever is fastest set off, every reason told."""

from typing import Any

import pytest

from vqpipe.reports import page
from vqpipe.reports.benchmark import (
    benchmark_page,
    case_rows,
    factor,
    headlines,
    method_rows,
    number,
    reasons,
    share,
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


def test_the_fastest_is_set_off_whosever_it_is() -> None:
    header, rows = case_rows(SEARCH[0], wide=False)
    assert header == ["method", "wall, ms", "CPU, ms", "over ours"]  # what no row fills has no column
    assert [[cell for cell in cells if cell[1]] for cells in rows] == [[], [], [("9", True), ("9", True)]]
    assert [cells[-1][0] for cells in rows] == ["–", "20.0x", "0.90x"]


def test_headlines_take_the_worst_shape_and_small_sizes_have_none() -> None:
    found = headlines(benchmark(search=SEARCH))
    assert found == {"search_over_naive": 13.0, "search_over_faiss_tuned": 0.9}
    assert headlines(benchmark(quick=True, search=SEARCH)) == {}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (share(1.0), "100 %"),
        (share(0.9999999), "99.999 %"),
        (share(0.99976), "99.976 %"),
        (number(1234.6), "1,235"),
        (number(0.01234), "0.0123"),
        (factor(0.949), "0.95x"),
        (factor(134.56), "135x"),
    ],
)
def test_numbers_are_written_with_three_digits_and_never_up_to_all(written: str, text: str) -> None:
    assert written == text


def test_a_reason_is_told_once_where_it_is_that_of_all_cases() -> None:
    absent = {"OpenCV": "cv2 is not installed"}
    cases = [
        case("a", row("vqpipe", 1), not_run=absent | {"naive": "26 GB"}),
        case("b", row("vqpipe", 1), not_run=absent),
    ]
    assert reasons(benchmark(search=cases)) == {"OpenCV": "cv2 is not installed", "naive (a)": "26 GB"}


def test_methods_are_listed_once() -> None:
    assert [cells[0] for cells in method_rows(SEARCH)] == ["vqpipe", "naive expansion", "faiss tuned"]


def test_the_page_holds_tables_drawings_floor_and_reasons() -> None:
    facts = {"flop_floor_ms": 5.0, "bytes_floor_ms": 0.1, "matmul_gflops": 100.0, "copy_gb_per_s": 8.0}
    rows = [row("vqpipe", 10, extra={"over_floor": 2.0}), row("a <peer>", 40, 4.0, extra={"over_floor": 8.0})]
    cases = [case("nearest code", *rows, facts=facts, not_run={"other": "is <not> here"})]
    html = page.render(benchmark_page(benchmark(search=cases), "vqpipe bench --out again", "foot"))
    assert "What this machine does" in html
    assert "A CPU, 2 threads on 2 CPUs (AVX2)" in html
    assert "FLOP floor 5 ms" in html
    assert "Dashed: the FLOP floor." in html
    assert "a &lt;peer&gt;" in html
    assert "is &lt;not&gt; here" in html
    assert "8.00x" in html
    assert "vqpipe bench --out again" in html
    assert html.count("<svg") == 1
