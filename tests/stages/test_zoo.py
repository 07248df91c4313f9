"""`vqpipe zoo`: the table of published tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import console, list_zoo
from vqpipe import downloads, zoo
from vqpipe.zoo.fetch import address


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_list_has_a_line_for_each_entry_that_fits_80_columns(tmp_path: Path, vqpipe: Callable[..., Any]) -> None:
    done = vqpipe(tmp_path, "zoo")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for entry in zoo.entries():
        assert sum(line.split()[:1] == [entry.name] for line in lines) == 1
    (line,) = [line for line in lines if line.strip().startswith("llamagen-f16 ")]
    assert line.split() == ["llamagen-f16", "16", "16,384", "256", "0.055", "yes"]
    names = [line.split()[0] for line in lines if line.split() and zoo.get(line.split()[0])]
    assert names.index("ibq-f16-8k") + 1 == names.index("ibq-f16-16k")
    refused = [bool(entry.refused) for name in names if (entry := zoo.get(name))]
    assert refused == sorted(refused)
    assert "vqpipe zoo NAME" in lines[-1]
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_a_name_prints_all_about_one_with_whole_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for entry in zoo.entries():
        list_zoo.zoo([entry.name])
        printed = capsys.readouterr().out
        assert all(text in printed for text in (entry.title, entry.licence, entry.page))
        assert all(published.protocol in printed for published in entry.published)
        for label, text in list_zoo.all_about(entry, {}):
            narrow = console.wrapped(f"{label:{list_zoo.LABEL_WIDTH}}{text}", 80, list_zoo.LABEL_WIDTH)
            assert all(word in narrow.split() for word in text.split())
            assert all(len(line) <= 80 or ":" in line.strip() for line in narrow.splitlines())


def test_json_has_the_entries_that_contain_the_words_and_what_is_here(
    tmp_path: Path, vqpipe: Callable[..., Any]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps({"facts": {"zoo": "llamagen-f16"}}))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("[")
    done = vqpipe(tmp_path, "zoo", "llamagen", "f16", "--json")
    first, second = json.loads(done.stdout)
    assert (first["name"], first["family"], first["licence"]) == ("llamagen-f16", "llamagen", "MIT")
    assert first["source"] == "hf:FoundationVision/LlamaGen/vq_ds16_c2i.pt"
    assert (first["imported"], first["downloaded"], first["importable"]) == (["mine"], False, True)
    assert second["imported"] == []
    assert "size" not in second  # not known


def test_files_in_the_caches_are_shown_as_downloaded(tmp_path: Path, vqpipe: Callable[..., Any]) -> None:
    entry = zoo.get("taef2")
    assert entry is not None
    for file in entry.files:
        url = address(file)
        assert isinstance(url, downloads.Url)
        downloads.url_folder(url).mkdir(parents=True)
        (downloads.url_folder(url) / file.name).write_bytes(b"")
    (record,) = json.loads(vqpipe(tmp_path, "zoo", "taef2", "--json").stdout)
    assert record["downloaded"] is True


def test_unknown_word_is_an_error_of_one_line(tmp_path: Path, vqpipe: Callable[..., Any]) -> None:
    done = vqpipe(tmp_path, "zoo", "llamagem-f16")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no published tokenizer matches 'llamagem-f16'. Did you mean llamagen-f16?\n"
