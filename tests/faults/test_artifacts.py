"""Group F: artifacts, weights and versions, as far as tests/test_artifacts.py and the stages do not ask already."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqpipe.artifacts import Artifact, Draft, draft, open_artifact, start
from vqpipe.codebooks.kmeans import load_codebook
from vqpipe.data.examples import TokenSet
from vqpipe.data.tokens import write_token_file
from vqpipe.errors import ArtifactError
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.quantizers import VqConfig
from vqpipe.tokenizer import Tokenizer, write_files


def publish(out: Path, kind: str, write: Callable[[Draft], None], facts: dict[str, Any]) -> Artifact:
    begun = start(out, kind, {}, {"images": "0" * 64})
    assert isinstance(begun, Draft)
    with begun:
        write(begun)
        return begun.publish(facts)


def flip(path: Path, byte: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(bytes(data))


def codebook(begun: Draft) -> None:
    with begun.write("codebook.safetensors") as path:
        save_file({"codebook": torch.ones(4, 3), "counts": torch.ones(4, dtype=torch.int64)}, path)


def tokens(begun: Draft) -> None:
    with begun.write("tokens-00000.parquet") as path:
        write_token_file(path, ["a"], [0], np.array([[[1, 2]]], np.uint16))


def tokenizer(begun: Draft) -> None:
    small = {"base_channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    model = VqganConfig(**small, z_channels=4, quantizer=VqConfig(codebook_size=4, code_dim=2))
    write_files(begun, Tokenizer(build_autoencoder(model), image_size=8))


LOADS: dict[str, tuple[Callable[[Draft], None], str, Callable[[Artifact], object]]] = {
    "codebook": (codebook, "codebook.safetensors", load_codebook),
    "tokenizer": (tokenizer, "model.safetensors", lambda artifact: Tokenizer.from_pretrained(artifact.path)),
    "tokens": (tokens, "tokens-00000.parquet", TokenSet),
}


@pytest.mark.parametrize("kind", LOADS)
def test_rows_87_88_a_flipped_bit_is_found_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    write, name, load = LOADS[kind]
    artifact = publish(tmp_path / "out", kind, write, {"codebook_size": 9, "num_images": 1, "num_tokens": 2})
    load(artifact)
    flip(artifact.path / name, 60 if kind == "tokens" else -5)
    again = open_artifact(artifact.path)  # sizes alone do not show it
    with pytest.raises(ArtifactError, match=rf"{name} is damaged: sha256 \w{{12}}, published as \w{{12}}"):
        load(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"schema": 0}, "has schema 0, this vqpipe reads 1. Use the vqpipe that made it", id="row 90: older"
        ),
        pytest.param(
            {"schema": 2}, "has schema 2, this vqpipe reads 1. Use the vqpipe that made it", id="row 91: newer"
        ),
        pytest.param({"schema": "1"}, "has schema 1", id="of another type"),
    ],
)
def test_rows_90_91_another_schema_is_refused_and_names_its_version(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    artifact = publish(tmp_path / "out", "codebook", codebook, {})
    file = artifact.path / "manifest.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    version = table["provenance"]["versions"]["vqpipe"]
    file.write_text(json.dumps({**table, **change}), encoding="utf-8")
    with pytest.raises(ArtifactError) as failure:
        open_artifact(artifact.path)
    assert message in str(failure.value)
    assert version in str(failure.value)


def test_row_89_unknown_keys_are_passed_over_within_a_schema(tmp_path: Path) -> None:
    artifact = publish(tmp_path / "out", "codebook", codebook, {"k": 4})
    file = artifact.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "later": [1]}), encoding="utf-8")
    assert open_artifact(artifact.path).facts == {"k": 4}


def test_rows_99_112_a_run_that_goes_on_elsewhere_says_so_and_records_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(version: str, threads: int, stop: bool) -> Artifact | None:
        here = {"versions": {"vqpipe": version}, "hardware": {"threads": threads}, "world_size": 1}
        monkeypatch.setattr(draft, "surroundings", lambda world_size: here)
        begun = start(tmp_path / "out", "codebook", {}, {"images": "0" * 64})
        assert isinstance(begun, Draft)
        with begun:
            if begun.record("codebook.safetensors") is None:
                codebook(begun)
            return None if stop else begun.publish({})

    with caplog.at_level(logging.WARNING, logger="vqpipe"):
        run("1", 2, stop=True)
        run("1", 2, stop=True)
        assert caplog.messages == []
        run("1", 4, stop=True)
        artifact = run("2", 4, stop=False)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "hardware.threads was 2, now 4; the manifest will name both",
        'versions.vqpipe was "1", now "2"; the manifest will name both',
    ]
    assert artifact is not None
    runs = artifact.manifest.provenance["runs"]
    assert [(run["versions"]["vqpipe"], run["hardware"]["threads"]) for run in runs] == [("1", 2), ("1", 4), ("2", 4)]
    assert artifact.content == publish(tmp_path / "straight", "codebook", codebook, {}).content


def test_a_file_behind_a_link_is_not_the_artifacts(tmp_path: Path) -> None:
    def write(begun: Draft) -> None:
        with begun.write("sub/a.bin") as path:
            path.write_bytes(b"a")

    artifact = publish(tmp_path / "out", "codebook", write, {})
    (artifact.path / "sub").rename(tmp_path / "elsewhere")
    (artifact.path / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"sub/a\.bin is missing"):
        open_artifact(artifact.path)
