"""The page of one tokenizer: metrics by protocol and those of the paper, pictures, codes, and lineage."""

from collections.abc import Mapping, Sequence
from typing import Any

from vqpipe.reports import page, plots
from vqpipe.reports.codebook_use import num_used, sections_on_codes
from vqpipe.reports.evaluation import (
    BY_KEY,
    MEASURES,
    NUM_HEADLINES,
    PRINTED,
    EvaluationResult,
    Measure,
    Metrics,
    bits_first,
    by_protocol,
    codes,
    convention_of,
    frechet_measures,
    not_computed,
    number_rows,
    on_images,
    over_images,
    protocols_in_words,
    reasons_not_measured,
    size_in_words,
    value_of,
    with_unit,
    written,
)
from vqpipe.reports.papers import PaperRow, paper_row
from vqpipe.reports.pictures import MAX_PREFIX_SIDE, galleries, prefix_pictures
from vqpipe.reports.training import run_curves
from vqpipe.words import capitalized, counted

FIXED = {
    "crop": "crop",
    "reference_kind": "compared with",
    "rounding": "rounding",
    "resize": "resize for Inception",
    "extractor": "features",
}
"""Choice of a protocol -> its name in the table."""
PREFIX_TITLE = "Reconstruction from the first k groups"
PREFIX_CAPTION = (
    "As in MGVQ's Figure 5: the codes of the other groups are zero. PSNR is that of the whole image; of large ones the "
    f"center is shown, at most {MAX_PREFIX_SIDE} pixels wide and high."
)


def evaluation_page(evaluated: EvaluationResult) -> page.ReportPage:
    """The page, without empty sections."""
    metrics = evaluated.metrics
    protocols = by_protocol(metrics)
    sections: list[page.Section] = [headline(evaluated, protocols[0])]
    paper = paper_row(evaluated.commands)
    if paper is not None or len(protocols) > 1:
        sections.append(comparison_with_paper(protocols, paper))
    sections += galleries(evaluated.shown)
    if evaluated.is_discrete:
        sections += sections_on_codes(evaluated)
    if prefixes := metrics.get("prefixes"):
        if pictures := prefix_pictures(evaluated.shown):
            sections.append(page.Pictures(PREFIX_TITLE, pictures, PREFIX_CAPTION))
        sections.append(prefix_table(prefixes, metrics))
        sections.append(page.Plots("Quality by bits per pixel", plots.k_curves({evaluated.name: prefixes})))
    sections += evaluated.analyses
    if curves := run_curves(evaluated.history):
        sections.append(page.Plots("Training", curves))
    sections += [all_metrics(own, metrics) for own in protocols]
    sections += not_computed([(evaluated.name, metrics)])
    if reasons := reasons_not_measured(metrics):
        sections.append(page.Reasons("Images that are not measured", reasons))
    sections.append(page.Lineage("Lineage", [evaluated.lineage]))
    sections.append(page.Commands("Reproduce", evaluated.commands))
    title = evaluated.name + on_images(evaluated.lineage, metrics["num_images"])
    return page.ReportPage(title, subtitle(metrics), sections)


def headline(evaluated: EvaluationResult, own: Metrics) -> page.Numbers:
    """The numbers of the first protocol, large, under its name."""
    measures = [*MEASURES[:NUM_HEADLINES], *frechet_measures([own])]
    numbers = [
        page.Number(m.label, written(m, value, unit=False), m.unit, headline_note(m, evaluated, own))
        for m in measures
        if (value := value_of(own, m.key)) is not None
    ]
    title = f"{counted(own['num_images'], 'images')} at {size_in_words(own)}, protocol {own['protocol']}"
    caption = "Numbers of other protocols, sizes or images are not comparable with these."
    if "mixed_sizes" in own:
        caption += f" {capitalized(own['mixed_sizes'])}."
    if tiles := evaluated.metrics.get("tiles"):
        caption += f" In tiles of {tiles['side']} px: {counted(tiles['num_images'], 'images')} ({tiles['how']})."
    if padded := evaluated.metrics.get("padded"):
        caption += f" Padded: {counted(padded['num_images'], 'images')} ({padded['how']})."
    if drawn := evaluated.metrics.get("random_classes"):
        caption += (
            f" Only images of {len(drawn['classes']):,} of {drawn['num_classes']:,} classes were used, drawn at random "
            f"(seed {drawn['seed']})."
        )
    return page.Numbers(title, numbers, caption)


