"""Several reports side by side: of tokenizers, or of generated images.

Numbers share a column only where protocol, image size and images are equal (KEYS). Tokenizers measured on several sets
of images get a table over the sets, as in MGVQ's Tables 2 and 3.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vqpipe import distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.errors import ArtifactError
from vqpipe.reports import generated, page, plots
from vqpipe.reports.codebook_use import MAP_CAPTION, maps_of
from vqpipe.reports.evaluation import (
    BY_KEY,
    MEASURES,
    NUM_HEADLINES,
    PRINTED,
    EvaluationResult,
    Measure,
    bits_first,
    by_protocol,
    codes,
    convention_of,
    frechet_measures,
    input_of,
    not_computed,
    open_evaluation,
    protocols_in_words,
    size_in_words,
    table_rows,
    value_of,
    with_unit,
    written,
)
from vqpipe.reports.generated import check_alike, generated_page, is_generated, open_generated
from vqpipe.reports.papers import paper_row
from vqpipe.reports.pictures import PictureBudget, shared_pictures
from vqpipe.reports.published import OurNumbers, PublishedTable, published_table
from vqpipe.reports.seeds import configurations_of, numbers_over_seeds, seeds_table, size_plots
from vqpipe.words import counted

SHARED = "The pictures that every one of the reports shows: its best and worst differ from report to report."
KEYS = ("protocol", "image_size", "num_images", "reference")
"""Keys of `metrics.json` that must be equal for numbers to share a column. `reference` is the digest of the crops."""
HEADLINES = (*MEASURES[:NUM_HEADLINES], BY_KEY["lpips"])
OVER_SETS = (BY_KEY["rfid"], BY_KEY["psnr"])
"""Columns of the table over several sets."""
TRAINING: tuple[tuple[str, str, plots.Scale, str], ...] = (
    ("loss/total", "Total loss", "log", ""),
    ("psnr", "Training PSNR, dB", "linear", ""),
    ("utilization", "Utilization in training", "share", "Over the tokens between two rows of the log."),
)
"""Curves with a line per tokenizer: key in the log, title, scale, caption."""


@dataclass(frozen=True)
class Comparison:
    """Reports that may be compared."""

    names: list[str]
    """Distinct names of the reports, in their order."""
    metrics: dict[str, Any]
    """`metrics.json` of each report by name; by name and images where a tokenizer was measured on several sets."""
    facts: dict[str, Any]
    """Facts of the artifact."""
    tables: list[page.Table]
    """The headline numbers, a table per group of comparable reports."""
    make_page: Callable[[], page.ReportPage]
    """The page, which reads all pictures."""
    over_seeds: dict[str, Any] = field(default_factory=dict)
    """Means and standard deviations of tokenizers that differ only in the seed, by the title of their group."""


@dataclass(frozen=True)
class Group:
    """Evaluations with comparable numbers; their metrics are those of the protocol."""

    protocol: str
    images: str
    """Name of the set of images; different for different sets, sizes and numbers of images."""
    members: Sequence[EvaluationResult]

    @property
    def title(self) -> str:
        """`60 images of kodak at 256 px, protocol adm`."""
        first = self.members[0].metrics
        images = counted(first["num_images"], "images")
        return f"{images} of {self.images} at {size_in_words(first)}, protocol {self.protocol}"

    def values(self, measure: Measure) -> dict[str, float | None]:
        """The number of each member by its name; None where it was not measured."""
        return {each.name: value_of(each.metrics, measure.key) for each in self.members}


def compare(reports: Sequence[Artifact], published: Sequence[PublishedTable] = ()) -> Comparison:
    """Compare reports of `vqpipe eval`, or of `vqpipe eval-generation`.

    Args:
        published: tables of papers, whose numbers are shown beside those of the reports.

    Raises:
        ArtifactError: a report is of another kind, or cannot be compared with any other: the message names both and
            the first differing key.
        ConfigError: a published table has a column that is no measure of these reports.
    """
    kind = compare_samples if any(map(is_generated, reports)) else compare_tokenizers
    return kind(reports, published)


def publish_comparison(draft: Draft, comparison: Comparison) -> Artifact:
    """Write `metrics.json` and the page, and publish them."""
    if distributed.is_main():
        seeds = {"over_seeds": comparison.over_seeds} if comparison.over_seeds else {}
        draft.write_json("metrics.json", {"compared": comparison.metrics, **seeds})
        draft.write_text("report.html", page.render(comparison.make_page()))
    return draft.publish(comparison.facts)


def compare_tokenizers(reports: Sequence[Artifact], published: Sequence[PublishedTable] = ()) -> Comparison:
    """Compare reports of `vqpipe eval`."""
    evaluations = distinct([open_evaluation(report) for report in reports], [report.name for report in reports])
    check_comparable(evaluations, [str(report.path) for report in reports])
    groups = groups_of(evaluations)
    names = list(dict.fromkeys(each.name for each in evaluations))
    title = " and ".join(names) if len(names) <= 2 else f"{len(names)} tokenizers"
    ours = OurNumbers()
    for report, evaluated in zip(reports, evaluations, strict=True):
        images = str(input_of(evaluated.lineage, "images").get("name", "")).removeprefix("set-")
        for view in by_protocol(evaluated.metrics):
            values = {key: value_of(view, key) for key in BY_KEY}
            ours.add(view["protocol"], images, (evaluated.name, report.name.removeprefix("report-")), values)
    as_published = [published_table(table, ours) for table in published]
    return Comparison(
        names=[each.name for each in evaluations],
        metrics=metrics_by_name(evaluations),
        facts=facts_of(groups),
        over_seeds={
            title: numbers
            for title, group in by_title(groups).items()
            if (numbers := numbers_over_seeds(configurations_of(group.members), HEADLINES))
        },
        tables=[
            *(measure_table(group, present(group.members, HEADLINES), title=group.title) for group in groups),
            *tables_over_seeds(groups),
            *as_published,
        ],
        make_page=lambda: comparison_page(evaluations, title, as_published),
    )


def compare_samples(reports: Sequence[Artifact], published: Sequence[PublishedTable] = ()) -> Comparison:
    """Compare reports of `vqpipe eval-generation`."""
    opened = [open_generated(report) for report in reports]
    names, report_names = [each.name for each in opened], [report.name for report in reports]
    if len(set(names)) < len(names):
        names = report_names if len(set(report_names)) == len(names) else numbered(names, range(len(names)))
    opened = [replace(each, name=name) for each, name in zip(opened, names, strict=True)]
    check_alike(opened)
    ours = OurNumbers()
    for each in opened:
        values = {key: value_of(each.metrics, key) for key in BY_KEY}
        ours.add(each.metrics["protocol"], "", (each.name.removeprefix("samples-"),), values)
    as_published = [published_table(table, ours) for table in published]
    return Comparison(
        names=names,
        metrics={each.name: each.metrics for each in opened},
        facts={key: opened[0].metrics[key] for key in ("protocol", "image_size", "num_references")},
        tables=[replace(generated.comparison(opened), title=""), *as_published],
        make_page=lambda: generated_page(opened, " and ".join(names), as_published),
    )


def facts_of(groups: Sequence[Group]) -> dict[str, Any]:
    """The headline numbers of a single group, or the members of several."""
    if len(groups) > 1:
        return {"groups": {title: [each.name for each in group.members] for title, group in by_title(groups).items()}}
    members = groups[0].members
    facts = {key: members[0].metrics[key] for key in ("protocol", "num_images", "image_size")}
    return facts | {key: {e.name: e.metrics.get(key) for e in members} for key in ("psnr", "utilization")}


def by_title(groups: Sequence[Group]) -> dict[str, Group]:
    """The groups by their titles, which are numbered where two are equal: the same images may be decoded to other
    pixels."""
    titles = [group.title for group in groups]
    if len(set(titles)) < len(titles):
        titles = numbered(titles, range(len(titles)))
    return dict(zip(titles, groups, strict=True))


def metrics_by_name(evaluations: Sequence[EvaluationResult]) -> dict[str, Any]:
    """The metrics of each report under its name, or `name, on images` where a name occurs more than once."""
    names = [each.name for each in evaluations]
    sets = names_of_sets(evaluations)
    keys = [name if names.count(name) == 1 else f"{name}, on {where}" for name, where in zip(names, sets, strict=True)]
    if len(set(keys)) < len(keys):  # one tokenizer and one set, by different protocols
        keys = numbered(keys, range(len(keys)))
    return {key: each.metrics for key, each in zip(keys, evaluations, strict=True)}


# ---------------------------------------------------------------------------------------- which numbers may be compared


def check_comparable(evaluations: Sequence[EvaluationResult], paths: Sequence[str]) -> None:
    """Check that each report shares a group with another, or its tokenizer with a report on other images.

    Raises:
        ArtifactError: one shares neither.
    """
    groups = members_by_key(evaluations)
    tokenizers = [tokenizer_of(each) for each in evaluations]
    for number in range(len(paths)):
        shares_group = any(len(group) > 1 and number in {place for place, _ in group} for group in groups)
        if shares_group or tokenizers.count(tokenizers[number]) > 1:
            continue
        first, second = sorted((number, 1 if number == 0 else 0))
        one, two = evaluations[first].metrics, evaluations[second].metrics
        key = next((key for key in KEYS if one.get(key) != two.get(key)), "reference")
        raise ArtifactError(
            f"{paths[first]} and {paths[second]} cannot be compared: their {key} differs "
            f"({str(one.get(key))[:16]} and {str(two.get(key))[:16]})",
            "Evaluate both on the same images with the same protocol, image size and --limit",
        )


def members_by_key(evaluations: Sequence[EvaluationResult]) -> list[list[tuple[int, EvaluationResult]]]:
    """Groups by KEYS: the index of each report, and its metrics by the protocol of the group."""
    groups: dict[tuple[object, ...], list[tuple[int, EvaluationResult]]] = {}
    for place, evaluated in enumerate(evaluations):
        for metrics in by_protocol(evaluated.metrics):
            key = tuple(metrics.get(name) for name in KEYS)
            groups.setdefault(key, []).append((place, replace(evaluated, metrics=metrics)))
    return list(groups.values())


def groups_of(evaluations: Sequence[EvaluationResult]) -> list[Group]:
    """The groups, largest first, with a name for each set of images."""
    found = sorted(([each for _, each in group] for group in members_by_key(evaluations)), key=len, reverse=True)
    names = names_of_sets([group[0] for group in found])
    return [Group(group[0].metrics["protocol"], name, group) for group, name in zip(found, names, strict=True)]


def names_of_sets(evaluations: Sequence[EvaluationResult]) -> list[str]:
    """A name for the images of each evaluation, with size and number where these tell two sets apart.

    Protocols crop in different ways: sets are equal if they come from the same images and the same of their classes, at
    the same size and number.
    """
    sources = [input_of(each.lineage, "images") for each in evaluations]
    metrics = [each.metrics for each in evaluations]
    draws = [m.get("random_classes", {}) for m in metrics]
    sets = [
        (source.get("content") or m["reference"], str(drawn.get("classes")), str(m["image_size"]), m["num_images"])
        for source, m, drawn in zip(sources, metrics, draws, strict=True)
    ]
    plain = [source.get("name", "images") + classes_in_words(d) for source, d in zip(sources, draws, strict=True)]
    sized = [f"{name}, {size_in_words(m)}" for name, m in zip(plain, metrics, strict=True)]
    with_number = [f"{name}, {counted(m['num_images'], 'images')}" for name, m in zip(sized, metrics, strict=True)]
    for names in (plain, sized, with_number):
        if len(set(names)) == len(set(sets)) == len(set(zip(names, sets, strict=True))):
            return names
    return numbered(plain, sets)


def classes_in_words(drawn: Mapping[str, Any]) -> str:
    """` (100 of 1,000 classes, seed 3)`, to follow the name of a set of which classes were drawn; else empty."""
    if not drawn:
        return ""
    return f" ({len(drawn['classes']):,} of {counted(drawn['num_classes'], 'classes')}, seed {drawn['seed']})"


def numbered(names: Sequence[str], things: Sequence[Hashable]) -> list[str]:
    """`1: name`, `2: name`, ...: the name of each thing after a number, the same for equal things."""
    order = {thing: number for number, thing in enumerate(dict.fromkeys(things), start=1)}
    return [f"{order[thing]}: {name}" for name, thing in zip(names, things, strict=True)]


def distinct(evaluations: Sequence[EvaluationResult], report_names: Sequence[str]) -> list[EvaluationResult]:
    """Name different tokenizers differently: by the tokenizer, else by the report, else by a number before the name.

    A tokenizer that occurs twice in a group, as with the same report given twice, counts as two.
    """
    names = [each.name for each in evaluations]
    named_by: Literal["tokenizer", "report"] = "tokenizer"
    tokenizers = [tokenizer_of(each) for each in evaluations]
    if any(len({tokenizers[place] for place, _ in group}) < len(group) for group in members_by_key(evaluations)):
        tokenizers = list(map(str, range(len(tokenizers))))
    if len(set(names)) < len(set(tokenizers)) and len(set(tokenizers)) == len(set(report_names)) == len(tokenizers):
        names, named_by = list(report_names), "report"
    if len(set(names)) < len(set(tokenizers)):
        names = numbered(names, tokenizers)
    return [
        replace(evaluated, name=name, named_by=named_by) for evaluated, name in zip(evaluations, names, strict=True)
    ]


def tokenizer_of(evaluated: EvaluationResult) -> str:
    """The content digest of the tokenizer, else its name."""
    return input_of(evaluated.lineage, "tokenizer").get("content") or evaluated.name


# ---------------------------------------------------------------------------------------------------------- the page


def comparison_page(
    evaluations: Sequence[EvaluationResult], title: str, published: Sequence[page.Table] = ()
) -> page.ReportPage:
    """The page of several tokenizers."""
    groups = groups_of(evaluations)
    by_images: dict[str, list[Group]] = {}
    for group in groups:
        by_images.setdefault(group.images, []).append(group)
    sections: list[page.Section] = [*tables_over_seeds(groups), *tables_over_sets(groups)]
    sections += map(headline_table, groups)
    sections += published or paper_tables(evaluations)
    budget = PictureBudget()
    for images, same_images in by_images.items():
        members, of = same_images[0].members, f" ({images})" if len(by_images) > 1 else ""
        sections += quality_plots(members, f"{of}, protocol {same_images[0].protocol}")
        if pictures := shared_pictures({each.name: each.shown for each in members}, budget):
            caption = f"{SHARED} {budget.note()}".strip()
            sections.append(page.Pictures(f"Reconstructions of the same images{of}", pictures, caption))
        if maps := maps_of(members):
            sections.append(page.Maps(f"Codes in use{of}", maps, MAP_CAPTION))
    if drawn := usage_and_training_plots(groups[0].members, evaluations):
        sections.append(page.Plots("Utilization and training", drawn))
    for group in groups:
        if others := present(group.members, [m for m in MEASURES if m not in HEADLINES]):
            conventions = [*present(group.members, HEADLINES[:2]), *others]
            words = [f"{m.label}: {convention_of(m, group.members[0].metrics)}" for m in conventions]
            sections.append(measure_table(group, others, f"Other conventions: {group.title}", ". ".join(words) + "."))
    sections += not_computed([(each.name, each.metrics) for each in evaluations])
    sections.append(page.Lineage("Lineage", [evaluated.lineage for evaluated in evaluations]))
    commands = list(dict.fromkeys(command for evaluated in evaluations for command in evaluated.commands))
    sections.append(page.Commands("Reproduce", commands))
    protocols = protocols_in_words(group.protocol for group in groups)
    where = f"On {len(by_images)} sets of images"
    if len(by_images) == 1:
        number = counted(groups[0].members[0].metrics["num_images"], "images")
        where, title = f"On the same {number}", f"{title} on {groups[0].images}, {number}"
    return page.ReportPage(title, f"{where}. {protocols}", sections)


def headline_table(group: Group) -> page.Table:
    """The headline numbers of one group."""
    caption = f"Protocol {group.protocol}, the same images for all. The best quality of each column is highlighted."
    if len(group.members) == 1:
        caption = f"Protocol {group.protocol}. No other report is on these images by this protocol."
    if not all(evaluated.is_discrete for evaluated in group.members):
        caption += " Continuous latents have neither codes nor bits."
    named = frechet_measures(each.metrics for each in group.members)
    return measure_table(group, present(group.members, [*HEADLINES, *named]), group.title, caption)


def measure_table(group: Group, measures: Sequence[Measure], title: str, caption: str = "") -> page.Table:
    """A row per tokenizer: name, codes, capacity where there are groups, and each measure, the best highlighted."""
    header = [group.members[0].named_by, "codes"]
    labels = [[each.name, code_cell(each.metrics["tokenizer"])] for each in group.members]
    if any((each.metrics["tokenizer"].get("num_groups") or 1) > 1 for each in group.members):
        header.append("capacity, bits")
        caption += " Capacity: log2 of the number of different tokens at a position, codes ^ groups."
        for label, each in zip(labels, group.members, strict=True):
            label.append(capacity_cell(each.metrics["tokenizer"]))
    values = [[value_of(each.metrics, measure.key) for measure in measures] for each in group.members]
    rows = table_rows(labels, measures, values, unit=False)
    return page.Table(title, [*header, *map(with_unit, measures)], rows, caption.strip())


def tables_over_seeds(groups: Sequence[Group]) -> list[page.Table]:
    """For each group in which several tokenizers differ only in the seed: means over the seeds."""
    tables = (
        seeds_table(group.title, configurations_of(group.members), present(group.members, HEADLINES))
        for group in groups
    )
    return [table for table in tables if table is not None]


def tables_over_sets(groups: Sequence[Group]) -> list[page.Section]:
    """For each protocol with several sets of images: a row per tokenizer, and rFID and PSNR of each set."""
    sections: list[page.Section] = []
    for protocol in dict.fromkeys(group.protocol for group in groups):
        sets = [group for group in groups if group.protocol == protocol]
        if len(sets) < 2:
            continue
        names = list(dict.fromkeys(each.name for group in sets for each in group.members))
        columns = [(group, m) for group in sets for m in present(group.members, OVER_SETS)]
        ranked = [m for m in OVER_SETS if any(m is column for _, column in columns)]
        values = [[group.values(m).get(name) for group, m in columns] for name in names]
        rows = [
            [*row, *(rank_cell(name, sets, m) for m in ranked)]
            for name, row in zip(
                names, table_rows([[name] for name in names], [m for _, m in columns], values, unit=False), strict=True
            )
        ]
        spans = [("", 1), *((g.images, n) for g in sets if (n := sum(each is g for each, _ in columns)))]
        spans.append(("mean rank", len(ranked)))
        header = [sets[0].members[0].named_by, *(with_unit(m) for _, m in columns), *(m.label for m in ranked)]
        titles = [f"{group.title}." for group in sets]
        first = (
            "Each column is of one set of images, its best number highlighted. Mean rank over the sets; 1 is the best."
        )
        caption = "\n".join([first, *titles])
        sections.append(page.Table(f"Several sets of images, protocol {protocol}", header, rows, caption, spans=spans))
    return sections


def rank_cell(name: str, sets: Sequence[Group], measure: Measure) -> str:
    """The mean over the sets of a tokenizer's rank, equal numbers sharing the best; a dash where one lacks a number."""
    ranks = []
    for group in sets:
        values = group.values(measure)
        own = values.get(name)
        if own is None:
            return "–"
        better = [v for v in values.values() if v is not None and v != own and measure.best([v, own]) == v]
        ranks.append(1 + len(better))
    return f"{sum(ranks) / len(ranks):.1f}"


