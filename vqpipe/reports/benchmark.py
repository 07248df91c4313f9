"""A benchmark's `metrics.json` as tables, drawings and one page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vqpipe.reports import page
from vqpipe.reports.plots import INK, STYLE, color, plain_numbers, to_svg, untypeset

SUBJECTS = {
    "search": "Nearest code",
    "kmeans": "k-means",
    "train": "A training step",
    "tokenize": "Images to ids",
    "data": "From bytes to pixels and features",
    "generate": "Generators: the loss, and ids drawn",
    "eval": "What measuring costs",
}
"""Name -> heading, in the order of the page."""

Table = Mapping[str, Any]
"""A case, a row or a whole benchmark, as JSON holds it."""


@dataclass(frozen=True)
class Column:
    """A column of a case's table: `value` of a row as text."""

    title: str
    value: Callable[[Table], Any]
    written: Callable[[Any], str]
    wide: bool = False
    """On the page only, where the terminal has no room."""
    lowest: bool = False
    """The lowest value is set off, whosever it is."""


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def factor(value: float) -> str:
    """A ratio: 0.95x, 12.3x."""
    return f"{value:,.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def share(value: float) -> str:
    """Never rounded up to all of them: 99.976 %, 100 %."""
    return "100 %" if value == 1 else f"{min(100 * value, 99.999):.3f} %"


def part(value: float) -> str:
    return f"{value:.1%}"


def extra(key: str) -> Callable[[Table], Any]:
    return lambda row: row["extra"].get(key)


COLUMNS = (
    Column("wall, ms", lambda row: row["wall_ms"], number, lowest=True),
    Column("least", lambda row: row["wall_min_ms"], number, wide=True),
    Column("CPU, ms", lambda row: row["cpu_ms"], number, lowest=True),
    Column("over ours", lambda row: None if row["ours"] else row["ratio_wall"], factor),
    Column("in CPU time", lambda row: None if row["ours"] else row["ratio_cpu"], factor, wide=True),
    Column("peak, MB", lambda row: row["peak_mb"], number),
    Column("same ids", lambda row: row["same_ids"], share),
    Column("over floor", extra("over_floor"), factor),
    Column("inertia", extra("inertia"), lambda value: f"{value:.5g}", wide=True),
    Column("inertia / faiss", extra("inertia_ratio"), lambda value: f"{value:.4f}"),
    Column("of it search", extra("search_share"), part),
    Column("same pixels", extra("same_pixels"), share),
    Column("MB/s", extra("megabytes_per_s"), number, wide=True),
    Column("megapixels/s", extra("megapixels_per_s"), number, wide=True),
    Column("first call, s", extra("compile_s"), number, wide=True),
)
METHOD_HEADER = ("method", "answer", "version", "rounds", "note")


def case_rows(case: Table, wide: bool) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """A header, and (text, whether it is set off) of every cell; columns that no row fills are left out."""
    rate = Column(f"{case['unit']}/s", lambda row: row["rate"], number)
    columns = [*COLUMNS[:3], *([rate] if case["unit"] in ("images", "MB") else []), *COLUMNS[3:]]
    columns = [column for column in columns if wide or not column.wide]
    columns = [column for column in columns if any(column.value(row) is not None for row in case["rows"])]
    lowest = {
        column.title: min(column.value(row) for row in case["rows"])
        for column in columns
        if column.lowest and len(case["rows"]) > 1
    }
    rows = []
    for row in case["rows"]:
        cells = [(row["name"], False)]
        for column in columns:
            value = column.value(row)
            text = "–" if value is None else column.written(value)
            cells.append((text, value is not None and lowest.get(column.title) == value))
        rows.append(cells)
    return ["method", *(column.title for column in columns)], rows


def method_rows(cases: Sequence[Table]) -> list[list[str]]:
    """What each method of a subject is, once where that is the same in several cases: cells under METHOD_HEADER."""
    rows = [
        [row["name"], "exact" if row["exact"] else "approximate", row["version"], str(row["rounds"]), row["note"]]
        for case in cases
        for row in case["rows"]
    ]
    return list(map(list, dict.fromkeys(map(tuple, rows))))


