"""The page of a benchmark, from its `metrics.json` (see `vqpipe.benchmarks`).

A measurement, a case and the whole benchmark are dictionaries as in JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vqpipe.reports import page
from vqpipe.reports.plots import INK, STYLE, color, legend_above, plain_numbers, to_svg, untypeset
from vqpipe.words import capitalized, percent

SUBJECTS = {
    "search": "Nearest code",
    "kmeans": "k-means",
    "quantizer": "Training step of a quantizer",
    "train": "Training step",
    "tokenize": "Images to ids",
    "generate": "Images from a generator",
    "data": "Files to batches",
}
"""Name -> heading, in the order of the page."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class MeasuredColumn:
    """A column of the table of a case: the value of a measurement, and its format."""

    title: str
    value: Callable[[Json], Any]
    written: Callable[[Any], str]
    wide: bool = False
    """On the page only, not on the terminal."""
    best: bool = False
    """Highlight the lowest value."""


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def factor(value: float) -> str:
    """A ratio: 0.95x, 12.3x."""
    return f"{value:,.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


COLUMNS = (
    MeasuredColumn("wall, ms", lambda row: row["wall_ms"], number, best=True),
    MeasuredColumn("minimum", lambda row: row["wall_min_ms"], number, wide=True),
    MeasuredColumn("CPU, ms", lambda row: row["cpu_ms"], number, best=True),
    MeasuredColumn("over ours", lambda row: None if row["ours"] else row["ratio_wall"], factor),
    MeasuredColumn("CPU over ours", lambda row: None if row["ours"] else row["ratio_cpu"], factor, wide=True),
    MeasuredColumn("peak, MB", lambda row: row["peak_mb"], number),
    MeasuredColumn("same ids", lambda row: row["same_ids"], partial(percent, digits=3)),
    MeasuredColumn("inertia", lambda row: row["extra"].get("inertia"), lambda value: f"{value:.5g}", wide=True),
    MeasuredColumn("inertia / faiss", lambda row: row["extra"].get("inertia_ratio"), lambda value: f"{value:.4f}"),
)
METHOD_HEADER = ("method", "answer", "version", "rounds", "note")
FAISS_SEARCHES = {"faiss, default settings": "faiss's default", "faiss GPU": "faiss on the GPU"}
"""Method of the search -> its name in the summary, which takes the first that was measured."""
FAISS_KMEANS = {"faiss": "faiss"}
"""The same for k-means."""
RATIOS = {
    "search_over_naive": ("search, naive expansion over ours", "smallest of the shapes, wall time"),
    "search_over_faiss_tuned": ("search, faiss tuned over ours", "smallest of the shapes, wall time"),
    "lc_over_vq": ("training step of a quantizer, lc over vq", "largest codebook, wall time"),
    "cost_of_k": ("training step, large over small codebook", "wall time"),
    "step_over_released": ("training step, released over ours", "large codebook, wall time"),
}
"""Fact of the artifact that the summary does not have -> label and note on the page."""


def case_table(case: Json, wide: bool) -> page.Table:
    """The rows of a case, without columns that are empty. `wide`: for the page, else for the terminal."""
    columns = list(COLUMNS)
    if case["unit"] == "images":
        columns.insert(3, MeasuredColumn("images/s", lambda row: row["rate"], number))
    columns = [column for column in columns if wide or not column.wide]
    columns = [column for column in columns if any(column.value(row) is not None for row in case["rows"])]
    rows = []
    for row in case["rows"]:
        cells: list[str | page.Cell] = [row["name"]]
        for column in columns:
            value = column.value(row)
            best = column.best and len(case["rows"]) > 1 and value == min(map(column.value, case["rows"]))
            cells.append(page.Cell("–" if value is None else column.written(value), best))
        rows.append(cells)
    return page.Table(
        capitalized(case["title"]), ["method", *(column.title for column in columns)], rows, caption(case)
    )


def caption(case: Json) -> str:
    """How to read the table of a case."""
    facts, words = case["facts"], ["Medians over the rounds. Over ours: time of the method divided by our time."]
    if "checked_vectors" in facts:
        words.append(f"Same ids: share equal to a float64 search, for the first {facts['checked_vectors']:,} vectors.")
    if facts.get("cost_of_k"):
        wall, cpu = facts["cost_of_k"], facts["cost_of_k_cpu"]
        words.append(f"Large over small codebook: {wall:.2f} in wall time, {cpu:.2f} in CPU time.")
    if facts.get("lc_over_vq"):
        wall, cpu = facts["lc_over_vq"], facts["lc_over_vq_cpu"]
        words.append(
            f"Ours is the quantizer of the same kind. lc over vq: {wall:.2f} in wall time, {cpu:.2f} in CPU time."
        )
    if any("inertia_ratio" in row["extra"] for row in case["rows"]):
        words.append("Inertia: mean squared distance of a point to its center.")
    if facts.get("over_decoding"):
        words.append(f"Ours over decoding alone: {facts['over_decoding']:.2f} in CPU time.")
    if case["load"] is not None:
        words.append(f"Load average before: {case['load']:.1f}.")
    return " ".join(words)


