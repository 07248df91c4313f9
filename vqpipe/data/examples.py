"""Tokens or latents as training data: random access, and an endless shuffled stream.

Like `batches.TrainingStream` the stream has no state to save: the example at a position of the run is a function of the
seed and the position, not of the number of ranks.

B images of a batch, N ids per image, R rows (one per image, two where horizontal flips are stored, or ten crops).
"""

import fcntl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact
from vqpipe.data.batches import SAMPLE, Shuffle, chunks, generator, shuffled
from vqpipe.data.encode import read_samples
from vqpipe.data.tokens import files_of_size, id_dtype, read_tokens, views_per_image
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.files import atomic_write, disk_errors

HELD_OUT = 2  # key of a random generator, besides ORDER and SAMPLE of `batches`
IN_MEMORY = 1 << 30
"""Bytes of ids up to which every rank keeps them in memory. More are unpacked once into a file that the ranks map, and
share through the page cache: ImageNet with flips at 4 x 576 ids is 12 GB, in ten crops 59 GB."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """Section [examples]: which tokens or latents are trained on."""

    conditional: bool = True
    """Train with class labels. Every image needs one."""
    num_classes: int = 0
    """Labels are in [0, num_classes); 0: the highest label plus one."""
    mirror: bool = True
    """Flip an image horizontally with probability 1/2, where the artifact holds its flip (tokenize --flip, or --crops
    ten: one of the ten crops is drawn, else one of the five that are not flipped)."""
    raw: bool = False
    """Latents: do not normalize them by their measured mean and standard deviation, as in VQGAN-LC's released code."""
    held_out: int = 0
    """Images held out for validation: the same ones in every run on an artifact."""

    def __post_init__(self) -> None:
        if min(self.num_classes, self.held_out) < 0:
            raise ConfigError("examples.num_classes and examples.held_out are at least 0")

    def num_classes_of(self, labels: np.ndarray, unlabeled: str = "") -> int | None:
        """The number of classes for labels int[images], -1 where unknown; None: unconditional. `unlabeled` is why
        images have no labels, where that is known.

        Raises:
            DataError: an image has no label, or one of `num_classes` or more.
        """
        if not self.conditional:
            return None
        unknown, highest = int((labels < 0).sum()), int(labels.max(initial=-1))
        if unknown:
            raise DataError(
                f"{unknown:,} of {len(labels):,} images have no label{f' ({unlabeled})' if unlabeled else ''}",
                "Use labeled images. Only generators can be trained without: --set examples.conditional=false",
            )
        if self.num_classes and highest >= self.num_classes:
            raise DataError(f"label {highest} is out of range", f"examples.num_classes = {self.num_classes}")
        return self.num_classes or highest + 1


@dataclass
class ExampleBatch:
    """Examples with their labels and keys, in the same order."""

    examples: Tensor
    """int64[B, N] ids, or float32[B, C, h, w] latents."""
    labels: Tensor
    """int64[B]; -1 where an image has no class."""
    keys: list[str]
    skipped: dict[int, str] = field(default_factory=dict)
    """Empty: every stored example can be used."""

    def __len__(self) -> int:
        return len(self.keys)


class Examples(Protocol):
    """Training data of a generator or classifier, with random access."""

    labels: np.ndarray
    """int64[images], -1 where unknown."""
    views: int
    """Stored views of each image: 1, 2 with its horizontal flip, or 10 crops. View 0 is the center crop, which is
    validated on; the second half are flips."""

    def __len__(self) -> int:
        """The number of images, each counted once."""

    def key(self, image: int) -> str:
        """The key of an image."""

    def read(self, images: Sequence[int], views: Sequence[int]) -> Tensor:
        """A view of each of the images: int64[B, N], or float32[B, C, h, w]."""


class TokenSet:
    """All ids of a tokens artifact, in their stored type: in memory up to IN_MEMORY bytes, else in a mapped file.

    Args:
        tokens: the artifact.
        cache: a folder for that file, on a disk shared by all ranks; rank 0 writes it. Every rank constructs the set at
            the same time.
        image_size: of an artifact with native sizes, that of the images to read.

    Raises:
        ArtifactError: the set is large and there is no `cache`, or the shards do not match the manifest.
        DataError: a shard is damaged; there are several sizes, or no images of `image_size`.
    """

    def __init__(self, tokens: Artifact, cache: Path | None = None, image_size: int | str | None = None) -> None:
        self.artifact = tokens
        names, self.facts = files_of_size(tokens, image_size)
        """Of the artifact, and of the size."""
        self.views = views_per_image(tokens.config)
        self.codebook_size = int(tokens.facts["codebook_size"])
        shape = (int(self.facts["num_images"]) * self.views, int(self.facts["num_tokens"]))
        dtype = id_dtype(self.codebook_size)
        stored = read_samples(tokens, names, ["key", "label"])
        if len(stored) != shape[0]:
            raise ArtifactError(f"{tokens.path} holds {len(stored)} rows, its manifest {shape[0]}", "Tokenize again")
        images = stored.take(np.arange(0, len(stored), self.views))
        self.labels, self.keys = images["label"].to_numpy().astype(np.int64), images["key"]
        self.file: Path | None = None
        if shape[0] * shape[1] * dtype.itemsize > IN_MEMORY:
            if cache is None:
                raise ArtifactError(
                    f"{tokens.path} holds too many ids for memory",
                    "Name a folder to unpack them into: TokenDataset(path, cache=FOLDER)",
                )
            part_name = f"-{self.facts['image_size']}" if "sizes" in self.facts else ""
            self.file = file = cache / f"ids-{tokens.digest[:16]}{part_name}.npy"
            distributed.on_main(lambda: write_array(file, shape, dtype, self.shards(names, shape[1])))
            self.rows = np.load(file, mmap_mode="r")
        else:
            parts = [ids.astype(dtype) for ids in self.shards(names, shape[1])]
            self.rows = np.concatenate([np.empty((0, shape[1]), dtype), *parts])
            """uint16 or uint32 [R, N]; the rows of an image follow each other."""

    def shards(self, names: Sequence[str], num_tokens: int) -> Iterator[np.ndarray]:
        """Yield the ids int64[rows, N] of each shard."""
        flipped = [2 * view >= self.views for view in range(self.views)]
        for name in names:
            part = read_tokens(self.artifact.file(name), self.codebook_size)
            if part.ids.shape[1] != num_tokens:
                raise ArtifactError(f"{self.artifact.path / name} has other rows than its manifest", "Tokenize again")
            if part.flipped.tolist() != flipped * (len(part.keys) // self.views):
                raise ArtifactError(f"{self.artifact.path / name} lacks flipped images", "Tokenize again")
            yield part.ids.numpy()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"rows": None} if self.file is not None else {})  # pickling would copy the mapped file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if self.file is not None:
            self.rows = np.load(self.file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, image: int) -> str:
        """The key of an image."""
        return str(self.keys[image])

    def read(self, images: Sequence[int], views: Sequence[int]) -> Tensor:
        """int64[B, N]."""
        rows = np.asarray(images) * self.views + np.asarray(views)
        return torch.from_numpy(self.rows[rows].astype(np.int64))


