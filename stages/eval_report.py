"""What `vqpipe eval` leaves behind: the report's files, and its numbers on the terminal."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages import console

if TYPE_CHECKING:
    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.reports.evaluation import Evaluated
    from vqpipe.reports.page import Section


def publish(draft: "Draft", evaluated: "Evaluated", sections: "Sequence[Section]") -> "Artifact":
    """Write the report's files and finish it."""
    from vqpipe import distributed
    from vqpipe.reports.evaluation import MEASURES, NUM_HEADLINES, value_of

    metrics = evaluated.metrics
    if distributed.is_main():
        write_files(draft, evaluated, sections)
        console.show(number_table(evaluated))
        if len(metrics["protocols"]) > 1:
            console.show(protocol_table(metrics["protocols"]))
    headline = {measure.key: value_of(metrics, measure.key) for measure in MEASURES[:NUM_HEADLINES]}
    facts = {key: metrics[key] for key in ("protocol", "num_images", "image_size")}
    return draft.publish(facts | {key: value for key, value in headline.items() if value is not None})


def write_files(draft: "Draft", evaluated: "Evaluated", sections: "Sequence[Section]") -> None:
    """`metrics.json`, `counts.npy`, `dead-codes.npy` where a list of them is possible, the pictures, the training log
    that the curves are drawn from, and the page."""
    import numpy as np

    from vqpipe.metrics.usage import dead_codes
    from vqpipe.reports import page
    from vqpipe.reports.evaluation import counts_to_array
    from vqpipe.reports.evaluation_page import evaluation_page

    with draft.write("metrics.json") as path:
        content = {**evaluated.metrics, "commands": list(evaluated.commands)}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    with draft.write("counts.npy") as path:
        np.save(path, counts_to_array(evaluated.counts))
    if evaluated.is_discrete and not evaluated.counts.is_sparse:
        with draft.write("dead-codes.npy") as path:
            np.save(path, dead_codes(evaluated.counts).numpy())
    for number, shown in enumerate(evaluated.shown):
        for side, png in (("original", shown.original), ("reconstruction", shown.reconstruction)):
            with draft.write(f"pictures/{number:02d}-{side}.png") as path:
                path.write_bytes(png)
    if evaluated.history:
        with draft.write("training.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in evaluated.history), encoding="utf-8")
    names = ", ".join(evaluated.metrics["protocols"])
    footer = f"Made by vqpipe {evaluated.metrics['versions']['vqpipe']}, protocol {names}."
    with draft.write("report.html") as path:
        whole = evaluation_page(evaluated, evaluated.name, footer, sections)
        path.write_text(page.render(whole), encoding="utf-8")


def number_table(evaluated: "Evaluated") -> Any:
    """The numbers for the terminal."""
    from rich import box
    from rich.table import Table

    from vqpipe.reports.evaluation import MEASURES, value_of, written

    table = Table("measure", "value", "convention", box=box.SIMPLE, pad_edge=False)
    table.columns[1].justify = "right"
    for each in MEASURES:
        value = value_of(evaluated.metrics, each.key)
        if value is not None:
            table.add_row(each.label, written(each, value), each.convention)
    for name in evaluated.metrics["not_computed"]:
        table.add_row(name, "–", "left out: the report says why")
    return table


def protocol_table(protocols: Mapping[str, Mapping[str, Any]]) -> Any:
    """Each protocol's own numbers, a column each: those of two never share one."""
    from rich import box
    from rich.table import Table

    table = Table("own convention", *protocols, box=box.SIMPLE, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("psnr", "ssim", "lpips", "rfid"):
        if any(name in numbers for numbers in protocols.values()):
            cells = (f"{numbers[name]:.4g}" if name in numbers else "–" for numbers in protocols.values())
            table.add_row(name, *cells)
    return table
