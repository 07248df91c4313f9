"""`vqpipe settings`: the list of settings agrees with the dataclasses that are configured by them."""

import dataclasses
import json
from pathlib import Path

import pytest

from stages.cli import load as load_command
from stages.list_settings import settings as settings_command
from stages.recipe import SECTIONS, PipelineRecipe, load, settings_of
from vqpipe.config import to_table
from vqpipe.errors import ConfigError
from vqpipe.settings import Setting
from vqpipe.training.tokenizer_run import TokenizerRecipe


@pytest.mark.parametrize("command", SECTIONS)
def test_every_setting_of_a_command_has_a_doc_and_a_type(command: str) -> None:
    found = settings_of(command)
    assert {each.section.partition(".")[0] for each in found} == set(SECTIONS[command][1])
    assert [each.name for each in found if not each.doc or not each.type] == []
    assert json.loads(json.dumps([dataclasses.asdict(each) for each in found])) is not None


def test_the_sections_of_train_and_the_pipeline_are_listed() -> None:
    assert set(SECTIONS["train"][1]) == {field.name for field in dataclasses.fields(TokenizerRecipe)}
    read = {name for cls, names in SECTIONS.values() if cls is PipelineRecipe for name in names}
    assert read == {field.name for field in dataclasses.fields(PipelineRecipe)}


def test_defaults_are_those_of_a_preset_without_settings() -> None:
    table = to_table(load(None))
    settings = {command: settings_of(command) for command in ("extract-features", "kmeans", "train", "eval")}
    for section in ("data", "features", "kmeans", "discriminator", "train", "eval"):
        command = section if section in ("kmeans", "train", "eval") else "train"
        command = "extract-features" if section == "features" else command
        defaults = {each.name: each.default for each in settings[command] if each.section == section}
        assert {name: json.loads(json.dumps(value)) for name, value in table[section].items()} == defaults


def test_settings_of_a_kind_and_of_a_section_in_a_section_are_listed_once() -> None:
    found = settings_of("train")
    assert len(found) == len({(each.section, each.kind, each.name) for each in found})
    by_key = {(each.section, each.kind, each.name): each for each in found}
    assert by_key["model.quantizer", "", "kind"].required
    assert '"lc"' in by_key["model.quantizer", "", "kind"].type
    size = by_key["model.quantizer", "lc", "codebook_size"]
    assert (size.required, size.type, size.default) == (True, "whole number", None)
    assert by_key["model.quantizer", "multi_group", "group"].default["kind"] == "cvq"
    assert by_key["data", "", "num_workers"] == Setting(
        section="data",
        name="num_workers",
        type="whole number",
        required=False,
        default=-1,
        resumable=True,
        doc="Processes that decode, per rank; 0: decode in the main process; -1: one per available core, at most 16.",
    )


def test_settings_are_printed_filtered_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    settings_command("train", word="warmup")
    printed = capsys.readouterr().out
    assert "[train]" in printed
    assert "warmup_steps: whole number; default 0" in printed
    assert "quantizer" not in printed
    settings_command("kmeans", as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["name"] == "k"
    assert listed[0]["default"] == 100_000
    with pytest.raises(ConfigError, match=r"tokenize reads no preset\. Known: eval, extract-features"):
        settings_command("tokenize")
    with pytest.raises(ConfigError, match="no setting of kmeans has 'warmup'"):
        settings_command("kmeans", word="warmup")


def test_commands_with_settings_are_those_that_take_set() -> None:
    from stages.cli import COMMANDS

    takes = {name for name in COMMANDS if any("--set" in parameter.opts for parameter in load_command(name).params)}
    assert takes - {"plan"} == set(SECTIONS)  # plan reads the presets of the others


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("[data]\nimage_size = 64", "model.kind, model.quantizer.kind, objective.perceptual are not set"),
        (
            "[model]\nkind = 'vqgan'\nquantizer.kind = 'vq'\n",
            "quantizer.codebook_size, model.quantizer.code_dim, obj",
        ),
        ("[train]\nstepps = 64", r"unknown key train\.stepps\. Did you mean steps"),
    ],
)
def test_all_missing_settings_of_a_preset_are_in_one_error_with_a_preset_to_start_from(
    text: str, lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=lacking) as caught:
        load(str(tmp_path / "mine.toml"))
    assert "stepps" in text or "vqpipe presets small > mine.toml writes a whole preset" in str(caught.value)


def test_a_preset_needs_no_model_for_the_commands_that_read_none(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[kmeans]\nk = 7\n")
    assert load(str(tmp_path / "mine.toml"), reads=["kmeans"]).kmeans.k == 7
    with pytest.raises(ConfigError, match=r"model\.kind"):
        load(str(tmp_path / "mine.toml"), reads=["model"])


@pytest.mark.parametrize("command", ["train", "train-generator", "train-classifier"])
def test_help_says_where_all_settings_are_listed(command: str) -> None:
    assert f"vqpipe settings {command}" in (load_command(command).help or "")