def paper_tables(evaluations: Sequence[EvaluationResult]) -> list[page.Section]:
    """The numbers that papers print for the presets of these tokenizers: a table per protocol of the papers."""
    found = {each.name: row for each in evaluations if (row := paper_row(each.commands)) is not None}
    sections: list[page.Section] = []
    for protocol in dict.fromkeys(row.protocol for row in found.values()):
        printed = {name: row for name, row in found.items() if row.protocol == protocol}
        measures = [BY_KEY[key] for key in PRINTED if any(key in row.values for row in printed.values())]
        header = [evaluations[0].named_by, "row", *map(with_unit, measures), "changed in this run"]
        rows = [
            [name, f"{row.short}, {row.row}"]
            + [written(m, row.values.get(m.key), unit=False) for m in measures]
            + [", ".join(row.changed) or "nothing"]
            for name, row in printed.items()
        ]
        caption = f"Measured by the authors on their images, {protocol}: not comparable with the tables above."
        title = "Numbers printed in the papers"
        sections.append(page.Table(title, header, rows, caption, prose=("row", "changed in this run")))
    return sections


def quality_plots(evaluations: Sequence[EvaluationResult], of: str) -> list[page.Section]:
    """PSNR over bits per pixel, and the k-curves of tokenizers with groups; `of` ends the headings."""
    points = {e.name: (e.metrics.get("bits_per_pixel"), e.metrics["psnr"]) for e in evaluations if "psnr" in e.metrics}
    prefixes = {e.name: e.metrics["prefixes"] for e in evaluations if "prefixes" in e.metrics}
    sections: list[page.Section] = []
    if drawn := plots.rate_distortion(points):
        sections.append(page.Plots(f"Quality by bits per pixel{of}", [drawn]))
    if by_size := size_plots(configurations_of(evaluations)):
        sections.append(page.Plots(f"Codebook size{of}", by_size))
    if curves := plots.k_curves(prefixes):
        sections.append(page.Plots(f"Reconstruction from the first k groups{of}", curves))
    return sections


