"""Data sets for training loops of others: every image once an epoch, the same batches for any ranks and workers."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import vqpipe.data
from vqpipe import artifacts, distributed
from vqpipe.data import ImageStream, TokenDataset, TokenStream
from vqpipe.data.examples import ExampleStream
from vqpipe.data.streams import Stream
from vqpipe.data.tokens import write_token_file
from vqpipe.errors import ArtifactError, ConfigError, DataError

NUM, TOKENS = 10, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tokens of 10 images in shards of 4, with flips; image i, view v holds the ids 10 i + 1000 v + (0..5)."""
    images = np.arange(NUM)
    ids = images[:, None, None] * 10 + np.arange(2)[:, None] * 1000 + np.arange(TOKENS)
    draft = artifacts.start(tmp_path / "tokens", "tokens", {"flip": True}, {"images": "0" * 64})
    assert isinstance(draft, artifacts.Draft)
    with draft:
        for number, first in enumerate(range(0, NUM, 4)):
            part = images[first : first + 4]
            with draft.write(f"tokens-{number:05d}.parquet") as path:
                keys, labels = [f"key-{i}" for i in part], [-1 if i == 7 else int(i) % 3 for i in part]
                write_token_file(path, keys, labels, ids[part].astype(np.uint16))
        layout = {"grids": [[2, 3]], "num_groups": 1}
        draft.publish({"num_images": NUM, "num_tokens": TOKENS, "codebook_size": 2000, "layout": layout})
    return tmp_path / "tokens"


@pytest.fixture
def pictures(tmp_path: Path, draw: Callable[..., bytes]) -> Path:
    """A folder of 10 pictures in 2 classes."""
    for number in range(NUM):
        file = tmp_path / "pictures" / f"class-{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(draw(number))
    return tmp_path / "pictures"


def take(batches: Any, count: int) -> list[dict[str, Any]]:
    iterator: Iterator[dict[str, Any]] = iter(batches)
    return list(islice(iterator, count))


def content(batches: list[dict[str, Any]]) -> list[tuple[list[str], list[int], int, list[Any]]]:
    """Everything in the batches, comparable."""
    return [
        (batch["key"], batch["label"].tolist(), batch["images_seen"], batch.get("ids", batch.get("image")).tolist())
        for batch in batches
    ]


