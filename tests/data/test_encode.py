"""Encoding jobs: order, errors, resuming, progress."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from vqpipe import artifacts, device, distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.data import decoding, sizes, transforms
from vqpipe.data.encode import EncodedShard, EncodingJob, Shard, Stopwatch, equal_shards, faster_network
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.tars import write_tar
from vqpipe.data.tokens import TokensConfig, decode_tokens, id_dtype, read_tokens, write_tokens
from vqpipe.errors import ConfigError, DataError
from vqpipe.progress import SILENT, Progress, Silent
from vqpipe.quantizers import TokenLayout

NUM = 23
BAD = {4, 10, 11, 12, 13}  # with shards of 10 and batches of 4 one batch has no usable image


@pytest.fixture
def images(tmp_path: Path, draw: Callable[..., bytes]) -> ImageSet:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(NUM):
        data = draw(i, (32, 24), "JPEG")
        (folder / f"{i:02d}.jpg").write_bytes(b"" if i in BAD else data)
    return open_images([folder])


Check = Callable[[Tensor, list[str]], None]


def mean_colours(images: Tensor) -> Tensor:
    """The simplest rows: the mean of each channel, in thousandths."""
    return (images.double().mean(dim=(2, 3)) * 1000).long()


def accept(rows: Tensor, keys: list[str]) -> None:
    """Every row may be stored."""


def encode_images(
    out: Path,
    images: ImageSet,
    encode: Callable[[Tensor], Tensor] = mean_colours,
    *,
    check: Check = accept,
    before_writing: Callable[[int], None] = lambda number: None,
    num_workers: int = 0,
    max_skipped: float = 0.5,
    progress: Progress = SILENT,
) -> tuple[Artifact, Stopwatch]:
    draft = artifacts.start(out, "features", {}, {"images": images})
    assert isinstance(draft, Draft)

    def write(draft: Draft, shard: EncodedShard) -> None:
        before_writing(shard.number)
        record = {"keys": shard.keys, "skipped": shard.skipped}
        with draft.write(f"{shard.number}.npy", **record) as path, path.open("wb") as file:
            np.save(file, shard.rows)

    with draft:
        shards = equal_shards("{}.npy", len(images), 10, (3,), 4)
        job = EncodingJob(draft, images, shards, title="encode", max_skipped=max_skipped, progress=progress)
        job.run(
            encode,
            write,
            check=check,
            device=torch.device("cpu"),
            dtype=np.uint32,
            image_size=16,
            num_workers=num_workers,
        )
        job.finish()
        return draft.publish({}), job.stopwatch


def run(out: Path, images: ImageSet, encode: Callable[[Tensor], Tensor] = mean_colours, **options: Any) -> Artifact:
    return encode_images(out, images, encode, **options)[0]


def test_shards_hold_every_usable_image_in_order(images: ImageSet, tmp_path: Path) -> None:
    artifact, stopwatch = encode_images(tmp_path / "out", images)
    rows = np.concatenate([np.load(artifact.file(name)) for name in artifact.names("*.npy")])
    crops = [transforms.center_crop(decoding.decode(images.read(i)), 16) for i in range(NUM) if i not in BAD]
    expected = (torch.stack(crops).double().mean(dim=(2, 3)) * 1000).long()
    assert rows.dtype == np.uint32
    assert np.array_equal(rows, expected.numpy())
    assert stopwatch.images == NUM - len(BAD)
    assert set(stopwatch.parts) == {"waiting for images", "encoding", "copying", "writing"}
    assert 0 < sum(stopwatch.shares().values()) <= 1


@pytest.mark.parametrize("workers", [1, 3, -1])
@pytest.mark.parametrize("fast", [True, False])
def test_bytes_do_not_depend_on_workers_and_jpeg_decoder(
    images: ImageSet, tmp_path: Path, workers: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "alone", images).digest
    if not fast:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    assert run(tmp_path / "other", images, num_workers=workers).digest == expected


def test_loader_processes_start_once(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import dataloader

    started: list[int] = []
    real = dataloader._MultiProcessingDataLoaderIter.__init__
    count = lambda self, loader: (started.append(loader.num_workers), real(self, loader))[1]  # noqa: E731
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "__init__", count)
    run(tmp_path / "out", images, num_workers=2)
    assert started == [2]


def test_an_error_of_the_writer_thread_is_raised_and_complete_shards_are_kept(images: ImageSet, tmp_path: Path) -> None:
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
    assert again.digest == run(tmp_path / "straight", images).digest


class Stop(BaseException):
    """As raised by a signal: not an Exception."""


def test_an_interruption_waits_for_the_shard_being_written(images: ImageSet, tmp_path: Path) -> None:
    encoding_the_second = threading.Event()

    def slowly(number: int) -> None:
        assert encoding_the_second.wait(20)

    def stop(rows: Tensor, keys: list[str]) -> None:
        if keys[-1] == "17":  # in the second shard, while the first is being written
            encoding_the_second.set()
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", images, check=stop, before_writing=slowly)
    names = {path.name for path in (tmp_path / "out.partial").glob("*.npy")}
    assert names == {"0.npy"}
    assert run(tmp_path / "out", images).digest == run(tmp_path / "straight", images).digest


def test_a_batch_is_submitted_before_the_results_of_the_last_are_awaited(images: ImageSet, tmp_path: Path) -> None:
    """A CUDA device gains from it: batch i + 1 is queued before the host waits for batch i."""
    order: list[str] = []

    def encode(batch: Tensor) -> Tensor:
        order.append("encode")
        return mean_colours(batch)

    run(tmp_path / "out", images, encode, check=lambda rows, keys: order.append(f"stored {keys[0]}"))
    usable = order.count("encode")
    assert order[:3] == ["encode", "encode", "stored 00"]
    assert order.count("encode") == len(order) - usable == 6


def test_records_of_all_ranks_are_in_the_order_of_the_shards(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = artifacts.start(tmp_path / "out", "features", {}, {"images": images})
    assert isinstance(draft, Draft)

    def write(draft: Draft, shard: EncodedShard) -> None:
        draft.write_bytes(shard.name, shard.rows.tobytes(), keys=shard.keys, skipped=shard.skipped)

    with draft:
        shares = list[tuple[dict[int, Any], int]]()
        for rank in (1, 0):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda: 2)
            job = EncodingJob(draft, images, equal_shards("{}", NUM, 10, (3,), 4), title="encode", max_skipped=0.5)
            settings: dict[str, Any] = {"device": torch.device("cpu"), "image_size": 16, "num_workers": 0}
            job.run(mean_colours, write, check=accept, dtype=np.uint32, **settings)
            records = {shard.number: draft.record(shard.name) for shard in job.mine}
            shares.insert(0, (records, job.stopwatch.images))
        monkeypatch.setattr(distributed, "gather_objects", lambda own: shares)
        records, skipped = job.finish()
    assert [record["keys"][0] for record in records] == ["00", "14", "20"]
    assert (skipped, job.stopwatch.images) == ({"empty": 5}, NUM - len(BAD))


class Recorder(Silent):
    def __init__(self) -> None:
        self.started: list[tuple[str, int | None, int]] = []
        self.messages: list[str] = []
        self.done = 0

    def start(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        self.started.append((title, total, done))

    def advance(self, count: int = 1) -> None:
        self.done += count

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_progress_counts_every_image_and_ends_with_a_report(images: ImageSet, tmp_path: Path) -> None:
    progress = Recorder()
    run(tmp_path / "out", images, progress=progress)
    assert (progress.started, progress.done) == ([("encode", NUM, 0)], NUM)
    report, skipped = progress.messages
    assert re.match(r"18 images in 0:0.*/s: .*(waiting for images|encoding|writing) \d+ %", report)
    assert skipped == (
        "5 of 23 images cannot be used (5 empty): 04 of images (empty), 10 of images (empty), 11 of images (empty) and"
        f" 2 more; all are listed in {tmp_path / 'out' / 'skipped.parquet'}"
    )


def stopwatch_of(seconds: float, **parts: float) -> Stopwatch:
    """A stopwatch of 1,000 images."""
    stopwatch = Stopwatch()
    stopwatch.images, stopwatch.began, stopwatch.ended = 1000, 0.0, seconds
    stopwatch.parts.update(parts)  # type: ignore[arg-type]
    return stopwatch


def test_the_report_names_the_slowest_part_and_after_a_long_job_what_to_change() -> None:
    stopwatch = stopwatch_of(100, **{"waiting for images": 80, "encoding": 15, "copying": 1})
    assert stopwatch.report() == "1,000 images in 0:01:40, 10/s: waiting for images 80 %, encoding 15 %."
    advice = "Faster: more --num-workers, the extra `fast` (simplejpeg), or a faster disk."
    assert stopwatch.advice("") == advice
    assert len(advice) <= 80
    assert stopwatch_of(100, encoding=90).advice("Faster: a GPU.") == "Faster: a GPU."
    assert stopwatch_of(100, encoding=90).advice("") == ""
    assert stopwatch_of(20, encoding=19).advice("Faster: a GPU.") == ""


def test_bf16_is_advised_where_it_is_faster_and_not_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(device, "ROOT", tmp_path)
    for flags, words in (
        ("avx2", "Faster: a GPU."),
        ("avx512_bf16", "Faster: a GPU or --precision bf16 (less exact)."),
    ):
        (tmp_path / "proc" / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        assert faster_network(torch.device("cpu"), "fp32") == words
        assert faster_network(torch.device("cpu"), "bf16") == "Faster: a GPU."


LIST = [{"key": f"{i:02d}", "shard": "images", "index": i, "reason": "empty"} for i in sorted(BAD)]


def test_too_many_unusable_images_stop_after_a_shard_and_a_larger_tolerance_continues(
    images: ImageSet, tmp_path: Path
) -> None:
    """Shards of ten images have one unusable image, four, and none."""
    encoded: list[int] = []

    def counted(batch: Tensor) -> Tensor:
        encoded.append(len(batch))
        return mean_colours(batch)

    out, straight = tmp_path / "out", run(tmp_path / "straight", images)
    where = re.escape(str(tmp_path / "out.partial" / "skipped.parquet"))
    stopped = (
        r"^at least 5 of 23 images cannot be used \(5 empty\), more than the 10 % allowed: 04 of images \(empty\), "
        rf".* and 2 more; all are listed in {where}\. Raise --max-skipped"
    )
    for again in (False, True):
        encoded.clear()
        with pytest.raises(DataError, match=stopped):
            run(out, images, counted, max_skipped=0.1)
        assert sum(encoded) <= (0 if again else 9 + 6 + 3)  # one piece of the next shard is encoded meanwhile
        assert pq.read_table(tmp_path / "out.partial" / "skipped.parquet").to_pylist() == LIST
    assert run(out, images, counted, max_skipped=0.3).digest == straight.digest
    assert sum(encoded) == 3
    assert pq.read_table(straight.verified_file("skipped.parquet")).to_pylist() == LIST


def test_a_share_equal_to_the_tolerance_is_allowed(tmp_path: Path, draw: Callable[..., bytes]) -> None:
    (tmp_path / "a").mkdir()
    for i in range(100):
        (tmp_path / "a" / f"{i:02d}.jpg").write_bytes(b"" if i < 29 else draw(i, (8, 8), "JPEG"))
    run(tmp_path / "out", open_images([tmp_path / "a"]), max_skipped=0.29)  # 0.29 x 100 is below 29 in binary


def test_usable_images_leave_no_list(tmp_path: Path, draw: Callable[..., bytes]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(draw(1, (32, 24), "JPEG"))
    assert run(tmp_path / "out", open_images([tmp_path / "one"])).names() == ["0.npy"]


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    images = open_images([tmp_path])
    with pytest.raises(DataError, match="1 of 1 image cannot be used"):
        run(tmp_path / "out", images)


class Pixels:
    """A fake tokenizer: the ids of an image are its first two red values, moved to the end of the codebook."""

    device = torch.device("cpu")
    image_size: int | None = None
    downsample_factor = 8

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.batches = list[torch.Size]()

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((1, 2),))

    def encode(self, images: Tensor, precision: str = "fp32") -> Tensor:
        self.batches.append(images.shape)
        return images[:, 0, 0, :2].long() + self.codebook_size - 256

    def decode(self, ids: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        return torch.zeros(len(ids), 3, *image_size, dtype=torch.uint8)


def tokenize(out: Path, images: ImageSet, codebook_size: int, flip: bool) -> Artifact:
    draft = artifacts.start(out, "tokens", {"flip": flip}, {"images": images})
    assert isinstance(draft, Draft)
    with draft:
        facts = write_tokens(
            draft, images, Pixels(codebook_size), TokensConfig(image_size=16, flip=flip, max_skipped=0.5)
        )
        return draft.publish(facts)


def test_ids_of_more_than_32_bits_are_refused_before_any_image_is_read(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="68,719,476,736 codes do not fit the 32 bits"):
        tokenize(tmp_path / "tokens", images, 1 << 36, flip=False)
    assert id_dtype(1 << 32) == np.uint32


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("codebook_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_are_stored_narrow_and_read_back(
    images: ImageSet, tmp_path: Path, flip: bool, codebook_size: int, dtype: str
) -> None:
    artifact = tokenize(tmp_path / "tokens", images, codebook_size, flip)
    facts = artifact.facts
    assert (facts["num_images"], facts["num_tokens"], facts["skipped"]) == (NUM - len(BAD), 2, {"empty": len(BAD)})
    file, views = artifact.file("tokens-00000.parquet"), 1 + flip
    assert str(pq.read_schema(file).field("ids").type.value_type) == dtype
    tokens = read_tokens(file, codebook_size)
    usable = [i for i in range(NUM) if i not in BAD]
    crops = torch.stack([transforms.center_crop(decoding.decode(images.read(i)), 16) for i in usable])
    assert tokens.keys == [images.key(i) for i in usable for _ in range(views)]
    assert tokens.labels.tolist() == [-1] * len(usable) * views
    assert tokens.flipped.tolist() == [False, True][:views] * len(usable)
    ids = tokens.ids.view(len(usable), views, 2)
    assert torch.equal(ids[:, 0], crops[:, 0, 0, :2].long() + codebook_size - 256)
    if flip:
        assert torch.equal(ids[:, 1], crops.flip(-1)[:, 0, 0, :2].long() + codebook_size - 256)


def test_token_rows_name_the_shard_of_their_image(
    draw: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tars with the same keys."""
    stored = dict[tuple[str, int], bytes]()
    for name in ("a.tar", "b.tar"):
        with write_tar(tmp_path / name) as tar:
            for i in range(3):
                stored[name, i] = b"no image" if (name, i) == ("a.tar", 1) else draw(len(stored))
                tar.write(str(i), stored[name, i], "png")
    images = open_images([f"{tmp_path}/{{a,b}}.tar"])
    artifact = tokenize(tmp_path / "tokens", images, 300, flip=True)
    file = artifact.file("tokens-00000.parquet")
    table = pq.read_table(file)
    assert table.column_names == ["key", "shard", "index", "label", "ids", "flipped"]
    assert [str(table.schema.field(name).type) for name in ("shard", "index")] == [
        "dictionary<values=string, indices=int32, ordered=0>",
        "int64",
    ]
    rows = table.to_pylist()
    assert [(row["shard"], row["index"]) for row in rows[::2]] == [place for place in stored if place != ("a.tar", 1)]
    assert [(row["key"], row["shard"]) for row in rows[1::2]] == [(row["key"], row["shard"]) for row in rows[::2]]
    for row in rows[::2]:
        pixels = transforms.center_crop(decoding.decode(stored[row["shard"], row["index"]]), 16)
        assert row["ids"] == (pixels[0, 0, :2].long() + 300 - 256).tolist()

    older = tmp_path / "older.parquet"
    pq.write_table(table.drop_columns(["shard", "index"]), older)
    before, now = read_tokens(older, 300), read_tokens(file, 300)
    assert before.keys == now.keys
    assert torch.equal(before.ids, now.ids)


