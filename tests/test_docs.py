"""The code of docs/python.md and docs/examples runs."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqpipe import Tokenizer
from vqpipe.data import TokenDataset
from vqpipe.quantizers import LcConfig, QuantizerConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.DOTALL)
LIBRARIES = ("pandas", "polars", "duckdb", "datasets")
READERS = {name: block for block in BLOCKS for name in LIBRARIES if block.startswith(f"import {name}\n")}
"""Blocks that need a package which vqpipe does not depend on."""


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draw_folder: Callable[..., Path],
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer],
) -> Path:
    """The current folder, with `images` and `tokenizer`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "images", 12, side=40)
    config = LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform")
    small_tokenizer(config).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def run(blocks: list[str]) -> dict[str, Any]:
    """Run blocks of the page in one namespace, which is returned."""
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    return names


def test_page_of_the_python_api_runs(folder: Path) -> None:
    names = run([block for block in BLOCKS if block not in READERS.values()])
    assert len(names["tokens"]) == 12
    assert names["table"].num_rows == 24
    assert names["table"].column_names == ["key", "shard", "index", "label", "ids", "flipped"]
    assert names["resumed"].images_seen == 4
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    public = {name for name in vars(Tokenizer) if not name.startswith(("_", "check_"))}
    internal = {"to_table", "describe", "push_to_hub", "hub_card", "hub_files", "latent_shape", "config", "dtype"}
    assert {name for name in public - internal if name not in page} == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_tokens_are_read_by(name: str, folder: Path) -> None:
    pytest.importorskip(name)
    tokens = next(number for number, block in enumerate(BLOCKS) if "write_tokens" in block)
    names = run([BLOCKS[0], BLOCKS[tokens], READERS[name]])
    assert len(names.get("frame", names.get("rows", names.get("table")))) == 24


def test_example_trains_a_transformer_on_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tokens_to_transformer.py", "images", "tokenizer", "tokens"])
    runpy.run_path(str(DOCS / "examples" / "tokens_to_transformer.py"), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    assert len(TokenDataset("tokens")) == 12
    assert (folder / "tokens-samples.png").read_bytes().startswith(b"\x89PNG")
