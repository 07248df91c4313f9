"""What the commands say and record about images that are left out, unlabeled, or share keys; and unusual file names."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import console
from stages.evaluate import evaluate
from stages.extract_features import extract_features
from stages.options import out_path
from stages.prepare_data import prepare_data
from stages.reconstruct import reconstruct
from stages.tokenize_images import tokenize
from stages.train_classifier import train_classifier
from vqpipe.artifacts import open_artifact
from vqpipe.errors import ArtifactError, DataError

MakeTokenizer = Callable[..., Path]
OPTIONS: dict[str, Any] = {"num_workers": 0}
STRAY = "photos/drawn-0.png and 1 more lie beside the class folders: without them, the images have 2 classes"
FACTS = {"left_out": {".txt": 1, "dead link": 1}, "unlabeled": STRAY}


@pytest.fixture
def stray(tmp_path: Path, picture_folder: Path) -> Path:
    """A folder of two classes with two pictures in its root, a text and a dead link."""
    folder = tmp_path / "photos"
    for number, picture in enumerate(sorted(picture_folder.iterdir())):
        target = folder / ("", "cat", "dog")[min(number // 2, 2)] / picture.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    (folder / "cat" / "notes.txt").write_text("notes")
    (folder / "dog" / "link.png").symlink_to("gone.png")
    return folder


def tar(path: Path, picture: Path) -> None:
    with tarfile.open(path, "w") as file:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = picture.stat().st_size
            file.addfile(member, io.BytesIO(picture.read_bytes()))


def test_commands_say_and_record_what_is_left_out_and_why_labels_are_missing(
    stray: Path, tiny_tokenizer: MakeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer("tokenizer")
    tokenize([str(stray)], tokenizer, tmp_path / "tokens", **OPTIONS)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [console.READING, "left out: 1 .txt, 1 dead link", f"unlabeled: {STRAY}"]
    extract_features([str(stray)], tmp_path / "features", limit=2, **OPTIONS)
    prepare_data("folder", stray, tmp_path / "dataset", **OPTIONS)
    for name in ("tokens", "features", "dataset"):
        facts = open_artifact(tmp_path / name).facts
        assert {key: facts[key] for key in FACTS} == FACTS
    evaluate([str(stray)], tokenizer, tmp_path / "report", limit=2, **OPTIONS)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert {key: metrics[key] for key in FACTS} == FACTS

    with pytest.raises(DataError, match=r"10 of 10 images have no label \(photos/drawn-0.png and 1 more lie beside"):
        train_classifier(
            tmp_path / "tokens",
            tokenizer,
            tmp_path / "classifier",
            preset="vit-tiny",
            overrides=["train.validate_every=0", "examples.held_out=0"],
            device="cpu",
        )
    with pytest.raises(DataError, match=r"images of photos have no classes \(photos/drawn-0.png and 1 more lie beside"):
        evaluate([str(stray)], tokenizer, tmp_path / "classes", random_classes=2, **OPTIONS)


def test_equal_keys_of_shards_are_said_and_made_distinct_on_request(
    picture_folder: Path, tiny_tokenizer: MakeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        tar(tmp_path / f"{name}.tar", picture_folder / "drawn-0.png")
    tokenizer, images = tiny_tokenizer("tokenizer"), [f"{tmp_path}/{{a,b}}.tar"]
    tokenize(images, tokenizer, tmp_path / "equal", **OPTIONS)
    assert "duplicate keys: 3 keys are each those of several images, as 0 in a.tar and b.tar" in capsys.readouterr().err
    equal = open_artifact(tmp_path / "equal")
    assert equal.facts["duplicate_keys"] == 3
    assert "key_prefix" not in equal.config
    tokenize(images, tokenizer, tmp_path / "distinct", key_prefix="shard", **OPTIONS)
    assert "duplicate keys" not in capsys.readouterr().err
    distinct = open_artifact(tmp_path / "distinct")
    assert "duplicate_keys" not in distinct.facts
    keys = pq.read_table(distinct.file("tokens-00000.parquet"))["key"].to_pylist()
    assert keys == [f"{name}/{number}" for name in "ab" for number in range(3)]
    with pytest.raises(ArtifactError, match=r"made with other settings: key_prefix"):
        tokenize(images, tokenizer, tmp_path / "equal", key_prefix="shard", **OPTIONS)


@pytest.mark.parametrize("odd", [os.fsdecode(b"caf\xe9"), "esc\x1b[31m", "line\nbreak"])
def test_odd_file_names_are_read_and_written_unless_they_are_not_utf8(
    odd: str,
    picture_folder: Path,
    tiny_tokenizer: MakeTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, tokenizer = tmp_path / odd, tiny_tokenizer("tokenizer")
    (folder / f"class {odd}").mkdir(parents=True)
    file = folder / f"class {odd}" / f"{odd}.png"
    shutil.copy(picture_folder / "drawn-0.png", file)
    tar(folder / f"{odd}.tar", file)
    (folder / "class 2").mkdir()
    (folder / "class 2" / "gone.png").symlink_to(odd)
    tokenizer = tokenizer.rename(tmp_path / f"tokenizer {odd}")
    tokenize([str(folder), str(folder / f"{odd}.tar")], tokenizer, tmp_path / "tokens", key_prefix="shard", **OPTIONS)
    prepare_data("folder", folder, tmp_path / "dataset", **OPTIONS)
    evaluate([str(folder)], tokenizer, tmp_path / "report", random_classes=1, **OPTIONS)
    reconstruct([file], tokenizer, tmp_path / "reconstructed")
    for name in ("tokens", "dataset", "report", "reconstructed"):
        for written in (tmp_path / name).glob("*.json"):
            written.read_bytes().decode()
            assert not any("\udc80" <= letter <= "\udcff" for letter in str(json.loads(written.read_text())))
        open_artifact(tmp_path / name).verify()
    if "\udce9" not in odd:
        tokenize([str(folder)], tokenizer, tmp_path / odd / f"out {odd}", **OPTIONS)
        open_artifact(tmp_path / odd / f"out {odd}").verify()
    else:
        with pytest.raises(ArtifactError, match=r"--out .*caf\\xe9 is not UTF-8. Choose another name"):
            out_path(tmp_path / odd)
        with pytest.raises(ArtifactError, match="is not UTF-8"):
            tokenize([str(folder)], tokenizer, tmp_path / odd / "out", **OPTIONS)
    assert "\x1b" not in capsys.readouterr().err
