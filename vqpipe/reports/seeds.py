"""Tokenizers whose training differs only in the seed, as one row with means, and plots over the codebook size.

Shapes: K codes per group, G groups, f the downsample factor.
"""

import json
import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from vqpipe.provenance import options_of, stage_command
from vqpipe.reports import page, plots
from vqpipe.reports.evaluation import EvaluationResult, Measure, codes, input_of, value_of, with_unit, written

OTHER_OPTIONS = ("--seed", "--out", "--images", "--validation", "--codebook", "--from", "--device")
"""Options of `vqpipe train` that may differ between the seeds of a configuration: inputs are compared by content."""
MIN_SIZES = 3
"""Different codebook sizes of a method from which on they are plotted."""
CAPTION = (
    "Rows of tokenizers that were trained with the same settings on the same inputs, with other seeds. Mean ± standard "
    "deviation over the seeds (of the sample, n - 1)."
)


@dataclass(frozen=True)
class Configuration:
    """Evaluations of tokenizers that differ only in the seed of their training."""

    name: str
    members: Sequence[EvaluationResult]

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """The facts of the tokenizers, the same for all."""
        return self.members[0].metrics["tokenizer"]

    @property
    def steps(self) -> int | None:
        """The steps of the training; None where the reports do not have its log."""
        return max((row["step"] for row in self.members[0].history if "step" in row), default=None)

    def mean_and_spread(self, key: str) -> tuple[float, float] | None:
        """Mean and standard deviation (0 for one seed) of a measure; None if a member lacks it."""
        values = [value for each in self.members if (value := value_of(each.metrics, key)) is not None]
        if len(values) < len(self.members):
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def configurations_of(evaluations: Sequence[EvaluationResult]) -> list[Configuration]:
    """The evaluations by configuration, in their order; those of equal seeds stay apart."""
    found: dict[str, list[EvaluationResult]] = {}
    for number, each in enumerate(evaluations):
        found.setdefault(configuration_key(each) or f"{number}", []).append(each)
    grouped: list[list[EvaluationResult]] = []
    for members in found.values():
        seeds = {training_of(each)[1] for each in members}
        grouped += [members] if len(seeds) == len(members) else [[each] for each in members]
    names = [common_name([each.name for each in members]) for members in grouped]
    return [
        Configuration(name if names.count(name) == 1 else ", ".join(each.name for each in members), members)
        for name, members in zip(names, grouped, strict=True)
    ]


def training_command(evaluated: EvaluationResult) -> list[str]:
    """The words of the command that trained the tokenizer, from `train` on, if the report holds it."""
    commands = map(stage_command, map(shlex.split, evaluated.commands))
    return next((words for words in commands if words[:1] == ["train"]), [])


def training_of(evaluated: EvaluationResult) -> tuple[Any, Any]:
    """The settings of the tokenizer's training without the seed, and the seed; the settings are empty if the report
    holds neither them nor the command. (Reports of earlier versions hold the command alone.)"""
    if settings := dict(evaluated.metrics.get("training", {})):
        return settings, settings.pop("seed")
    command = training_command(evaluated)
    return settings_of(command), dict(options_of(command)).get("--seed", "0")


def configuration_key(evaluated: EvaluationResult) -> str:
    """What is equal for seeds of one configuration; "" if the settings of the training are not known."""
    settings, _ = training_of(evaluated)
    if not settings:
        return ""
    inputs = input_of(evaluated.lineage, "tokenizer").get("inputs", {})
    contents = {role: node.get("content") for role, node in inputs.items()}
    return json.dumps([settings, contents, evaluated.metrics["tokenizer"]], sort_keys=True)


def settings_of(train: Sequence[str]) -> list[str]:
    """The options of a command of training with their values, without OTHER_OPTIONS, sorted."""
    return sorted(" ".join(option) for option in options_of(train) if option[0] not in OTHER_OPTIONS)


def common_name(names: Sequence[str]) -> str:
    """`lc-16384` of lc-16384-seed-0 and lc-16384-seed-1; the first name if they share no beginning."""
    if len(set(names)) == 1:
        return names[0]
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*names, strict=False))
    prefix = "".join(characters[0] for characters in same)
    if all(name[len(prefix) :][:1].isdigit() for name in names):
        prefix = prefix.rstrip("0123456789")
    return re.sub(r"[-_. ]*(seed|(?<=[-_. ])s)?[-_. =]*$", "", prefix) or names[0]