def benchmark_page(metrics: Table, command: str, footer: str = "") -> page.ReportPage:
    """The page: headlines, then a table and a drawing per case, what was left out, and the machine."""
    sections: list[page.Section] = []
    if headlines := [page.Number(*each) for each in headline_texts(metrics)]:
        sections.append(page.Numbers("In short", headlines))
    for subject, cases in metrics["subjects"].items():
        for case in cases:
            header, rows = case_rows(case, wide=True)
            cells = [[page.Cell(text, best) for text, best in row] for row in rows]
            sections.append(page.Table(capitalised(case["title"]), header, cells, caption(case)))
        if drawn := [drawing(case) for case in cases if len(case["rows"]) > 1]:
            sections.append(page.Plots(f"{SUBJECTS[subject]}, drawn", drawn))
        title = f"{SUBJECTS[subject]}: the methods"
        sections.append(page.Table(title, METHOD_HEADER, method_rows(cases), folded=True, prose=METHOD_HEADER[1:]))
    if missing := reasons(metrics):
        sections.append(page.Reasons("Not measured, and why", missing))
    where = [
        [key, str(value)] for table in ("machine", "settings", "versions") for key, value in metrics[table].items()
    ]
    sections.append(page.Table("Measured on", ["", "value"], where, folded=True, prose=("value",)))
    sections.append(page.Commands("Measure again", [command]))
    title = "A quick look at this machine" if metrics["settings"]["quick"] else "What this machine does"
    return page.ReportPage(title, machine_line(metrics), sections, footer)


def machine_line(metrics: Table) -> str:
    """The machine in one line."""
    machine = metrics["machine"]
    cpus = f"{machine['cpu']}, {machine['threads']} threads on {machine['cpus']} CPUs ({machine['instructions']})"
    return f"{machine['gpu']}; {cpus}" if "gpu" in machine else cpus


def headline_texts(metrics: Table) -> list[tuple[str, str, str, str]]:
    """(label, value, unit, convention) of the few numbers to begin with."""
    found = headlines(metrics)
    told = {
        "search_over_naive": ("search, naive expansion over ours", "x", "least of the shapes, wall time"),
        "search_over_faiss_tuned": ("search, faiss tuned over ours", "x", "least of the shapes, wall time"),
        "kmeans_over_faiss": ("Lloyd iteration, faiss over ours", "x", "same start, wall time"),
        "cost_of_k": ("training step, large over small codebook", "x", "median over the rounds"),
        "tokenized_per_s": ("images to ids, largest codebook", "images/s", ""),
        "decoded_per_s": ("JPEG decoding, one core", "images/s", ""),
        "eval_over_plain": ("evaluation over encode and decode alone", "x", "most of the networks, wall time"),
    }
    return [
        (label, f"{found[key]:.2f}" if unit == "x" else number(found[key]), unit, note)
        for key, (label, unit, note) in told.items()
        if key in found
    ]


def headlines(metrics: Table) -> dict[str, float]:
    """The few numbers that the artifact says of itself: what was measured of them, and at full size."""
    subjects = {} if metrics["settings"]["quick"] else metrics["subjects"]
    found: dict[str, float | None] = {
        "search_over_naive": least_ratio(subjects.get("search", []), "naive expansion"),
        "search_over_faiss_tuned": least_ratio(subjects.get("search", []), "faiss tuned"),
        "kmeans_over_faiss": least_ratio(subjects.get("kmeans", [])[:1], "faiss"),
        "cost_of_k": next((case["facts"]["cost_of_k"] for case in subjects.get("train", [])), None),
        "tokenized_per_s": next((our_rate(case) for case in reversed(subjects.get("tokenize", []))), None),
        "decoded_per_s": next((our_rate(case) for case in subjects.get("data", [])), None),
        "eval_over_plain": max((case["facts"]["eval_over_plain"] for case in subjects.get("eval", [])), default=None),
    }
    return {key: value for key, value in found.items() if value is not None}


def least_ratio(cases: Sequence[Table], name: str) -> float | None:
    """The least that the method takes in units of ours, over those cases in which it ran."""
    ratios = [row["ratio_wall"] for case in cases for row in case["rows"] if row["name"] == name]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def our_rate(case: Table) -> float | None:
    return next((row["rate"] for row in case["rows"] if row["ours"]), None)