def test_progress_of_decoding_counts_the_rows_of_this_rank_and_those_already_decoded(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqpipe.data.tokens.IMAGES_PER_SHARD", 10)  # 23 images, 5 of them unreadable: 9, 6 and 3 left
    tokens = tokenize(tmp_path / "tokens", images, 300, flip=True)
    progress = {rank: Recorder() for rank in (0, 1, 2)}
    draft = artifacts.start(tmp_path / "decoded", "images", {}, {"tokens": tokens})
    assert isinstance(draft, Draft)
    with draft:
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda: 2)
            facts = decode_tokens(draft, tokens, Pixels(300), limit=16, batch_size=4, progress=progress[rank])
            assert facts == {"num_images": 32, "image_size": tokens.facts["image_size"]}
        monkeypatch.undo()
        decode_tokens(draft, tokens, Pixels(300), progress=progress[2])
    started = [recorder.started for recorder in progress.values()]
    assert started == [
        [("detokenize (rank 0 of 2)", 20, 0)],
        [("detokenize (rank 1 of 2)", 12, 0)],
        [("detokenize", 36, 36)],
    ]
    assert [recorder.done for recorder in progress.values()] == [20, 12, 0]


def test_progress_of_several_sizes_is_in_proportion_to_their_tokens(images: ImageSet, tmp_path: Path) -> None:
    shards = [Shard(0, "large", range(4), (1, 90), 4), Shard(1, "small", range(4, 8), (1, 10), 4)]
    lengths, recorder = iter((90, 10)), Recorder()
    draft = artifacts.start(tmp_path / "out", "tokens", {}, {"images": images})
    assert isinstance(draft, Draft)
    with draft:
        job = EncodingJob(draft, images, shards, title="encode", max_skipped=1.0, progress=recorder)
        settings: dict[str, Any] = {"device": torch.device("cpu"), "image_size": 16, "num_workers": 0}
        job.run(
            lambda batch: torch.zeros(len(batch), 1, next(lengths), dtype=torch.int64),
            lambda draft, shard: draft.write_json(shard.name, []),
            check=lambda rows, keys: None,
            dtype=np.uint16,
            **settings,
        )
    assert recorder.started == [("encode", 400, 0)]
    assert (job.unit, recorder.done) == ("tokens", 400)


