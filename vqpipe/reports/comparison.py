"""Several tokenizers side by side: a table for each protocol and image set, a table over several sets, and one page."""

from collections.abc import Mapping, Sequence
from typing import Any

from vqpipe.reports import page, plots
from vqpipe.reports.codebook_use import MAP_CAPTION, maps_of
from vqpipe.reports.evaluation import (
    MEASURES,
    NUM_HEADLINES,
    Evaluated,
    Measure,
    bits_first,
    codes,
    convention_of,
    measures_of,
    table_rows,
    value_of,
    with_unit,
    written,
)
from vqpipe.reports.grouping import Group, named_groups
from vqpipe.reports.papers import PaperRow, paper_row
from vqpipe.reports.pictures import PictureBudget, shared_pictures

HEADLINES = (*MEASURES[:NUM_HEADLINES], *(m for m in MEASURES if m.key == "lpips"))
ACROSS = tuple(m for key in ("rfid", "psnr") for m in MEASURES if m.key == key)
"""What stands over several image sets, as in MGVQ's Tables 2 and 3."""
PRINTED = tuple(m for m in MEASURES if m.key in ("rfid", "psnr", "ssim", "lpips", "utilization"))


def comparison_page(evaluations: Sequence[Evaluated], title: str, footer: str = "") -> page.ReportPage:
    """The page of several tokenizers: what they share stands side by side, never numbers of different protocols."""
    groups = named_groups(evaluations)
    sections: list[page.Section] = [*across_sets(groups), *(headline(group) for group in groups)]
    sections += printed_in_papers(evaluations)
    room = PictureBudget()
    for sharing in by_images(groups).values():
        of = f" ({sharing[0].images})" if len(by_images(groups)) > 1 else ""
        sections += quality_against_bits(sharing[0].members, f"{of}, protocol {sharing[0].protocol}")
        if together := shared_pictures({e.name: e.shown for e in sharing[0].members}, room):
            sections.append(page.Pictures(f"The same images, reconstructed by each{of}", together, room.note()))
        if maps := maps_of(sharing[0].members):
            sections.append(page.Maps(f"Which codes are in use{of}", maps, MAP_CAPTION))
    if drawn := codes_and_training(groups[0].members, first_of_each(evaluations)):
        sections.append(page.Plots("Codes and training", drawn))
    sections += [others for group in groups for others in other_conventions(group)]
    if missing := reasons(evaluations):
        sections.append(page.Reasons("Left out, and why", missing))
    sections.append(page.Lineage("Made from", [evaluated.lineage for evaluated in evaluations]))
    commands = list(dict.fromkeys(command for evaluated in evaluations for command in evaluated.commands))
    sections.append(page.Commands("Make it again", commands))
    return page.ReportPage(title, subtitle(groups), sections, footer)


def subtitle(groups: Sequence[Group]) -> str:
    """How many images of how many sets, by which protocols."""
    protocols = ", ".join(dict.fromkeys(group.protocol for group in groups))
    sets = by_images(groups)
    if len(sets) == 1:
        return (
            f"Measured alike, on the same {groups[0].members[0].metrics['num_images']:,} images. Protocol {protocols}."
        )
    return f"Measured on {len(sets)} sets of images. Protocol {protocols}."