def seeds_table(title: str, configurations: Sequence[Configuration], measures: Sequence[Measure]) -> page.Table | None:
    """A row for each configuration: `23.10 ± 0.14`, the best mean highlighted; None where each has one seed."""
    if all(len(each.members) == 1 for each in configurations):
        return None
    columns = [[each.mean_and_spread(measure.key) for each in configurations] for measure in measures]
    best = [
        measure.best(None if pair is None else pair[0] for pair in column)
        for measure, column in zip(measures, columns, strict=True)
    ]
    rows: list[list[str | page.Cell]] = [
        [
            configuration.name,
            codes(configuration.tokenizer).removesuffix(" codes"),
            f"{len(configuration.members)}",
            *(
                seeds_cell(measure, column[place], top, len(configuration.members))
                for measure, column, top in zip(measures, columns, best, strict=True)
            ),
        ]
        for place, configuration in enumerate(configurations)
    ]
    header = ["tokenizer", "codes", "seeds", *map(with_unit, measures)]
    return page.Table(f"Over seeds: {title}", header, rows, CAPTION)


def seeds_cell(measure: Measure, pair: tuple[float, float] | None, best: float | None, seeds: int) -> page.Cell:
    """`23.10 ± 0.14`; the number alone for one seed; a dash for None. The best mean of a column is highlighted."""
    if pair is None:
        return page.Cell("–")
    numbers = [written(measure, value, unit=False) for value in pair]
    varies = seeds > 1 and (measure.key != "bits_per_pixel" or pair[1] > 0)
    return page.Cell(" ± ".join(numbers) if varies else numbers[0], pair[0] == best)


def numbers_over_seeds(
    configurations: Sequence[Configuration], measures: Sequence[Measure]
) -> dict[str, dict[str, Any]]:
    """For `metrics.json`: name -> seeds, and mean and standard deviation of each measure."""
    return {
        each.name: {"seeds": len(each.members), "names": [member.name for member in each.members]}
        | {
            measure.key: {"mean": pair[0], "std": pair[1]}
            for measure in measures
            if (pair := each.mean_and_spread(measure.key)) is not None
        }
        for each in configurations
        if len(each.members) > 1
    }


def size_plots(configurations: Sequence[Configuration]) -> list[page.Plot]:
    """PSNR over log2 K, utilization over K and PSNR over bits per position, a line for each method.

    A plot needs a method with MIN_SIZES different x, trained for as many steps each. Bits per position, which count
    groups and scales, are drawn where they are not log2 K.
    """
    discrete = [each for each in configurations if each.tokenizer["codebook_size"] is not None]
    bits = [bits_per_position(each) for each in discrete]
    logs = [math.log2(each.tokenizer["codebook_size"]) for each in discrete]
    plain = [float(each.tokenizer["codebook_size"]) for each in discrete]
    drawn = [
        method_plot("PSNR (dB) over log2 K", discrete, logs, "psnr", "log2 of the codebook size K"),
        method_plot("Utilization over K", discrete, plain, "utilization", "codebook size K"),
    ]
    if any(each is not None and abs(each - log) > 1e-6 for each, log in zip(bits, logs, strict=True)):
        drawn.append(method_plot("PSNR (dB) over bits per position", discrete, bits, "psnr", "bits per position"))
    return [plot for plot in drawn if plot is not None]


def bits_per_position(configuration: Configuration) -> float | None:
    """Bits of the ids of one position of the latent, over its groups and scales."""
    per_pixel = configuration.members[0].metrics.get("bits_per_pixel")
    return None if per_pixel is None else round(float(per_pixel) * configuration.tokenizer["downsample_factor"] ** 2, 6)


def method_plot(
    title: str, configurations: Sequence[Configuration], places: Sequence[float | None], key: str, xlabel: str
) -> page.Plot | None:
    """A measure at these x, a line for each method with MIN_SIZES of them that were trained for as many steps; None
    without such a method."""
    methods: dict[str, list[tuple[float, float, float]]] = {}
    steps: dict[str, set[int | None]] = {}
    for configuration, x in zip(configurations, places, strict=True):
        pair = configuration.mean_and_spread(key)
        if x is not None and pair is not None:
            method = method_of(configuration, configurations)
            methods.setdefault(method, []).append((x, *pair))
            steps.setdefault(method, set()).add(configuration.steps)
    joined = {
        method
        for method, points in methods.items()
        if len({x for x, _, _ in points}) >= MIN_SIZES and len(steps[method]) == 1 and None not in steps[method]
    }
    if not joined:
        return None
    several = any(len(each.members) > 1 for each in configurations)
    caption = "Bars: standard deviation over seeds." if several else ""
    share = key == "utilization"
    return plots.points_with_spread(
        title,
        methods,
        xlabel=xlabel,
        is_share=share,
        log=share,
        unjoined=methods.keys() - joined,
        caption=caption,
    )


def method_of(configuration: Configuration, among: Sequence[Configuration]) -> str:
    """The quantizer, with the downsample factor and the number of groups where these differ between tokenizers."""
    words = [str(configuration.tokenizer["quantizer"])]
    for key, text in (("downsample_factor", "f{}"), ("num_groups", "G = {}")):
        if len({each.tokenizer.get(key) for each in among}) > 1 and configuration.tokenizer.get(key):
            words.append(text.format(configuration.tokenizer[key]))
    return ", ".join(words)
