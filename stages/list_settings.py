"""`vqpipe settings`: list the settings of a command."""

import json
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from vqpipe.config import toml_value
from vqpipe.errors import ConfigError

if TYPE_CHECKING:
    from vqpipe.settings import Setting

WithSettings = Literal["extract-features", "kmeans", "train", "eval", "train-generator", "generate", "train-classifier"]


def settings(
    command: Annotated[
        WithSettings, typer.Argument(help="A command that reads settings from a preset.", metavar="COMMAND")
    ],
    word: Annotated[
        str, typer.Option("--filter", help="List only settings whose section, name or doc has this.", metavar="WORD")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the settings of a command, with defaults and docs.

    They are set in a preset or by --set: `steps` of the section `train` is
    --set train.steps=1000. Settings marked with * may change when a run is
    resumed.
    """
    from stages.recipe import settings_of  # imports PyTorch

    found = [each for each in settings_of(command) if word.lower() in text_of(each).lower()]
    if not found:
        raise ConfigError(f"no setting of {command} has {word!r} in its section, name or doc", "Leave --filter out")
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2, ensure_ascii=False))
        return
    out = Console(highlight=False)
    for (section, kind), members in groupby(found, key=lambda each: (each.section, each.kind)):
        out.print(f"\n[bold]\\[{section}][/]" + (f', kind = "{kind}"' if kind else ""))
        for each in members:
            default = "not set" if each.default is None else toml_value(each.default)
            value = "required" if each.required else f"default {default}"
            mark = "*" if each.resumable else ""
            line = f"[bold]{each.name}[/]{mark}: {escape(each.type)}; {escape(value)}"
            out.print(Padding(line, (0, 0, 0, 2), expand=False))
            out.print(Padding(escape(each.doc), (0, 0, 0, 6), expand=False))


def text_of(setting: "Setting") -> str:
    """What --filter searches."""
    return f"{setting.section}.{setting.name} {setting.kind} {setting.doc}"