def caption(case: Table) -> str:
    """What a reader of the table has to know."""
    facts, told = case["facts"], ["Medians over the rounds; over ours: its time in units of ours."]
    if "flop_floor_ms" in facts:
        told.append(
            f"FLOP floor {number(facts['flop_floor_ms'])} ms: 2 N K D at the {number(facts['matmul_gflops'])} GFLOP/s"
            f" of a float32 matrix product in the same rounds; bytes floor {number(facts['bytes_floor_ms'])} ms at"
            f" {number(facts['copy_gb_per_s'])} GB/s."
        )
    if "checked_vectors" in facts:
        told.append(f"Same ids: as a float64 search, of the first {facts['checked_vectors']:,} vectors.")
    if "cost_of_k" in facts:
        told.append(
            f"Large over small codebook: {facts['cost_of_k']:.2f} in wall time, {facts['cost_of_k_cpu']:.2f} in CPU"
            f" time; at most {facts['bound']} is wanted."
        )
    if "memory_over_plain" in facts:
        told.append(
            f"Peak memory, ours over plain: {facts['memory_over_plain']:.3f}; at most {facts['memory_wanted']} wanted."
        )
    if "largest_difference" in facts:
        told.append(
            f"Largest difference of loss or gradients, relative to the largest: {facts['largest_difference']:.1g}."
        )
    if "same_ids_as_whole" in facts:
        told.append(
            f"Same ids either way: {share(facts['same_ids_as_whole'])}; running the whole sequence for every id should"
            f" take at least {facts['speed_wanted']:.0f} times as long."
        )
    if "eval_over_plain" in facts:
        told.append(
            f"Measuring over encoding and decoding alone: {facts['eval_over_plain']:.2f} in wall time,"
            f" {facts['eval_over_plain_cpu']:.2f} in CPU time; at most {facts['eval_wanted']} is wanted."
        )
    if any("inertia_ratio" in row["extra"] for row in case["rows"]):
        told.append("Inertia: mean squared distance of a point to its centre.")
    if case["load"] is not None:
        told.append(f"Load before: {case['load']:.1f}.")
    return " ".join(told)


def reasons(metrics: Table) -> dict[str, str]:
    """Method -> why it was not measured; under the case's title where the reason is not that of all cases."""
    found: dict[str, str] = {}
    for cases in metrics["subjects"].values():
        for case in cases:
            for name, reason in case["not_run"].items():
                everywhere = all(each["not_run"].get(name) == reason for each in cases)
                found[name if everywhere and len(cases) > 1 else f"{name} ({case['title']})"] = reason
    return found


def drawing(case: Table) -> page.Plot:
    """Wall time (filled) and CPU time (open) of every method on a logarithmic axis, the FLOP floor as an upright."""
    rows = case["rows"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 0.8 + 0.46 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(rows))[::-1]
        shown = [(max(row["wall_ms"], 1e-6), max(row["cpu_ms"], 1e-6)) for row in rows]
        left = min(min(pair) for pair in shown) / 1.6
        floor = case["facts"].get("flop_floor_ms")
        left = min(left, floor / 1.6) if floor else left
        for place, row, (wall, cpu) in zip(places, rows, shown, strict=True):
            ink = color(0 if row["ours"] else 1)
            axes.plot([left, wall], [place, place], color=ink, linewidth=1.0, alpha=0.5)
            axes.plot(cpu, place, "o", color=ink, markerfacecolor="none", markersize=6)
            axes.plot(wall, place, "o", color=ink, markersize=4.5)
            axes.text(left, place + 0.16, f" {untypeset(row['name'])}: {number(row['wall_ms'])} ms", va="bottom")
        if floor:
            axes.axvline(floor, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5)
        right = max(max(pair) for pair in shown)
        axes.set(xscale="log", xlim=(left, max(right, left * 8) * 1.6), ylim=(-0.5, len(rows) - 0.25), xlabel="ms")
        plain_numbers(axes.xaxis)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        svg = to_svg(figure, case["title"])
    alt = ", ".join(f"{row['name']} {number(row['wall_ms'])} ms" for row in rows)
    told = "Filled: wall time. Open: CPU time of all threads."
    return page.Plot(capitalised(case["title"]), svg, alt, told + (" Dashed: the FLOP floor." if floor else ""))


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
