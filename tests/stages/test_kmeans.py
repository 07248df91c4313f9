"""`vqpipe kmeans` as a function: artifacts and bare arrays in, a codebook out."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from stages.kmeans import kmeans
from vqpipe.artifacts import open_artifact
from vqpipe.codebooks.kmeans import load_codebook
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
    with pytest.raises(ArtifactError, match=r"config.k was 16, now 17"):
        kmeans([vectors], out, k=17, iterations=5, device="cpu")
    with pytest.raises(ArtifactError, match=r"config.seed was 0, now 1"):
        kmeans([vectors], out, k=16, iterations=5, device="cpu", seed=1)


def test_refuses_in_words(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="500 vectors, fewer than k = 501"):
        kmeans([vectors], tmp_path / "a", k=501, device="cpu")
    with pytest.raises(ConfigError, match=r"kmeans\.init = 'best' is not a choice"):
        kmeans([vectors], tmp_path / "b", k=5, init="best", device="cpu")
    with pytest.raises(DataError, match="needs labels"):
        kmeans([vectors], tmp_path / "c", k=5, per_class=True, device="cpu")
    with pytest.raises(DataError, match=r"cannot read .*absent"):
        kmeans([tmp_path / "absent.npy"], tmp_path / "d", k=5, device="cpu")
