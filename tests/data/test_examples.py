"""Tokens as training data: rows are read as written; the stream is a function of (seed, position)."""

import fcntl
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from vqpipe import artifacts
from vqpipe.artifacts import Artifact
from vqpipe.data import examples
from vqpipe.data.examples import (
    ExampleBatch,
    ExamplesConfig,
    ExampleStream,
    TokenSet,
    ordered_batches,
    split_held_out,
)
from vqpipe.data.tokens import write_token_file
from vqpipe.errors import ArtifactError, ConfigError, DataError, VqpipeError

NUM, TOKENS, BATCH = 14, 6, 4  # 14 images in global batches of 4: epochs end inside a batch
Make = Callable[..., Artifact]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("name", flip=True) -> 14 images in shards of 5; image i, view v holds the ids i * 10 + v * 1000 + (0..5)."""

    def make(
        name: str,
        *,
        flip: bool = True,
        ten: bool = False,
        classes: int | None = 3,
        codebook_size: int = 100_000,
        shift: int = 0,
    ) -> Artifact:
        images = np.arange(NUM)
        views = np.arange(10 if ten else 1 + flip)
        ids = images[:, None, None] * 10 + views[:, None] * 1000 + np.arange(TOKENS) + shift
        config = {"flip": False, "crops": "ten"} if ten else {"flip": flip}
        draft = artifacts.start(tmp_path / name, "tokens", config, {"images": "0" * 64})
        assert isinstance(draft, artifacts.Draft)
        with draft:
            for number, first in enumerate(range(0, NUM, 5)):
                part = images[first : first + 5]
                labels = [-1 if classes is None else int(i) % classes for i in part]
                with draft.write(f"tokens-{number:05d}.parquet") as path:
                    dtype = np.uint16 if codebook_size <= 1 << 16 else np.uint32
                    write_token_file(path, [f"key-{i:02d}" for i in part], labels, ids[part].astype(dtype))
            facts = {"num_images": NUM, "num_tokens": TOKENS, "codebook_size": codebook_size}
            return draft.publish(facts)

    return make


def prints(batch: ExampleBatch) -> list[tuple[str, int, int]]:
    """(key, label, first id) of each example; the id identifies image and view."""
    return list(zip(batch.keys, batch.labels.tolist(), batch.examples[:, 0].tolist(), strict=True))


def run(tokens: TokenSet, start: int, steps: int, world: int = 1, seed: int = 5) -> list[tuple[str, int, int]]:
    """The examples of `steps` global batches, in order, read by `world` ranks."""
    ranks = [
        ExampleStream(tokens, seed=seed, batch_size=BATCH, rank=r, world_size=world).from_sample(start)
        for r in range(world)
    ]
    return [print_ for _ in range(steps) for rank in ranks for print_ in prints(next(rank))]


def test_the_order_does_not_depend_on_ranks_or_resuming(make: Make) -> None:
    tokens = TokenSet(make("tokens"))
    whole = run(tokens, 0, 11)
    epochs = [whole[e * NUM : (e + 1) * NUM] for e in range(3)]
    assert [sorted(key for key, *_ in epoch) for epoch in epochs] == [[f"key-{i:02d}" for i in range(NUM)]] * 3
    assert len({tuple(key for key, *_ in epoch) for epoch in epochs}) == 3
    for world, step in itertools.product((1, 2, 4), (0, 1, 3, 10)):  # 3: across the end of an epoch
        assert run(tokens, step * BATCH, min(2, 11 - step), world) == whole[step * BATCH : (step + 2) * BATCH]
    assert run(tokens, 0, 11, seed=6) != whole


def test_batches_match_the_stored_rows_and_half_are_flipped(make: Make) -> None:
    tokens = TokenSet(make("tokens"))
    found = run(tokens, 0, 100)
    for key, label, first in found:
        number = int(key.removeprefix("key-"))
        assert label == number % 3
        assert first in (number * 10, number * 10 + 1000)
    share = sum(first >= 1000 for *_, first in found) / len(found)
    assert 0.4 < share < 0.6  # three standard deviations of 400 samples are 0.075
    plain = ExampleStream(tokens, seed=0, batch_size=BATCH, flip=False).from_sample(0)
    assert max(int(next(plain).examples.max()) for _ in range(10)) < 1000
    unflipped = ExampleStream(TokenSet(make("unflipped", flip=False)), seed=0, batch_size=BATCH).from_sample(0)
    assert max(int(next(unflipped).examples.max()) for _ in range(10)) < 1000


def test_one_of_ten_crops_is_drawn_in_each_epoch(make: Make) -> None:
    tokens = TokenSet(make("tokens", ten=True))
    found = run(tokens, 0, 1000)
    assert all(first % 1000 == int(key.removeprefix("key-")) * 10 for key, _, first in found)
    drawn = np.bincount([first // 1000 for *_, first in found], minlength=10)
    assert len(drawn) == 10
    assert abs(drawn - 400).max() < 4 * 360**0.5  # 4 standard deviations
    assert len({first for key, _, first in found if key == "key-05"}) == 10
    assert run(tokens, 40 * BATCH, 5, 2) == found[40 * BATCH : 45 * BATCH]
    unflipped = ExampleStream(tokens, seed=0, batch_size=BATCH, flip=False).from_sample(0)
    assert {int(first) // 1000 for _ in range(50) for first in next(unflipped).examples[:, 0]} == set(range(5))
    assert torch.cat([batch.examples for batch in ordered_batches(tokens, 4)])[:, 0].tolist() == [
        i * 10 for i in range(NUM)
    ]


def test_the_drawn_flips_are_stable_between_versions(make: Make) -> None:
    found = run(TokenSet(make("tokens")), 0, 3)
    assert [int(first >= 1000) for *_, first in found] == [1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(("codebook_size", "dtype"), [(100_000, np.uint32), (4096, np.uint16)])
def test_ids_keep_their_stored_type_in_memory_and_mapped(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codebook_size: int, dtype: type
) -> None:
    artifact = make("tokens", codebook_size=codebook_size)
    held = TokenSet(artifact)
    assert held.keys.type == pa.large_string()  # keys of more than 2 GiB
    monkeypatch.setattr(examples, "IN_MEMORY", 100)
    mapped = TokenSet(artifact, tmp_path / "cache")
    assert held.rows.dtype == mapped.rows.dtype == dtype
    assert isinstance(mapped.rows, np.memmap)
    assert not mapped.rows.flags.writeable
    np.testing.assert_array_equal(held.rows, mapped.rows)
    again = TokenSet(artifact, tmp_path / "cache")  # unpacked once
    assert run(again, 0, 3) == run(held, 0, 3)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]
    other = make("other", shift=1, codebook_size=codebook_size)
    assert TokenSet(other, tmp_path / "cache").rows[0, 0] == held.rows[0, 0] + 1
    with pytest.raises(ArtifactError, match=r"too many ids for memory\. .*TokenDataset\(path, cache=FOLDER\)"):
        TokenSet(artifact)


def test_shards_are_read_once_for_their_hash_and_keys_and_once_for_their_ids(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, open_file, opened = make("tokens"), Path.open, list[str]()

    def counted(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self.name)
        return open_file(self, *args, **options)

    monkeypatch.setattr(Path, "open", counted)
    TokenSet(artifact)
    shards = [f"tokens-{number:05d}.parquet" for number in range(3)]
    assert sorted(opened) == sorted(shards * 2)


def test_mapped_ids_are_not_copied_into_another_process(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "IN_MEMORY", 100)
    mapped = TokenSet(make("tokens"), tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(mapped))
    assert isinstance(copy.rows, np.memmap)
    assert run(copy, 0, 3) == run(mapped, 0, 3)


def test_a_job_waits_for_another_that_unpacks_the_same_ids_and_replaces_what_a_killed_one_left(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "IN_MEMORY", 100)
    artifact = make("tokens")
    wanted = TokenSet(artifact, tmp_path / "first")
    assert wanted.file is not None
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".writing-{wanted.file.name}").write_bytes(b"half of it")
    lock = tmp_path / "cache" / wanted.file.with_suffix(".lock").name
    with ThreadPoolExecutor(1) as pool, lock.open("wb") as other:  # a file: NFS locks no folders between machines
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = pool.submit(TokenSet, artifact, tmp_path / "cache")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        other.close()
        np.testing.assert_array_equal(waiting.result().rows, wanted.rows)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {wanted.file.name, lock.name}


def test_ids_that_cannot_be_unpacked_leave_no_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "IN_MEMORY", 100)
    artifact = make("tokens")
    shard = artifact.path / "tokens-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(VqpipeError, match="tokens-00002"):
        TokenSet(artifact, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    full = make("full")
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / f"ids-{full.digest[:16]}.npy"
    (tmp_path / "cache" / f".writing-{file.name}").symlink_to("/dev/full")
    with pytest.raises(ArtifactError, match=r"cannot write .*npy: No space left on device \(.* are free\)"):
        TokenSet(full, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_ordered_examples_are_every_image_once(make: Make) -> None:
    tokens = TokenSet(make("tokens"))
    batches = list(ordered_batches(tokens, 4))
    assert [key for batch in batches for key in batch.keys] == [f"key-{i:02d}" for i in range(NUM)]
    assert torch.cat([batch.examples for batch in batches])[:, 0].tolist() == [i * 10 for i in range(NUM)]
    shares = [list(ordered_batches(tokens, 4, rank, 2)) for rank in range(2)]
    assert sorted(key for share in shares for batch in share for key in batch.keys) == [
        f"key-{i:02d}" for i in range(NUM)
    ]


def test_held_out_images_cover_every_class_and_are_not_trained_on(make: Make) -> None:
    tokens = TokenSet(make("tokens"))
    rest, held_out = split_held_out(tokens, 6)
    assert held_out is not None
    assert sorted(held_out.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert held_out.images.tolist() == [2, 4, 6, 8, 9, 13]  # in every version
    keys = [{part.key(i) for i in range(len(part))} for part in (rest, held_out)]
    assert [len(part) for part in keys] == [8, 6]
    assert not keys[0] & keys[1]
    stream = ExampleStream(rest, seed=0, batch_size=BATCH).from_sample(0)
    seen = [print_ for _ in range(20) for print_ in prints(next(stream))]
    assert {key for key, *_ in seen} == keys[0]
    assert all(first % 1000 == int(key.removeprefix("key-")) * 10 for key, _, first in seen)
    with pytest.raises(DataError, match=r"examples\.held_out = 8 of 14 images .* --set examples\.held_out=7"):
        split_held_out(tokens, 8)


def test_num_classes_follows_the_labels(make: Make) -> None:
    labels, unknown = TokenSet(make("known")).labels, TokenSet(make("unknown", classes=None)).labels
    assert ExamplesConfig().num_classes_of(labels) == 3
    assert ExamplesConfig(num_classes=1000).num_classes_of(labels) == 1000
    assert ExamplesConfig(conditional=False).num_classes_of(unknown) is None
    with pytest.raises(DataError, match=r"14 of 14 images have no label.*Only generators .*conditional=false"):
        ExamplesConfig().num_classes_of(unknown)
    with pytest.raises(DataError, match="label 2 is out of range"):
        ExamplesConfig(num_classes=2).num_classes_of(labels)


def test_inconsistent_tokens_are_an_error(make: Make, tmp_path: Path) -> None:
    artifact = make("tokens")
    with pytest.raises(ConfigError, match="10 images is not divisible by 4 ranks"):
        ExampleStream(TokenSet(artifact), seed=0, batch_size=10, world_size=4)
    artifact.facts["num_images"] = NUM + 1
    with pytest.raises(ArtifactError, match="holds 28 rows, its manifest 30"):
        TokenSet(artifact)
    artifact.facts["num_images"] = NUM - 1
    with pytest.raises(ArtifactError, match="holds 28 rows, its manifest 26"):
        TokenSet(artifact)
    unflipped = make("unflipped", flip=False)
    unflipped.config["flip"], unflipped.facts["num_images"] = True, NUM // 2
    with pytest.raises(ArtifactError, match="lacks flipped images"):
        TokenSet(unflipped)
