"""Patch features of images: written as float16 shards, read as one matrix.

A shard holds the features of a fixed number of consecutive images, so its bytes do not depend on the number of ranks or
workers, and a resumed run continues with the first missing shard:

    features-00000.npy       float16[rows, D]: per image pool * pool vectors, row-major
    samples-00000.parquet    key, shard and index (where the image is stored), label (null: none), first_row (in this
                             shard), num_rows
    encoder.safetensors      patch-pca only: the fitted projection

`FeatureSet` reads such an artifact, or any `.npy` files of shape [n, D], memory-mapped.

Shapes: B images, S their side, N vectors of dimension D.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, Draft, open_artifact
from vqpipe.codebooks.encoders import PatchEncoder, PatchPca, check_pool
from vqpipe.config import check_choices, resumable
from vqpipe.data.arrays import check_float16, first_rows, map_array, take_rows, write_rows
from vqpipe.data.encode import (
    ORIGIN_FIELDS,
    EncodedShard,
    EncodingJob,
    equal_shards,
    faster_network,
    read_samples,
    sample_columns,
)
from vqpipe.data.images import ImageSet
from vqpipe.errors import ConfigError, DataError
from vqpipe.files import hash_file
from vqpipe.progress import SILENT, Progress

BLOCK_ROWS = 65_536
"""Rows that are read at a time."""
ENCODER_FILE = "encoder.safetensors"
WEIGHTS_OPTION = "--set features.weights=FILE; --set features.allow_random_weights=true uses random weights"
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        *ORIGIN_FIELDS,
        pa.field("label", pa.int32()),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Settings of the features that a codebook is made from; section [features]."""

    encoder: str = "patch-pca"
    """`patch-pca` (no weights needed), `open_clip:NAME/TAG` or `timm:NAME`."""
    pool: int | None = None
    """Side of the grid of features per image after adaptive average pooling, at most that of the encoder's grid; none:
    4 for open_clip and timm, the whole grid for patch-pca."""
    image_size: int | None = None
    """Side of the square images in pixels; none: the size the encoder was trained on, 256 for patch-pca."""
    batch_size: int = resumable(default=32)
    """Images per batch; changes only the speed."""
    patch_size: int = 8
    """Side of a patch in pixels, patch-pca only."""
    components: int = 64
    """Dimension of a feature, patch-pca only."""
    fit_patches: int = 200_000
    """Approximate number of patches for the principal components, patch-pca only."""
    weights: Path | None = resumable(default=None)
    """File with the encoder's weights (its hash is an input of the artifact); none: the Hugging Face cache, and with
    `--download` the hub."""
    allow_random_weights: bool = False
    """Without `weights`, use an untrained network instead of downloading them: for controls."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder, the same on every device. bf16 is several times faster on a GPU; a feature then has 8
    significant bits. Features are averaged in float32."""
    images_per_shard: int = 1024
    """Images per shard."""
    limit: int | None = None
    """Use only the first `limit` images."""

    def __post_init__(self) -> None:
        check_choices(self, "features")
        for name in ("pool", "image_size", "batch_size", "patch_size", "fit_patches", "images_per_shard", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"features.{name} = {value}", "It is at least 1")
        kind, colon, name = self.encoder.partition(":")
        takes_name = kind in ENCODERS and ENCODERS[kind].hub_files is not None
        if kind not in ENCODERS or (bool(colon), bool(name)) != (takes_name, takes_name):
            *others, last = (each.usage for each in ENCODERS.values())
            raise ConfigError(f"features.encoder = {self.encoder!r} is unknown", f"Use {', '.join(others)} or {last}")

    @property
    def chosen_size(self) -> int | None:
        """Side of the images in pixels; None: that of the encoder's own training."""
        return self.image_size or (256 if self.encoder == "patch-pca" else None)


def pretrained_encoders() -> ModuleType:
    """The module of pretrained encoders; open_clip and timm take seconds to import."""
    from vqpipe.codebooks import pretrained

    return pretrained


@dataclass(frozen=True)
class EncoderKind:
    """How to build the encoders of one kind."""

    usage: str
    """The form of the setting `encoder`: `KIND`, or `KIND:NAME` for a kind with weights."""
    build: Callable[[FeaturesConfig, str, Path | None], PatchEncoder]
    """Build the encoder from (config, NAME, weights file)."""
    hub_files: Callable[[str], tuple[str, Sequence[str]]] | None = None
    """The hub repository of NAME, and the names that its weight file may have; None: the kind has no weights."""


ENCODERS: dict[str, EncoderKind] = {
    "patch-pca": EncoderKind(
        "patch-pca",
        lambda config, name, weights: PatchPca(config.chosen_size or 256, config.patch_size, config.components),
    ),
    "open_clip": EncoderKind(
        "open_clip:NAME/TAG",
        lambda config, name, weights: pretrained_encoders().open_clip_encoder(name, weights, config.image_size),
        lambda name: pretrained_encoders().open_clip_files(name),
    ),
    "timm": EncoderKind(
        "timm:NAME",
        lambda config, name, weights: pretrained_encoders().timm_encoder(name, weights, config.image_size),
        lambda name: pretrained_encoders().timm_files(name),
    ),
}
"""The kinds of encoders, by the KIND of the setting."""


