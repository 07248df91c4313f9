"""The numbers that a paper prints of the row a preset stands for, to be shown beside ours, never among them.

They live in the heads of `vqpipe/presets/*.toml`. A paper measured on its own images by its own protocol, so its
numbers keep a column, or a table, of their own, which names that protocol.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqpipe import presets

LABELS = {"rFID": "rfid", "PSNR": "psnr", "SSIM": "ssim", "LPIPS": "lpips", "usage": "utilization"}
LABELS["utilization"] = "utilization"
"""A word of `expected` -> the measure it is."""
HARMLESS = ("objective.lpips_weights", "data.num_workers", "train.log_every", "train.save_every", "train.sample_every")
"""Settings that leave a row what it is."""
TELLING = ("--steps", "--global-batch-size", "--precision", "--from")
"""Options of `train` that make another row of it, beside `--set`."""


@dataclass(frozen=True)
class PaperRow:
    """A row of a paper's table."""

    preset: str
    paper: str
    """Who, when, what (arXiv number)."""
    row: str
    protocol: str
    """How its authors measured, in the preset's words."""
    values: Mapping[str, float]
    """Measure -> what is printed; shares in 0..1, SSIM in 0..1."""
    changed: Sequence[str] = ()
    """What the command changed of the preset."""

    @property
    def short(self) -> str:
        """ "Zhu et al. 2024, VQGAN-LC"."""
        return self.paper.partition(" (")[0]


def paper_row(commands: Sequence[str]) -> PaperRow | None:
    """The row of the preset that the first of these commands trained with; None without one, or without a number."""
    for command in commands:
        words = shlex.split(command)
        if len(words) > 1 and words[1] == "train":
            return row_of(words[2:])
    return None


def row_of(words: Sequence[str]) -> PaperRow | None:
    """The row that the options of one `vqpipe train` stand for."""
    options = list(pairs(words))
    named = [value for option, value in options if option == "--preset"]
    if not named or named[-1] not in presets.names():  # a file of the user's own says nothing of a paper
        return None
    head = presets.read_head(presets.find(named[-1]))
    values = printed(head.get("expected", ""))
    if not values or "paper" not in head or head.get("row", "none").startswith("none"):
        return None
    changed = [value for option, value in options if option == "--set" and not value.startswith(HARMLESS)]
    changed += [f"{option} {Path(value).name}" for option, value in options if option in TELLING]
    protocol = own_protocol(head.get("protocol", ""), head["row"])
    return PaperRow(named[-1], head["paper"], head["row"], protocol, values, changed)


def own_protocol(told: str, row: str) -> str:
    """Of "the paper's (A; B); its X rows follow X's (C); ours is D": "A; B", or "C" where the row is one of X."""
    for name, other in re.findall(r"its (\S+) rows follow [^(]*\(([^)]*)\)", told):
        if name in row:
            return str(other)
    found = re.match(r"the paper's \(([^)]*)\)", told)
    return found[1] if found else told.partition("; ours")[0] or "a protocol it does not tell"


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--a b --c=d` -> [("--a", "b"), ("--c", "d")]."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found.append((option, value if equals else following))
    return found


def printed(expected: str) -> dict[str, float]:
    """ "rFID 2.62, SSIM 58.9, usage 97 %" -> {"rfid": 2.62, "ssim": 0.589, "utilization": 0.97}, the rest left out."""
    values = {}
    for part in expected.split(", "):
        found = re.fullmatch(rf"({'|'.join(LABELS)}) ([\d.]+)( %)?", part.strip())
        if found is None:
            continue
        key, value = LABELS[found[1]], float(found[2])
        # VQGAN-LC prints SSIM in hundredths
        values[key] = value / 100 if found[3] or (key == "ssim" and value > 1) else value
    return values
