"""Every `vqpipe` command in README and in the heads of presets parses; help texts agree with docstrings."""

import re
import shlex
from pathlib import Path

import pytest

from stages import cli
from vqpipe.presets import heads

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = [line.split("#")[0].strip() for line in SHELL.splitlines() if line.startswith("vqpipe ")]
COMMANDS += [head["command"] for _, head in heads()]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str) -> None:
    name, *words = shlex.split(line)[1:]
    context = cli.load(name).make_context(name, words)  # raises on an unknown option or a missing argument
    assert context.command.name == name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_line_is_the_first_line_of_the_docstring(name: str) -> None:
    command = cli.COMMANDS[name]
    assert (command.load().__doc__ or "").splitlines()[0] == command.help


def test_readme_names_every_command() -> None:
    assert {name for name in cli.COMMANDS if f"vqpipe {name}" not in README} <= {"demo"}


def test_files_named_in_the_readme_exist() -> None:
    """Paths are relative to the repository, or to `vqpipe`."""
    paths = re.findall(r"`((?:\w+/)+[\w.-]*)`", README)
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / "vqpipe" / path).exists()] == []