def method_table(subject: str, cases: Sequence[Json]) -> page.Table:
    """Version and settings of each method of a subject; once where they are equal in several cases."""
    rows = [
        (row["name"], "exact" if row["exact"] else "approximate", row["version"], str(row["rounds"]), row["note"])
        for case in cases
        for row in case["rows"]
    ]
    title = f"{SUBJECTS[subject]}: methods"
    return page.Table(title, METHOD_HEADER, list(dict.fromkeys(rows)), folded=True, prose=METHOD_HEADER[1:])


def estimate_table(metrics: Json) -> page.Table | None:
    """The estimates of `vqpipe plan` beside what was measured; None where nothing was estimated."""
    rows = []
    for case, row in estimated(metrics):
        planned, measured = row["extra"].get("planned_mb"), row["peak_mb"]
        memory = ["–" if value is None else number(value) for value in (planned, measured)]
        times = [number(row["extra"]["planned_ms"]), number(row["wall_ms"]), factor(over_planned(row))]
        rows.append([f"{capitalized(case['title'])}, {row['name']}", *times, *memory])
    header = ["", "planned, ms", "measured, ms", "measured / planned", "planned, MB", "measured, MB"]
    caption = "Peaks of memory are those above what is allocated before the call."
    return page.Table("Estimates of vqpipe plan", header, rows, caption) if rows else None


def estimated(metrics: Json) -> list[tuple[Json, Json]]:
    """The cases and measurements with an estimated time."""
    cases = [case for cases in metrics["subjects"].values() for case in cases]
    return [(case, row) for case in cases for row in case["rows"] if row["extra"].get("planned_ms")]


def over_planned(row: Json) -> float:
    """The measured time of a measurement over its estimate."""
    return float(row["wall_ms"] / row["extra"]["planned_ms"])


def own_rate(cases: Sequence[Json]) -> float | None:
    """Images per second of our first method in these cases; None without one."""
    return next((row["rate"] for case in cases for row in case["rows"] if row["ours"]), None)


def headline_numbers(metrics: Json) -> list[page.Number]:
    """Training speed, the search and k-means beside faiss's own, and how far the estimates of training are off."""
    subjects = metrics["subjects"]
    numbers = []
    train = subjects.get("train", [])[:1]
    if (rate := own_rate(train)) is not None:
        numbers.append(page.Number("training", number(rate), "images/s", train[0]["title"]))
    for subject, label, peers in (("search", "search", FAISS_SEARCHES), ("kmeans", "k-means", FAISS_KMEANS)):
        for name, words in peers.items():
            if (ratio := smallest_ratio(subjects.get(subject, []), name)) is not None:
                numbers.append(page.Number(label, factor(ratio), f"as fast as {words}", "the least of the shapes"))
                break
    for label, cases in (
        ("images to ids", subjects.get("tokenize", [])[-1:]),
        ("files to batches", subjects.get("data", [])[:1]),
        ("generation", subjects.get("generate", [])[:1]),
    ):
        if (rate := own_rate(cases)) is not None:
            numbers.append(page.Number(label, number(rate), "images/s", cases[0]["title"]))
    steps = [over_planned(row) for case, row in estimated(metrics) if case in subjects.get("train", [])]
    if steps:
        low, high = factor(min(steps)), factor(max(steps))
        span = low if low == high else f"{low} to {high}"
        numbers.append(page.Number("training steps", span, "the estimated time", "estimated by vqpipe plan"))
    return numbers


def in_a_sentence(numbers: Sequence[page.Number]) -> str:
    """`Training: 40 images/s; search: 24.8x as fast as faiss's default.`"""
    text = "; ".join(f"{each.label}: {each.value} {each.unit}" for each in numbers)
    return f"{capitalized(text)}." if text else ""


