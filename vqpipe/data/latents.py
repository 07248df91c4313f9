"""Stored latents of images before quantization, the training data of LDM, DiT and SiT.

A shard holds a fixed number of consecutive images:

    latents-00000.npy        float16[rows, C, h, w]; the row of an image's flip follows the row of the image
    samples-00000.parquet    key, shard and index (where the image is stored), label (null: none), flipped: one row per
                             latent

float16 has 11 significant bits: its rounding error is at most 1/2048 of a value (bfloat16: 1/256), and the smallest
noise of diffusion is 1/100 of a standard deviation. A latent beyond float16's 65504 is an error. A .npy file is
memory-mapped, so training has only the latents of its batch in memory.

The released generators run the encoder in every step, without normalization. Here the mean and standard deviation of
each channel are measured, and latents are normalized when read, unless `raw` is set.

Shapes: B images, R rows, C latent channels, h x w positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vqpipe.artifacts import Draft, open_artifact
from vqpipe.data.arrays import check_float16, first_rows, map_array, take_rows, write_rows
from vqpipe.data.encode import (
    IMAGES_PER_SHARD,
    ORIGIN_FIELDS,
    EncodedShard,
    EncodingJob,
    encode_views,
    equal_shards,
    faster_network,
    read_samples,
    sample_columns,
    with_flip,
)
from vqpipe.data.images import ImageSet
from vqpipe.data.tokens import views_per_image
from vqpipe.errors import ArtifactError, DataError, NumericError
from vqpipe.progress import SILENT, Progress

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        *ORIGIN_FIELDS,
        pa.field("label", pa.int32()),
        pa.field("flipped", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel over a whole set, of length C."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """0 for a constant channel, which is only shifted."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) < 0:
            raise DataError(f"latent statistics of {len(self.mean)} means and {len(self.std)} deviations")
        if not np.isfinite([*self.mean, *self.std]).all():
            raise NumericError("the latents' mean or standard deviation is not finite")

    @classmethod
    def identity(cls, channels: int) -> "LatentStatistics":
        """Mean 0 and standard deviation 1, for raw latents."""
        return cls((0.0,) * channels, (1.0,) * channels)

    def normalize(self, latents: Tensor) -> Tensor:
        """float[B, C, h, w] -> float32[B, C, h, w] of mean 0 and variance 1 in each channel."""
        mean, scale = self.tensors(latents)
        return (latents.float() - mean) / scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """float[B, C, h, w] -> float32[B, C, h, w]; the inverse of `normalize`."""
        mean, scale = self.tensors(latents)
        return latents.float() * scale + mean

    def tensors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, float32[C, 1, 1], on the device of `latents`."""
        if latents.shape[1] != len(self.mean):
            raise DataError(f"latents of {latents.shape[1]} channels, the statistics are of {len(self.mean)}")
        mean, scale = (
            torch.tensor(values, dtype=torch.float32, device=latents.device)[:, None, None]
            for values in (self.mean, [std or 1.0 for std in self.std])
        )
        return mean, scale

    def to_table(self) -> dict[str, list[float]]:
        """The statistics for JSON, exactly."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_table(cls, table: Mapping[str, Sequence[float]]) -> "LatentStatistics":
        """The inverse of `to_table`."""
        return cls(tuple(map(float, table["mean"])), tuple(map(float, table["std"])))


class LatentSet:
    """Stored latents as examples of training, read row by row from memory-mapped shards.

    Args:
        files: the shards.
        samples: columns key and label (-1: unknown), a row per latent.
        views: latents of each image: 1, or 2 with its flip.
        statistics: the normalization of `take`.

    Attributes:
        shape: (C, h, w).
        labels: int64[images]; -1 where an image has no class.
    """

    def __init__(self, files: Sequence[Path], samples: pa.Table, views: int, statistics: LatentStatistics) -> None:
        self.files, self.views, self.statistics = list(files), views, statistics
        self.shards = list(map(map_array, self.files))
        self.shape = tuple(int(side) for side in self.shards[0].shape[1:])
        for file, shard in zip(self.files, self.shards, strict=True):
            if shard.ndim != 4 or shard.dtype != np.float16 or shard.shape[1:] != self.shape:
                raise DataError(f"{file} holds {shard.dtype} of shape {list(shard.shape)}, not latents")
        self.num_rows = int(first_rows(self.shards)[-1])
        if self.num_rows != len(samples) or self.num_rows == 0:
            raise DataError(f"{self.num_rows} latents with {len(samples)} labels in {self.files[0].parent}")
        images = samples.take(np.arange(0, len(samples), views))
        self.keys, self.labels = images["key"], images["label"].to_numpy().astype(np.int64)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": None}  # pickling would copy the mapped files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "shards": list(map(map_array, state["files"]))}

    def key(self, image: int) -> str:
        """The key of an image."""
        return str(self.keys[image])

    def read(self, images: Sequence[int], views: Sequence[int]) -> Tensor:
        """A view of each of the images: float32[B, C, h, w]."""
        return self.take(np.asarray(images) * self.views + np.asarray(views))

    def take(self, rows: np.ndarray | Sequence[int]) -> Tensor:
        """The latents at `rows`, in that order, normalized: float32[len(rows), C, h, w]."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise DataError(f"rows {rows.min()} to {rows.max()} of {self.num_rows} latents")
        return self.statistics.normalize(torch.from_numpy(take_rows(self.shards, rows, np.float16)))


class LatentEncoder(Protocol):
    """The part of `vqpipe.Tokenizer` used here."""

    device: torch.device

    def latent(self, images: Tensor, precision: str = "fp32") -> Tensor:
        """uint8[B, 3, S, S] -> float[B, C, h, w]."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w)."""


