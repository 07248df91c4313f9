"""The code of docs/ runs or compiles, docs/hooks.py makes a page of every command, setting and preset, and the site is
built. Commands and links of the pages: tests/test_readme.py."""

import ast
import dataclasses
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vqpipe
from stages import cli
from stages.recipe import RECIPES
from vqpipe import Tokenizer, config, data, presets, quantizers
from vqpipe.data import TokenDataset
from vqpipe.quantizers import LcConfig, QuantizerConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HOOKS = runpy.run_path(str(DOCS / "hooks.py"))
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in HOOKS["ROOT_PAGES"])]
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
    pq.write_table(pa.table({"reason": ["truncated"]}), "tokens/skipped.parquet")
    assert run([block for block in BLOCKS if block.startswith("import pyarrow")])["table"] == names["table"]
    assert len(names["tokens"]) == 12
    assert names["table"].num_rows == 24
    assert names["table"].column_names == ["key", "shard", "index", "label", "ids", "flipped"]
    assert names["resumed"].images_seen == 4
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    public = {name for name in vars(Tokenizer) if not name.startswith(("_", "check_"))}
    internal = {"to_table", "describe", "push_to_hub", "hub_card", "latent_shape", "config", "dtype"}
    assert {name for name in public - internal if name not in page} == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_tokens_are_read_by(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    tokens = next(number for number, block in enumerate(BLOCKS) if "write_tokens" in block)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    names = run([BLOCKS[0], BLOCKS[tokens], READERS[name]])
    assert len(names.get("frame", names.get("rows", names.get("table")))) == 24
    if name == "datasets":
        assert torch.equal(names["table"][0]["ids"], TokenDataset("tokens")[0]["ids"])


def test_example_trains_a_transformer_on_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = str(DOCS / "examples" / "tokens_to_transformer.py")
    monkeypatch.setattr(sys, "argv", [example, "images", "tokenizer", "tokens"])
    runpy.run_path(example, run_name="__main__")
    first, entropy, *lines, sampling, last = capsys.readouterr().out.splitlines()
    assert (first, sampling.split()[0]) == ("encoding images into tokens", "sampling")
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 100
    assert losses[-1] < losses[0] - 0.5
    tokens = TokenDataset("tokens")
    assert len(tokens) == 12
    ids = torch.cat([tokens[row]["ids"] for row in range(12)])
    shares = [(ids == value).double().mean().item() for value in ids.unique()]
    expected = -sum(share * math.log(share) for share in shares)
    assert entropy == f"entropy of single ids: {expected:.3f}; the loss should fall below it"
    assert last == "samples: tokens-samples.png"
    with Image.open(folder / "tokens-samples.png") as samples:
        assert samples.width >= 4 * 32
    monkeypatch.setattr(sys, "argv", [example, "images", "tokenizer", "tokens", "2"])
    runpy.run_path(example, run_name="__main__")
    assert capsys.readouterr().out.count("step ") == 2
    monkeypatch.setattr(sys, "argv", [example])
    with pytest.raises(SystemExit, match=r"^usage: python tokens_to_transformer.py IMAGES TOKENIZER OUT \[STEPS\]$"):
        runpy.run_path(example, run_name="__main__")


def test_example_is_short() -> None:
    text = (DOCS / "examples" / "tokens_to_transformer.py").read_text(encoding="utf-8")
    module = ast.parse(text)
    statements = [each for each in module.body[1:] if not isinstance(each, (ast.Import, ast.ImportFrom))]
    code = [line for each in statements for line in ast.unparse(each).splitlines() if line]
    assert len(code) <= 36
    assert max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    """The pages that are made from the code."""
    pages: dict[str, str] = HOOKS["generated_pages"]()
    return pages


def code_blocks(markdown: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_of_all_pages_compile_and_their_imports_exist() -> None:
    blocks = [block for page in PAGES for block in code_blocks(page.read_text(encoding="utf-8"), "python")]
    assert len(blocks) > 15
    for block in blocks:
        compile(block, "block", "exec")
        imports = re.findall(r"^(?:from (?:vqpipe|stages)[\w.]* import .*|import vqpipe.*)$", block, flags=re.MULTILINE)
        exec("\n".join(imports), {})


def vqpipe_commands(shell: str) -> list[list[str]]:
    """The words of every `vqpipe` command of a shell block, without continued lines and comments."""
    lines = shell.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "vqpipe" in line or "-m stages" in line]
    starts = [(each, each.index("vqpipe" if "vqpipe" in each else "stages") + 1) for each in words if each]
    return [each[start:] for each, start in starts if each[start - 1] == "stages" or start == 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_keep_their_words_where_the_site_folds_them(page: Path) -> None:
    for block in code_blocks(page.read_text(encoding="utf-8"), "bash"):
        assert vqpipe_commands(HOOKS["folded_block"](block)) == vqpipe_commands(block)


def test_links_are_rewritten_for_the_site() -> None:
    text = (
        "[a](docs/guides/x.md#part) [b](SECURITY.md) [`c`](vqpipe/config.py) ![d](docs/images/d.png) [e](https://e.org)"
    )
    assert HOOKS["with_site_links"](text, "README.md", "index.md") == (
        "[a](guides/x.md#part) [b](security.md) `c` ![d](images/d.png) [e](https://e.org)"
    )
    text = "[a](../faq.md) [b](../../CONTRIBUTING.md#tests) [c](y.md) [d](#part)\n```\n[e](../../x.py)\n```"
    assert HOOKS["with_site_links"](text, "docs/guides/x.md", "guides/x.md") == (
        "[a](../faq.md) [b](../contributing.md#tests) [c](y.md) [d](#part)\n```\n[e](../../x.py)\n```"
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_page_of_a_command_has_its_options_and_an_example_that_parses(name: str, generated: dict[str, str]) -> None:
    page = generated[f"commands/{name}.md"]
    command = cli.load(name)
    names = {option for each in command.params for option in each.opts if option.startswith("--")}
    assert {option for option in names if not re.search(rf"^`[^`]*{option}\b[^`]*`", page, flags=re.MULTILINE)} == set()
    examples = vqpipe_commands("\n".join(code_blocks(page, "bash")))
    assert examples
    for words in examples:
        assert words[0] == name
        cli.load(name).make_context(name, [word for word in words[1:] if word not in (">", "mine.toml")])


def test_commands_are_listed_with_exit_codes_and_completion(generated: dict[str, str]) -> None:
    page = generated["commands/index.md"]
    assert {name for name in cli.COMMANDS if f"[`{name}`]({name}.md)" not in page} == set()
    assert "vqpipe --install-completion" in page


def test_shell_completion_lists_commands_and_their_options() -> None:
    def complete(words: str) -> list[str]:
        start = "from stages.cli import app; app(prog_name='vqpipe')"
        count = str(len(words.split(" ")) - 1)
        shell = {"_VQPIPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **shell}
        done = subprocess.run(
            [sys.executable, "-c", start], env=environment, capture_output=True, text=True, timeout=300
        )
        return done.stdout.split()

    assert complete("vqpipe tra") == ["train", "train-generator", "train-classifier"]
    assert {"--source", "--out"} <= set(complete("vqpipe prepare-data --"))


def test_settings_page_has_every_section_and_setting(generated: dict[str, str]) -> None:
    page = generated["settings.md"]
    recipes = set(RECIPES)
    named = {name for name, _, _ in HOOKS["SECTIONS"]}
    assert {each.name for recipe in recipes for each in dataclasses.fields(recipe)} == named - {"model.quantizer"}
    for quantizer in config.all_subclasses(QuantizerConfig):
        if quantizer.__module__.startswith("vqpipe.") and "kind" in vars(quantizer):
            assert f'### kind = "{quantizer.kind}"' in page
    assert "`quantizer_rate` *number, default `1.0`*\n:   Learning rate of the quantizer" in page
    assert '`schedule` *`"constant"` or `"linear"` or `"cosine"`, default `"cosine"`*' in page
    assert "`codebook_size` *whole number, required*" in page
    assert "`channel_multipliers` *list of whole numbers, default `[1, 1, 2, 2, 4]`*" in page
    for name, recipe, commands in HOOKS["SECTIONS"]:
        base = recipe
        for key in name.split("."):
            base = typing.get_type_hints(base)[key]
        chapter = page.split(f"## \\[{name}\\]")[1].split("\n## ")[0]
        assert [each.name for each in dataclasses.fields(base) if f"\n`{each.name}` *" not in chapter] == []
        assert set(commands) <= cli.COMMANDS.keys()


def test_presets_page_has_every_preset(generated: dict[str, str]) -> None:
    for name, head in presets.heads():
        entry = generated["presets.md"].split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert head["command"] in entry
        assert "Expected: " in entry


def test_api_reference_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE))
    public = {f"vqpipe.{name}" for name in vqpipe.__all__} | {f"vqpipe.data.{name}" for name in data.__all__}
    settings = {name for name in quantizers.__all__ if name.endswith("Config")}  # on the page of settings
    public |= {f"vqpipe.quantizers.{name}" for name in {*quantizers.__all__} - settings - {"TokenLayout"}}
    assert public - listed == set()


def test_citation_has_the_version_and_the_fields_of_its_format() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert all(each.get("name") or each.get("family-names") for each in citation["authors"])
    assert all({"type", "title", "authors"} <= each.keys() for each in citation["references"])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert citation["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_notebook_is_committed_without_outputs() -> None:
    cells = json.loads((DOCS / "examples" / "tokenizer.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    code = "".join(line for cell in cells if cell["cell_type"] == "code" for line in [*cell["source"], "\n"])
    exec("\n".join(line for line in code.splitlines() if re.match(r"(from|import) vqpipe", line)), {})


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(DOCS / "examples" / "tokenizer.ipynb", 4)
    nbformat.validate(notebook)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [each for cell in notebook.cells if cell.cell_type == "code" for each in cell.outputs]
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 4
    assert "of the codes are used; perplexity" in "".join(each.get("text", "") for each in outputs)


@pytest.mark.slow
def test_site_is_built_without_a_warning_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")]
    assert {"index", "api", "settings", "presets", "changelog", "contributing", "security"} <= set(pages)
    assert {f"commands/{name}" for name in cli.COMMANDS} <= set(pages)
    loaded = re.compile(r"""<(?:script|img|iframe|link(?![^>]*canonical))\b[^>]*(?:src|href)=["']?https?:[^>]*>""")
    assert {found for page in pages for found in loaded.findall((site / f"{page}.html").read_text("utf-8"))} == set()
    assert "url(http" not in "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
