"""Patch features of images, stored as float16 shards: what a codebook is clustered from.

A shard holds the features of a fixed number of consecutive images, so its bytes do not depend on the number of ranks or
workers, and it is the unit of resuming:

    features-00000.npy       float16[rows, D]: per image pool * pool vectors, row-major
    samples-00000.parquet    key, label (null: none), first_row (in this shard), num_rows
    encoder.safetensors      patch-pca only: the fitted projection
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from vqpipe import config as configs
from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.codebooks.encoders import PatchEncoder, PatchPca, check_pool, pool_features
from vqpipe.data.encode import EncodedShard, EncodingJob, check_float16
from vqpipe.data.images import ImageSet
from vqpipe.device import reduced_precision
from vqpipe.errors import ConfigError
from vqpipe.progress import SILENT, Progress

ENCODER_FILE = "encoder.safetensors"
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which features codebooks are made of; section [features]."""

    encoder: str = "patch-pca"
    """`patch-pca` (no weights needed), `open_clip:NAME/TAG` or `timm:NAME`."""
    pool: int | None = None
    """Side of the grid of features per image after averaging; none: 4 for open_clip and timm, all for patch-pca."""
    image_size: int | None = None
    """Side of the square images in pixels; none: the size the encoder was trained at, 256 for patch-pca."""
    batch_size: int = 32
    """Images at a time; changes speed only."""
    patch_size: int = 8
    """Side of a patch in pixels, patch-pca only."""
    components: int = 64
    """Dimension of a feature, patch-pca only."""
    fit_patches: int = 200_000
    """Patches that the principal components are found on, about, patch-pca only."""
    weights: Path | None = None
    """File with the encoder's weights; none: the Hugging Face cache, or its hub."""
    allow_random_weights: bool = False
    """Without `weights`, use an untrained network instead of fetching them: a control, not a codebook."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """In which the encoder computes; the same on every device, so that it never depends on where one runs. bf16 is
    several times as fast on a GPU and leaves a feature 8 significant bits. Averages are taken in float32."""
    images_per_shard: int = 1024
    """Images whose features make one file."""
    limit: int | None = None
    """Use only the first so many images."""

    def __post_init__(self) -> None:
        for name in ("pool", "image_size", "batch_size", "patch_size", "fit_patches", "images_per_shard", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"features.{name} = {value}", "It is at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"features.precision = {self.precision!r} is not a choice", "Use fp32 or bf16")
        family, colon, name = self.encoder.partition(":")
        if self.encoder != "patch-pca" and (family not in ("open_clip", "timm") or not colon or not name):
            raise ConfigError(
                f"features.encoder = {self.encoder!r} is unknown", "Use patch-pca, open_clip:NAME/TAG or timm:NAME"
            )

    def request(self) -> dict[str, Any]:
        """The settings that decide the features: without batch size, and without where weights lie (their hash is an
        input of its own)."""
        table = configs.to_table(self)
        return {key: value for key, value in table.items() if key not in ("batch_size", "weights")}


def find_weights(config: FeaturesConfig) -> Path | None:
    """The file with the encoder's weights; None where there is none to load (patch-pca, or random by choice).

    Raises:
        WeightsError: they are not on this machine and cannot be fetched.
        ConfigError: no such model, or weights for patch-pca.
    """
    family, _, name = config.encoder.partition(":")
    if family == "patch-pca" and config.weights is not None:
        raise ConfigError("features.weights is set, and patch-pca has no weights", "Leave it out, or name an --encoder")
    if config.weights is not None or family == "patch-pca" or config.allow_random_weights:
        return config.weights
    from vqpipe.codebooks import pretrained  # open_clip and timm take seconds to import

    return pretrained.open_clip_weights(name) if family == "open_clip" else pretrained.timm_weights(name)


def open_encoder(config: FeaturesConfig, weights: Path | None) -> PatchEncoder:
    """Build the encoder; patch-pca comes unfitted. Checks that `pool` divides its grid.

    Raises:
        ConfigError: no such model, or a pool that does not divide its grid.
        WeightsError: the weights are absent or of another model.
    """
    family, _, name = config.encoder.partition(":")
    encoder: PatchEncoder
    if family == "patch-pca":
        encoder = PatchPca(config.image_size or 256, config.patch_size, config.components)
    else:
        from vqpipe.codebooks import pretrained

        build = pretrained.open_clip_encoder if family == "open_clip" else pretrained.timm_encoder
        encoder = build(name, weights, config.image_size)
    check_pool(encoder, config.pool)
    return encoder


def fit_encoder(
    encoder: PatchEncoder,
    draft: Draft,
    images: ImageSet,
    config: FeaturesConfig,
    *,
    seed: int,
    on_images: Callable[[int], None] = lambda count: None,
    num_workers: int = 0,
) -> None:
    """Fit patch-pca on `images` and keep it in the draft, or read what an earlier run kept. Others need no fitting."""
    if not isinstance(encoder, PatchPca):
        return
    if distributed.is_main() and draft.record(ENCODER_FILE) is None:
        encoder.fit(images, config.limit, config.fit_patches, seed, on_images, num_workers)
        with draft.write(ENCODER_FILE) as path:
            encoder.save(path)
    distributed.barrier()
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
    """Write this rank's shards that are not written yet; returns the facts over all ranks.

    Raises:
        NumericError: a feature is NaN or outside float16, with the image's key.
        DataError: more images than `max_skipped` cannot be read, or none can.
    """
    pool = check_pool(encoder, config.pool)
    device = next(encoder.parameters()).device

    @torch.inference_mode()
    def encode(batch: Tensor) -> Tensor:
        """uint8[B, 3, S, S] -> float16[B, pool * pool, D]."""
        with reduced:
            features = encoder(batch)
        return pool_features(features.float(), pool).half()

    reduced = reduced_precision(encoder, device, config.precision)
    with EncodingJob(
        draft,
        images,
        "features-{:05d}.npy",
        shard_size=config.images_per_shard,
        title="extract features",
        limit=config.limit,
        progress=progress,
    ) as job:
        for shard in job.encode(
            encode,
            check=partial(check_float16, what="features"),
            device=device,
            row_shape=(pool * pool, encoder.dim),
            dtype=np.float16,
            image_size=encoder.image_size,
            batch_size=config.batch_size,
            num_workers=num_workers,
            transform=encoder.transform,
        ):
            job.write(write_shard, draft, shard)
    records, skipped = job.finish(max_skipped)
    return {
        "num_images": sum(record["images"] for record in records),
        "num_vectors": sum(record["rows"] for record in records),
        "dim": encoder.dim,
        "encoder": config.encoder,
        "skipped": skipped,
    }


def write_shard(draft: Draft, shard: EncodedShard) -> None:
    """Write one shard's two files; the array last, so that its record means both are."""
    keys, rows = shard.keys, shard.rows
    vectors_per_image = rows.shape[1]
    columns = {
        "key": keys,
        "label": [None if label < 0 else label for label in shard.labels],
        "first_row": [vectors_per_image * index for index in range(len(keys))],
        "num_rows": [vectors_per_image] * len(keys),
    }
    with draft.write(f"samples-{shard.number:05d}.parquet") as path:
        parquet.write_table(pa.table(columns, schema=SAMPLES_SCHEMA), path)
    record = {"images": len(keys), "rows": vectors_per_image * len(keys), "skipped": dict(shard.skipped)}
    with draft.write(f"features-{shard.number:05d}.npy", **record) as path, path.open("wb") as file:
        np.save(file, rows.reshape(-1, rows.shape[2]), allow_pickle=False)
