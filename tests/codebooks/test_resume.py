"""A clustering that is killed anywhere goes on to the same bytes; a state that cannot be trusted is not used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqpipe.artifacts.saved import Checkpoints, Saved
from vqpipe.codebooks import feature_set, seeding
from vqpipe.codebooks import kmeans as module
from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.codebooks.kmeans import Clustering, KmeansConfig, kmeans
from vqpipe.codebooks.watch import Watch
from vqpipe.errors import ArtifactError

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


class StopAfter(Watch):
    """Stops the run after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def advance(self, vectors: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "BLOCK_ROWS", 512)
    monkeypatch.setattr(seeding, "SAVE_SECONDS", 0.0)


def run(folder: Path | None, seed: int = 0, **settings) -> Clustering:
    rest = {name: settings.pop(name) for name in ("watch", "on_step", "on_note") if name in settings}
    config = KmeansConfig(k=40, **settings)
    return kmeans(FeatureSet([DATA], ["x"], LABELS), config, seed=seed, device=CPU, checkpoints=folder, **rest)


def same(a: Clustering, b: Clustering) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.counts, b.counts) and a.facts() == b.facts()


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_a_run_stopped_at_any_block_ends_in_the_same_bytes(tmp_path: Path, settings: dict) -> None:
    whole = run(None, **settings)
    for blocks in range(0, 10_000, 1 if settings.get("per_class") else 43):
        folder = tmp_path / str(blocks)
        try:
            run(folder, watch=StopAfter(blocks), **settings)
        except Stopped:
            assert same(run(folder, **settings), whole)
        else:
            assert blocks > 2
            return
    raise AssertionError("the run never ended")


def test_finished_work_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at(number: int) -> Callable[[float], None]:
        def on_step(inertia: float) -> None:
            heard.append(inertia)
            if len(heard) == number:
                raise Stopped

        return on_step

    heard: list[float] = []
    settings = MODES["lloyd"]
    with pytest.raises(Stopped):
        run(tmp_path, on_step=stop_at(4), **settings)
    monkeypatch.setattr(module, "plusplus_rows", None)  # the first centres are not chosen again
    result = run(tmp_path, on_step=heard.append, **settings)
    assert heard == [*result.history[:4], *result.history[3:]]

    heard.clear()
    settings = MODES["per class"]
    with pytest.raises(Stopped):
        run(tmp_path / "classes", on_step=stop_at(3), init="random", **settings)
    done = []
    monkeypatch.setattr(module, "of_class", lambda *args, of=module.of_class: done.append(args[0].name) or of(*args))
    run(tmp_path / "classes", init="random", **settings)
    assert done == ["class 3"]


@pytest.mark.parametrize("mode", ["lloyd", "mini-batch"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, mode: str) -> None:
    settings = MODES[mode]
    whole = run(tmp_path, **settings)
    newest, before = sorted(tmp_path.glob("iterations-*"), reverse=True)
    whole_bytes = newest.read_bytes()
    notes: list[str] = []
    for damage in (whole_bytes[:-7], whole_bytes[:100], b"", whole_bytes[:-1] + bytes([whole_bytes[-1] ^ 1])):
        newest.write_bytes(damage)
        assert same(run(tmp_path, on_note=notes.append, **settings), whole)
        assert len(notes) == 1
        assert f"{newest.name} is damaged" in notes.pop()
    newest.write_bytes(b"")
    before.write_bytes(b"{}")
    assert same(run(tmp_path, on_note=notes.append, **settings), whole)
    assert len(notes) == 2


def test_a_state_of_another_clustering_is_refused(tmp_path: Path) -> None:
    run(tmp_path, iterations=2)
    for changed in ({"iterations": 3}, {"iterations": 2, "seed": 1}):
        with pytest.raises(ArtifactError, match="other features or settings"):
            run(tmp_path, **changed)
    assert same(run(tmp_path, iterations=2, gpu_share=0.1), run(None, iterations=2))


def test_states_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = Checkpoints(tmp_path / "deep" / "er", "asked")
    assert states.newest("a") is None
    tensors = {"x": torch.arange(6).view(2, 3).T, "none": torch.zeros(0, 4)}
    for step in range(4):
        states.save("a", Saved(step, tensors, {"history": [0.1, step]}))
    assert [file.name for file in states.files("a")] == ["a-00000002.safetensors", "a-00000003.safetensors"]
    found = states.newest("a")
    assert found is not None
    assert (found.step, found.state) == (3, {"history": [0.1, 3]})
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vqpipe.artifacts.saved.flush_to_disk", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*No space left"):
        states.save("a", Saved(4, tensors))
    assert len(list((tmp_path / "deep" / "er").iterdir())) == 2
    states.discard("a")
    assert states.newest("a") is None
