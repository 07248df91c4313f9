"""Stored latents: bytes and moments do not depend on how they are computed; rows are read back."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from vqpipe import artifacts
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.latents import LatentSet, LatentStatistics, moments, open_latents, pooled, write_latents
from vqpipe.errors import ArtifactError, DataError, NumericError


def encode(images: Tensor) -> Tensor:
    """uint8[B, 3, 8, 8] -> float[B, 3, 4, 2]: not symmetric, and not of mean 0."""
    x = images.float()
    return 3 * (x[:, :, ::2, ::4] - 40) / 7


class Encoder:
    """A fake tokenizer."""

    device = torch.device("cpu")

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def latent(self, images: Tensor, precision: str = "fp32") -> Tensor:
        return self.function(images)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height // 2, width // 4


@pytest.fixture
def images(tmp_path: Path, draw: Callable[..., bytes]) -> ImageSet:
    for number in range(11):
        folder = tmp_path / "images" / ("b" if number % 3 else "a")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(b"no picture" if number == 7 else draw(number, (12, 9)))
    return open_images([str(tmp_path / "images")])


def write(out: Path, images: ImageSet, **options: object) -> artifacts.Artifact:
    settings = {"encode": encode, "max_skipped": 0.2, "flip": True} | options
    draft = artifacts.start(out, "latents", {"flip": settings["flip"]}, {"images": images})
    assert isinstance(draft, artifacts.Draft)
    with draft:
        facts = write_latents(
            draft,
            images,
            Encoder(settings.pop("encode")),  # type: ignore[arg-type]
            image_size=8,
            **settings,  # type: ignore[arg-type]
        )
        return draft.publish(facts)


def test_latents_are_stored_and_read_back(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqpipe.data.latents.IMAGES_PER_SHARD", 4)
    made = write(tmp_path / "out", images)
    assert made.names("latents-*") == [f"latents-{n:05d}.npy" for n in range(3)]
    assert (made.facts["num_images"], made.facts["num_latents"]) == (10, 20)
    assert (made.facts["latent_shape"], made.facts["num_classes"]) == ([3, 4, 2], 2)
    assert made.facts["skipped"] == {"not-an-image": 1}

    from vqpipe.data.batches import OrderedBatches

    pixels = torch.cat([batch.images for batch in OrderedBatches(images, image_size=8, batch_size=5)])
    truth = torch.stack([encode(pixels), encode(pixels.flip(-1))], dim=1).flatten(0, 1).half()
    latents = open_latents(tmp_path / "out", raw=True)
    assert (len(latents), latents.num_rows) == (10, 20)
    assert torch.equal(latents.take(np.arange(20)), truth.float())

    channels = truth.double().transpose(0, 1).flatten(1)
    normal = open_latents(tmp_path / "out")
    assert normal.statistics.mean == pytest.approx(channels.mean(1).tolist(), rel=1e-12)
    assert normal.statistics.std == pytest.approx(channels.std(1, correction=0).tolist(), rel=1e-12)
    everything = normal.take(range(20)).transpose(0, 1).flatten(1)
    assert torch.allclose(everything.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(everything.std(1, correction=0), torch.ones(3), atol=1e-5)

    usable = [i for i in range(11) if images.key(i) != "b/07"]
    assert [normal.key(i) for i in range(10)] == [images.key(i) for i in usable]
    assert normal.labels.tolist() == images.labels[usable].tolist()
    assert torch.equal(normal.read([3, 5], [1, 0]), normal.take([7, 10]))

    rows = [19, 0, 7, 8, 0]
    taken = normal.take(rows)
    assert torch.equal(taken, normal.take(range(20))[rows])
    assert torch.equal(pickle.loads(pickle.dumps(normal)).take(rows), taken)
    assert truth[:8].numpy().tobytes() not in pickle.dumps(normal)  # those of the first shard
    with pytest.raises(DataError, match="rows 3 to 20 of 20 latents"):
        normal.take([3, 20])


def test_bytes_and_moments_do_not_depend_on_batch_size_and_workers(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqpipe.data.latents.IMAGES_PER_SHARD", 2)
    made = [
        write(tmp_path / f"{workers}", images, num_workers=workers, batch_size=size)
        for workers, size in ((0, 1), (2, 3))
    ]
    assert made[0].digest == made[1].digest
    assert made[0].facts == made[1].facts
    records = [moments(np.load(made[0].file(name))) for name in made[0].names("latents-*")]
    assert pooled(records).to_table() == {key: made[0].facts[key] for key in ("mean", "std")}


def test_latents_beyond_float16_are_an_error(images: ImageSet, tmp_path: Path) -> None:
    for factor in (float("nan"), 1e6, -1e6):
        with pytest.raises(NumericError, match=r"NaN, or values beyond float16's 65504, in the latent of image a/00"):
            write(tmp_path / "bad", images, encode=lambda batch, factor=factor: encode(batch).abs() * factor)


def test_pooled_moments_are_exact_for_any_split_and_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    rows = (1000 + rng.standard_normal((50, 2, 3, 3)) * [[[[8.0]], [[0.0]]]]).astype(np.float16)
    truth = np.moveaxis(rows.astype(np.float64), 1, 0).reshape(2, -1)
    for cuts in ([], [25], [1, 2, 49], [0, 30, 30]):
        statistics = pooled([moments(part) for part in np.split(rows, cuts)])
        assert statistics.mean == pytest.approx(truth.mean(1), rel=1e-13)
        assert statistics.std == pytest.approx(truth.std(1), rel=1e-9)
    assert statistics.std[1] == 0
    normal = statistics.normalize(torch.from_numpy(rows))
    assert not normal[:, 1].any()  # a constant channel is only shifted
    assert torch.allclose(statistics.denormalize(normal), torch.from_numpy(rows).float(), atol=1e-3)


def test_statistics_survive_json_and_are_validated() -> None:
    import json

    statistics = LatentStatistics((0.1, -1 / 3), (1e-3, 2 / 7))
    assert LatentStatistics.from_table(json.loads(json.dumps(statistics.to_table()))) == statistics
    x = torch.randn(2, 2, 3, 3)
    assert torch.equal(LatentStatistics.identity(2).normalize(x), x)
    with pytest.raises(DataError, match="latents of 2 channels, the statistics are of 3"):
        LatentStatistics.identity(3).normalize(x)
    with pytest.raises(DataError, match="1 means and 2 deviations"):
        LatentStatistics((0.0,), (1.0, 1.0))
    with pytest.raises(NumericError, match="not finite"):
        LatentStatistics((float("nan"),), (1.0,))


def test_damaged_or_inconsistent_latents_are_an_error(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a vqpipe artifact"):
        open_latents(tmp_path)
    rest = (1, LatentStatistics.identity(3))
    samples = pa.table({"key": ["a", "b", "c"], "label": [0, 0, 0]})
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 4), np.float32))
    with pytest.raises(DataError, match=r"holds float32 of shape \[2, 3, 4, 4\], not latents"):
        LatentSet([tmp_path / "a.npy"], samples[:2], *rest)
    np.save(tmp_path / "b.npy", np.zeros((2, 3, 4, 4), np.float16))
    with pytest.raises(DataError, match="2 latents with 3 labels"):
        LatentSet([tmp_path / "b.npy"], samples, *rest)
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"is not a \.npy array"):
        LatentSet([tmp_path / "c.npy"], samples[:2], *rest)
    np.save(tmp_path / "d.npy", np.zeros((0, 3, 4, 4), np.float16))
    both = LatentSet([tmp_path / "d.npy", tmp_path / "b.npy"], samples[:2], *rest)
    assert both.take([1]).shape == (1, 3, 4, 4)
