"""`vqpipe presets`: list the presets, or print one."""

import os
import shutil
import sys
from typing import Annotated

import typer

from stages import console
from vqpipe.errors import ConfigError
from vqpipe.presets import estimates, find, heads

MACHINE = "1 x 80 GB"
"""The machine of vqpipe.presets.estimates that the list has figures of."""
SMALL = "Small, for a CPU"
"""The heading of presets without a paper."""
WIDE = 120
"""Columns of a terminal from which on the list has more than the name of a preset and what it trains."""


def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset as TOML.", metavar="NAME|FILE.toml")] = None,
    word: Annotated[
        str | None,
        typer.Option("--filter", help="List only presets whose name or description has this.", metavar="WORD"),
    ] = None,
) -> None:
    """List the presets, or print one.

    The list is grouped by paper and command, small presets for a CPU first:
    of each preset what it trains, the row of the paper's table, and the expected
    numbers. Before them stand what vqpipe plan estimates for one GPU of 80 GB,
    where it fits: memory and hours. A terminal of under 120 columns shows only
    what a preset trains.

    A preset is printed as TOML, including the settings of the presets that it
    extends: vqpipe presets small > mine.toml writes a file to change, for
    --preset mine.toml.
    """
    if name is not None:
        if word is not None:
            raise ConfigError("--filter is for the list, not for one preset", "Leave out the name of the preset")
        find(name)  # raises for a name that is unknown, before PyTorch is imported
        from stages.recipe import resolved_toml

        print(resolved_toml(name), end="")
        return
    found = [(preset, head) for preset, head in heads() if (word or "").lower() in f"{preset} {head}".lower()]
    if not found:
        raise ConfigError(f"no preset has {word!r} in its name or description", "vqpipe presets lists all")
    groups: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {}
    for preset, head in found:
        command = " ".join(head["command"].split()[:2])
        groups.setdefault((head.get("paper", ""), command), []).append((preset, head))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    width, figures, whole = max(len(preset) for preset, _ in found), estimates(), columns is None or columns >= WIDE
    if whole:
        print(
            console.wrapped(
                "GiB and hours: what vqpipe plan estimates for one GPU of 80 GB, where the preset fits.", columns, 0
            )
        )
    for (paper, command), members in sorted(groups.items(), key=lambda item: (item[0][0] != "", -len(item[1]))):
        print(console.wrapped(f"{paper or SMALL}: {command}", columns, 2))
        for preset, head in members:
            about = " | ".join(head[key] for key in ("what", "row", "expected") if head.get(key))
            figure = figures_text(figures.get(preset, {}).get(MACHINE)) + "  "
            start = f"  {preset:{width}}  " + (figure if whole else "")
            print(console.wrapped(start + (about if whole else head.get("what", "")), columns, len(start)))
    if columns is not None:
        console.say("\nvqpipe presets NAME prints one of them whole, and --filter WORD lists fewer.")


def figures_text(figures: dict[str, float] | None) -> str:
    """` 41.2 GiB    160 h`, as wide without figures."""
    if figures is None:
        return " " * 18
    hours = "<1" if figures["hours"] < 1 else f"{figures['hours']:,.0f}"
    return f"{figures['memory_gib']:5.1f} GiB {hours:>6} h"
