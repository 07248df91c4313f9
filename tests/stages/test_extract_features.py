"""`vqpipe extract-features` as a function: what it publishes, and that a repeated run finds it."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stages.extract_features import extract_features
from vqpipe.artifacts import open_artifact
from vqpipe.codebooks.features import open_features
from vqpipe.errors import ArtifactError, ConfigError, WeightsError

SETTINGS = ["features.image_size=32", "features.patch_size=4", "features.components=8", "features.images_per_shard=4"]


def run(out: Path, *more: str, **options) -> None:
    extract_features(["builtin:photos/heldout"], out, limit=10, overrides=[*SETTINGS, *more], device="cpu", **options)


def test_publishes_features_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features"
    run(out, pool=4)
    assert capsys.readouterr().out.split() == [str(out)]
    artifact = open_artifact(out, "features")
    artifact.verify()
    assert artifact.facts["num_images"] == 10
    assert artifact.facts["num_vectors"] == 160
    assert artifact.config["components"] == 8
    assert artifact.inputs.keys() == {"images"}
    assert open_features([out]).dim == 8
    assert np.load(artifact.file("features-00002.npy"), mmap_mode="r").shape == (32, 8)

    before = (out / "manifest.json").stat().st_mtime_ns
    run(out, pool=4, batch_size=3)  # the batch size does not change the request
    assert "already published" in capsys.readouterr().err
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match=r"settings: pool was 4, now 2"):
        run(out, pool=2)


def test_pool_need_not_divide_the_grid(tmp_path: Path) -> None:
    run(tmp_path / "features", pool=3)
    assert open_artifact(tmp_path / "features").facts["num_vectors"] == 10 * 9


def test_pool_larger_than_the_grid_is_refused_before_images_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 x 8 patches cannot be averaged to 9 x 9"):
        extract_features([str(tmp_path)], tmp_path / "features", pool=9, overrides=SETTINGS)


def test_weights_are_downloaded_only_with_the_option(tmp_path: Path, hub: Any) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    hub.files["model.safetensors"] = tmp_path / "model.safetensors"
    options = {"encoder": "timm:test_vit", "pool": 5, "limit": 2, "device": "cpu"}
    with pytest.raises(WeightsError, match="Add --download"):
        extract_features(["builtin:photos/heldout"], tmp_path / "features", **options)
    assert hub.requests == []
    extract_features(["builtin:photos/heldout"], tmp_path / "features", download=True, **options)
    assert hub.requests == ["timm/test_vit.r160_in1k/model.safetensors"]
    assert open_artifact(tmp_path / "features").inputs.keys() == {"images", "weights"}


def test_an_invalid_request_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pt"):
        run(tmp_path / "features", "features.weights=nowhere.pt", encoder="timm:test_vit")
    assert list(tmp_path.iterdir()) == []


def test_random_weights_need_a_setting(tmp_path: Path) -> None:
    random = ["features.allow_random_weights=true"]
    extract_features(
        ["builtin:photos/heldout"], tmp_path / "a", encoder="timm:test_vit", pool=5, limit=2, overrides=random
    )
    artifact = open_artifact(tmp_path / "a")
    assert artifact.config["allow_random_weights"] is True
    assert (artifact.facts["num_vectors"], artifact.facts["dim"]) == (50, 64)


def test_precision_is_part_of_the_request(tmp_path: Path) -> None:
    random = ["features.allow_random_weights=true"]
    for name, precision in (("plain", None), ("fp32", "fp32"), ("bf16", "bf16")):
        extract_features(
            ["builtin:photos/heldout"],
            tmp_path / name,
            encoder="timm:test_vit",
            pool=5,
            limit=2,
            overrides=random,
            precision=precision,
        )
    plain, fp32, bf16 = (open_artifact(tmp_path / name) for name in ("plain", "fp32", "bf16"))
    assert plain.manifest.request == fp32.manifest.request != bf16.manifest.request
    assert bf16.config["precision"] == "bf16"
    values = [np.load(artifact.file("features-00000.npy")).astype(np.float32) for artifact in (fp32, bf16)]
    assert values[0].shape == values[1].shape
    assert np.isfinite(values[1]).all()


def test_prints_images_per_second_and_time_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "features", num_workers=0)
    printed = capsys.readouterr().err
    assert re.search(r"10 images in \d:\d\d:\d\d, [\d.e+]+/s: .*\d+ %", printed), printed
    shares = [int(share) for share in re.findall(r"(?:waiting for images|encoding|copying|writing) (\d+) %", printed)]
    assert 0 < sum(shares) <= 102


def test_resume_is_bit_exact_after_sigkill(
    tmp_path: Path, start_process: Callable[..., Any], processes: Any, draw_folder: Callable[..., Path]
) -> None:
    images = str(draw_folder(tmp_path / "images", 60))
    words = ["extract-features", "--images", images, "--num-workers", "1"]
    words += [part for setting in SETTINGS for part in ("--set", setting)] + ["--out", str(tmp_path / "killed")]
    process = start_process(
        processes.program, processes.VQPIPE, words, tmp_path, dict(os.environ), tmp_path / "printed"
    )
    partial = tmp_path / "killed.partial"
    while process.is_alive() and not (partial / "features-00001.npy").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in (partial / ".records").glob("*.json")}
    options = {"overrides": SETTINGS, "device": "cpu"}
    time.sleep(0.5)  # until its loader process, which also holds the lock, has ended
    extract_features([images], tmp_path / "killed", num_workers=0, **options)
    extract_features([images], tmp_path / "straight", num_workers=2, **options)
    killed, straight = (open_artifact(tmp_path / name) for name in ("killed", "straight"))
    killed.verify()
    assert len(before) >= 2
    assert killed.digest == straight.digest
