"""Several tokenizers on the same images, side by side: one table, and one page."""

from collections.abc import Mapping, Sequence
from typing import Any

from vqpipe.errors import ArtifactError
from vqpipe.metrics.evaluation import comparable
from vqpipe.reports import page, pictures, plots, rates
from vqpipe.reports.evaluation import (
    MAP_CAPTION,
    MEASURES,
    NUM_HEADLINES,
    Evaluated,
    Measure,
    bits_first,
    codes,
    decibels,
    maps_of,
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
    headline, others = measured(evaluations, MEASURES[:NUM_HEADLINES]), measured(evaluations, MEASURES[NUM_HEADLINES:])
    caption = f"Protocol {first['protocol']}, the same images for all. The best of each column is set off."
    if not all(evaluated.is_discrete for evaluated in evaluations):
        caption += " Continuous latents have neither codes nor bits."
    conventions = ". ".join(f"{measure.label}: {measure.convention}" for measure in others) + "."
    sections: list[page.Section] = [
        comparison_table(f"{first['num_images']:,} images at {first['image_size']} px", evaluations, headline, caption),
        *quality_against_bits(evaluations),
    ]
    if maps := maps_of(evaluations):
        sections.append(page.Maps("Which codes are in use", maps, MAP_CAPTION))
    if together := side_by_side(evaluations):
        sections.append(page.Pictures("The same images, reconstructed by each", together))
    if drawn := codes_and_training(evaluations):
        sections.append(page.Plots("Codes and training", drawn))
    sections.append(comparison_table("Other conventions", evaluations, others, conventions))
    if missing := reasons(evaluations):
        sections.append(page.Reasons("Left out, and why", missing))
    sections.append(page.Lineage("Made from", [evaluated.lineage for evaluated in evaluations]))
    commands = list(dict.fromkeys(command for evaluated in evaluations for command in evaluated.commands))
    sections.append(page.Commands("Make it again", commands))
    return page.ReportPage(title, f"Measured alike, on the same {first['num_images']:,} images", sections, footer)


def quality_against_bits(evaluations: Sequence[Evaluated]) -> list[page.Section]:
    """PSNR over bits per pixel, and the k-curves of those with groups."""
    points = {
        evaluated.name: (evaluated.metrics.get("bits_per_pixel"), evaluated.metrics["psnr"])
        for evaluated in evaluations
        if "psnr" in evaluated.metrics
    }
    prefixes = {e.name: e.metrics["prefixes"] for e in evaluations if "prefixes" in e.metrics}
    sections: list[page.Section] = []
    if any(bits is not None for bits, _ in points.values()):
        sections.append(page.Plots("Quality against bits", [rates.rate_distortion(points)]))
    if curves := rates.k_curves(prefixes):
        sections.append(page.Plots("From the first groups only", curves))
    return sections


def codes_and_training(evaluations: Sequence[Evaluated]) -> list[plots.Plot]:
    """How much of its codebook each uses, and what its training logged."""
    discrete = [evaluated for evaluated in evaluations if evaluated.is_discrete]
    used = {evaluated.name: evaluated.metrics["utilization"] for evaluated in discrete}
    drawn = [
        plots.bars("Codes in use", used, "Share chosen at least once over all images.", share=True),
        plots.code_frequency({evaluated.name: evaluated.counts for evaluated in discrete}),
    ]
    logged = {evaluated.name: evaluated.history for evaluated in evaluations if evaluated.history}
    return [*(drawn if discrete else []), *plots.training_curves(logged)]


def comparison_table(
    title: str, evaluations: Sequence[Evaluated], measures: Sequence[Measure], caption: str
) -> page.Table:
    """A row per tokenizer, a column per measure."""
    header, rows = comparison_rows(evaluations, measures)
    cells = [[page.Cell(text, best) for text, best in row] for row in rows]
    return page.Table(title, header, cells, caption)


def comparison_rows(
    evaluations: Sequence[Evaluated], measures: Sequence[Measure]
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """A header, and (text, whether it is its column's best) of every cell: tokenizer, codes, and each measure."""
    best = {}
    for measure in measures:
        present = [value for e in evaluations if (value := value_of(e.metrics, measure.key)) is not None]
        if measure.higher_is_better is not None and len(set(present)) > 1:
            best[measure.key] = max(present) if measure.higher_is_better else min(present)
    rows = []
    for evaluated in evaluations:
        values = [value_of(evaluated.metrics, measure.key) for measure in measures]
        cells = [
            (written(measure, value, unit=False), value is not None and value == best.get(measure.key))
            for measure, value in zip(measures, values, strict=True)
        ]
        rows.append([(evaluated.name, False), (code_cell(evaluated.metrics["tokenizer"]), False), *cells])
    units = [f"{measure.label}, {measure.unit}" if measure.unit else measure.label for measure in measures]
    return ["tokenizer", "codes", *units], rows


def code_cell(tokenizer: Mapping[str, Any]) -> str:
    """ "4 x 8,192", K codes in each of G groups; a dash with continuous latents."""
    return codes(tokenizer).removesuffix(" codes") if tokenizer["codebook_size"] is not None else "–"


def measured(evaluations: Sequence[Evaluated], measures: Sequence[Measure] = MEASURES) -> list[Measure]:
    """The measures that at least one evaluation has, what they cost in front."""
    return bits_first(m for m in measures if any(value_of(each.metrics, m.key) is not None for each in evaluations))


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
    told = dict(shared)
    for evaluated, each in zip(evaluations, missing, strict=True):
        own = {key: reason for key, reason in each.items() if key not in shared}
        for reason in dict.fromkeys(own.values()):
            keys = ", ".join(key for key, its in own.items() if its == reason)
            told[f"{evaluated.name}: {keys}"] = reason
    return told


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
