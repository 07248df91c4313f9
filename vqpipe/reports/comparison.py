"""Several tokenizers on the same images, side by side: one table, and one page."""

from collections.abc import Sequence
from typing import Any

from vqpipe.errors import ArtifactError
from vqpipe.metrics.evaluation import comparable
from vqpipe.reports import page, pictures, plots
from vqpipe.reports.evaluation import (
    MAP_CAPTION,
    MEASURES,
    NUM_HEADLINES,
    Evaluated,
    Measure,
    codes,
    decibels,
    map_of,
    value_of,
    written,
)


def refuse_unlike(evaluations: Sequence[Evaluated], places: Sequence[str]) -> None:
    """Numbers of different protocols, sizes or images never share a column.

    Raises:
        ArtifactError: two evaluations differ; both are named, and the key.
    """
    for other, place in zip(evaluations[1:], places[1:], strict=True):
        key = comparable(evaluations[0].metrics, other.metrics)
        if key is not None:
            values = [short(evaluation.metrics.get(key)) for evaluation in (evaluations[0], other)]
            raise ArtifactError(
                f"{places[0]} and {place} cannot be compared: their {key} differs ({values[0]} and {values[1]})",
                "Evaluate both on the same images with the same protocol and image size",
            )


def comparison_page(evaluations: Sequence[Evaluated], title: str, footer: str = "") -> page.ReportPage:
    """The page of several tokenizers on the same images: one table, maps, pictures and curves side by side."""
    first = evaluations[0].metrics
    named = {evaluated.name: evaluated for evaluated in evaluations}
    headline, others = measured(evaluations, MEASURES[:NUM_HEADLINES]), measured(evaluations, MEASURES[NUM_HEADLINES:])
    caption = f"Protocol {first['protocol']}, the same images for all. The best of each column is set off."
    conventions = ". ".join(f"{measure.label}: {measure.convention}" for measure in others) + "."
    sections: list[page.Section] = [
        comparison_table(f"{first['num_images']:,} images at {first['image_size']} px", evaluations, headline, caption),
        page.Maps("Which codes are in use", [map_of(evaluated) for evaluated in evaluations], MAP_CAPTION),
    ]
    if together := side_by_side(evaluations):
        sections.append(page.Pictures("The same images, reconstructed by each", together))
    used = {name: evaluated.metrics["utilization"] for name, evaluated in named.items()}
    drawn = [
        plots.bars("Codes in use", used, "Share chosen at least once over all images.", share=True),
        plots.code_frequency({name: evaluated.counts for name, evaluated in named.items()}),
        *plots.training_curves({name: evaluated.history for name, evaluated in named.items() if evaluated.history}),
    ]
    sections.append(page.Plots("Codes and training", drawn))
    sections.append(comparison_table("Other conventions", evaluations, others, conventions))
    if missing := reasons(evaluations):
        sections.append(page.Reasons("Left out, and why", missing))
    sections.append(page.Lineage("Made from", [evaluated.lineage for evaluated in evaluations]))
    commands = list(dict.fromkeys(command for evaluated in evaluations for command in evaluated.commands))
    sections.append(page.Commands("Make it again", commands))
    return page.ReportPage(title, f"{len(evaluations)} tokenizers, measured alike", sections, footer)


def comparison_table(
    title: str, evaluations: Sequence[Evaluated], measures: Sequence[Measure], caption: str
) -> page.Table:
    """A row per tokenizer, a column per measure."""
    header = ["tokenizer", "codebook", *(measure.label for measure in measures)]
    rows = [[page.Cell(text, best) for text, best in row] for row in comparison_rows(evaluations, measures)]
    return page.Table(title, header, rows, caption)


def comparison_rows(evaluations: Sequence[Evaluated], measures: Sequence[Measure]) -> list[list[tuple[str, bool]]]:
    """(text, whether it is its column's best) of every cell: the tokenizer, its codebook, and each measure."""
    best = {}
    for measure in measures:
        present = [value for e in evaluations if (value := value_of(e.metrics, measure.key)) is not None]
        if measure.higher_is_better is not None and len(set(present)) > 1:
            best[measure.key] = max(present) if measure.higher_is_better else min(present)
    rows = []
    for evaluated in evaluations:
        values = [value_of(evaluated.metrics, measure.key) for measure in measures]
        cells = [
            (written(measure, value), value is not None and value == best.get(measure.key))
            for measure, value in zip(measures, values, strict=True)
        ]
        rows.append([(evaluated.name, False), (codes(evaluated.metrics["tokenizer"]), False), *cells])
    return rows


def measured(evaluations: Sequence[Evaluated], measures: Sequence[Measure] = MEASURES) -> list[Measure]:
    """The measures that at least one evaluation has."""
    return [m for m in measures if any(value_of(evaluated.metrics, m.key) is not None for evaluated in evaluations)]


def side_by_side(evaluations: Sequence[Evaluated]) -> list[page.Picture]:
    """The originals that every report shows, with each one's reconstruction."""
    by_original = [{shown.original: shown for shown in evaluated.shown} for evaluated in evaluations]
    return [
        page.Picture(
            shown.name,
            pictures.data_uri(original),
            [
                page.Version(e.name, pictures.data_uri(known[original].reconstruction), decibels(known[original].psnr))
                for e, known in zip(evaluations, by_original, strict=True)
            ],
        )
        for original, shown in by_original[0].items()
        if all(original in known for known in by_original)
    ]


def reasons(evaluations: Sequence[Evaluated]) -> dict[str, str]:
    """Why numbers are absent: once where it is the same for all, else under each one's name."""
    missing = [evaluated.metrics["not_computed"] for evaluated in evaluations]
    shared = {key: reason for key, reason in missing[0].items() if all(each.get(key) == reason for each in missing)}
    own = {
        f"{evaluated.name}: {key}": reason
        for evaluated, each in zip(evaluations, missing, strict=True)
        for key, reason in each.items()
        if key not in shared
    }
    return shared | own


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
