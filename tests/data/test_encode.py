"""Shards written while the next is encoded: order, errors, memory, and where the time goes."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqpipe import artifacts
from vqpipe.artifacts import Artifact, Draft
from vqpipe.data import transforms
from vqpipe.data.encode import Background, EncodedShard, RowEncoder, Stopwatch, share, write_shards
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.tokens import read_tokens, token_encoder, write_tokens
from vqpipe.errors import ArtifactError, DataError

NUM = 23
BAD = {4, 10, 11, 12, 13}  # with shards of 10 and batches of 4 one batch holds nothing that can be used


@pytest.fixture
def images(tmp_path: Path, draw: Callable[..., bytes]) -> ImageSet:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(NUM):
        data = draw(i, (32, 24), "JPEG")
        (folder / f"{i:02d}.jpg").write_bytes(b"" if i in BAD else data)
    return open_images([folder])


class Silent:
    def resume(self, count: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


def mean_colours(check: Callable[[Tensor, list[str]], None] = lambda rows, keys: None) -> RowEncoder:
    """The simplest rows there are: the mean of each channel, in thousandths."""
    return RowEncoder(
        encode=lambda images: (images.double().mean(dim=(2, 3)) * 1000).long(),
        check=check,
        device=torch.device("cpu"),
        row_shape=(3,),
        dtype=np.dtype(np.uint32),
    )


def run(out: Path, images: ImageSet, encoder: RowEncoder | None = None, **options) -> Artifact:
    draft = artifacts.start(out, "features", {}, {"images": images})
    assert isinstance(draft, Draft)

    def write(number: int, shard: EncodedShard) -> None:
        (options.get("before_writing") or (lambda number: None))(number)
        with (
            draft.write(f"{number}.npy", keys=shard.keys, skipped=dict(shard.skipped)) as path,
            path.open("wb") as file,
        ):
            np.save(file, shard.rows)

    with draft:
        stopwatch = options.get("stopwatch") or Stopwatch()
        write_shards(
            draft,
            images,
            encoder or mean_colours(),
            write,
            name="{}.npy".format,
            shard_size=10,
            stop=len(images),
            max_skipped=0.5,
            stopwatch=stopwatch,
            progress=Silent(),
            image_size=16,
            batch_size=4,
            num_workers=options.get("num_workers", 0),
        )
        return draft.publish({})


def test_shards_hold_every_usable_image_in_order(images: ImageSet, tmp_path: Path) -> None:
    stopwatch = Stopwatch()
    artifact = run(tmp_path / "out", images, stopwatch=stopwatch)
    rows = np.concatenate([np.load(artifact.file(name)) for name in artifact.names("*.npy")])
    crops = [transforms.center_crop(transforms.decode(images.read(i)), 16) for i in range(NUM) if i not in BAD]
    expected = (torch.stack(crops).double().mean(dim=(2, 3)) * 1000).long()
    assert rows.dtype == np.uint32
    assert np.array_equal(rows, expected.numpy())
    assert stopwatch.images == NUM
    assert set(stopwatch.parts) == {"waiting for images", "encoding", "copying", "writing"}
    assert 0 < sum(stopwatch.shares().values()) <= 1
    assert stopwatch.beside["writing"] > 0


@pytest.mark.parametrize("workers", [1, 3, -1])
@pytest.mark.parametrize("fast", [True, False])
def test_the_same_bytes_for_any_workers_and_decoder(
    images: ImageSet, tmp_path: Path, workers: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "alone", images).content
    if not fast:
        monkeypatch.setattr(transforms, "simplejpeg", None)
    assert run(tmp_path / "other", images, num_workers=workers).content == expected


def test_loader_processes_start_once(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import dataloader

    started: list[int] = []
    real = dataloader._MultiProcessingDataLoaderIter.__init__
    count = lambda self, loader: (started.append(loader.num_workers), real(self, loader))[1]  # noqa: E731
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "__init__", count)
    run(tmp_path / "out", images, num_workers=2)
    assert started == [2]


def test_an_error_of_the_writing_thread_is_raised_and_what_was_whole_is_kept(images: ImageSet, tmp_path: Path) -> None:
    def full(number: int) -> None:
        if number == 1:
            assert threading.current_thread() is not threading.main_thread()
            raise OSError(28, "No space left on device", "1.npy")

    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out", images, before_writing=full)
    partial = tmp_path / "out.partial"
    assert (partial / "0.npy").is_file()
    assert not (partial / "1.npy").exists()
    assert not list(partial.glob(".writing-*"))
    resumed: list[int] = []
    again = run(tmp_path / "out", images, before_writing=resumed.append)
    assert 0 not in resumed
    assert again.content == run(tmp_path / "straight", images).content


class Stop(BaseException):
    """Like a signal: no Exception."""


def test_an_interruption_waits_for_the_shard_that_is_being_written(images: ImageSet, tmp_path: Path) -> None:
    encoding_the_second = threading.Event()

    def slowly(number: int) -> None:
        assert encoding_the_second.wait(20)

    def stop(rows: Tensor, keys: list[str]) -> None:
        if keys[-1] == "17":  # in the second shard, while the first is being written
            encoding_the_second.set()
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", images, mean_colours(stop), before_writing=slowly)
    names = {path.name for path in (tmp_path / "out.partial").glob("*.npy")}
    assert names == {"0.npy"}
    assert run(tmp_path / "out", images).content == run(tmp_path / "straight", images).content


def die(image: Image.Image, size: int) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_loader_process_that_is_killed_is_one_error(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # its patience at shutdown: 5 s
    monkeypatch.setattr("vqpipe.data.batches.center_crop", die)
    with pytest.raises(DataError, match=r"the image loader stopped: .*Try fewer workers"):
        run(tmp_path / "out", images, num_workers=1)


def test_results_are_fetched_while_the_next_batch_is_computed(images: ImageSet, tmp_path: Path) -> None:
    """What a CUDA device gains from: batch i + 1 is handed over before batch i is waited for."""
    order: list[str] = []
    plain = mean_colours(lambda rows, keys: order.append(f"stored {keys[0]}"))

    def encode(batch: Tensor) -> Tensor:
        order.append("encode")
        return plain.encode(batch)

    run(tmp_path / "out", images, dataclasses.replace(plain, encode=encode))
    usable = order.count("encode")
    assert order[:3] == ["encode", "encode", "stored 00"]
    assert order.count("encode") == len(order) - usable == 6


def test_one_job_at_a_time() -> None:
    running: list[int] = []

    def job() -> None:
        running.append(1)
        assert len(running) == 1
        running.pop()

    with Background(Stopwatch()) as background:
        for _ in range(5):
            background.submit(job)
    with pytest.raises(ArtifactError, match="no"), Background(Stopwatch()) as background:
        background.submit(lambda: (_ for _ in ()).throw(ArtifactError("no")))


def test_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    images = open_images([tmp_path])
    with pytest.raises(DataError, match="1 of 1 images cannot be used"):
        run(tmp_path / "out", images)


def test_share() -> None:
    assert [share(stop, 10) for stop in (1, 10, 25)] == [1, 10, 25]


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("codebook_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_there_and_back(tmp_path: Path, flips: bool, codebook_size: int, dtype: type) -> None:
    encoder = token_encoder(
        lambda images: images[:, 0, 0, :2].long() + codebook_size - 256,
        torch.device("cpu"),
        codebook_size=codebook_size,
        num_tokens=2,
        flips=flips,
    )
    images = torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).view(3, 3, 2, 2) + 200
    ids = encoder.encode(images)
    encoder.check(ids, ["a", "b", "c"])
    assert encoder.dtype == dtype
    assert ids.shape == (3, *encoder.row_shape)
    write_tokens(tmp_path / "t.parquet", ["a", "b", "c"], [5, -1, 0], ids.numpy().astype(encoder.dtype))
    tokens = read_tokens(tmp_path / "t.parquet", codebook_size)
    views = 1 + flips
    assert tokens.keys == [key for key in "abc" for _ in range(views)]
    assert tokens.labels.tolist() == [label for label in (5, -1, 0) for _ in range(views)]
    assert tokens.flipped.tolist() == [False, True][:views] * 3
    assert torch.equal(tokens.ids.view(3, views, 2)[:, 0], images[:, 0, 0].long() + codebook_size - 256)
    if flips:
        assert torch.equal(tokens.ids.view(3, 2, 2)[:, 1], images[:, 0, 0].flip(-1).long() + codebook_size - 256)
    for wrong in (-1, codebook_size):
        with pytest.raises(DataError, match="are outside a codebook"):
            encoder.check(torch.full_like(ids, wrong), ["a", "b", "c"])
