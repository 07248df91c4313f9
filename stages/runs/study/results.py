"""The numbers of the study in one table, which later runs add to, and its plots.

    python results.py collect OUT results.csv      add the reports in OUT; a row of an equal run is replaced
    python results.py draw results.csv FOLDER      write the plots as SVG, and print the tables as Markdown
    python results.py curve RUN FOLDER             write the PSNR over the steps of a training as SVG

A run is named METHOD-K of part A, or METHOD-G of G groups (part C), with "-fast" or "-tuned" after it for the other two
forms of a learned codebook (study.sh). Those of other parts have longer names, and a table of their own.
"""

import csv
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from math import log2
from pathlib import Path

import numpy as np

from vqpipe.artifacts import open_artifact
from vqpipe.files import atomic_write, read_rows
from vqpipe.reports.evaluation import open_evaluation
from vqpipe.reports.page import Plot
from vqpipe.reports.plots import line_plot, points_with_spread

COLUMNS = (
    *("run", "seed", "steps", "images", "codes", "groups", "bits_per_pixel"),
    *("psnr", "ssim", "squeeze", "mobilenet", "used", "used_64k", "perplexity"),
)
"""`squeeze` and `mobilenet`: distances of the study's networks, not LPIPS and not FID. `used`: the share of the codes
chosen at least once, over all images and over their first 65,536 tokens."""
KEY = COLUMNS[:4]
Row = dict[str, str]
COMPARED = re.compile(r"[a-z]+-\d+(-fast|-tuned)?")
"""The names of runs that compare methods, after STEPS steps."""
STEPS = "1000"
AVERAGED = 10
"""Rows of the log of a training that are one point of its curve."""
GRAY = "#808080"
"""Of text and axes: legible on a light and on a dark page."""


def row_of(report: Path) -> Row:
    """The row of a report `report-RUN-IMAGES`."""
    evaluated = open_evaluation(open_artifact(report, "report"))
    metrics = evaluated.metrics
    run, images = report.name.removeprefix("report-").rsplit("-", 1)
    name, _, seed = run.partition("-seed")
    at = {each["tokens"]: each["utilization"] for each in metrics["utilization_at"]}
    values = {
        "run": name,
        "seed": seed or "0",
        "steps": evaluated.history[-1]["step"],
        "images": images,
        "codes": metrics["tokenizer"]["codebook_size"],
        "groups": metrics["tokenizer"]["num_groups"],
        "bits_per_pixel": f"{metrics['bits_per_pixel']:.4f}",
        "psnr": f"{metrics['psnr']:.3f}",
        "ssim": f"{metrics['ssim']:.4f}",
        "squeeze": number(metrics.get("perceptual_squeeze"), 4),
        "mobilenet": number(metrics.get("frechet", {}).get("mobilenet:pooled"), 3),
        "used": f"{metrics['utilization']:.5f}",
        "used_64k": number(at.get(65_536), 5),
        "perplexity": f"{statistics.mean(metrics['perplexity_per_group']):.1f}",
    }
    return {name: str(value) for name, value in values.items()}


def number(value: float | None, digits: int) -> str:
    """ "" for what was not computed."""
    return "" if value is None else f"{value:.{digits}f}"


def read(table: Path) -> list[Row]:
    """The rows of the table; none if it is absent."""
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def collect(out: Path, table: Path) -> None:
    """Add the complete reports in `out` to the table."""
    rows = {tuple(row[name] for name in KEY): row for row in read(table)}
    for report in sorted(out.glob("report-*")):
        if (report / "manifest.json").is_file():
            row = row_of(report)
            rows[tuple(row[name] for name in KEY)] = row
    with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def method(row: Row) -> str:
    """`lc-4096-tuned` -> `lc tuned`, `lc-4` -> `lc`."""
    return re.sub(r"-\d+", "", row["run"]).replace("-", " ")


def quantizer(row: Row) -> str:
    """`lc-4096-tuned` -> `lc`."""
    return row["run"].split("-")[0]


def codes(row: Row) -> str:
    """`4,096`, or of several groups `4 x 1,024`."""
    return f"{row['groups']} x " * (row["groups"] != "1") + f"{int(row['codes']):,}"


