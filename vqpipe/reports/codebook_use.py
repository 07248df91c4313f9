"""How a tokenizer uses its codebook: maps, the share in use beside that of codes drawn uniformly, and a row per group.

Shapes: G groups, K codes per group.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vqpipe.metrics.usage import BUDGETS, times_chosen
from vqpipe.reports import page, pictures, plots
from vqpipe.reports.evaluation import EvaluationResult
from vqpipe.words import percent

MOST_MAPPED = 2**22
"""Codes, over all groups, up to which the page draws each as a cell."""
MOST_GROUPS = 16
"""Groups up to which the table with a row for each is open."""
MAP_CAPTION = (
    "Each cell is one code, in the codebook's order. Dark: never chosen on these images. "
    "The brighter, the more often chosen (logarithmic)."
)
CEILING = (
    "Uniform codes: the expected share in use if every token were drawn uniformly from all codes. Compare the "
    "utilization with it."
)


def sections_on_codes(evaluated: EvaluationResult) -> list[page.Section]:
    """The map and frequencies of the codes, then the numbers of their use."""
    maps, drawings = maps_of([evaluated]), [plots.code_frequency(evaluated.counts)]
    if growth := plots.usage_growth(evaluated.metrics.get("utilization_curve", ()), BUDGETS):
        drawings.append(growth)
    sections: list[page.Section] = [page.Maps("Codebook utilization", maps, MAP_CAPTION if maps else "", drawings)]
    if rows := evaluated.metrics.get("utilization_at"):
        sections.append(budget_table(rows))
    if "gini_per_group" in evaluated.metrics:
        sections.append(group_table(evaluated.metrics))
    if "joint_entropy" in evaluated.metrics:
        sections.append(joint_numbers(evaluated.metrics))
    return sections


def budget_table(rows: Sequence[Mapping[str, Any]]) -> page.Table:
    """Utilization after several numbers of tokens, beside that of codes drawn uniformly."""
    cells = [
        [f"{row['tokens']:,}", percent(row["utilization"]), percent(row["uniform_utilization"])]
        + ([" to ".join(percent(end(groups)) for end in (min, max))] if len(groups) > 1 else [])
        for row in rows
        for groups in [row["utilization_per_group"]]
    ]
    header = ["tokens of a group", "codes in use", "uniform codes"]
    header += ["least and most used group"] if len(cells[0]) > len(header) else []
    return page.Table("Utilization by number of tokens", header, cells, CEILING)


def group_table(metrics: Mapping[str, Any]) -> page.Table:
    """A row for each group: the distribution of its codes."""
    columns: list[tuple[str, Sequence[Any], Callable[[Any], str]]] = [
        ("codes in use", metrics["utilization_per_group"], percent),
        ("never chosen", metrics.get("num_dead_per_group", ()), "{:,d}".format),
        ("perplexity", metrics["perplexity_per_group"], "{:,.1f}".format),
        ("Gini", metrics["gini_per_group"], "{:.3f}".format),
        ("least chosen, times", metrics.get("min_count_per_group", ()), "{:,d}".format),
        ("most chosen, times", metrics.get("max_count_per_group", ()), "{:,d}".format),
    ]
    columns = [column for column in columns if column[1]]
    num_groups = len(metrics["gini_per_group"])
    several = num_groups > 1
    rows = [
        [
            f"group {group + 1}" if several else "the codebook",
            *(how(values[group]) for _, values, how in columns),
        ]
        for group in range(num_groups)
    ]
    caption = "Gini: 0: all codes are equally frequent; 1: a single code is used. Unused codes are included."
    title = "Code frequencies"
    return page.Table(title, ["", *(name for name, _, _ in columns)], rows, caption, folded=num_groups > MOST_GROUPS)


def joint_numbers(metrics: Mapping[str, Any]) -> page.Numbers:
    """The joint entropy of the groups, and its limits."""
    numbers = [page.Number("joint entropy", f"{metrics['joint_entropy']:.2f}", "bits", "per position; biased low")]
    limits = {
        "joint_entropy_limit": ("upper bound", "bits", "log2 of the number of positions"),
        "joint_entropy_bias": ("estimated bias (Miller 1955)", "bits", "valid only if the coverage is near 1"),
    }
    for key, (label, unit, note) in limits.items():
        if key in metrics:
            numbers.append(page.Number(label, f"{metrics[key]:.2f}", unit, note))
    if "joint_coverage" in metrics:
        note = "probability that the next tuple was seen before"
        numbers.append(page.Number("coverage", percent(metrics["joint_coverage"]).removesuffix(" %"), "%", note))
    return page.Numbers("Joint entropy of the groups", numbers)


def maps_of(evaluations: Sequence[EvaluationResult]) -> list[page.Map]:
    """The codebook of each tokenizer, one cell per code, if it is small enough to be drawn."""
    return [map_of(e) for e in evaluations if e.is_discrete and e.counts.numel() <= MOST_MAPPED]


def map_of(evaluated: EvaluationResult) -> page.Map:
    """The codebook of one tokenizer, under the number of its codes in use."""
    used, total = num_used(evaluated.counts), evaluated.counts.numel()
    heading = f"{used:,} of {total:,} codes in use ({percent(used / total)})"
    alt = f"Codebook of {evaluated.name}, one cell per code: {heading}"
    return page.Map(evaluated.name, pictures.codebook_map(evaluated.counts), heading, alt)


def num_used(counts: Tensor) -> int:
    """The number of codes of all groups that were chosen at least once."""
    return sum(map(len, times_chosen(counts)))
