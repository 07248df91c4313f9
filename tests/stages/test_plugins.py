"""A quantizer that is not part of vqpipe works in every command, and nothing but the user's word imports its module."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from stages import plugins
from stages.cli import COMMANDS, load
from vqpipe.artifacts import open_artifact
from vqpipe.errors import ConfigError
from vqpipe.tokenizer import Tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "rotation_quantizer.py"


TRAIN = [
    *("--preset", "smoke", "--precision", "fp32", "--steps", "1", "--global-batch-size", "2", "--out", "tokenizer"),
    *("--set", "model.quantizer.kind=rotation", "--set", "data.image_size=16", "--set", "model.base_channels=8"),
    *("--set", "train.warmup_steps=1", "--set", "train.whiten_init=false"),
    *("--set", "model.z_channels=8", "--set", "discriminator.base_channels=4", "--device", "cpu"),
]
PROGRAM = """
import json, sys
from stages.cli import load
from unittest.mock import MagicMock
from vqpipe.reports import plots

plots.one_axes = lambda names: (MagicMock(), MagicMock())  # drawing takes seconds
plots.to_svg = lambda figure, salt: "<svg></svg>"
for words in json.loads(sys.argv[1]):
    load(words[0]).main(words[1:], standalone_mode=False)
"""


def test_the_example_quantizer_works_in_every_command(tmp_path: Path, picture_folder: Path, python: Any) -> None:
    images, option = ["--images", str(picture_folder)], ["--import", str(EXAMPLE)]
    stored = ["--tokenizer", "tokenizer", "--device", "cpu"]
    commands = [
        ["train", *option, *images, *TRAIN],
        ["tokenize", "--import", "rotation_quantizer", *stored, *images, "--num-workers", "0", "--out", "tokens"],
        ["detokenize", *stored, *option, "--tokens", "tokens", "--out", "decoded"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent)}
    done = python(PROGRAM, json.dumps(commands), folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text())["model"]["quantizer"]["kind"] == "rotation"
    assert open_artifact(tmp_path / "decoded").facts["num_images"] == 10
    with pytest.raises(ConfigError, match=r"'rotation' is unknown.*--import FILE.py"):  # not imported by this process
        Tokenizer.from_pretrained(tmp_path / "tokenizer")


def test_an_installed_package_declares_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "declared_plugin.py").write_text("LOADED = True")
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    entry_points = tmp_path / "mine-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text(f"[{plugins.GROUP}]\nfirst = declared_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    load("presets")
    assert sys.modules.pop("declared_plugin").LOADED
    (tmp_path / "declared_plugin.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="the plugin first of mine cannot be imported: ZeroDivisionError"):
        load("presets")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module_of_mine", "no module of that name is installed"),
        ("absent.py", "no such file"),
        ("broken.py", "cannot be imported: ZeroDivisionError: division by zero"),
        ("torch.py", "another module is called torch"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0")
    Path("torch.py").write_text("")
    with pytest.raises(ConfigError, match=f"--import {name}.*{message}"):
        plugins.import_named([name])
    assert "broken" not in sys.modules


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    file = tmp_path / "imported_once.py"
    file.write_text("import itertools\nCALLS = []\n")
    plugins.import_named([str(file), str(file)])
    module = sys.modules["imported_once"]
    plugins.import_named([str(file)])
    assert sys.modules.pop("imported_once") is module


def test_every_command_has_the_option() -> None:
    for name in COMMANDS:
        assert any("--import" in parameter.opts for parameter in load(name).params), name


@pytest.mark.parametrize("key", ["import", "plugin", "module"])
def test_a_preset_cannot_name_a_module(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.recipe import load as load_recipe

    (tmp_path / "evil_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    for line in (f'{key} = "evil_module"', 'model.kind = "evil_module"', 'model.quantizer.kind = "evil_module.Evil"'):
        (tmp_path / "mine.toml").write_text(f'extends = "smoke"\n{line}\n')
        with pytest.raises(ConfigError, match="unknown"):
            load_recipe(str(tmp_path / "mine.toml"))
    assert "evil_module" not in sys.modules
