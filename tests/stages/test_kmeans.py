"""`vqpipe kmeans` as a function: artifacts and bare arrays in, a codebook out."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.extract_features import extract_features
from stages.kmeans import kmeans, report, suitable_k
from stages.recipe import load
from vqpipe import presets
from vqpipe.artifacts import open_artifact
from vqpipe.codebooks.codebook import Clustering, load_codebook
from vqpipe.codebooks.features import FeatureSet
from vqpipe.errors import ArtifactError, ConfigError, DataError


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((500, 6)).astype(np.float16))
    return tmp_path / "vectors.npy"


def test_publishes_a_codebook_once(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "codebook"
    kmeans([vectors], out, k=16, iterations=5, device="cpu")
    assert capsys.readouterr().out.split() == [str(out)]
    artifact = open_artifact(out, "codebook")
    artifact.verify()
    facts = artifact.facts
    assert (facts["k"], facts["dim"], facts["num_vectors"]) == (16, 6, 500)
    assert facts["inertia"] == facts["inertia_per_iteration"][-1]
    assert len(facts["inertia_per_iteration"]) == facts["iterations"] + 1 <= 6
    stored = load_file(artifact.file("codebook.safetensors"))
    assert stored["counts"].sum() == 500
    assert load_codebook(out).equal(stored["codebook"])
    assert load_codebook(artifact).equal(stored["codebook"])

    kmeans([vectors], out, k=16, iterations=5, device="cpu")
    assert "already published" in capsys.readouterr().err
    kmeans([vectors], out, k=16, iterations=5, device="cpu", overrides=["kmeans.gpu_share=0"])
    with pytest.raises(ArtifactError, match=r"settings: k was 16, now 17"):
        kmeans([vectors], out, k=17, iterations=5, device="cpu")
    with pytest.raises(ArtifactError, match=r"settings: seed was 0, now 1"):
        kmeans([vectors], out, k=16, iterations=5, device="cpu", seed=1)


def test_prints_a_report_on_stderr(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kmeans([vectors], tmp_path / "codebook", k=20, iterations=2, mini_batch=128, device="cpu")
    printed = capsys.readouterr().err
    artifact = open_artifact(tmp_path / "codebook", "codebook")
    assert artifact.manifest.config["batch"] == 128
    facts = artifact.facts
    assert facts["distinct_codes"] == 20
    assert facts["cluster_sizes"]["smallest"] >= 1
    for line in ("vectors per code", "in the largest 1 % of clusters", f"{facts['inertia']:.6g}", "reading features"):
        assert line in printed
    assert {file.name for file in (tmp_path / "codebook").iterdir()} == {"manifest.json", "codebook.safetensors"}


def test_an_inertia_that_has_no_first_is_printed_once() -> None:
    """As of a clustering per class."""
    values = report(Clustering(torch.eye(2), torch.ones(2, dtype=torch.int64), (0.25,), True, 3))
    assert next(iter(values.items())) == ("inertia", "0.25")


def test_resume_is_bit_exact_after_sigkill_and_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start_process: Callable[..., Any], processes: Any
) -> None:
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).standard_normal((6_000, 8)).astype(np.float16))
    settings = {"k": 150, "iterations": 60, "overrides": ["kmeans.tolerance=0"]}
    kmeans([vectors], tmp_path / "whole", device="cpu", **settings)
    out, states = tmp_path / "killed", tmp_path / "killed.partial" / "checkpoints"
    command = ["kmeans", "--features", str(vectors), "--k", "150", "--iterations", "60", "--out", str(out)]
    command += ["--set", "kmeans.tolerance=0", "--device", "cpu"]
    process = start_process(
        processes.program, processes.VQPIPE, command, tmp_path, dict(os.environ), tmp_path / "printed"
    )
    while max(states.glob("iterations-*"), default=states).name < "iterations-00000003" and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    newest = sorted(states.glob("iterations-*"))[-1]
    file = newest / "clustering.safetensors"
    file.write_bytes(file.read_bytes()[:-5])

    capsys.readouterr()
    kmeans([vectors], out, device="cpu", **settings)
    printed = capsys.readouterr().err
    assert newest.name in printed
    assert "the state before it is used" in printed
    assert "initial centers" not in printed  # they are not chosen again
    whole, killed = (open_artifact(tmp_path / name, "codebook") for name in ("whole", "killed"))
    assert whole.digest == killed.digest
    assert whole.facts == killed.facts


def test_unusable_features_and_settings_are_errors(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="500 vectors, fewer than k = 501"):
        kmeans([vectors], tmp_path / "a", k=501, device="cpu")
    with pytest.raises(ConfigError, match=r"kmeans\.init = 'best' is not a choice"):
        kmeans([vectors], tmp_path / "b", k=5, init="best", device="cpu")
    with pytest.raises(DataError, match="needs labels"):
        kmeans([vectors], tmp_path / "c", k=5, per_class=True, device="cpu")
    with pytest.raises(DataError, match=r"cannot read .*absent"):
        kmeans([tmp_path / "absent.npy"], tmp_path / "d", k=5, device="cpu")


def test_without_k_it_is_the_preset_s_or_an_error_that_suggests_one(vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("extends = 'smoke'\nkmeans.k = 12\n")
    kmeans([vectors], tmp_path / "preset", preset=str(tmp_path / "mine.toml"), device="cpu")
    kmeans([vectors], tmp_path / "set", overrides=["kmeans.k=9", "kmeans.iterations=1"], device="cpu")
    assert [open_artifact(tmp_path / name).facts["k"] for name in ("preset", "set")] == [12, 9]
    with pytest.raises(
        ConfigError, match=r"number of codes is not given, and vectors\.npy holds 500 vectors\. Give --k 1"
    ):
        kmeans([vectors], tmp_path / "none", device="cpu")
    with pytest.raises(ConfigError, match="number of codes is not given"):  # a preset without [kmeans]
        kmeans([vectors], tmp_path / "none", preset="mgvq-f16-g4", device="cpu")
    features = FeatureSet([np.zeros((6000, 2), np.float32)], ["x"], labels=np.arange(6000) % 10)
    assert (suitable_k(features, per_class=False), suitable_k(features, per_class=True)) == (23, 20)


def test_a_line_warns_of_features_of_another_size_than_the_preset_s(
    tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("extends = 'smoke'\ndata.image_size = 32\nfeatures.image_size = 64\nkmeans.k = 12\n")
    images = [str(picture_folder)]
    extract_features(images, tmp_path / "features", preset=str(mine), num_workers=0, device="cpu")
    warning = "of images of 64 px, and preset {} trains at 32 px (data.image_size)"
    assert "warning: these are features " + warning.format(mine) in " ".join(capsys.readouterr().err.split())
    kmeans([tmp_path / "features"], tmp_path / "codebook", preset=str(mine), device="cpu")
    printed = " ".join(capsys.readouterr().err.split())
    assert f"warning: {tmp_path / 'features'} has features " + warning.format(mine) in printed
    kmeans([tmp_path / "features"], tmp_path / "equal", preset="smoke", k=12, device="cpu")
    assert "warning" not in capsys.readouterr().err


def test_presets_with_features_extract_them_at_the_size_they_train_at() -> None:
    for name in presets.names("model"):
        if any("features" in table for table in presets.chain(name)):
            settings = load(name)
            assert settings.features.chosen_size in (None, settings.data.image_size), name
