"""`vqpipe inspect`. (tests/stages/test_pipeline.py inspects the artifacts of commands.)"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from stages import facts as facts_in_words
from stages.inspect_artifact import inspect
from vqpipe.artifacts import Draft, start
from vqpipe.artifacts.unfinished import read_unfinished
from vqpipe.errors import ArtifactError
from vqpipe.files import partial_path

CONFIG = {"train": {"steps": 5000}, "name": "x"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An artifact of which two files, a checkpoint and a log are written, by a run that failed."""
    path = tmp_path / "out"
    draft = start(path, "tokens", CONFIG, {})
    assert isinstance(draft, Draft)
    with suppress(ArtifactError), draft:
        for number in range(2):
            with draft.write(f"tokens-{number}.parquet", images=50, skipped={}) as file:
                file.write_bytes(b"12345")
        for step in (900, 1200):
            state = draft.path / "checkpoints" / f"step-{step:08d}" / "state.json"
            state.parent.mkdir(parents=True)
            state.write_text("{}")
        (draft.path / "metrics.jsonl").write_text('{"step": 1250, "loss": 1}\n{"step": 12')
        raise ArtifactError("the disk is full", "Free some space")
    return path


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_is_written_of_an_unfinished_artifact_is_printed(
    out: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(out.with_name(name))
    printed = capsys.readouterr().out
    rows = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert ["kind", "tokens, not finished"] in [[key, rest.strip()] for key, rest in rows]
    for words in ("no process now", "2 files, 10 bytes", "images in them", "100", "checkpoints/step", "1,200 of 5,000"):
        assert words in printed
    assert "1,250 of 5,000" in printed
    assert "the disk is full. Free some space." in printed
    assert "train.steps" not in printed
    inspect(out.with_name(name), settings=True)
    assert "train.steps  5000" in capsys.readouterr().out
    before = sorted(partial_path(out).rglob("*"))
    inspect(out.with_name(name), as_json=True)
    table = json.loads(capsys.readouterr().out)
    assert (table["files"], table["bytes"], table["counts"]) == (2, 10, {"images": 100})
    assert (table["states"], table["logged_step"]) == ({"checkpoints/step": 1200}, 1250)
    assert sorted(partial_path(out).rglob("*")) == before
    with pytest.raises(ArtifactError, match="--verify is for finished artifacts"):
        inspect(out.with_name(name), verify=True)


def test_the_process_that_writes_is_named(out: Path) -> None:
    draft = start(out, "tokens", CONFIG, {})
    assert isinstance(draft, Draft)
    with draft:
        assert read_unfinished(partial_path(out)).writer.startswith("process ")
    assert read_unfinished(partial_path(out)).writer == ""


def test_a_damaged_request_and_a_missing_artifact_are_errors(out: Path, tmp_path: Path) -> None:
    (partial_path(out) / "request.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"request\.json is damaged"):
        inspect(out)
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        inspect(tmp_path / "absent.partial")


def test_facts_command_and_lineage_are_printed_and_settings_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vqpipe", "tokenize", "--images", "my photos", "--out", "tokens"])
    monkeypatch.setenv("COLUMNS", "80")
    long = "a_section_with_a_long_name.and_a_setting_with_a_long_name"
    section, name = long.split(".")
    draft = start(tmp_path / "tokens", "tokens", {section: {name: 3}, "max_pixels": None}, {"images": "0" * 64})
    assert isinstance(draft, Draft)
    facts = {"num_images": 350, "psnr": 24.28213, "skipped": {}, "layout": {"grids": [[16, 8]], "num_groups": 2}}
    with draft:
        draft.publish({**facts, "converged": True, "sizes": {"64x48": {"num_images": 1}}, "skipped": {}, "color": None})
    inspect(tmp_path / "tokens")
    said = capsys.readouterr()
    for words in ("350 images", "PSNR 24.28 dB", "layout: grid 16 x 8, 2 groups", "converged: yes", "64x48: 1 image"):
        assert words in said.out
    assert "vqpipe tokenize --images 'my photos' --out tokens" in said.out
    assert "hash of the files" in said.out
    assert not any(word in said.out for word in ("skipped", "color", "{", "24.282", section))
    assert "tokens --settings prints its 2 settings too." in said.err
    inspect(tmp_path / "tokens", settings=True)
    printed = capsys.readouterr().out.splitlines()
    assert [f"{long}  3", "max_pixels".ljust(len(long)) + "  not set"] == [line.rstrip() for line in printed[-2:]]


def test_the_command_is_that_of_vqpipe_also_where_it_ran_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, program, shown in (("module", "/x/stages/__main__.py", "vqpipe tokenize"), ("other", "/x/a.py", "a.py ")):
        monkeypatch.setattr(sys, "argv", [program, "tokenize"])
        draft = start(tmp_path / name, "tokens", CONFIG, {})
        assert isinstance(draft, Draft)
        with draft:
            draft.publish({})
        inspect(tmp_path / name)
        assert f"made by   {shown}" in capsys.readouterr().out


def test_braces_in_the_name_of_a_fact_are_printed() -> None:
    assert list(facts_in_words.phrases({"psnr": {"a{}b.png": 10.623}, "x{}": 3})) == ["psnr: a{}b.png 10.62", "x{} 3"]


def test_a_tokenizer_without_a_manifest_is_inspected_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    inspect(Path("builtin:photos-f8"))
    printed = capsys.readouterr().out
    assert "16,384 codes" in printed
    assert "downsample factor 8" in printed
    inspect(Path("builtin:photos-f8"), as_json=True)
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["kind"], manifest["config"]["image_size"]) == ("tokenizer", 128)
    assert sorted(manifest["files"]) == ["README.md", "config.json", "model.safetensors"]
    with pytest.raises(ArtifactError, match="has no manifest with the hashes of its files"):
        inspect(Path("builtin:photos-f8"), verify=True)
