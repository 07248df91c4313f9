"""Latents of images before quantization, computed once and stored: what LDM, DiT and SiT train on.

A shard holds a fixed number of consecutive images, so its bytes do not depend on the number of ranks or workers, and it
is the unit of resuming:

    latents-00000.npy        float16[rows, C, h, w], memory-mapped when read; a mirror image's row follows its image's
    samples-00000.parquet    key, label (null: none), flipped: one row a latent

Why float16 and .npy: it keeps 11 significant bits, a rounding of at most 1/2048 of a value, where the smallest noise
that diffusion adds is 1/100 of a standard deviation; bfloat16 would round by 1/256. A latent beyond its 65504 is
refused. A plain array is mapped, so that training holds no latent in memory but those of its batch.

The released generators run the encoder in every step, and do not normalise. Here the mean and the standard deviation of
each channel are measured, and latents are read normalised, unless `raw` asks for them as they are.

Shapes: B images, R rows, C latent channels, h x w positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from vqpipe.artifacts import Artifact, Draft, open_artifact
from vqpipe.data.encode import EncodedShard, Progress, RowEncoder, Stopwatch, write_shards
from vqpipe.data.images import ImageSet
from vqpipe.errors import ArtifactError, DataError, NumericError

IMAGES_PER_SHARD = 4096
"""Fixed, so that shards are the same bytes whatever the number of ranks and workers."""
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("flipped", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel over a whole set, of length C."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of a channel that never changes it is 0; such a channel is only shifted."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) < 0:
            raise DataError(f"latent statistics of {len(self.mean)} means and {len(self.std)} deviations")
        if not np.isfinite([*self.mean, *self.std]).all():
            raise NumericError("the latents' mean or standard deviation is not finite")

    @classmethod
    def identity(cls, channels: int) -> "LatentStatistics":
        """Those under which normalising changes nothing: for raw latents."""
        return cls((0.0,) * channels, (1.0,) * channels)

    def normalize(self, latents: Tensor) -> Tensor:
        """float[B, C, h, w] -> float32[B, C, h, w] of mean 0 and variance 1 in each channel."""
        mean, scale = self.tensors(latents)
        return (latents.float() - mean) / scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """float[B, C, h, w] -> float32[B, C, h, w]; undoes `normalize`."""
        mean, scale = self.tensors(latents)
        return latents.float() * scale + mean

    def tensors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, float32[C, 1, 1], where `latents` lie."""
        if latents.shape[1] != len(self.mean):
            raise DataError(f"latents of {latents.shape[1]} channels, the statistics are of {len(self.mean)}")
        mean, scale = (
            torch.tensor(values, dtype=torch.float32, device=latents.device)[:, None, None]
            for values in (self.mean, [std or 1.0 for std in self.std])
        )
        return mean, scale

    def to_table(self) -> dict[str, list[float]]:
        """The statistics as JSON can hold them, exactly."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_table(cls, table: Mapping[str, Sequence[float]]) -> "LatentStatistics":
        """Undoes `to_table`."""
        return cls(tuple(map(float, table["mean"])), tuple(map(float, table["std"])))


class LatentSet:
    """Stored latents, read row by row from memory-mapped shards. In memory: the labels, 4 bytes a row.

    Attributes:
        shape: (C, h, w).
        labels: int32[R]; -1 where an image has no class.
        num_classes: labels are below it; None where no image has one.
        statistics: what `take` normalises with.
        artifact: what it was opened from, if it was.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: np.ndarray,
        statistics: LatentStatistics,
        num_classes: int | None = None,
        artifact: Artifact | None = None,
    ) -> None:
        self.files, self.labels, self.statistics = list(files), labels, statistics
        self.num_classes, self.artifact = num_classes, artifact
        self.shards: list[np.ndarray] | None = None
        shards = self.opened()
        self.first_rows = np.cumsum([0, *(len(shard) for shard in shards)])
        self.shape = tuple(int(side) for side in shards[0].shape[1:])
        for file, shard in zip(self.files, shards, strict=True):
            if shard.ndim != 4 or shard.dtype != np.float16 or shard.shape[1:] != self.shape:
                raise DataError(f"{file} holds {shard.dtype} of shape {list(shard.shape)}, not latents")
        if len(self) != len(labels) or len(self) == 0:
            raise DataError(f"{len(self)} latents with {len(labels)} labels in {self.files[0].parent}")

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": None}  # a mapped file would go to a worker process with all of its content

    def opened(self) -> list[np.ndarray]:
        """The shards, mapped in this process."""
        if self.shards is None:
            self.shards = [open_shard(file) for file in self.files]
        return self.shards

    def take(self, rows: np.ndarray | Sequence[int]) -> Tensor:
        """The latents at `rows`, in that order, normalised: float32[len(rows), C, h, w]."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise DataError(f"rows {rows.min()} to {rows.max()} of {len(self)} latents")
        shards, taken = self.opened(), np.empty((len(rows), *self.shape), np.float16)
        places = np.searchsorted(self.first_rows, rows, side="right") - 1
        for number in np.unique(places):
            here = places == number
            taken[here] = shards[number][rows[here] - self.first_rows[number]]
        return self.statistics.normalize(torch.from_numpy(taken))


def write_latents(
    draft: Draft,
    images: ImageSet,
    encode: Callable[[Tensor], Tensor],
    progress: Progress,
    stopwatch: Stopwatch,
    *,
    device: torch.device,
    latent_shape: tuple[int, int, int],
    image_size: int,
    flip: bool = False,
    precision: str = "fp32",
    batch_size: int = 32,
    num_workers: int = 0,
    max_skipped: float = 0.01,
) -> dict[str, Any]:
    """Write this rank's shards that are not written yet; returns the facts over all ranks, to publish with.

    `encode` is uint8[B, 3, S, S] on `device` -> float[B, *latent_shape]; with `flip` the mirror image is stored too.

    Raises:
        NumericError: a latent is NaN or outside float16, with the image's key.
        DataError: more images than `max_skipped` cannot be read, or none can.
    """

    @torch.no_grad()
    def views(batch: Tensor) -> Tensor:
        if precision == "bf16" and device.type == "cuda":
            batch = batch.contiguous(memory_format=torch.channels_last)  # the layout its bf16 convolutions want
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return torch.stack([encode(view) for view in ([batch, batch.flip(-1)] if flip else [batch])], 1).half()

    records, skipped = write_shards(
        draft,
        images,
        RowEncoder(
            encode=views,
            check=check_latents,
            device=device,
            row_shape=(1 + flip, *latent_shape),
            dtype=np.dtype(np.float16),
        ),
        partial(write_shard, draft),
        name=shard_name,
        shard_size=IMAGES_PER_SHARD,
        stop=len(images),
        max_skipped=max_skipped,
        stopwatch=stopwatch,
        progress=progress,
        image_size=image_size,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    records.sort(key=lambda record: record["number"])
    return {
        "num_images": sum(record["images"] for record in records),
        "num_latents": sum(record["rows"] for record in records),
        "latent_shape": list(latent_shape),
        "image_size": image_size,
        "num_classes": images.num_classes,
        **pooled(records).to_table(),
        "skipped": skipped,
    }


def shard_name(number: int) -> str:
    """The file whose record says that shard `number` is whole."""
    return f"latents-{number:05d}.npy"


def write_shard(draft: Draft, number: int, shard: EncodedShard) -> None:
    """Write one shard's two files; the array last, so that its record means both are."""
    views = shard.rows.shape[1]
    columns = {
        "key": [key for key in shard.keys for _ in range(views)],
        "label": [None if label < 0 else label for label in shard.labels for _ in range(views)],
        "flipped": [view > 0 for _ in shard.keys for view in range(views)],
    }
    with draft.write(f"samples-{number:05d}.parquet") as path:
        parquet.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), path, compression="zstd")
    rows = shard.rows.reshape(-1, *shard.rows.shape[2:])
    record = {"number": number, "images": len(shard.keys), "rows": len(rows), "skipped": dict(shard.skipped)}
    with draft.write(shard_name(number), **record, **moments(rows)) as path, path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def check_latents(latents: Tensor, keys: list[str]) -> None:
    """Every value of float16[B, views, C, h, w] is a number."""
    largest = (latents.view(torch.int16) & 0x7FFF).flatten(1).amax(dim=1)  # of the bits without the sign
    whole = largest < 0x7C00  # infinity; NaN lies above. torch.isfinite is 30 times as slow on float16
    if not whole.all():
        key = keys[int((~whole).nonzero()[0])]
        raise NumericError(
            f"the latent of image {key} holds NaN, or values beyond float16's 65504",
            "Look at that image, and at the tokenizer's weights",
        )


