import gc
import hashlib
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe.data.batches import (
    BLOCK,
    Batch,
    Draws,
    OrderedBatches,
    Shuffle,
    TrainingStream,
    WeightedShuffle,
    permutation,
    through_workers,
)
from vqpipe.data.decoding import decode
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.skipped import merged
from vqpipe.data.transforms import DataConfig, center_crop
from vqpipe.errors import ConfigError, DataError

Draw = Callable[..., bytes]
NUM, BATCH = 14, 4  # 14 images in global batches of 4: epochs end inside a batch


@pytest.fixture
def images(tmp_path: Path, draw: Draw, pack: Callable[..., bytes]) -> ImageSet:
    members = {f"{i:02d}.png": draw(i) for i in range(NUM)} | {f"{i:02d}.cls": b"%d" % (i % 3) for i in range(NUM)}
    (tmp_path / "s.tar").write_bytes(pack(members))
    return open_images([tmp_path / "s.tar"])


def config(workers: int = 0, **settings: object) -> DataConfig:
    return DataConfig(image_size=16, num_workers=workers, **settings)


def prints(batch: Batch) -> list[tuple[int, str, int, str]]:
    """(index, key, label, hash of the cropped pixels) of each image, in order."""
    pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in batch.images]
    return list(zip(batch.indices, batch.keys, batch.labels.tolist(), pixels, strict=True))


@pytest.fixture
def photographs(tmp_path: Path, pack: Callable[..., bytes]) -> ImageSet:
    """JPEGs of several sizes."""
    noise = Image.effect_noise((64, 64), 60)
    members = {}
    for i in range(NUM):
        file = io.BytesIO()
        Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180))).resize((40 + 7 * i, 50)).save(file, "JPEG")
        members[f"{i:02d}.jpg"] = file.getvalue()
    (tmp_path / "p.tar").write_bytes(pack(members))
    return open_images([tmp_path / "p.tar"])


def run(
    images: ImageSet, start: int, steps: int, world: int = 1, workers: int = 0, seed: int = 5, **settings: object
) -> list:
    """The images of `steps` global batches, in order, read by `world` ranks."""
    data = config(workers, **settings)
    ranks = [
        TrainingStream(images, data, seed=seed, batch_size=BATCH, rank=r, world_size=world).from_sample(start)
        for r in range(world)
    ]
    return [print_ for _ in range(steps) for rank in ranks for print_ in prints(next(rank))]


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_crops_do_not_depend_on_ranks_workers_and_resuming(photographs: ImageSet, resize: str) -> None:
    whole = run(photographs, 0, 9, resize=resize)
    assert run(photographs, 0, 9, world=2, resize=resize) == whole
    assert run(photographs, 0, 9, workers=2, resize=resize) == whole
    assert run(photographs, 5 * BATCH, 4, resize=resize) == whole[5 * BATCH :]
    assert run(photographs, 0, 9, seed=6, resize=resize) != whole