def test_batches_and_shards_of_native_sizes_are_limited(
    tmp_path: Path, draw: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of three has the pixels of 3 x 16 x 16, or one image; a shard four ids."""
    monkeypatch.setattr("vqpipe.data.sizes.NATIVE_SIDE", 16)
    monkeypatch.setattr("vqpipe.data.sizes.IDS_PER_SHARD", 4)
    (tmp_path / "a").mkdir()
    for i, size in enumerate([(16, 8), (24, 16), (48, 48), (17, 15), (31, 20)] * 4):
        (tmp_path / "a" / f"{i:02d}.png").write_bytes(draw(i, size))
    images, tokenizer = open_images([tmp_path / "a"]), Pixels(300)
    draft = artifacts.start(tmp_path / "tokens", "tokens", {}, {"images": images})
    assert isinstance(draft, Draft)
    with draft:
        facts = write_tokens(draft, images, tokenizer, TokensConfig(image_size="native"), batch_size=3)
        made = draft.publish(facts)
    assert [tuple(shape)[::2] for shape in tokenizer.batches] == [(1, 48)] * 4 + [(2, 16)] * 4 + [(2, 8)] * 4
    assert made.names() == [
        f"tokens-{size}-{number:05d}.parquet"
        for size, count in (("16x8", 4), ("24x16", 4), ("48x48", 2))
        for number in range(count)
    ]
    table = {"num_tokens": 2, "layout": {"grids": [[1, 2]], "num_groups": 1}}
    assert made.facts["sizes"] == {
        "48x48": {"num_images": 4, **table},
        "24x16": {"num_images": 8, **table},
        "16x8": {"num_images": 8, **table},
    }


def test_native_sizes_are_read_once(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Callable[..., bytes]
) -> None:
    """A run that was stopped, with images of which some cannot be used, and three too small."""
    for i in (1, 2, 20):
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(draw(i, (7, 40), "JPEG"))
    measured = list[int]()
    real = sizes.decoded_size
    monkeypatch.setattr(sizes, "decoded_size", lambda *arguments: (measured.append(0), real(*arguments))[1])

    def run(name: str, max_skipped: float) -> Artifact:
        draft = artifacts.start(tmp_path / name, "tokens", {}, {"images": images})
        assert isinstance(draft, Draft)
        with draft:
            facts = write_tokens(draft, images, Pixels(300), TokensConfig(image_size="native", max_skipped=max_skipped))
            return draft.publish(facts)

    with pytest.raises(DataError, match=r"^at least 5 of 23 images cannot be used \(5 empty\)"):
        run("out", 0.2)
    assert len(measured) == NUM
    made = run("out", 0.25)
    assert len(measured) == NUM
    assert (made.facts["skipped"], made.facts["excluded"]) == ({"empty": 5}, {"too-small": 3})
    assert made.names() == ["skipped.parquet", "tokens-32x24-00000.parquet"]
    rows = pq.read_table(made.file("skipped.parquet")).to_pylist()
    assert [row["key"] for row in rows if row["reason"] == "too-small"] == ["01", "02", "20"]
    assert made.digest == run("straight", 0.5).digest


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (630, r"none of the 1 images of a can be used \(1 too-small\)"),
        (629, r"1 of 1 image cannot be used \(1 too-large\), more than"),  # of any image, and not asked for
    ],
)
def test_an_image_below_the_downsample_factor_or_beyond_pillows_limit_has_no_tokens(
    tmp_path: Path, draw: Callable[..., bytes], limit: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "MAX_PIXELS", limit)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.png").write_bytes(draw(0, (7, 90)))
    images = open_images([tmp_path / "a"])
    draft = artifacts.start(tmp_path / "out", "tokens", {}, {"images": images})
    assert isinstance(draft, Draft)
    with draft, pytest.raises(DataError, match=message):
        write_tokens(draft, images, Pixels(300), TokensConfig(image_size="native"))


def test_memory_that_does_not_suffice_is_an_error_with_a_remedy(images: ImageSet, tmp_path: Path) -> None:
    class Large(Pixels):
        def encode(self, images: Tensor, precision: str = "fp32") -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    draft = artifacts.start(tmp_path / "out", "tokens", {}, {"images": images})
    assert isinstance(draft, Draft)
    with draft:
        for batch_size, message in (
            (4, r"out of memory for a batch of 4 images of 32x24. Use a smaller --batch-size"),
            (1, r"1 image of 32x24. Leave such images out of --image-size native: --max-pixels 767"),
        ):
            with pytest.raises(DataError, match=message):
                write_tokens(
                    draft,
                    images,
                    Large(300),
                    TokensConfig(image_size="native", max_skipped=0.5),
                    batch_size=batch_size,
                )