def write_latents(
    draft: Draft,
    images: ImageSet,
    tokenizer: LatentEncoder,
    *,
    image_size: int,
    flip: bool = False,
    precision: str = "fp32",
    batch_size: int = 32,
    num_workers: int = 0,
    max_skipped: float = 0.01,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Encode images: write this rank's missing shards of a `latents` artifact. Returns its facts, over all ranks.

    With `flip` the latents of each image's horizontal flip are stored as well.

    Raises:
        NumericError: a latent is NaN or outside float16, with the image's key.
        DataError: the size is not divisible by the downsample factor; more images than `max_skipped` are unreadable.
    """
    latent_shape = tokenizer.latent_shape(image_size, image_size)
    shards = equal_shards("latents-{:05d}.npy", len(images), IMAGES_PER_SHARD, (1 + flip, *latent_shape), batch_size)
    job = EncodingJob(
        draft,
        images,
        shards,
        title="latents",
        max_skipped=max_skipped,
        progress=progress,
        faster_encoding=faster_network(tokenizer.device, precision),
    )
    job.run(
        partial(
            encode_views,
            views=partial(with_flip, flip=flip),
            encode=lambda view: tokenizer.latent(view, precision=precision).half(),
        ),
        write_latent_shard,
        check=partial(check_float16, what="latent"),
        device=tokenizer.device,
        dtype=np.float16,
        image_size=image_size,
        num_workers=num_workers,
    )
    records, skipped = job.finish()
    return {
        "num_images": sum(record["images"] for record in records),
        "num_latents": sum(record["rows"] for record in records),
        "latent_shape": list(latent_shape),
        "image_size": image_size,
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        **pooled(records).to_table(),
        "skipped": skipped,
        **images.facts,
    }


def write_latent_shard(draft: Draft, shard: EncodedShard) -> None:
    """Write a shard's two files."""
    columns = sample_columns(shard.keys, shard.labels, shard.origins, rows_per_image=shard.rows.shape[1])
    latents = shard.rows.reshape(-1, *shard.rows.shape[2:])
    write_rows(draft, shard, pa.table(columns, schema=SAMPLES_SCHEMA), **moments(latents))


def moments(rows: np.ndarray) -> dict[str, Any]:
    """Per channel of float16[R, C, h, w], in float64: the number of values, mean, and sum of squared deviations."""
    mean, squares = [], []
    for channel in np.moveaxis(rows, 1, 0):  # one at a time, because float64 takes four times the memory
        values = channel.astype(np.float64)
        mean.append(float(values.mean()) if values.size else 0.0)
        squares.append(float(((values - mean[-1]) ** 2).sum()))
    return {"values": len(rows) * int(np.prod(rows.shape[2:])), "mean": mean, "squares": squares}


def pooled(records: Sequence[Mapping[str, Any]]) -> LatentStatistics:
    """The statistics of all shards, in shard order: equal for any number of ranks.

    The formula (Chan, Golub & LeVeque 1983, eq. 2.1) does not subtract large sums.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for record in records:
        if record["values"] == 0:
            continue
        delta = np.array(record["mean"]) - mean
        total = count + record["values"]
        squares = squares + np.array(record["squares"]) + delta**2 * (count * record["values"] / total)
        mean = mean + delta * (record["values"] / total)
        count = total
    return LatentStatistics(tuple(mean.tolist()), tuple(np.sqrt(squares / count).tolist()))


def open_latents(path: Path | str, *, raw: bool = False) -> LatentSet:
    """Open a `latents` artifact; with `raw` its latents are not normalized.

    Raises:
        ArtifactError: it is absent, unfinished or damaged.
        DataError: it holds no latents.
    """
    artifact = open_artifact(Path(path), "latents")
    files = [artifact.file(name) for name in artifact.names("latents-*.npy")]
    if not files:
        raise DataError(f"{path} holds no latents", "Encode at least one image")
    samples = read_samples(artifact, artifact.names("samples-*.parquet"), ["key", "label"])
    try:
        measured = LatentStatistics.from_table(artifact.facts)
    except KeyError as error:
        raise ArtifactError(f"{path} lacks the fact {error}", "Encode the latents again") from None
    statistics = LatentStatistics.identity(len(measured.mean)) if raw else measured
    return LatentSet(files, samples, views_per_image(artifact.config), statistics)