def moments(rows: np.ndarray) -> dict[str, Any]:
    """Of float16[R, C, h, w], per channel in float64: how many values, their mean, their squared deviations' sum."""
    mean, squares = [], []
    for channel in np.moveaxis(rows, 1, 0):  # one at a time: a shard in float64 is four times its size
        values = channel.astype(np.float64)
        mean.append(float(values.mean()) if values.size else 0.0)
        squares.append(float(((values - mean[-1]) ** 2).sum()))
    return {"values": len(rows) * int(np.prod(rows.shape[2:])), "mean": mean, "squares": squares}


def pooled(records: Sequence[Mapping[str, Any]]) -> LatentStatistics:
    """Shards' moments as one, in shard order, so that the result is the same numbers for any number of ranks.

    Chan, Golub & LeVeque 1983, eq. 2.1: no difference of large sums is taken.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for record in records:
        if record["values"] == 0:
            continue
        apart = np.array(record["mean"]) - mean
        total = count + record["values"]
        squares = squares + np.array(record["squares"]) + apart**2 * (count * record["values"] / total)
        mean = mean + apart * (record["values"] / total)
        count = total
    return LatentStatistics(tuple(mean.tolist()), tuple(np.sqrt(squares / count).tolist()))


def open_latents(path: Path | str, *, raw: bool = False) -> LatentSet:
    """Open a `latents` artifact; with `raw` its latents are read as they are, not normalised.

    Raises:
        ArtifactError: it is absent, unfinished or damaged.
        DataError: it holds no latents.
    """
    artifact = open_artifact(Path(path), "latents")
    files = [artifact.file(name) for name in artifact.names("latents-*.npy")]
    if not files:
        raise DataError(f"{path} holds no latents", "Write latents of at least one image")
    columns = [
        parquet.read_table(artifact.whole(name), columns=["label"])["label"].fill_null(-1).to_numpy()
        for name in artifact.names("samples-*.parquet")
    ]
    try:
        measured = LatentStatistics.from_table(artifact.facts)
        num_classes = artifact.facts["num_classes"]
    except KeyError as error:
        raise ArtifactError(f"{path} does not say its {error}", "Make the latents again") from None
    statistics = LatentStatistics.identity(len(measured.mean)) if raw else measured
    return LatentSet(files, np.concatenate(columns).astype(np.int32), statistics, num_classes, artifact)


def open_shard(path: Path) -> np.ndarray:
    """Memory-map one shard."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a latent shard ({type(error).__name__})", "Make the latents again") from None