def encoder_kind(config: FeaturesConfig) -> tuple[EncoderKind, str]:
    """The kind of the config's encoder, and its NAME."""
    kind, _, name = config.encoder.partition(":")
    return ENCODERS[kind], name


def encoder_weights(
    config: FeaturesConfig, *, download: bool = False, option: str = WEIGHTS_OPTION, progress: Progress = SILENT
) -> Path | None:
    """The file with the encoder's weights; None for a kind without weights and for random weights.

    Args:
        config: the encoder.
        download: fetch the file from the hub if it is not in the cache. Otherwise nothing is downloaded.
        option: how to name a file instead, for the message of an absent one.

    Raises:
        WeightsError: they are not on this machine, and are not to be downloaded or cannot be.
        ConfigError: no such model, or weights for a kind that has none.
    """
    kind, name = encoder_kind(config)
    if kind.hub_files is None and config.weights is not None:
        raise ConfigError(
            f"features.weights is set, and {config.encoder} has no weights", "Leave it out, or name an --encoder"
        )
    if kind.hub_files is None or config.weights is not None or config.allow_random_weights:
        return config.weights
    found: Path = pretrained_encoders().find_file(
        config.encoder, *kind.hub_files(name), download=download, option=option, progress=progress
    )
    return found


def open_encoder(config: FeaturesConfig, weights: Path | None) -> PatchEncoder:
    """Build the encoder (patch-pca unfitted), and check that `pool` is not larger than its grid.

    Raises:
        ConfigError: no such model, or a pool larger than its grid.
        WeightsError: the weights are missing or belong to another model.
    """
    kind, name = encoder_kind(config)
    encoder = kind.build(config, name, weights)
    check_pool(encoder, config.pool)
    return encoder


def fit_encoder(
    encoder: PatchEncoder,
    draft: Draft,
    images: ImageSet,
    config: FeaturesConfig,
    *,
    seed: int,
    num_workers: int = 0,
    progress: Progress = SILENT,
) -> None:
    """Fit patch-pca on `images` and write it to the draft, or load it if an earlier run wrote it."""
    if not isinstance(encoder, PatchPca):
        return

    def fit() -> None:
        if draft.record(ENCODER_FILE) is None:
            encoder.fit(images, config.limit, config.fit_patches, seed, num_workers=num_workers, progress=progress)
            with draft.write(ENCODER_FILE) as path:
                encoder.save(path)

    distributed.on_main(fit)
    encoder.load(draft.path / ENCODER_FILE)