def headline_note(measure: Measure, evaluated: EvaluationResult, own: Metrics) -> str:
    """The small line under a headline number: its reference or its convention."""
    tokenizer = own["tokenizer"]
    match measure.key:
        case "utilization":
            return f"{num_used(evaluated.counts):,} of {codes(tokenizer)}, over all images"
        case "perplexity":
            several = tokenizer["num_groups"] > 1
            return f"of at most {tokenizer['codebook_size']:,}" + (", mean over groups" if several else "")
        case "bits_per_pixel":
            mean = "on average " if "mixed_sizes" in own else ""
            return f"{mean}{counted(own['num_tokens_per_image'], 'tokens')} per image"
        case "rfid":
            return f"against {own.get('reference_kind') or 'the same crops'}"
    return convention_of(measure, own)


def comparison_with_paper(protocols: Sequence[Metrics], paper: PaperRow | None) -> page.Table:
    """A row per measure, a column per protocol, and one for what the paper prints."""
    columns: list[tuple[str, Mapping[str, float | None]]] = [
        (f"here, {own['protocol']}", {key: printed_value(own, key) for key in PRINTED}) for own in protocols
    ]
    if paper is not None:
        columns.append(("the paper, its own protocol", paper.values))
    rows = [
        [with_unit(m)] + [written(m, values.get(m.key), unit=False) for _, values in columns]
        for m in map(BY_KEY.__getitem__, PRINTED)
        if any(values.get(m.key) is not None for _, values in columns)
    ]
    first = protocols[0]
    caption = ["Each column has its own crop, rounding and formulas: compare within columns only."]
    caption[0] += f" Here: {counted(first['num_images'], 'images')} at {size_in_words(first)}."
    if paper is not None:
        caption.append(f"The paper: {paper.paper}, {paper.row}. Its own images and protocol: {paper.protocol}.")
        caption += [f"This run changes the preset {paper.preset}: {', '.join(paper.changed)}."] if paper.changed else []
    title = "Comparison with the paper" if paper is not None else "Comparison of protocols"
    return page.Table(title, ["", *(name for name, _ in columns)], rows, "\n".join(caption))


def printed_value(own: Metrics, key: str) -> float | None:
    """The number of a protocol; for LPIPS, that of the network which the protocol's authors use."""
    if key == "lpips" and "lpips" not in own:
        named = str(own.get("conventions", {}).get("lpips", "lpips_alex")).partition(":")[0]
        return value_of(own, named)
    return value_of(own, key)


def all_metrics(own: Metrics, metrics: Metrics) -> page.Table:
    """A protocol's numbers with their conventions; then its choices."""
    rows = number_rows(own)
    if own["protocol"] == metrics["protocol"]:  # its authors' formula, and the common one of the same name
        rows += [
            (m.label, written(m, value_of(metrics, m.key)), m.convention + over_images(m, metrics))
            for m in MEASURES
            if value_of(metrics, m.key) not in (None, value_of(own, m.key))
        ]
    rows += [(name, "", str(own[key])) for key, name in FIXED.items() if own.get(key)]
    header = ["measure", "value", "convention"]
    return page.Table(f"All metrics, protocol {own['protocol']}", header, rows, prose=header[2:])


def prefix_table(prefixes: Sequence[Mapping[str, Any]], metrics: Metrics) -> page.Table:
    """The k-curve in numbers: a row for each k."""
    rows = [{"protocol": metrics["protocol"], "rfid": {}, **row} for row in prefixes]
    shown = bits_first([measure for measure in MEASURES if measure.key in prefixes[-1]])
    cells = [[str(row["groups"]), *(written(m, value_of(row, m.key)) for m in shown)] for row in rows]
    caption = (
        f"Each image was encoded once, then decoded from the first k of its {len(rows)} groups alone, the codes of the "
        "others being zero, as in MGVQ's Table 6."
    )
    return page.Table(f"{PREFIX_TITLE}: numbers", ["groups", *(m.label for m in shown)], cells, caption)


def subtitle(metrics: Mapping[str, Any]) -> str:
    """The tokenizer in a sentence, and the protocols."""
    tokenizer = metrics["tokenizer"]
    what = f"{tokenizer['quantizer']} quantizer, {codes(tokenizer)}"
    if tokenizer["codebook_size"] is None:
        what = f"Continuous latents of {' x '.join(map(str, tokenizer['latent_shape']))}"
    protocols = protocols_in_words(metrics.get("protocols") or [metrics["protocol"]])
    return f"{what}, downsample factor {tokenizer['downsample_factor']}. {protocols}"