class Subset:
    """Some images of a set."""

    def __init__(self, examples: Examples, images: np.ndarray) -> None:
        self.examples, self.images = examples, images
        self.labels, self.views = examples.labels[images], examples.views

    def __len__(self) -> int:
        return len(self.images)

    def key(self, image: int) -> str:
        """The key of an image."""
        return self.examples.key(int(self.images[image]))

    def read(self, images: Sequence[int], views: Sequence[int]) -> Tensor:
        """As `Examples.read`."""
        return self.examples.read([int(self.images[image]) for image in images], views)


def write_array(file: Path, shape: tuple[int, int], dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
    """Write the rows of `parts` as a .npy file, unless it exists. A file beside it is locked meanwhile, where files can
    be: another job that needs the same file waits for it. (Folders are not locked between the machines of an NFS.)"""
    if file.is_file():
        return  # it may be in a folder that cannot be written
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("wb") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.is_file():
                with atomic_write(file) as temporary, temporary.open("wb") as handle:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(handle, header)
                    for rows in parts:
                        handle.write(rows.astype(dtype).tobytes())


def check_held_out(count: int, num_images: int) -> None:
    """Raise a DataError if more than half of the images would be held out."""
    if 2 * count > num_images:
        raise DataError(
            f"examples.held_out = {count:,} of {num_images:,} images would leave fewer to train on",
            f"Hold out at most half: --set examples.held_out={num_images // 2}",
        )


def split_held_out(examples: Examples, count: int) -> tuple[Examples, Subset | None]:
    """Split into training images and `count` held-out ones (None for 0): the same in every run, spread evenly
    over the classes. Raises the error of `check_held_out`."""
    check_held_out(count, len(examples))
    if count == 0:
        return examples, None
    mixed = shuffled(len(examples), 0, HELD_OUT)
    order = np.argsort(examples.labels[mixed], kind="stable")
    spread = mixed[order][np.linspace(0, len(examples) - 1, count).round().astype(np.int64)]
    rest = np.setdiff1d(np.arange(len(examples)), spread)
    return Subset(examples, rest), Subset(examples, np.sort(spread))


class ExampleStream:
    """Endless shuffled training examples in the order of `Shuffle`; the view of an image is drawn from (seed, epoch,
    image): without `flip`, one that is not flipped.

    Raises:
        ConfigError: the global batch is not divisible by the number of ranks.
        DataError: there are no images.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        flip: bool = True,
    ) -> None:
        self.examples, self.seed = examples, seed
        self.views = examples.views if flip else max(1, examples.views // 2)
        """The first so many views are drawn from."""
        self.shuffle = Shuffle(len(examples), seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)

    def from_sample(self, images_seen: int, first: int = 0, step: int = 1) -> Iterator[ExampleBatch]:
        """Yield this rank's batches from global position `images_seen` on, without reading the examples before: all, or
        the batches `first`, `first + step`, ..."""
        for samples in islice(self.shuffle.batches(images_seen), first, None, step):
            images = [image for _, image in samples]
            yield read_batch(self.examples, images, [self.view(epoch, image) for epoch, image in samples])

    def view(self, epoch: int, image: int) -> int:
        """The view of the image in this epoch."""
        if self.views == 1:
            return 0
        return int(generator(self.seed, SAMPLE, epoch, image).random_raw()) * self.views >> 64


def ordered_batches(examples: Examples, batch_size: int, first: int = 0, step: int = 1) -> Iterator[ExampleBatch]:
    """Yield view 0 of every image, in order: the batches `first`, `first + step`, ... of `batch_size` images."""
    for images in chunks(range(len(examples)), batch_size)[first::step]:
        yield read_batch(examples, images, [0] * len(images))


def read_batch(examples: Examples, images: Sequence[int], views: Sequence[int]) -> ExampleBatch:
    """The batch of a view of each of these images."""
    labels = torch.from_numpy(examples.labels[list(images)].astype(np.int64))
    return ExampleBatch(examples.read(images, views), labels, [examples.key(i) for i in images])