def strongest(rows: Iterable[Row]) -> list[Row]:
    """Of every method at every size and number of groups the form with the highest PSNR."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in averaged(rows):
        place = quantizer(row), row["codes"], row["groups"]
        if place not in best or float(row["psnr"]) > float(best[place]["psnr"]):
            best[place] = row
    return list(best.values())


def by_method(rows: Iterable[Row], x: str, y: str) -> dict[str, list[tuple[float, float, float]]]:
    """Method -> (x, y, standard deviation of y over the seeds; 0 for all but the PSNR)."""
    methods: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        place = log2(int(row["codes"])) if x == "log2" else float(row[x])
        spread = float(row["spread"] or 0) if y == "psnr" else 0.0
        methods.setdefault(quantizer(row), []).append((place, float(row[y]), spread))
    return methods


def plots(rows: Sequence[Row]) -> dict[str, Plot | None]:
    """File name -> plot of the strongest forms. Methods of one group come first: each has one color in all plots."""
    drawn = sorted(strongest(rows), key=lambda row: (int(row["groups"]), row["run"]))
    single = [row for row in drawn if row["groups"] == "1"]
    points = by_method(single, "codes", "used")
    return {
        "psnr-over-codes": points_with_spread(
            "PSNR over log2 K", by_method(single, "log2", "psnr"), xlabel="log2 of the codebook size K; PSNR in dB"
        ),
        "use-over-codes": points_with_spread(
            "Codes in use over K", points, xlabel="codebook size K; share of the codes in use", is_share=True, log=True
        ),
        "psnr-over-bits": points_with_spread(
            "PSNR over bits",
            by_method(drawn, "bits_per_pixel", "psnr"),
            xlabel="bits per pixel, above 0.6 in groups; PSNR in dB",
        ),
    }


def averaged(rows: Iterable[Row]) -> list[Row]:
    """A row per run: the mean of each number over its seeds, and `spread`, the standard deviation of the PSNR over
    several seeds."""
    seeds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        seeds.setdefault((row["run"], row["steps"]), []).append(row)
    means = []
    for found in seeds.values():
        row = dict(found[0])
        for name in COLUMNS[COLUMNS.index("psnr") :]:
            if all(each[name] for each in found):
                row[name] = str(statistics.mean(float(each[name]) for each in found))
        row["spread"] = f"{statistics.stdev(float(each['psnr']) for each in found):.2f}" if len(found) > 1 else ""
        means.append(row)
    return means


def markdown(rows: Iterable[Row]) -> Iterable[str]:
    """A table of the strongest forms, the best PSNR of equal bits in bold; of several seeds the mean and the spread."""
    rows = strongest(rows)
    best: dict[str, float] = {}
    for row in rows:
        best[row["bits_per_pixel"]] = max(float(row["psnr"]), best.get(row["bits_per_pixel"], 0.0))
    number_of = Counter(row["bits_per_pixel"] for row in rows)
    yield "| codes | quantizer | bits per pixel | PSNR | SSIM | SqueezeNet | MobileNetV2 | codes in use | perplexity |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (int(row["groups"]), int(row["codes"]), -float(row["psnr"]))):
        is_best = float(row["psnr"]) == best[row["bits_per_pixel"]] and number_of[row["bits_per_pixel"]] > 1
        psnr = f"**{mean(row)} dB**" if is_best else f"{mean(row)} dB"
        cells = (
            codes(row),
            method(row),
            f"{float(row['bits_per_pixel']):.3f}",
            psnr,
            f"{float(row['ssim']):.3f}",
            f"{float(row['squeeze']):.3f}" if row["squeeze"] else "-",
            f"{float(row['mobilenet']):.0f}" if row["mobilenet"] else "-",
            f"{float(row['used']) * 100:.1f} %",
            f"{float(row['perplexity']):,.0f}",
        )
        yield f"| {' | '.join(cells)} |"


def mean(row: Row) -> str:
    """The PSNR of an averaged row."""
    return f"{float(row['psnr']):.2f}{' ± ' * bool(row['spread'])}{row['spread']}"


def forms(rows: Iterable[Row]) -> Iterable[str]:
    """A table of the three forms of learned codebooks: PSNR and codes in use."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in sorted(averaged(rows), key=lambda row: (int(row["groups"]), int(row["codes"]), quantizer(row))):
        form = row["run"].split("-")[2:]
        cell = f"{mean(row)} dB, {float(row['used']) * 100:.1f} %"
        cells.setdefault((codes(row), quantizer(row)), {})["".join(form)] = cell
    yield "| codes | quantizer | as published | fast | tuned |"
    yield "|---|---|---|---|---|"
    for (size, name), found in cells.items():
        if len(found) > 1:
            yield f"| {size} | {name} | {' | '.join(found.get(form, '-') for form in ('', 'fast', 'tuned'))} |"


def tries(rows: Sequence[Row]) -> Iterable[str]:
    """A table of the runs of other parts, and of longer ones, by their names and a line for each seed."""
    yield "| run | steps | PSNR | SSIM | codes in use | perplexity |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: float(row["psnr"])):
        quality = f"{float(row['psnr']):.2f} dB | {float(row['ssim']):.3f}"
        use = f"{float(row['used']) * 100:.1f} % | {float(row['perplexity']):,.0f}"
        yield f"| {row['run']} | {int(row['steps']):,} | {quality} | {use} |"


def write_plot(plot: Plot | None, path: Path) -> None:
    """Write a plot as a file of its own, if there is one."""
    if plot is not None:
        drawing = plot.svg.replace("currentColor", GRAY)
        drawing = drawing.replace("<svg", '<svg width="480" font-family="sans-serif"', 1)
        path.write_text(drawing, encoding="utf-8")


def curve(run: Path, folder: Path) -> None:
    """Write the PSNR over the steps of a training: of its crops, means of AVERAGED rows of the log."""
    rows = [(row["step"], row["psnr"]) for row in read_rows(run / "metrics.jsonl")]
    steps, psnr = np.array(rows[: len(rows) // AVERAGED * AVERAGED], dtype=float).reshape(-1, AVERAGED, 2).mean(1).T
    plot = line_plot("PSNR over steps", {"": (steps, psnr)}, xlabel="steps; PSNR in dB")
    write_plot(plot, folder / "psnr-over-steps.svg")


def draw(table: Path, folder: Path) -> None:
    """Write the plots over the large set of images, and print the tables of all sets."""
    everything = read(table)
    rows = [row for row in everything if COMPARED.fullmatch(row["run"]) and row["steps"] == STEPS]
    others = [row for row in everything if row not in rows and row["images"] == "eval"]
    for name, plot in plots([row for row in rows if row["images"] == "eval"]).items():
        write_plot(plot, folder / f"{name}.svg")
    for images in sorted({row["images"] for row in rows}):
        print(f"\n{images}\n", *markdown([row for row in rows if row["images"] == images]), sep="\n")
    print("\nforms\n", *forms(row for row in rows if row["images"] == "eval"), sep="\n")
    print("\nother parts\n", *tries(others), sep="\n")


if __name__ == "__main__":
    action, first, second = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {"collect": collect, "draw": draw, "curve": curve}[action](first, second)