def benchmark_page(metrics: Json, command: str, footer: str = "") -> page.ReportPage:
    """A summary, the facts, a table and a plot per case, reasons of what was not measured, and the machine."""
    sections: list[page.Section] = []
    summary, found = headline_numbers(metrics), facts_of(metrics)
    if summary:
        sections.append(page.Numbers("Summary", summary))
    numbers = [
        page.Number(label, f"{found[key]:.2f}", "x", note) for key, (label, note) in RATIOS.items() if key in found
    ]
    if numbers:
        sections.append(page.Numbers("Ratios", numbers))
    for subject, cases in metrics["subjects"].items():
        sections += [case_table(case, wide=True) for case in cases]
        if drawn := [time_plot(case) for case in cases if len(case["rows"]) > 1]:
            sections.append(page.Plots(f"{SUBJECTS[subject]}: times", drawn))
        sections.append(method_table(subject, cases))
    if table := estimate_table(metrics):
        sections.append(table)
    if missing := reasons(metrics):
        sections.append(page.Reasons("Not measured", missing))
    names = ("machine", "settings", "versions")
    where = [[key, str(value)] for name in names for key, value in metrics[name].items()]
    sections.append(page.Table("Machine and versions", ["", "value"], where, folded=True, prose=("value",)))
    sections.append(page.Commands("Command", [command]))
    title = "Quick benchmark" if metrics["settings"]["quick"] else "Benchmark"
    subtitle = " ".join(filter(None, (in_a_sentence(summary), f"Measured on {machine_line(metrics)}.")))
    return page.ReportPage(title, subtitle, sections, footer)


def machine_line(metrics: Json) -> str:
    """The machine in one line."""
    machine = metrics["machine"]
    cpus = f"{machine['cpu']}, {machine['threads']} threads on {machine['cpus']} CPUs ({machine['instructions']})"
    return f"{machine['gpu']}; {cpus}" if "gpu" in machine else cpus


def facts_of(metrics: Json) -> dict[str, float]:
    """The facts of the artifact; none for a quick benchmark."""
    subjects = {} if metrics["settings"]["quick"] else metrics["subjects"]
    search, kmeans, train = (subjects.get(name, []) for name in ("search", "kmeans", "train"))
    found: dict[str, float | None] = {
        "search_over_naive": smallest_ratio(search, "naive expansion"),
        "search_over_faiss_tuned": smallest_ratio(search, "faiss tuned"),
        "kmeans_over_faiss": smallest_ratio(kmeans, "faiss"),
        "lc_over_vq": next((case["facts"]["lc_over_vq"] for case in subjects.get("quantizer", [])[-1:]), None),
        "cost_of_k": next((case["facts"].get("cost_of_k") for case in train), None),
        "step_over_released": next((case["facts"].get("over_released") for case in train), None),
        "tokenized_per_s": own_rate(subjects.get("tokenize", [])[-1:]),
        "loaded_per_s": own_rate(subjects.get("data", [])[:1]),
    }
    return {key: value for key, value in found.items() if value is not None}


def smallest_ratio(cases: Sequence[Json], name: str) -> float | None:
    """The smallest time of a method divided by ours, over the cases in which it ran."""
    ratios = [row["ratio_wall"] for case in cases for row in case["rows"] if row["name"] == name]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def reasons(metrics: Json) -> dict[str, str]:
    """Method -> why it was not measured. The title of the case is added unless the reason is the same in all cases."""
    found: dict[str, str] = {}
    for cases in metrics["subjects"].values():
        for case in cases:
            for name, reason in case["not_run"].items():
                everywhere = all(each["not_run"].get(name) == reason for each in cases)
                found[name if everywhere and len(cases) > 1 else f"{name} ({case['title']})"] = reason
    return found


def time_plot(case: Json) -> page.Plot:
    """Wall time (filled) and CPU time (open) of each method on a logarithmic axis, its name above its line."""
    rows = case["rows"]
    times = [(max(row["wall_ms"], 1e-6), max(row["cpu_ms"], 1e-6)) for row in rows]
    left, right = min(map(min, times)) / 1.6, max(map(max, times))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 1.1 + 0.52 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (row, (wall, cpu)) in enumerate(zip(rows[::-1], times[::-1], strict=True)):
            ink = color(0 if row["ours"] else 1)
            axes.plot([left, wall], [place, place], color=ink, linewidth=1.0, alpha=0.5)
            axes.plot(cpu, place, "o", color=ink, markerfacecolor="none", markersize=6)
            axes.plot(wall, place, "o", color=ink, markersize=4.5)
            label = f"{untypeset(row['name'])}: {number(row['wall_ms'])} ms"
            axes.annotate(label, (left, place), (3, 6), textcoords="offset points", va="bottom")
        for label, fill in (("wall time", INK), ("CPU time of all threads", "none")):
            axes.plot([], [], "o", color=INK, markerfacecolor=fill, markersize=5, label=label)
        legend_above(axes, ("wall time", "CPU time of all threads"), columns=2)
        axes.set(xscale="log", xlim=(left, max(right, left * 8) * 1.6), ylim=(-0.5, len(rows) - 0.25), xlabel="ms")
        plain_numbers(axes.xaxis)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        svg = to_svg(figure, case["title"])
    alt = ", ".join(f"{row['name']} {number(row['wall_ms'])} ms" for row in rows)
    return page.Plot(capitalized(case["title"]), svg, alt)