def write_features(
    draft: Draft,
    images: ImageSet,
    encoder: PatchEncoder,
    config: FeaturesConfig,
    *,
    num_workers: int = 0,
    max_skipped: float = 0.01,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Encode images: write this rank's missing shards of a `features` artifact. Returns its facts, over all ranks.

    Raises:
        NumericError: a feature is NaN or exceeds float16; the message names the image.
        DataError: a larger share of images than `max_skipped` is unreadable, or all are.
    """
    pool = check_pool(encoder, config.pool)
    num_images = min(len(images), config.limit or len(images))
    row_shape = (pool * pool, encoder.dim)
    shards = equal_shards("features-{:05d}.npy", num_images, config.images_per_shard, row_shape, config.batch_size)
    job = EncodingJob(
        draft,
        images,
        shards,
        title="extract features",
        max_skipped=max_skipped,
        progress=progress,
        faster_encoding="" if isinstance(encoder, PatchPca) else faster_network(encoder.device, config.precision),
    )
    job.run(
        partial(encoder.encode, pool=pool, precision=config.precision),
        write_shard,
        check=partial(check_float16, what="features"),
        device=encoder.device,
        dtype=np.float16,
        image_size=encoder.image_size,
        num_workers=num_workers,
        transform=encoder.transform,
    )
    records, skipped = job.finish()
    return {
        "num_images": sum(record["images"] for record in records),
        "num_vectors": sum(record["rows"] for record in records),
        "dim": encoder.dim,
        "encoder": config.encoder,
        "skipped": skipped,
        **images.facts,
    }


def write_shard(draft: Draft, shard: EncodedShard) -> None:
    """Write a shard's two files."""
    images, vectors_per_image = shard.rows.shape[:2]
    columns = sample_columns(shard.keys, shard.labels, shard.origins) | {
        "first_row": [vectors_per_image * image for image in range(images)],
        "num_rows": [vectors_per_image] * images,
    }
    write_rows(draft, shard, pa.table(columns, schema=SAMPLES_SCHEMA))


class FeatureSet:
    """Vectors in shards, with row numbers that run through all shards.

    Attributes:
        num_vectors: N.
        dim: D.
        dtype: of `stored`: float16 if every shard has it, otherwise float32.
        labels: int32[N], the class of each vector's image (-1: none), or None without labels.
        digest, name: the input that an artifact made from these features records; of an artifact also its lineage.
        artifact: the artifact it was opened from, if any.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        names: Sequence[str],
        labels: np.ndarray | None = None,
        digest: str = "",
        artifact: Artifact | None = None,
    ) -> None:
        self.shards, self.names = list(shards), list(names)
        self.labels, self.artifact = labels, artifact
        self.digest = artifact.digest if artifact else digest
        files = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        self.name = artifact.name if artifact else files
        if artifact is not None:
            self.lineage = artifact.lineage
        self.first_rows = first_rows(self.shards)
        self.num_vectors = int(self.first_rows[-1])
        self.dim = int(self.shards[0].shape[1])
        self.dtype = np.float16 if all(shard.dtype == np.float16 for shard in self.shards) else np.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop as float32[stop - start, D], from as many shards as needed."""
        return self.stored(start, stop).float()

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows start..stop in `dtype`; read-only.

        Rows of one writable array in memory are a view of it. (PyTorch cannot view a read-only memory map.)
        """
        first, last = np.searchsorted(self.first_rows, [start + 1, stop]) - [1, 0]
        parts = [
            shard[max(0, start - row) : stop - row]
            for shard, row in zip(self.shards[first:last], self.first_rows[first:last].tolist(), strict=True)
        ]
        view = parts[0]
        if len(parts) == 1 and view.dtype == self.dtype and view.flags.writeable and view.flags.c_contiguous:
            return torch.from_numpy(view)
        return torch.from_numpy(np.concatenate(parts, dtype=self.dtype))

    def block_starts(self) -> range:
        """First rows of the blocks of BLOCK_ROWS rows; together they cover all rows."""
        return range(0, self.num_vectors, BLOCK_ROWS)

    def block_stop(self, start: int) -> int:
        """The row after the last of the block at `start`."""
        return min(start + BLOCK_ROWS, self.num_vectors)

    def take(self, rows: np.ndarray) -> Tensor:
        """The vectors at `rows`, int64[R], in that order: float32[R, D]."""
        return torch.from_numpy(take_rows(self.shards, rows, np.float32))

    def subset(self, rows: np.ndarray, name: str) -> "FeatureSet":
        """The vectors at `rows` as another feature set, in memory."""
        return FeatureSet([self.take(rows).numpy()], [name])

    def verify(self, progress: Progress) -> None:
        """Compare the hashes of an artifact's shards with its manifest, each rank some of them.

        (Other files are hashed when they are opened: that is their digest.)

        Raises:
            ArtifactError: a shard is not as published.
        """
        if self.artifact is not None:
            self.artifact.verify_files(self.names, progress)

    def place(self, row: int) -> str:
        """The shard and the row within it, for messages."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return f"{self.names[shard]}, row {row - int(self.first_rows[shard])}"


def open_features(sources: Sequence[Path | str]) -> FeatureSet:
    """Open one `features` artifact, or any number of `.npy` files of shape [n, dim], in the given order.

    Raises:
        DataError: no file, a file that is not a matrix of floating-point numbers, different dimensions, no rows.
        ArtifactError: a directory that is not a published features artifact.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise DataError("no features were named", "Give --features a features artifact or .npy files")
    if len(paths) == 1 and paths[0].suffix != ".npy" and not paths[0].is_file():
        return open_features_artifact(paths[0])
    for path in paths:
        if path.is_dir() and len(paths) > 1:
            raise DataError(
                f"{path} is a folder: features are one artifact, or .npy files",
                "Pass its .npy files, each by --features",
            )
    shards = [open_matrix(path) for path in paths]
    digest = hashlib.sha256("".join(hash_file(path) for path in paths).encode()).hexdigest()
    return checked(FeatureSet(shards, [path.name for path in paths], digest=digest))


def open_features_artifact(path: Path) -> FeatureSet:
    """Open a features artifact with its labels (None if no image has one)."""
    artifact = open_artifact(path, "features")
    names = artifact.names("features-*.npy")
    if not names:
        raise DataError(f"{path} holds no feature shards", "Extract features from at least one image")
    samples = read_samples(artifact, artifact.names("samples-*.parquet"), ["label", "num_rows"])
    labels, rows = samples["label"].to_numpy(), samples["num_rows"].to_numpy()
    features = FeatureSet(
        [open_matrix(artifact.file(name)) for name in names],
        names,
        np.repeat(labels, rows) if (labels >= 0).any() else None,
        artifact=artifact,
    )
    return checked(features)


def open_matrix(path: Path) -> np.ndarray:
    """Memory-map one `.npy` file of floating-point numbers [n, D]."""
    array = map_array(path)
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise DataError(
            f"{path} holds {array.dtype} of shape {list(array.shape)}", "Features are floats of shape [n, dim]"
        )
    return array


def checked(features: FeatureSet) -> FeatureSet:
    """Return `features`, or raise a DataError if its shards differ in dimension or hold no vectors."""
    for shard, name in zip(features.shards, features.names, strict=True):
        if shard.shape[1] != features.dim:
            raise DataError(
                f"{name} has dimension {shard.shape[1]}, {features.names[0]} has {features.dim}",
                "Cluster features of one encoder at a time",
            )
    if features.num_vectors == 0:
        raise DataError(f"{features.name} holds no vectors", "Extract features from at least one image")
    return features
