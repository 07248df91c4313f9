"""Features on a device: read in order, kept or streamed, watched."""

from collections import Counter

import numpy as np
import pytest
import torch

from vqpipe.codebooks import feature_set
from vqpipe.codebooks import kmeans as module
from vqpipe.codebooks.feature_set import FeatureSet
from vqpipe.codebooks.kmeans import KmeansConfig, kmeans
from vqpipe.codebooks.points import Points
from vqpipe.codebooks.watch import Watch

CPU = torch.device("cpu")
DATA = np.random.default_rng(0).standard_normal((1100, 3)).astype(np.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "BLOCK_ROWS", 256)


def test_blocks_come_in_order_as_float32() -> None:
    points = Points(FeatureSet([DATA[:300], DATA[300:]], ["a", "b"]), CPU, shared=False)
    blocks = list(points.blocks())
    assert [start for start, _ in blocks] == [0, 256, 512, 768, 1024]
    joined = torch.cat([block for _, block in blocks])
    assert joined.dtype == torch.float32
    assert np.array_equal(joined.numpy(), DATA.astype(np.float32))


@pytest.mark.parametrize("batch", [0, 300])
def test_features_kept_on_the_device_are_read_once_and_change_nothing(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KmeansConfig(k=20, iterations=3, batch=batch, tolerance=0.0)
    streamed = kmeans(FeatureSet([DATA], ["x"]), config, seed=0, device=CPU)
    monkeypatch.setattr(module, "room_for_features", lambda *_: DATA.nbytes)
    features, reads = FeatureSet([DATA], ["x"]), Counter()
    stored = features.stored
    monkeypatch.setattr(features, "stored", lambda start, stop: reads.update([start]) or stored(start, stop))
    kept = kmeans(features, config, seed=0, device=CPU)
    assert torch.equal(kept.codes, streamed.codes)
    assert kept.facts() == streamed.facts()
    assert reads == dict.fromkeys([0, 256, 512, 768, 1024], 1)
    assert Points(features, CPU, shared=False, room=DATA.nbytes - 1).kept is None
    points = Points(features, CPU, shared=False, room=DATA.nbytes)
    assert points.kept is not None
    assert {block.dtype for block in points.kept.values()} == {torch.float16}


@pytest.mark.parametrize(
    "settings", [{}, {"batch": 300}, {"per_class": True}, {"select": "random"}, {"init": "random"}], ids=str
)
def test_the_watch_hears_of_as_many_vectors_as_each_phase_announced(settings: dict) -> None:
    class Count(Watch):
        def __init__(self) -> None:
            self.phases: list[list] = []

        def phase(self, title: str, total: int) -> None:
            self.phases.append([title, total, 0])

        def advance(self, vectors: int) -> None:
            self.phases[-1][2] += vectors

    watch = Count()
    labels = np.arange(1100, dtype=np.int32) % 2
    config = KmeansConfig(k=40, iterations=3, tolerance=0.0, **settings)
    kmeans(FeatureSet([DATA], ["x"], labels), config, seed=0, device=CPU, watch=watch)
    assert watch.phases
    for title, total, heard in watch.phases:
        # how many rounds seeding takes is known only about
        assert heard == pytest.approx(total, rel=0.1 if title.startswith("first centres") else 0), title


def test_scale_leaves_room_for_every_sum() -> None:
    for data, visits in ((DATA * 1000, 1), (DATA * 1000, 50), (DATA.astype(np.float32) * 1e-30, 1)):
        points = Points(FeatureSet([data], ["x"]), CPU, shared=False, visits=visits)
        assert float(np.abs(data).max()) * len(data) * visits * points.scale < 2.0**62
        assert torch.isfinite(torch.from_numpy(data).float() * points.scale).all()
