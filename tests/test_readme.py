"""Every `vqpipe` line of the README, and of every preset's head, is a command with options that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from stages.cli import app
from vqpipe.presets import heads

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = [line.split("#")[0].strip() for line in SHELL.splitlines() if line.startswith("vqpipe ")]
COMMANDS += [head["command"] for _, head in heads()]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_parses(line: str) -> None:
    group = typer.main.get_command(app)
    name, *words = shlex.split(line)[1:]
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, words)  # raises on an unknown option or a missing argument
    assert context.command.name == name


def test_the_readme_names_every_command() -> None:
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {name for name in names if f"vqpipe {name}" not in README} <= {"presets"} | {"demo"}
    assert "vqpipe presets" in README


def test_the_tests_that_the_readme_points_at_exist() -> None:
    paths = re.findall(r"`(tests/[\w/.]+)`", README)
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
