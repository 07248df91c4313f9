"""A clustering stopped at any moment resumes to the same bytes; damaged or foreign states are not used."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from vqpipe.codebooks import features as features_module
from vqpipe.codebooks import kmeans as module
from vqpipe.codebooks import seeding
from vqpipe.codebooks.codebook import Clustering
from vqpipe.codebooks.features import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.errors import ArtifactError
from vqpipe.progress import SILENT, Progress, Silent

CPU = torch.device("cpu")
DATA = np.random.default_rng(0).standard_normal((1500, 5)).astype(np.float16)
LABELS = np.arange(1500, dtype=np.int32) % 4
MODES = {
    "lloyd": {"iterations": 4, "tolerance": 0.0},
    "random start, all empty": {"iterations": 2, "tolerance": 0.0, "init": "random"},
    "mini-batch": {"iterations": 3, "tolerance": 0.0, "batch": 300},
    "per class": {"iterations": 2, "per_class": True},
    "random codes": {"select": "random"},
}


class Stopped(Exception):
    """Stands for a kill."""


class Record(Silent):
    """Records notes and messages; stops the run after `blocks` advances or at note number `stop_note`."""

    def __init__(self, blocks: int = 10**9, stop_note: int = 0) -> None:
        self.blocks, self.stop_note = blocks, stop_note
        self.notes: list[str] = []
        self.messages: list[str] = []

    def advance(self, count: int = 1) -> None:
        self.blocks -= 1
        if self.blocks < 0:
            raise Stopped

    def note(self, text: str, details: Sequence[tuple[str, str]] = ()) -> None:
        self.notes.append(text)
        if len(self.notes) == self.stop_note:
            raise Stopped

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK_ROWS", 512)
    monkeypatch.setattr(seeding, "SAVE_SECONDS", 0.0)


def run(folder: Path | None, seed: int = 0, progress: Progress = SILENT, **settings) -> Clustering:
    config = KmeansConfig(k=40, **settings)
    features = FeatureSet([DATA], ["x"], LABELS)
    return kmeans(features, config, seed=seed, device=CPU, checkpoints=folder, progress=progress)


def same(a: Clustering, b: Clustering) -> bool:
    return torch.equal(a.codebook, b.codebook) and torch.equal(a.counts, b.counts) and a.facts() == b.facts()


@pytest.mark.parametrize(("mode", "stride"), [*zip(MODES, (331, 7, 331, 2, 2), strict=True)])
def test_resume_after_a_stop_at_any_block_is_bit_exact(tmp_path: Path, mode: str, stride: int) -> None:
    settings = MODES[mode]
    whole = run(None, **settings)
    for blocks in range(0, 10_000, stride):
        folder = tmp_path / str(blocks)
        try:
            run(folder, progress=Record(blocks), **settings)
        except Stopped:
            assert same(run(folder, **settings), whole)
        else:
            assert blocks > 2
            return
    raise AssertionError("the run never ended")


def test_resume_does_not_repeat_finished_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MODES["lloyd"]
    with pytest.raises(Stopped):
        run(tmp_path, progress=Record(stop_note=4), **settings)
    monkeypatch.setattr(module, "plusplus_rows", None)  # initial centers are not chosen again
    resumed = Record()
    result = run(tmp_path, progress=resumed, **settings)
    assert resumed.notes == [f"iteration {i}, inertia {result.history[i]:.6g}" for i in (3, 4)]


def test_resume_does_not_repeat_finished_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MODES["per class"]
    with pytest.raises(Stopped):
        run(tmp_path, progress=Record(stop_note=3), **settings)
    done = []
    cluster_class = module.cluster_class
    monkeypatch.setattr(module, "cluster_class", lambda *args: done.append(args[0].name) or cluster_class(*args))
    run(tmp_path, **settings)
    assert done == ["class 3"]


@pytest.mark.parametrize("mode", ["lloyd", "mini-batch"])
def test_a_damaged_state_is_skipped_for_the_one_before(tmp_path: Path, mode: str) -> None:
    settings = MODES[mode]
    whole = run(tmp_path, **settings)
    for name in ("clustering.safetensors", "state.json"):
        newest, before = (path / name for path in sorted(tmp_path.glob("iterations-*"), reverse=True))
        content = newest.read_bytes()
        for damage in (content[:-7], content[:100], b"", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
            newest.write_bytes(damage)
            record = Record()
            assert same(run(tmp_path, progress=record, **settings), whole)
            assert len(record.messages) == 1
            assert newest.parent.name in record.messages[0]
            assert "; the state before it is used" in record.messages[0]
    newest.write_bytes(b"")
    before.write_bytes(b"{}")
    record = Record()
    assert same(run(tmp_path, progress=record, **settings), whole)
    assert len(record.messages) == 2


def test_a_damaged_class_is_clustered_again(tmp_path: Path) -> None:
    settings = MODES["per class"]
    whole = run(tmp_path, **settings)
    (file,) = (tmp_path / "class-00002").glob("*/clustering.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    record = Record()
    assert same(run(tmp_path, progress=record, **settings), whole)
    assert [message.partition(",")[0] for message in record.messages] == ["class 2"]


def test_states_of_another_clustering_are_an_error(tmp_path: Path) -> None:
    run(tmp_path, iterations=2)
    for changed in ({"iterations": 3}, {"iterations": 2, "seed": 1}):
        with pytest.raises(ArtifactError, match="other inputs or settings"):
            run(tmp_path, **changed)
    assert same(run(tmp_path, iterations=2, gpu_share=0.1), run(None, iterations=2))