def test_public_names() -> None:
    assert vqpipe.data.__all__ == ["ImageStream", "TokenDataset", "TokenStream", "open_images"]
    assert all(callable(getattr(vqpipe.data, name)) for name in vqpipe.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = vqpipe.data.absent
    program = "import sys, vqpipe.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=300, check=False).returncode == 0


def test_items_are_the_rows_of_an_image(folder: Path) -> None:
    tokens, flips = TokenDataset(folder), TokenDataset(str(folder), view=1)
    assert len(tokens) == NUM
    item = tokens[4]
    assert (item["key"], item["label"], item["ids"].dtype) == ("key-4", 1, torch.int64)
    assert item["ids"].tolist() == [40, 41, 42, 43, 44, 45]
    assert flips[4]["ids"].tolist() == [1040, 1041, 1042, 1043, 1044, 1045]
    assert tokens[7]["label"] == -1
    assert tokens[-1]["key"] == "key-9"
    assert [each["key"] for each in tokens] == [f"key-{i}" for i in range(NUM)]  # type: ignore[attr-defined]
    assert (tokens.codebook_size, tokens.num_classes, tokens.facts["num_tokens"]) == (2000, 3, TOKENS)
    sizes = f"num_images={NUM}, num_tokens={TOKENS}, codebook_size=2000"
    assert repr(tokens) == f"TokenDataset({sizes})"
    assert repr(tokens.stream(seed=0, batch_size=2)) == f"TokenStream({sizes}, batch_size=2)"


def test_invalid_requests_are_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="image 10 of 10"):
        _ = TokenDataset(folder)[NUM]
    with pytest.raises(ConfigError, match=r"view = 2, each image has 2 views\. Pass 0 to 1\.$"):
        TokenDataset(folder, view=2)
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        TokenDataset(tmp_path / "absent")
    with pytest.raises(ConfigError, match="5 images is not divisible by 2 ranks"):
        TokenStream(folder, seed=0, batch_size=5, world_size=2)
    stream = TokenStream(folder, seed=0, batch_size=5)
    with pytest.raises(ConfigError, match="the state has seed 1, the stream 0"):
        stream.load_state_dict({"images_seen": 5, "seed": 1})
    with pytest.raises(ConfigError, match="is negative"):
        stream.load_state_dict({"images_seen": -5})
    with pytest.raises(ConfigError, match=r"the state \{'seed': 0\} has no images_seen"):
        stream.load_state_dict({"seed": 0})
    with pytest.raises(ConfigError, match=r"rank 2 of 2 is none. Ranks are numbered from 0"):
        TokenStream(folder, seed=0, batch_size=4, rank=2, world_size=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_set_in_a_loader_of_two_ranks(folder: Path, workers: int) -> None:
    tokens, keys = TokenDataset(folder), list[str]()
    for rank in range(2):
        sampler = DistributedSampler(tokens, num_replicas=2, rank=rank, shuffle=True)
        for batch in DataLoader(tokens, batch_size=3, sampler=sampler, num_workers=workers):
            assert batch["ids"].shape == (len(batch["key"]), TOKENS)
            assert (batch["ids"][:, 0] // 10).tolist() == [int(key.removeprefix("key-")) for key in batch["key"]]
            keys += batch["key"]
    assert sorted(keys) == [f"key-{i}" for i in range(NUM)]


def test_stream_has_the_order_of_the_generators_training(folder: Path) -> None:
    tokens = TokenDataset(folder)
    expected = ExampleStream(tokens.tokens, seed=3, batch_size=4).from_sample(0)
    for batch in take(tokens.stream(seed=3, batch_size=4), 8):
        own = next(expected)
        assert (batch["key"], batch["label"].tolist()) == (own.keys, own.labels.tolist())
        assert torch.equal(batch["ids"], own.examples)
    unflipped = take(tokens.stream(seed=3, batch_size=4, flip=False), 8)
    assert max(int(batch["ids"].max()) for batch in unflipped) < 1000


@pytest.fixture(params=["tokens", "images"])
def make(request: pytest.FixtureRequest, folder: Path, pictures: Path) -> Callable[..., Stream]:
    """A new stream in global batches of 4."""
    if request.param == "tokens":
        return lambda **options: TokenStream(folder, seed=5, **{"batch_size": 4, **options})
    return lambda **options: ImageStream(pictures, image_size=8, seed=5, **{"batch_size": 4, **options})


def test_batches_do_not_depend_on_ranks_workers_and_resuming(
    make: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make()
    assert (stream.images_seen, stream.state_dict()) == (0, {"images_seen": 0, "seed": 5})
    whole = take(stream, 6)
    assert [batch["images_seen"] for batch in whole] == [4, 8, 12, 16, 20, 24]
    drawn = Counter(key for batch in whole[:5] for key in batch["key"])  # two epochs
    assert (len(drawn), set(drawn.values())) == (NUM, {2})
    state = stream.state_dict()
    assert state == {"images_seen": 24, "seed": 5}
    assert content(take(DataLoader(make(), batch_size=None, num_workers=2), 6)) == content(whole)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        by_default = make()
        monkeypatch.undo()
        for own in (make(rank=rank, world_size=2), by_default):
            for batch, all_ranks in zip(take(own, 6), whole, strict=True):
                assert batch["key"] == all_ranks["key"][2 * rank : 2 * rank + 2]
    resumed = make()
    resumed.load_state_dict({"images_seen": whole[2]["images_seen"]})
    assert content(take(DataLoader(resumed, batch_size=None, num_workers=2), 3)) == content(whole[3:])
    resumed.load_state_dict({"images_seen": 8, "seed": 5})
    assert content(take(resumed, 4)) == content(whole[2:])
    assert resumed.state_dict() == state


def test_every_loop_over_persistent_workers_starts_at_the_same_batch(make: Callable[..., Stream]) -> None:
    loader = DataLoader(make(), batch_size=None, num_workers=2, persistent_workers=True)
    for _ in range(2):
        assert [batch["images_seen"] for batch in take(loader, 3)] == [4, 8, 12]


def test_image_stream_crops_and_counts(pictures: Path) -> None:
    (pictures / "class-0" / "0.png").write_bytes(b"no image")
    options: dict[str, Any] = {"image_size": 16, "seed": 0, "batch_size": NUM, "crop": "center", "flip": False}
    stream = ImageStream(pictures, max_skipped=0.5, **options)
    assert repr(stream) == f"ImageStream(num_images={NUM}, image_size=16, batch_size={NUM})"
    (batch,) = take(stream, 1)
    assert (batch["image"].dtype, tuple(batch["image"].shape)) == (torch.uint8, (NUM, 3, 16, 16))
    assert set(batch["label"].tolist()) == {0, 1}
    assert stream.skipped == {"not-an-image": 1}
    (pictures / "class-1" / "1.png").write_bytes(b"")
    stream = ImageStream(pictures, max_skipped=0.5, **{**options, "batch_size": 1})
    take(stream, NUM)
    assert stream.skipped == {"empty": 1, "not-an-image": 1}
    with pytest.raises(DataError, match=r"at least 2 of .* class-0/0 of"):
        take(ImageStream(pictures, **options), 1)
    with pytest.raises(ConfigError, match=r"unknown key data\.flop"):
        ImageStream(pictures, image_size=16, seed=0, batch_size=2, flop=False)
