"""`vqpipe extract-features` as a function: what it publishes, and that a second run finds it published."""

from pathlib import Path

import numpy as np
import pytest

from stages.extract_features import extract_features
from vqpipe.artifacts import open_artifact
from vqpipe.codebooks.feature_set import open_features
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
    run(out, pool=4, batch_size=3)  # the batch size does not change what is asked for
    assert "already published" in capsys.readouterr().err
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match=r"config.pool was 4, now 2"):
        run(out, pool=2)


def test_a_wrong_request_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 x 8 patches cannot be averaged to 3 x 3"):
        run(tmp_path / "features", pool=3)
    with pytest.raises(WeightsError, match=r"nowhere\.pt"):
        run(tmp_path / "features", "features.weights=nowhere.pt", encoder="timm:test_vit")
    assert list(tmp_path.iterdir()) == []


def test_random_weights_only_where_asked_for(tmp_path: Path) -> None:
    random = ["features.allow_random_weights=true"]
    extract_features(
        ["builtin:photos/heldout"], tmp_path / "a", encoder="timm:test_vit", pool=5, limit=2, overrides=random
    )
    artifact = open_artifact(tmp_path / "a")
    assert artifact.config["allow_random_weights"] is True
    assert (artifact.facts["num_vectors"], artifact.facts["dim"]) == (50, 64)
