"""Tokens and images for training loops of others: data sets for torch's DataLoader.

| class | reads | order |
|---|---|---|
| `TokenDataset` | a tokens artifact | map-style: one image per index |
| `TokenStream` | the same | endless, shuffled, in batches |
| `ImageStream` | images, cropped and flipped at random | endless, shuffled, in batches |

The batch at a position of a stream is a function of the seed and the position, whatever the number of ranks and worker
processes; the position is all of its state.

B images of a batch on this rank, N ids per image, S the side of a crop.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from vqpipe import distributed
from vqpipe.artifacts import open_artifact
from vqpipe.config import from_table
from vqpipe.data.batches import TrainingStream
from vqpipe.data.examples import ExampleStream, TokenSet
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.skipped import Skipped
from vqpipe.data.transforms import DataConfig
from vqpipe.errors import ConfigError
from vqpipe.image_size import Size
from vqpipe.words import counted


class TokenDataset(Dataset[dict[str, Any]]):
    """The tokens of a `tokens` artifact: item i is {"ids": int64[N], "label": int, "key": str} of image i.

    The label is -1 where it is unknown. Where an artifact has several rows per image (tokenize --flip, or --crops ten),
    an item has those of one `view`, by default the center crop; `stream` draws one.

    Args:
        path: the directory of the artifact.
        view: 0 is the center crop; with --flip 1 is its flip; with --crops ten 0 to 4 are crops, 5 to 9 their flips.
        cache: a folder for the ids, if they take more than 1 GB: they are unpacked into one file, which all processes
            map. It is on a disk that all ranks share, and all ranks open the data set at the same time.
        image_size: of an artifact of tokenize --image-size native, that of the images to read: (H, W), the side of a
            square, or "WIDTHxHEIGHT", as in its facts["sizes"].

    Raises:
        ArtifactError: it is absent, unfinished, damaged or of another kind, or it is large and there is no `cache`.
        DataError: a shard is damaged; there are several sizes, or no images of `image_size`.
        ConfigError: no such view.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        view: int = 0,
        cache: str | Path | None = None,
        image_size: Size | None = None,
    ) -> None:
        if isinstance(image_size, tuple):
            image_size = f"{image_size[1]}x{image_size[0]}"
        self.tokens = TokenSet(open_artifact(path, "tokens"), None if cache is None else Path(cache), image_size)
        if not 0 <= view < self.tokens.views:
            views, last = counted(self.tokens.views, "views"), self.tokens.views - 1
            raise ConfigError(f"view = {view}, each image has {views}", f"Pass 0 to {last}" if last else "Pass 0")
        self.view = view
        self.facts = self.tokens.facts
        """Of the artifact: image_size, num_tokens, layout and others; of native sizes those of the one that is read."""

    def __repr__(self) -> str:
        """The number of images, of ids of each, and of codes."""
        return f"TokenDataset({described(self)})"

    def __len__(self) -> int:
        """The number of images, each counted once."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        ids = self.tokens.read([index], [self.view])[0]
        return {"ids": ids, "label": int(self.tokens.labels[index]), "key": self.tokens.key(index)}

    @property
    def codebook_size(self) -> int:
        """Ids are below it."""
        return self.tokens.codebook_size

    @property
    def num_classes(self) -> int:
        """The highest label plus one; 0 without labels."""
        return int(self.tokens.labels.max(initial=-1)) + 1

    def stream(
        self, *, seed: int, batch_size: int, rank: int | None = None, world_size: int | None = None, flip: bool = True
    ) -> "TokenStream":
        """An endless shuffled stream of these tokens; see `TokenStream`."""
        return TokenStream(self, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, flip=flip)


def described(tokens: TokenDataset) -> str:
    """`num_images=1000, num_tokens=1024, codebook_size=4096`."""
    num_tokens = tokens.facts["num_tokens"]
    return f"num_images={len(tokens)}, num_tokens={num_tokens}, codebook_size={tokens.codebook_size}"


class Stream(IterableDataset[dict[str, Any]]):
    """An endless shuffled stream of batches, as a data set for DataLoader(stream, batch_size=None, num_workers=n).

    The order of an epoch is drawn from (seed, epoch); each epoch has every image once, and batches cross the boundary
    of epochs. Rank r gets the r-th of `world_size` equal parts of each global batch. Workers of a DataLoader get every
    n-th batch, which the DataLoader returns in order, so that the batches are those without workers.

    To resume, pass `load_state_dict` what `state_dict` returned after the last batch that was used. Worker processes
    have copies of the stream: with `num_workers` above 0 resume from batch["images_seen"] of that batch instead, by
    load_state_dict({"images_seen": ...}). Batch size and number of ranks may differ then. Every loop over such a
    DataLoader starts at the position that the stream had when its workers were started: use one loop for a whole run.

    Args:
        seed: not negative.
        batch_size: images of a global batch, which all ranks have together.
        rank, world_size: by default those of torch.distributed, or 0 and 1 without.
    """

    def __init__(self, *, seed: int, batch_size: int, rank: int | None, world_size: int | None) -> None:
        self.options = {
            "seed": seed,
            "batch_size": batch_size,
            "rank": distributed.rank() if rank is None else rank,
            "world_size": distributed.world_size() if world_size is None else world_size,
        }
        self.images_seen = 0
        """Global position of the next batch, over all ranks."""

    @abstractmethod
    def batches(self, images_seen: int, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Yield the batches `worker`, `worker + workers`, ... of this rank from a global position on."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        size = self.options["batch_size"]
        first = self.images_seen
        for number, batch in enumerate(self.batches(first, worker, workers)):
            seen = first + (worker + number * workers + 1) * size
            if info is None:  # a worker's copy stays where it is: it has read more than was used
                self.images_seen = seen
            yield batch | {"images_seen": seen}

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch of an iteration in this process."""
        return {"images_seen": self.images_seen, "seed": self.options["seed"]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position of `state` in the next iteration.

        Raises:
            ConfigError: it is that of a stream with another seed, or no position.
        """
        if state.get("seed", self.options["seed"]) != self.options["seed"]:
            raise ConfigError(f"the state has seed {state['seed']}, the stream {self.options['seed']}", "Use one seed")
        if "images_seen" not in state:
            raise ConfigError(f"the state {state} has no images_seen", "Give that of state_dict()")
        if state["images_seen"] < 0:
            raise ConfigError(f"images_seen = {state['images_seen']} is negative")
        self.images_seen = state["images_seen"]


class TokenStream(Stream):
    """Batches {"ids": int64[B, N], "label": int64[B], "key": list of B, "images_seen": int}; see `Stream`.

    Of an artifact with several rows per image, one is drawn by (seed, epoch, image): the image or its flip, or one of
    its ten crops; without `flip` one that is not flipped.

    Args:
        tokens: a `TokenDataset`, or the directory of an artifact of one size.

    Raises:
        ConfigError: the global batch is not divisible by the number of ranks.
        ArtifactError, DataError: as `TokenDataset`; there are no images.
    """

    def __init__(
        self,
        tokens: TokenDataset | str | Path,
        *,
        seed: int,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        flip: bool = True,
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)
        self.dataset = tokens if isinstance(tokens, TokenDataset) else TokenDataset(tokens)
        self.examples = ExampleStream(self.dataset.tokens, **self.options, flip=flip)

    def __repr__(self) -> str:
        """The tokens, and the size of a global batch."""
        return f"TokenStream({described(self.dataset)}, batch_size={self.options['batch_size']})"

    def batches(self, images_seen: int, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        for batch in self.examples.from_sample(images_seen, worker, workers):
            yield {"ids": batch.examples, "label": batch.labels, "key": batch.keys}


class ImageStream(Stream):
    """Batches {"image": uint8[B, 3, S, S], "label": int64[B], "key": list of B, "images_seen": int}; see `Stream`.

    A label is -1 where it is unknown. Crop and flip are drawn from (seed, epoch, image). An image that cannot be
    decoded is replaced by another one, and counted.

    Args:
        images: what --images takes: a folder, tars, an artifact, `builtin:photos`; or several of them.
        image_size: S, in pixels.
        settings: those of section [data] of a preset, such as crop="center", flip=False, max_scale=1.5. By default
            `resize` is "fast". `num_workers` is 0, for a DataLoader with workers; without one, set it to decode in
            processes.

    Raises:
        ConfigError: the global batch is not divisible by the number of ranks, or an unknown setting.
        DataError: there are no images, or more than a share of `max_skipped` cannot be decoded.
    """

    def __init__(
        self,
        images: str | Path | Sequence[str | Path] | ImageSet,
        *,
        image_size: int,
        seed: int,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)
        table = {"num_workers": 0, "resize": "fast", **settings, "image_size": image_size}
        image_set = images if isinstance(images, ImageSet) else open_images(images)
        self.stream = TrainingStream(image_set, from_table(DataConfig, table, "data"), **self.options)
        self.unusable = Skipped(image_set, len(image_set), {})

    def __repr__(self) -> str:
        """The number of images, their size, and the size of a global batch."""
        size, batch_size = self.stream.config.image_size, self.options["batch_size"]
        return f"ImageStream(num_images={self.unusable.total}, image_size={size}, batch_size={batch_size})"

    @property
    def skipped(self) -> dict[str, int]:
        """reason -> count of the images that this process has found unusable, and replaced."""
        return self.unusable.counts()

    def batches(self, images_seen: int, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        for batch in self.stream.from_sample(images_seen, worker, workers):
            if batch.skipped:
                self.unusable = replace(self.unusable, reasons={**self.unusable.reasons, **batch.skipped})
                self.unusable.check(self.stream.config.max_skipped, None, so_far=True)
            yield {"image": batch.images, "label": batch.labels, "key": batch.keys}
