"""The numbers that a paper prints for the row that a preset reproduces, read from the head of the preset.

A paper measures on its own images by its own protocol. So its numbers have a column or a table of their own, which
states that protocol.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqpipe import presets
from vqpipe.provenance import options_of, stage_command

LABELS = {"rFID": "rfid", "PSNR": "psnr", "SSIM": "ssim", "LPIPS": "lpips", "usage": "utilization"}
LABELS["utilization"] = "utilization"
"""A name in `expected` -> the key of the measure."""
NEUTRAL_SETTINGS = (
    "objective.lpips_weights",
    "data.num_workers",
    "train.log_every",
    "train.save_every",
    "train.sample_every",
)
"""Settings that do not change the results of a run."""
CHANGING_OPTIONS = ("--steps", "--global-batch-size", "--precision", "--from")
"""Options of `train` that change the results, besides `--set`."""


@dataclass(frozen=True)
class PaperRow:
    """A row of a paper's table."""

    preset: str
    paper: str
    """Authors, year, title (arXiv number)."""
    row: str
    protocol: str
    """How its authors measured."""
    values: Mapping[str, float]
    """Measure -> the printed number; utilization and SSIM in 0..1."""
    changed: Sequence[str] = ()
    """Settings of the preset that the command changed."""

    @property
    def short(self) -> str:
        """`Zhu et al. 2024, VQGAN-LC`."""
        return self.paper.partition(" (")[0]


def paper_row(commands: Sequence[str]) -> PaperRow | None:
    """The row that the first training command reproduces; None without a preset of a paper or without a number."""
    for command in commands:
        words = stage_command(shlex.split(command))
        if words[:1] == ["train"]:
            return row_of(words[1:])
    return None


def row_of(words: Sequence[str]) -> PaperRow | None:
    """The row for the options of a `vqpipe train` command."""
    options = options_of(words)
    named = [value for option, value in options if option == "--preset"]
    if not named or named[-1] not in presets.names():  # a file of the user
        return None
    head = presets.read_head(presets.find(named[-1]))
    values = printed(head.get("expected", ""))
    if not values or "paper" not in head or head.get("row", "none").startswith("none"):
        return None
    changed = [value for option, value in options if option == "--set" and not value.startswith(NEUTRAL_SETTINGS)]
    changed += [f"{option} {Path(value).name}" for option, value in options if option in CHANGING_OPTIONS]
    protocol = protocol_of(head.get("protocol", ""), head["row"])
    return PaperRow(named[-1], head["paper"], head["row"], protocol, values, changed)


def protocol_of(head: str, row: str) -> str:
    """The protocol of a row by the head "the paper's (A; B); its X rows follow X's (C); ours is D": "C" if the row is
    one of X, else "A; B"."""
    for name, other in re.findall(r"its (\S+) rows follow [^(]*\(([^)]*)\)", head):
        if name in row:
            return str(other)
    found = re.match(r"the paper's \(([^)]*)\)", head)
    return found[1] if found else head.partition("; ours")[0] or "an unstated protocol"


def printed(expected: str) -> dict[str, float]:
    """`rFID 2.62, SSIM 58.9, usage 97 %` -> {"rfid": 2.62, "ssim": 0.589, "utilization": 0.97}; ignores other text."""
    values = {}
    for part in expected.split(", "):
        found = re.fullmatch(rf"({'|'.join(LABELS)}) ([\d.]+)( %)?", part.strip())
        if found is None:
            continue
        key, value = LABELS[found[1]], float(found[2])
        # VQGAN-LC prints SSIM in hundredths
        values[key] = value / 100 if found[3] or (key == "ssim" and value > 1) else value
    return values