def test_evaluation_does_not_depend_on_the_resize_of_training(photographs: ImageSet) -> None:
    training = {resize: run(photographs, 0, 3, resize=resize) for resize in ("exact", "fast")}
    assert training["exact"] != training["fast"]
    ordered = next(iter(OrderedBatches(photographs, image_size=16, batch_size=NUM)))
    for i, image in enumerate(ordered.images):
        pixels = Image.open(io.BytesIO(photographs.read(i)))  # ADM's rule, by Pillow alone
        while min(pixels.size) >= 32:
            pixels = pixels.resize((pixels.width // 2, pixels.height // 2), Image.Resampling.BOX)
        scale = 16 / min(pixels.size)
        pixels = pixels.resize((round(pixels.width * scale), round(pixels.height * scale)), Image.Resampling.BICUBIC)
        left, upper = (pixels.width - 16) // 2, (pixels.height - 16) // 2
        expected = torch.from_numpy(np.array(pixels.crop((left, upper, left + 16, upper + 16))))
        assert torch.equal(image, expected.permute(2, 0, 1))


def test_order_and_augmentation_do_not_depend_on_ranks_workers_or_resuming(images: ImageSet) -> None:
    whole = run(images, 0, 11)  # more than three epochs
    assert [sorted(index for index, *_ in whole[e * NUM : (e + 1) * NUM]) for e in range(3)] == [list(range(NUM))] * 3
    assert len({tuple(index for index, *_ in whole[e * NUM : (e + 1) * NUM]) for e in range(3)}) == 3
    assert len({pixels for *_, pixels in whole[: 3 * NUM]}) > 2 * NUM  # crops and flips differ between epochs
    assert all((key, label) == (f"{index:02d}", index % 3) for index, key, label, _ in whole)
    for world, workers, step in itertools.product((1, 2, 4), (0, 2), (0, 1, 3, 10)):  # 3: across the end of an epoch
        if workers and (world, step) not in ((1, 0), (2, 3)):
            continue
        assert run(images, step * BATCH, min(2, 11 - step), world, workers) == whole[step * BATCH : (step + 2) * BATCH]
    assert run(images, 0, 11, seed=6) != whole


def test_the_order_is_stable_between_versions() -> None:
    assert permutation(0, 0, 8).tolist() == [7, 6, 3, 2, 4, 1, 5, 0]
    assert permutation(7, 3, 8).tolist() == [2, 1, 7, 6, 5, 4, 3, 0]


def test_the_numbers_of_a_draw_depend_on_nothing_else() -> None:
    draws = Draws(seed=3)
    asked = [(0, 5, 0), (0, 2, 0), (1, 5, 0), (0, 5, 1), (2**40, 2**40, 255), (0, 4, 255), (0, 0, 0)]
    numbers = [draws.numbers(*draw) for draw in asked]
    assert numbers == [Draws(seed=3).numbers(*draw) for draw in asked]
    assert len({number for drawn in numbers for number in drawn}) == 8 * len(asked)  # no draw shares one with another
    assert draws.numbers(0, 5, 0) != Draws(seed=4).numbers(0, 5, 0)
    assert draws.numbers(0, 5, 0)[:2] == [0.6526735437390104, 0.3605005313481042]  # in every version


def test_resuming_reads_no_earlier_image(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, i: (read.append(i), real(self, i))[1])
    batch = next(TrainingStream(images, config(), seed=0, batch_size=BATCH).from_sample(10**9))
    assert read == batch.indices


def test_a_set_may_be_smaller_than_the_batch(images: ImageSet) -> None:
    stream = TrainingStream(images, config(), seed=0, batch_size=3 * NUM + 1)
    batch = next(stream.from_sample(0))
    assert [sorted(batch.indices[e * NUM : (e + 1) * NUM]) for e in range(3)] == [list(range(NUM))] * 3


def test_a_global_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigError, match="10 images is not divisible by 4 ranks"):
        Shuffle(20, seed=0, batch_size=10, rank=0, world_size=4)


SETS = [range(7), range(7, 107), range(107, 110)]


def weighted(start: int, count: int, weights: tuple[float, ...] = (1, 3, 0.5), seed: int = 0) -> list[tuple[int, int]]:
    """(epoch, sample) at `count` positions from `start` on."""
    shuffle = WeightedShuffle(SETS, weights, seed=seed, batch_size=count, rank=0, world_size=1)
    return next(shuffle.batches(start))


def test_image_sets_are_drawn_in_the_shares_of_their_weights() -> None:
    draws = 45_000
    samples = [sample for _, sample in weighted(0, draws)]
    for samples_of_set, share in zip(SETS, (1 / 4.5, 3 / 4.5, 0.5 / 4.5), strict=True):
        drawn = sum(sample in samples_of_set for sample in samples)
        assert abs(drawn - share * draws) < 4 * (draws * share * (1 - share)) ** 0.5  # standard deviations
    runs = [sample in SETS[1] for sample in samples]
    repeats = sum(a == b for a, b in itertools.pairwise(runs)) / draws
    assert repeats == pytest.approx((3 / 4.5) ** 2 + (1.5 / 4.5) ** 2, abs=0.01)  # positions are independent


@pytest.mark.parametrize("weights", [(0, 3, 1), (1, 0, 3), (1, 1, 0), (0, 1, 0)])
def test_a_set_of_weight_zero_is_never_drawn(weights: tuple[float, ...]) -> None:
    samples = {sample for _, sample in weighted(0, 5_000, weights)}
    drawn = [bool(samples & set(part)) for part in SETS]
    assert drawn == [weight > 0 for weight in weights]


def test_every_pass_over_a_set_draws_each_of_its_images_once() -> None:
    draws = weighted(0, 10_000)
    for part in SETS:
        mine = [draw for draw in draws if draw[1] in part]
        passes = [mine[first : first + len(part)] for first in range(0, len(mine), len(part))]
        assert [epoch for epoch, _ in mine] == sorted(epoch for epoch, _ in mine)
        assert all(sorted(each) == [(epoch, i) for i in part] for epoch, each in enumerate(passes[:-1]))
        assert len({tuple(i for _, i in each) for each in passes}) > 1


def test_a_weighted_position_does_not_depend_on_where_the_stream_starts() -> None:
    whole = weighted(0, 3 * BLOCK)
    for start in (1, BLOCK - 3, 2 * BLOCK, 2 * BLOCK + 17):
        assert weighted(start, 50) == whole[start : start + 50]
    shuffle = WeightedShuffle(SETS, (1, 3, 0.5), seed=0, batch_size=1, rank=0, world_size=1)
    for position in (2 * BLOCK + 5, 3, BLOCK, 3 * BLOCK - 1, BLOCK + 1):  # any order
        assert shuffle.draw(position) == whole[position]
    assert weighted(0, 100, seed=1) != whole[:100]


def test_weighted_order_is_stable_between_versions() -> None:
    assert weighted(BLOCK, 6) == [(437, 21), (2076, 5), (437, 41), (437, 77), (437, 104), (2076, 0)]


@pytest.fixture
def two_sets(tmp_path: Path, draw: Draw) -> ImageSet:
    """Folders of 3 and of 11 images."""
    for name, count in (("few", 3), ("many", 11)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i:02d}.png").write_bytes(draw(i))
    return open_images([tmp_path / "few", tmp_path / "many"])


def test_a_weighted_stream_does_not_depend_on_ranks_workers_or_resuming(two_sets: ImageSet) -> None:
    weights = {"set_weights": (2.0, 1.0)}
    whole = run(two_sets, 0, 9, **weights)
    for world, workers, step in itertools.product((1, 2, 4), (0, 2), (0, 3, 7)):
        if workers and (world, step) != (2, 3):
            continue
        found = run(two_sets, step * BATCH, 2, world, workers, **weights)
        assert found == whole[step * BATCH : (step + 2) * BATCH]
    crops = {(index, pixels) for index, _, _, pixels in whole}
    assert len(crops) > 14  # crops of an image differ between the passes over its set
    joined = run(two_sets, 0, 9)
    assert joined != whole
    assert joined == run(two_sets, 0, 9, set_weights=())


def test_a_bad_image_is_replaced_by_one_of_its_set(two_sets: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "few" / "01.png").write_bytes(b"")
    images = open_images([tmp_path / "few", tmp_path / "many"])
    stream = TrainingStream(images, config(max_skipped=0.9, set_weights=(1, 0)), seed=0, batch_size=30)
    batch = next(stream.from_sample(0))
    assert set(batch.indices) == {0, 2}
    assert batch.skipped == {1: "empty"}


def test_weights_that_do_not_fit_the_sets_are_an_error(two_sets: ImageSet, tmp_path: Path, pack: Draw) -> None:
    with pytest.raises(ConfigError, match=r"data\.set_weights has 3 weights, and --images names 2 sets"):
        TrainingStream(two_sets, config(set_weights=(1, 2, 3)), seed=0, batch_size=4)
    (tmp_path / "empty.tar").write_bytes(pack({}))
    with_empty = open_images([tmp_path / "few", tmp_path / "empty.tar"])
    TrainingStream(with_empty, config(set_weights=(1, 0)), seed=0, batch_size=4)
    with pytest.raises(ConfigError, match=r"gives weight to empty\.tar of --images, which has no images"):
        TrainingStream(with_empty, config(set_weights=(1, 1)), seed=0, batch_size=4)


@pytest.mark.parametrize("weights", [(-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1e308, 1e308)])
def test_weights_without_a_share_are_an_error(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data\.set_weights = .* Give each --images a number"):
        config(set_weights=weights)


@pytest.fixture
def with_bad(tmp_path: Path, draw: Draw) -> ImageSet:
    """40 images, number 7 truncated and number 20 empty."""
    for i in range(40):
        data = draw(i, kind="JPEG")
        (tmp_path / f"{i:02d}.jpg").write_bytes(data[:-20] if i == 7 else b"" if i == 20 else data)
    return open_images([tmp_path])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_images_are_replaced_and_counted(with_bad: ImageSet, workers: int) -> None:
    stream = TrainingStream(with_bad, config(workers, max_skipped=0.2), seed=1, batch_size=8)
    batches = list(itertools.islice(stream.from_sample(0), 5))
    found = [prints(batch) for batch in batches]
    indices = [index for batch in found for index, *_ in batch]
    assert len(indices) == 40
    assert not {7, 20} & set(indices)
    assert merged(batch.skipped for batch in batches) == {7: "truncated", 20: "empty"}
    halves = TrainingStream(with_bad, config(max_skipped=0.2), seed=1, batch_size=8, rank=1, world_size=2)
    assert [prints(batch) for batch in itertools.islice(halves.from_sample(0), 5)] == [batch[4:] for batch in found]


def test_a_bad_replacement_is_named_too(with_bad: ImageSet, tmp_path: Path) -> None:
    for i in range(36):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"")
    images = open_images([tmp_path])
    batches = list(itertools.islice(TrainingStream(images, config(), seed=1, batch_size=4).from_sample(0), 3))
    assert {index for batch in batches for index in batch.indices} <= {36, 37, 38, 39}
    assert len(merged(batch.skipped for batch in batches)) > 12  # as many as there are samples, and replacements


def test_no_usable_training_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not a jpeg")
    stream = TrainingStream(open_images([tmp_path]), config(), seed=0, batch_size=1)
    with pytest.raises(
        DataError, match=r"256 images drawn one after another cannot be used, such as a of .* \(not-an-"
    ):
        next(stream.from_sample(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_batches_skip_and_count_bad_images(with_bad: ImageSet, workers: int) -> None:
    batches = OrderedBatches(with_bad, spans=[range(5, 24)], image_size=16, batch_size=6, num_workers=workers)
    found = list(batches)
    assert [batch.indices for batch in found] == [[5, 6, 8, 9, 10], [*range(11, 17)], [17, 18, 19, 21, 22], [23]]
    assert found[1].keys == [f"{i:02d}" for i in range(11, 17)]
    assert batches.skipped == {7: "truncated", 20: "empty"}
    assert found[0].labels.tolist() == [-1] * 5
    assert torch.equal(found[3].images[0], center_crop(decode(with_bad.read(23)), 16))


def test_ordered_batches_apply_a_transform(with_bad: ImageSet) -> None:
    own = OrderedBatches(with_bad, image_size=0, batch_size=3, transform=lambda image: torch.tensor(image.size))
    assert next(iter(own)).images.tolist() == [[48, 40]] * 3


def test_errors_of_workers_are_raised_unchanged(with_bad: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "03.jpg").unlink()
    with pytest.raises(DataError, match=r"^cannot read .*03\.jpg: No such file or directory\. Check the folder"):
        list(OrderedBatches(with_bad, image_size=16, batch_size=2, num_workers=1))


class Trouble(torch.utils.data.Dataset):
    """Tasks that kill their worker, never end, or check that the signals of the process group are ignored."""

    def __getitem__(self, work: str) -> str:
        if work == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if work == "hang":
            time.sleep(60)
        if work == "signals":
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return work


def test_a_killed_or_hanging_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # the default is 5 s
    for work, message in (("die", "exited unexpectedly|killed by signal"), ("hang", "timed out")):
        began = time.monotonic()
        with pytest.raises(DataError, match=f"the image loader stopped: .*({message})"):
            list(through_workers(Trouble(), ["fine", work], 1, timeout=1))
        gc.collect()  # the loader ends its worker now: later, in another test, it would wait for it for ten seconds
        assert time.monotonic() - began < 20
    assert list(through_workers(Trouble(), ["signals", "fine"], 1, timeout=9)) == ["signals", "fine"]


FORKSERVER = """
import multiprocessing
from itertools import islice
from vqpipe.data import ImageStream

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    stream = ImageStream("builtin:photos", image_size=8, seed=0, batch_size=4, num_workers=1, worker_timeout=60.0)
    print(sum(len(batch["key"]) for batch in islice(stream, 2)))
"""


@pytest.mark.slow
def test_workers_that_a_fork_server_started_stay(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FORKSERVER, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=300
    )
    assert done.stdout == b"8\n", done.stderr
