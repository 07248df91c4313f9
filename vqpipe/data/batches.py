"""Batches of images: in order (`OrderedBatches`), or endless and shuffled for training (`TrainingStream`).

Neither has a state to save. The sample at a position is a function of the seed and the position, not of the number of
ranks or worker processes, so a resumed run needs only the number of images seen.

B images of a batch, S their side.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vqpipe.data import remote
from vqpipe.data.decoding import BadImage, decode
from vqpipe.data.images import ImageSet
from vqpipe.data.transforms import DataConfig, center_crop, training_crop
from vqpipe.errors import ConfigError, DataError, VqpipeError

# Keys of random generators: the order of an epoch, the crop of a sample, the sets of positions (2: examples.HELD_OUT).
ORDER, SAMPLE, SET = 0, 1, 3
BLOCK = 1 << 16
"""Positions whose sets are drawn from one generator."""
TRIES = 256
"""Draws for one training sample until an image can be decoded: enough where nine of ten images cannot."""
NUMBERS = 8
"""Random numbers of a draw: two blocks of Philox, of which five numbers are used."""

Positions = TypeVar("Positions", range, list[int])


@dataclass
class Batch:
    """Images with their labels, keys and positions, in the same order."""

    images: Tensor
    """uint8[B, 3, S, S], or the output of the transform."""

    labels: Tensor
    """int64[B]; -1 where an image has no class."""

    keys: list[str]
    indices: list[int]
    """Positions in the image set."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Of training: the undecodable images that were replaced in this batch, position -> reason."""

    def pin_memory(self) -> "Batch":
        """Called by the data loader, so that copies to the GPU overlap with computation."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.keys, self.indices, self.skipped)


class Piece(NamedTuple):
    """The result for one range of positions: a batch of its usable images, and the skipped ones."""

    positions: range
    """Positions in the image set, skipped images included."""

    batch: Batch | None
    """The usable images; None where there are none."""

    skipped: dict[int, str]
    """Position -> reason."""


Loaded = tuple[Batch | None, dict[int, str]]
"""The result of a worker: a batch and the skipped images, position -> reason."""


class OrderedBatches:
    """Images in order, for tokenizing, features and evaluation: the center crop, or another transform.

    `spans` are the ranges of positions, default: all images. A batch never crosses from one into the next. The same
    processes decode all of them (`num_workers` 0: the main process; -1: one per core, if there is enough work).

    Undecodable images are left out of their batch and kept in `skipped`. Batches are cut by position, so they do not
    move the other images to other batches. Whether they are too many is for `vqpipe.data.skipped`.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        image_size: int,
        batch_size: int,
        spans: Sequence[range] | None = None,
        num_workers: int = 0,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.spans = [range(len(images))] if spans is None else spans
        self.num_workers = worker_count(num_workers, len(self) // batch_size, 3 * image_size**2 * batch_size)
        self.dataset = OrderedImages(images, transform or partial(center_crop, size=image_size))
        self.skipped: dict[int, str] = {}
        """Position -> reason, of the current iteration."""

    def __len__(self) -> int:
        """The number of images."""
        return sum(len(span) for span in self.spans)

    def __iter__(self) -> Iterator[Batch]:
        for piece in self.pieces():
            if piece.batch is not None:
                yield piece.batch

    def pieces(self) -> Iterator[Piece]:
        """Yield every batch with its positions, also where none of its images is usable."""
        found = self.skipped = {}
        loaded = through_workers(self.dataset, self.work(), self.num_workers)
        for positions, (batch, skipped) in zip(self.work(), loaded, strict=True):
            found.update(skipped)
            yield Piece(positions, None if batch is None else with_keys(batch, self.images), skipped)

    def work(self) -> list[range]:
        """The positions of each batch."""
        return [part for span in self.spans for part in chunks(span, self.batch_size)]


class Shuffle:
    """An endless shuffled order of a set; the sample at position p of a run is a function of (seed, p) alone.

    The order of epoch e is drawn from (seed, e); batches cross the boundary of epochs. Rank r gets the r-th of
    `world_size` equal parts of each global batch, so the ranks' batches, joined in rank order, are the global batch for
    any number of ranks.

    Raises:
        ConfigError: the global batch is not divisible by the number of ranks; there is no such rank; a negative seed.
        DataError: the set is empty.
    """

    def __init__(self, length: int, *, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(
                f"the global batch of {batch_size} images is not divisible by {world_size} ranks",
                "Change train.global_batch_size or the number of processes",
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size} is none", "Ranks are numbered from 0")
        if seed < 0:
            raise ConfigError(f"the seed {seed} is negative")
        if length == 0:
            raise DataError("there are no images to train on")
        self.length, self.seed = length, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def draw(self, position: int) -> tuple[int, int]:
        """(epoch, sample) at a global position."""
        epoch, offset = divmod(position, self.length)
        return epoch, int(permutation(self.seed, epoch, self.length)[offset])

    def batches(self, images_seen: int) -> Iterator[list[tuple[int, int]]]:
        """Yield (epoch, sample) of each image of this rank's batches, from global position `images_seen` on."""
        share = self.batch_size // self.world_size
        first = images_seen + self.rank * share
        while True:
            yield [self.draw(position) for position in range(first, first + share)]
            first += self.batch_size


class WeightedShuffle(Shuffle):
    """An endless order over several sets. The set at position p is drawn by its weight from (seed, p); its sample is
    the next one in the shuffled order of that set, so each pass over a set draws every image of it once.

    The epoch of a sample is the number of the pass over its own set.

    To start at position p, the sets at all earlier positions are drawn and counted: a few seconds for 10^8 images.

    Args:
        sets: the samples of each set.
        weights: one for each set, not negative, with a positive sum.
    """

    def __init__(
        self,
        sets: Sequence[range],
        weights: Sequence[float],
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        length = sum(len(samples) for samples in sets)
        super().__init__(length, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)
        self.sets = sets
        sums = np.cumsum(weights)
        self.edges = sums[:-1] / sums[-1]
        """[0, 1) is cut here into a part for each set. A set of weight 0 has an empty part."""
        self.orders = dict[int, tuple[int, np.ndarray]]()
        """set -> the epoch of its latest sample, and the order of that epoch."""
        self.block, self.before = -1, np.zeros(len(sets), np.int64)
        """The block in use, and the draws of each set before it."""
        self.drawn = self.earlier = np.empty(0, np.int64)
        """For each position of the block: its set, and the number of earlier positions with the same set."""

    def draw(self, position: int) -> tuple[int, int]:
        """(epoch, sample) at a global position."""
        block, offset = divmod(position, BLOCK)
        if block != self.block:
            self.use_block(block)
        number = int(self.drawn[offset])
        samples = self.sets[number]
        epoch, place = divmod(int(self.earlier[offset]), len(samples))
        if number not in self.orders or self.orders[number][0] != epoch:
            self.orders[number] = epoch, shuffled(len(samples), self.seed, ORDER, epoch, number)
        return epoch, samples[int(self.orders[number][1][place])]

    def use_block(self, block: int) -> None:
        """Draw the sets of a block, and count the draws before it, starting from the block in use if that is
        earlier."""
        first, before = (self.block, self.before) if 0 <= self.block < block else (0, np.zeros_like(self.before))
        for number in range(first, block):
            before = before + np.bincount(self.sets_of(number), minlength=len(self.sets))
        self.block, self.before, self.drawn = block, before, self.sets_of(block)
        self.earlier = np.empty(BLOCK, np.int64)
        for number, count in enumerate(before):
            places = np.flatnonzero(self.drawn == number)
            self.earlier[places] = count + np.arange(len(places))

    def sets_of(self, block: int) -> np.ndarray:
        """int64[BLOCK]: the set of each position of a block."""
        shares = unit_interval(generator(self.seed, SET, block).random_raw(BLOCK))
        return np.searchsorted(self.edges, shares, side="right")


def check_set_weights(images: ImageSet, weights: Sequence[float]) -> None:
    """Check data.set_weights against the image sets.

    Raises:
        ConfigError: another number of weights than sets, or a weight for a set without images.
    """
    if weights and len(weights) != len(images.sources):
        raise ConfigError(
            f"data.set_weights has {len(weights)} weights, and --images names {len(images.sources)} sets",
            "Give one weight for each --images, in the same order",
        )
    for source, members, weight in zip(images.sources, images.sets, weights, strict=False):
        if weight and not len(members):
            raise ConfigError(
                f"data.set_weights gives weight to {source.name} of --images, which has no images",
                "Set its weight to 0",
            )


class TrainingStream:
    """Endless shuffled training images; the crop and flip of a sample are drawn from (seed, epoch, sample).

    The order is that of `Shuffle`; with `set_weights` in the config it is that of `WeightedShuffle`.

    An undecodable image is replaced by another, drawn from the same (seed, epoch, sample), and named in the batch's
    `skipped`; so is a replacement that is undecodable itself. With weights, the other image is of the same set.

    Raises:
        ConfigError: the global batch is not divisible by the number of ranks, or the weights do not fit the sets.
        DataError: there are no images.
    """

    def __init__(
        self, images: ImageSet, config: DataConfig, *, seed: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.images, self.config, self.seed = images, config, seed
        check_set_weights(images, config.set_weights)
        options = {"seed": seed, "batch_size": batch_size, "rank": rank, "world_size": world_size}
        self.shuffle = (
            WeightedShuffle(images.sets, config.set_weights, **options)
            if config.set_weights
            else Shuffle(len(images), **options)
        )

    def from_sample(self, images_seen: int, first: int = 0, step: int = 1) -> Iterator[Batch]:
        """Yield this rank's batches from global position `images_seen` on, without reading the images before: all, or
        the batches `first`, `first + step`, ...

        Raises:
            DataError: TRIES draws for one sample gave no image; a worker process was killed or timed out.
        """
        dataset = TrainingImages(self.images, self.config, self.seed)
        work = islice(self.shuffle.batches(images_seen), first, None, step)
        for batch, skipped in through_workers(dataset, work, self.config.num_workers, self.config.worker_timeout):
            batch.skipped = skipped
            yield with_keys(batch, self.images)


def chunks(positions: Positions, size: int) -> list[Positions]:
    """Cut a range or a list into parts of `size` numbers; the last one may be shorter."""
    return [positions[first : first + size] for first in range(0, len(positions), size)]


def generator(seed: int, *key: int) -> np.random.Philox:
    """A counter-based bit generator for a key: the same numbers in any process, in any order of use."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))


class Draws:
    """The random numbers of the draws of training samples, each of which may be asked for on its own.

    They come from one Philox generator, whose counter is moved to the draw: a new generator for each draw would take
    three times as long, as much as a tenth of what decoding a photograph at half its size takes.
    """

    def __init__(self, seed: int) -> None:
        self.generator, self.block = generator(seed, SAMPLE), 0

    def numbers(self, epoch: int, sample: int, attempt: int) -> list[float]:
        """NUMBERS numbers in [0, 1) of a draw."""
        block = 2 * ((epoch << 64) + TRIES * sample + attempt)
        self.generator.advance(block - self.block)
        self.block = block + 2
        return unit_interval(self.generator.random_raw(NUMBERS)).tolist()


def unit_interval(raw: np.ndarray) -> np.ndarray:
    """uint64[...] -> float64[...] in [0, 1), as NumPy converts them."""
    return (raw >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """int64[length]: the order of an epoch."""
    return shuffled(length, seed, ORDER, epoch)


def shuffled(length: int, seed: int, *key: int) -> np.ndarray:
    """int64[length]: a random order for a key, by sorting raw numbers: NumPy guarantees them across versions, but not
    its shuffles."""
    return np.argsort(generator(seed, *key).random_raw(length), kind="stable")


class OrderedImages(Dataset[Loaded]):
    """Dataset for loader processes: positions -> a batch without the undecodable images."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, work: Sequence[int]) -> Loaded:
        kept, tensors, skipped = list[int](), list[Tensor](), dict[int, str]()
        for i in work:
            try:
                tensors.append(self.transform(decode(self.images.read(i), color=self.images.color)))
                kept.append(i)
            except BadImage as error:
                skipped[i] = error.reason
        if not kept:
            return None, skipped
        return assemble(self.images, kept, torch.stack(tensors)), skipped


class TrainingImages(Dataset[Loaded]):
    """Dataset for loader processes: a list of (epoch, sample) -> a batch of random crops."""

    def __init__(self, images: ImageSet, config: DataConfig, seed: int) -> None:
        self.images, self.config, self.draws = images, config, Draws(seed)

    def __getitem__(self, work: Sequence[tuple[int, int]]) -> Loaded:
        crops = np.empty((len(work), 3, self.config.image_size, self.config.image_size), np.uint8)
        skipped = dict[int, str]()
        indices = [self.sample(*drawn, crop, skipped) for drawn, crop in zip(work, crops, strict=True)]
        return assemble(self.images, indices, torch.from_numpy(crops)), skipped

    def sample(self, epoch: int, sample: int, out: np.ndarray, skipped: dict[int, str]) -> int:
        """Write the crop of a sample to `out`, or that of the first replacement drawn for it that can be decoded, and
        return its position. The others are added to `skipped`."""
        index = sample
        for attempt in range(TRIES):
            *drawn, which = self.draws.numbers(epoch, sample, attempt)[:5]
            if attempt:
                pool = self.replacements(sample)
                index = pool[int(which * len(pool))]
            try:
                training_crop(self.images.read(index), self.config, drawn, out, self.images.color)
                return index
            except BadImage as error:
                skipped[index] = error.reason
        raise DataError(
            f"{TRIES} images drawn one after another cannot be used, such as {self.images.key(index)} of"
            f" {self.images.origin(index)[0]} ({skipped[index]})",
            "Check the image files",
        )

    def replacements(self, sample: int) -> range:
        """The images that may replace a sample: all; with weights, those of its set, so that the shares stay."""
        if not self.config.set_weights:
            return range(len(self.images))
        return next(samples for samples in self.images.sets if sample in samples)


def assemble(images: ImageSet, indices: list[int], crops: Tensor) -> Batch:
    """A batch with labels and without keys."""
    labels = torch.from_numpy(images.labels[indices].astype(np.int64))
    return Batch(crops, labels, [], indices)


def with_keys(batch: Batch, images: ImageSet) -> Batch:
    """Add the keys; in the main process, because a lookup is cheaper than sending them."""
    batch.keys = [images.key(i) for i in batch.indices]
    return batch


PR_SET_PDEATHSIG = 1  # from linux/prctl.h
GRACE_SECONDS = 60
"""Lifetime of a worker after SIGTERM: longer than its parent needs to save its state."""

MIN_BATCHES_PER_WORKER = 4
"""Fewer batches do not pay for a process: starting it takes as long as decoding one or two."""
BATCHES_AHEAD = 4
"""Largest number of batches of one worker in shared memory: two prefetched, one being decoded, one in use."""


def through_workers(dataset: Dataset, work: Iterable[Any], num_workers: int, timeout: float = 300.0) -> Iterator[Any]:
    """Yield `dataset[task]` for each task in `work`, in order, computed by loader processes.

    `num_workers` 0 computes in this process, -1 uses `available_workers`.

    Raises:
        VqpipeError: that of `dataset`.
        DataError: a worker was killed, or timed out after `timeout` seconds.
    """
    num_workers = available_workers() if num_workers < 0 else num_workers
    abandoned = multiprocessing.RawValue("b", 0)
    with warnings.catch_warnings():  # Python 3.12+: workers only decode, and use no thread pool of the parent
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the number is the user's choice
        loader: DataLoader = DataLoader(
            ReturnedErrors(dataset),
            sampler=work,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=identity,  # else torch converts arrays and numbers to tensors
            worker_init_fn=partial(start_worker, abandoned),
            pin_memory=get_worker_info() is None and torch.cuda.is_available(),  # not in a worker of a user's loader
            timeout=timeout if num_workers else 0,
        )
        results = iter(loader)
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                hint = "Out of memory, of shared memory (/dev/shm), or a stalled disk? Try fewer workers"
                raise DataError(f"the image loader stopped: {error}", hint) from error
            if isinstance(result, VqpipeError):
                raise result
            yield result
    finally:
        abandoned.value = 1  # the loader waits for its workers, and they may wait for a server


class ReturnedErrors(Dataset[Any]):
    """Another data set, which returns a VqpipeError that it raises: a loader would raise a new one with a traceback as
    its text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, task: Any) -> Any:
        try:
            return self.dataset[task]
        except VqpipeError as error:
            return error


def start_worker(abandoned: Any, worker: int) -> None:
    """Set up a worker: its signals, and the flag that ends its requests of remote files."""
    remote.stop_flag = abandoned
    set_worker_signals(worker)


def set_worker_signals(worker: int) -> None:
    """Ignore the signals of the process group, which the parent handles: it may have to save its state first. After
    SIGTERM a worker exits in GRACE_SECONDS, after a second one at once. It must not outlive a killed parent: it
    inherits the parent's open files, including the lock of the draft."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not has_parent(parent):
        os._exit(1)  # it was killed before the call to prctl
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, exit_after_grace)


def has_parent(parent: Any) -> bool:
    """Whether the process that uses this worker is alive. Under the start method forkserver, Python 3.14's default on
    Linux, another one has started the worker, and ends with it."""
    if multiprocessing.get_start_method() == "forkserver":
        return bool(parent.is_alive())
    return parent.pid == os.getppid()


def exit_after_grace(number: int, frame: object) -> None:
    """Handle SIGTERM in a worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(GRACE_SECONDS)


def identity(loaded: Any) -> Any:
    return loaded


def available_workers() -> int:
    """One loader process per core of this rank's share of the machine, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def worker_count(num_workers: int, batches: int, batch_bytes: int) -> int:
    """The number of processes to start: `num_workers`; for -1 one per core, limited by the number of batches and by the
    shared memory for prefetched ones (a container may have as little as 64 MB)."""
    if num_workers >= 0:
        return num_workers
    fitting = shared_memory() // (BATCHES_AHEAD * max(batch_bytes, 1))
    return min(available_workers(), batches // MIN_BATCHES_PER_WORKER, fitting)


def shared_memory() -> int:
    """Free bytes of shared memory for the processes of this rank."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return sys.maxsize
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