def by_images(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups of each image set, whatever their protocol."""
    sets: dict[str, list[Group]] = {}
    for group in groups:
        sets.setdefault(group.images, []).append(group)
    return sets


def first_of_each(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    """One evaluation for each name."""
    return list({evaluated.name: evaluated for evaluated in reversed(evaluations)}.values())[::-1]


def headline(group: Group) -> page.Table:
    """The headline numbers of one group."""
    caption = f"Protocol {group.protocol}, the same images for all. The best of each column is set off."
    if len(group.members) == 1:
        caption = f"Protocol {group.protocol}. No other report is on these images, by this protocol."
    if not all(evaluated.is_discrete for evaluated in group.members):
        caption += " Continuous latents have neither codes nor bits."
    named = measures_of(*(each.metrics for each in group.members))[len(MEASURES) :]
    return comparison_table(group.title, group.members, measured(group.members, [*HEADLINES, *named]), caption)


def other_conventions(group: Group) -> list[page.Section]:
    """What else was measured of one group, and by which formulas."""
    others = measured(group.members, [m for m in MEASURES if m not in HEADLINES])
    if not others:
        return []
    first = group.members[0].metrics
    told = ". ".join(
        f"{m.label}: {convention_of(m, first)}" for m in (*measured(group.members, HEADLINES[:2]), *others)
    )
    return [comparison_table(f"Other conventions: {group.title}", group.members, others, f"{told}.")]


def across_sets(groups: Sequence[Group]) -> list[page.Section]:
    """For each protocol with several image sets: a row per tokenizer, and for each set its rFID and PSNR.

    The layout of MGVQ's Tables 2 and 3. Each column is one set's, so the best of it is set off.
    """
    sections: list[page.Section] = []
    for protocol in dict.fromkeys(group.protocol for group in groups):
        sets = [group for group in groups if group.protocol == protocol]
        if len(sets) < 2:
            continue
        names = list(dict.fromkeys(each.name for group in sets for each in group.members))
        columns = [(group, m) for group in sets for m in measured(group.members, ACROSS)]
        rows = [[page.Cell(name), *(cell(name, group.members, m) for group, m in columns)] for name in names]
        spans = [("", 1), *((g.images, n) for g in sets if (n := sum(each is g for each, _ in columns)))]
        header = ["tokenizer", *(with_unit(m) for _, m in columns)]
        titles = [f"{group.title}." for group in sets]
        caption = "\n".join(["A column belongs to one set of images. The best of each is set off.", *titles])
        sections.append(page.Table(f"Across sets of images, protocol {protocol}", header, rows, caption, spans=spans))
    return sections


def cell(name: str, members: Sequence[Evaluated], measure: Measure) -> page.Cell:
    """The number of the member of that name, a dash where it was not measured."""
    values = [value_of(each.metrics, measure.key) for each in members]
    value = next((value for each, value in zip(members, values, strict=True) if each.name == name), None)
    return page.Cell(written(measure, value, unit=False), value is not None and value == measure.best(values))


def printed_in_papers(evaluations: Sequence[Evaluated]) -> list[page.Section]:
    """What papers print of the rows that these tokenizers' presets stand for: a table for each of their protocols."""
    found = {each.name: row for each in evaluations if (row := paper_row(each.commands)) is not None}
    sections: list[page.Section] = []
    for protocol in dict.fromkeys(row.protocol for row in found.values()):
        printed = {name: row for name, row in found.items() if row.protocol == protocol}
        measures = [m for m in PRINTED if any(m.key in row.values for row in printed.values())]
        header = [
            "tokenizer",
            "row",
            *map(with_unit, measures),
            "changed here",
        ]
        rows = [
            [name, f"{row.short}, {row.row}"]
            + [written(m, row.values.get(m.key), unit=False) for m in measures]
            + [changes(row)]
            for name, row in printed.items()
        ]
        caption = f"Measured by their authors, on their images, by {protocol}: not comparable with the tables above."
        title = "What the papers print of these rows"
        sections.append(page.Table(title, header, rows, caption, prose=("row", "changed here")))
    return sections


def changes(row: PaperRow) -> str:
    return ", ".join(row.changed) or "nothing"


def quality_against_bits(evaluations: Sequence[Evaluated], of: str = "") -> list[page.Section]:
    """PSNR over bits per pixel, and the k-curves of those with groups; `of` which images, for the headings."""
    points = {
        evaluated.name: (evaluated.metrics.get("bits_per_pixel"), evaluated.metrics["psnr"])
        for evaluated in evaluations
        if "psnr" in evaluated.metrics
    }
    prefixes = {e.name: e.metrics["prefixes"] for e in evaluations if "prefixes" in e.metrics}
    sections: list[page.Section] = []
    if any(bits is not None for bits, _ in points.values()):
        sections.append(page.Plots(f"Quality against bits{of}", [plots.rate_distortion(points)]))
    if curves := plots.k_curves(prefixes):
        sections.append(page.Plots(f"From the first groups only{of}", curves))
    return sections


def codes_and_training(alike: Sequence[Evaluated], all_of_them: Sequence[Evaluated]) -> list[plots.Plot]:
    """How much of its codebook each uses on the same images, and what the training of all logged."""
    discrete = [evaluated for evaluated in alike if evaluated.is_discrete]
    used = {evaluated.name: evaluated.metrics["utilization"] for evaluated in discrete}
    number = alike[0].metrics["num_images"]
    drawn = [
        plots.bars("Codes in use", used, f"Share chosen at least once over all {number:,} images."),
        plots.code_frequency({evaluated.name: evaluated.counts for evaluated in discrete}),
    ]
    logged = {evaluated.name: evaluated.history for evaluated in all_of_them if evaluated.history}
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
    labels = [[evaluated.name, code_cell(evaluated.metrics["tokenizer"])] for evaluated in evaluations]
    values = [[value_of(evaluated.metrics, measure.key) for measure in measures] for evaluated in evaluations]
    return ["tokenizer", "codes", *map(with_unit, measures)], table_rows(labels, measures, values, unit=False)


def code_cell(tokenizer: Mapping[str, Any]) -> str:
    """ "4 x 8,192", K codes in each of G groups; a dash with continuous latents."""
    return codes(tokenizer).removesuffix(" codes") if tokenizer["codebook_size"] is not None else "–"


def measured(evaluations: Sequence[Evaluated], measures: Sequence[Measure] = MEASURES) -> list[Measure]:
    """The measures that at least one evaluation has, what they cost in front."""
    return bits_first(m for m in measures if any(value_of(each.metrics, m.key) is not None for each in evaluations))


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