def usage_and_training_plots(
    same_images: Sequence[EvaluationResult], evaluations: Sequence[EvaluationResult]
) -> list[page.Plot]:
    """Utilization on the same images, and the training curves of all tokenizers."""
    drawn = []
    if discrete := [each for each in same_images if each.is_discrete]:
        caption = (
            f"Share of the codes chosen at least once over {counted(discrete[0].metrics['num_images'], 'images')}."
        )
        drawn.append(plots.bars("Utilization", {each.name: each.metrics["utilization"] for each in discrete}, caption))
        drawn.append(plots.code_frequency({each.name: each.counts for each in discrete}))
    logs = {each.name: each.history for each in evaluations if each.history}
    curves = (
        plots.curves(title, {name: plots.series(rows, key) for name, rows in logs.items()}, scale, caption)
        for key, title, scale, caption in TRAINING
    )
    return [*drawn, *(plot for plot in curves if plot is not None)]


def code_cell(tokenizer: Mapping[str, Any]) -> str:
    """`4 x 8,192`: K codes in each of G groups; a dash for continuous latents."""
    return codes(tokenizer).removesuffix(" codes") if tokenizer["codebook_size"] is not None else "–"


def capacity_cell(tokenizer: Mapping[str, Any]) -> str:
    """Bits of a position over its groups, G log2(K); a dash for continuous latents."""
    size, groups = tokenizer["codebook_size"], tokenizer.get("num_groups") or 1
    return "–" if size is None else f"{groups * math.log2(size):.1f}"


def present(evaluations: Sequence[EvaluationResult], measures: Sequence[Measure]) -> list[Measure]:
    """The measures that at least one evaluation has, bits per pixel first."""
    return bits_first(m for m in measures if any(value_of(each.metrics, m.key) is not None for each in evaluations))
