"""Which numbers of several reports may share a table: those of one protocol, one image size and the same images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vqpipe.errors import ArtifactError
from vqpipe.reports.evaluation import Evaluated, by_protocol, comparable, size_in_words

KEYS = ("protocol", "image_size", "num_images", "reference")
"""Of `metrics.json`: where all are equal, numbers may share a column. `reference` is the digest of the crops."""


@dataclass(frozen=True)
class Group:
    """Evaluations whose numbers may share a table; their metrics are those of its protocol alone."""

    protocol: str
    images: str
    """The set, for people: differs where the sets, sizes or numbers of images do."""
    members: Sequence[Evaluated]

    @property
    def title(self) -> str:
        """ "60 images of kodak at 256 px, protocol adm"."""
        first = self.members[0].metrics
        return f"{first['num_images']:,} images of {self.images} at {size_in_words(first)}, protocol {self.protocol}"


def refuse_unlike(evaluations: Sequence[Evaluated], places: Sequence[str]) -> None:
    """Each report shares a table with another, or its tokenizer with one on other images; else it has no place here.

    Raises:
        ArtifactError: one shares nothing; it and the first other are named, and the key at which they differ.
    """
    groups = groups_of(evaluations)
    known = [tokenizer_of(each) for each in evaluations]
    for number, place in enumerate(places):
        together = [group for group in groups if len(group) > 1 and number in {place for place, _ in group}]
        if together or known.count(known[number]) > 1:
            continue
        other = 1 if number == 0 else 0
        first, second = sorted((number, other))
        one, two = (evaluations[i].metrics for i in (first, second))
        key = comparable(one, two) or "reference"
        raise ArtifactError(
            f"{places[first]} and {places[second]} cannot be compared: their {key} differs ({short(one.get(key))} and "
            f"{short(two.get(key))}), and {place} shares neither images nor tokenizer with any other",
            "Evaluate both on the same images with the same protocol and image size",
        )


def groups_of(evaluations: Sequence[Evaluated]) -> list[list[tuple[int, Evaluated]]]:
    """By KEYS, in the order of the reports: each report's place, and its numbers by that protocol."""
    groups: dict[tuple[object, ...], list[tuple[int, Evaluated]]] = {}
    for place, evaluated in enumerate(evaluations):
        for view in by_protocol(evaluated.metrics):
            key = tuple(view.get(name) for name in KEYS)
            groups.setdefault(key, []).append((place, replace(evaluated, metrics=view)))
    return list(groups.values())


def named_groups(evaluations: Sequence[Evaluated]) -> list[Group]:
    """The groups, those of most reports first, their image sets under names that differ."""
    found = sorted(([each for _, each in group] for group in groups_of(evaluations)), key=len, reverse=True)
    names = set_names([group[0] for group in found])
    return [Group(group[0].metrics["protocol"], name, group) for group, name in zip(found, names, strict=True)]


def set_names(firsts: Sequence[Evaluated]) -> list[str]:
    """A name for the image set of each; equal where the sets are, and told apart by size or number where they are not.

    Two protocols crop a set differently, so sets are the same if they come from the same images at the same size.
    """
    sets = [
        (
            each.lineage.get("inputs", {}).get("images", {}).get("content") or each.metrics["reference"],
            str(each.metrics["image_size"]),
            each.metrics["num_images"],
        )
        for each in firsts
    ]
    plain = [each.lineage.get("inputs", {}).get("images", {}).get("name", "images") for each in firsts]
    sized = [f"{name}, {size_in_words(each.metrics)}" for name, each in zip(plain, firsts, strict=True)]
    counted = [f"{name}, {each.metrics['num_images']:,} images" for name, each in zip(sized, firsts, strict=True)]
    for names in (plain, sized, counted):
        if len(set(names)) == len(set(sets)) == len(set(zip(names, sets, strict=True))):
            return names
    order = {each: number for number, each in enumerate(dict.fromkeys(sets), start=1)}
    return [f"{number}: {name}" for each, name in zip(sets, plain, strict=True) for number in [order[each]]]


def distinct(evaluations: Sequence[Evaluated], report_names: Sequence[str]) -> list[Evaluated]:
    """The evaluations under names that differ where their tokenizers do: the tokenizer's, the report's, or numbered.

    A tokenizer that stands twice in one group, as the same report given twice, counts as two.
    """
    names = [each.name for each in evaluations]
    who = [tokenizer_of(each) for each in evaluations]
    if any(len({who[place] for place, _ in group}) < len(group) for group in groups_of(evaluations)):
        who = list(map(str, range(len(who))))
    if len(set(names)) < len(set(who)) and len(set(who)) == len(set(report_names)) == len(who):
        names = list(report_names)
    if len(set(names)) < len(set(who)):
        order = {each: number for number, each in enumerate(dict.fromkeys(who), start=1)}
        names = [f"{order[which]}: {name}" for which, name in zip(who, names, strict=True)]
    return [replace(evaluated, name=name) for evaluated, name in zip(evaluations, names, strict=True)]


def tokenizer_of(evaluated: Evaluated) -> str:
    """What tells tokenizers apart: the digest of its content, else its name."""
    tokenizer = evaluated.lineage.get("inputs", {}).get("tokenizer", {})
    return tokenizer.get("content") or evaluated.name


def short(value: object) -> str:
    """At most 16 characters of a value."""
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
