"""Token shards: one Parquet row per view of an image, its ids as narrow as the codebook allows; images to tokens and
back.

Columns: key string; shard dictionary<string> and index int64, the name of the tar, archive or folder that holds the
image, and its position there (not for generated images, nor in files of earlier versions); label int32, null where
unknown; ids fixed_size_list<uint16 or uint32>[N]; and, only where an image has several rows, flipped bool. The rows of
an image follow each other:

| tokenize | rows of an image |
|---|---|
| --crops center | the center crop |
| --flip | the center crop, and its horizontal flip |
| --crops ten | center, top left, top right, bottom left, bottom right of a larger center crop; the same of its flip |

B images of a batch, N ids per image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.data.batches import chunks
from vqpipe.data.encode import (
    IMAGES_PER_SHARD,
    ORIGIN_FIELDS,
    EncodedShard,
    EncodingJob,
    encode_views,
    sample_columns,
    with_flip,
)
from vqpipe.data.images import ImageSet
from vqpipe.data.tars import tar_keys, write_tar
from vqpipe.data.transforms import Framing, encode_png, fixed_size, ten_crops
from vqpipe.errors import ConfigError, DataError
from vqpipe.progress import SILENT, Progress

SHARD_NAME = "tokens-{:05d}.parquet"

Crops = Literal["center", "ten"]
TEN_CROP_RANGE = 1.1
"""Side of the center crop that ten crops are cut from, over their side: the default of LlamaGen's
`extract_codes_c2i.py`."""
TEN_CROP_KEYS = ("", "-top-left", "-top-right", "-bottom-left", "-bottom-right")
"""Added to the keys of decoded images."""


class ImageTokenizer(Protocol):
    """The part of `vqpipe.Tokenizer` used here."""

    device: torch.device

    @property
    def codebook_size(self) -> int:
        """Ids are below it."""

    def layout(self, height: int, width: int) -> Any:
        """The order of the ids of an image of `height` x `width` pixels (a `TokenLayout`)."""

    def encode(self, images: Tensor, precision: str = "fp32") -> Tensor:
        """uint8[B, 3, S, S] -> int64[B, N]."""

    def decode(self, ids: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """int64[B, N] -> uint8[B, 3, H, W]."""


def write_tokens(
    draft: Draft,
    images: ImageSet,
    tokenizer: ImageTokenizer,
    *,
    image_size: int | str,
    flip: bool = False,
    crops: Crops = "center",
    precision: str = "fp32",
    batch_size: int = 32,
    num_workers: int = 0,
    max_skipped: float = 0.01,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Tokenize images: write this rank's missing shards of a `tokens` artifact. Returns its facts, over all ranks.

    `image_size` is the side of ADM's center crop, or "WIDTHxHEIGHT" for the crop of the rule cover.

    With `flip` the tokens of each image's horizontal flip are stored as well. `crops` "ten" stores ten views of each
    image, as LlamaGen: the `ten_crops` of ADM's center crop of side int(1.1 x `image_size`). `precision` "bf16" applies
    to the network; the codebook search stays in float32, on slightly different latents.

    Raises:
        ConfigError: `flip` with ten crops, which include flips; ten crops of a rectangle; a size that is none.
        DataError: more images than `max_skipped` are unreadable, or all are; an id outside the codebook.
    """
    check_crops(crops, flip, image_size)
    height, width = fixed_size(image_size)
    side = int(width * TEN_CROP_RANGE) if crops == "ten" else max(height, width)
    views = partial(ten_crops, size=width) if crops == "ten" else partial(with_flip, flip=flip)
    layout = tokenizer.layout(height, width)
    job = EncodingJob(
        draft,
        images,
        SHARD_NAME,
        shard_size=IMAGES_PER_SHARD,
        title="tokenize",
        max_skipped=max_skipped,
        progress=progress,
    )
    job.run(
        partial(encode_views, views=views, encode=partial(tokenizer.encode, precision=precision)),
        write_token_shard,
        check=partial(check_token_ids, codebook_size=tokenizer.codebook_size),
        device=tokenizer.device,
        row_shape=(views_per_image({"flip": flip, "crops": crops}), layout.num_tokens),
        dtype=id_dtype(tokenizer.codebook_size),
        image_size=side,
        batch_size=batch_size,
        num_workers=num_workers,
        transform=None if height == width else Framing(rule="cover", size=(height, width)),
    )
    records, skipped = job.finish()
    return {
        "num_images": sum(record["images"] for record in records),
        "num_tokens": layout.num_tokens,
        "codebook_size": tokenizer.codebook_size,
        "image_size": image_size,
        "layout": layout.to_table(),
        "skipped": skipped,
        **images.facts,
    }


def check_crops(crops: Crops, flip: bool, image_size: int | str | None = None) -> None:
    """Raise a ConfigError for `flip` with ten crops, and for ten crops of a rectangle."""
    if crops == "ten" and flip:
        raise ConfigError("--crops ten includes the flip of each image", "Omit --flip")
    if crops == "ten" and image_size is not None and len(set(fixed_size(image_size))) > 1:
        raise ConfigError(f"--crops ten is for squares, {image_size} is none", "Give one number as --image-size")


def views_per_image(config: Mapping[str, Any]) -> int:
    """The rows of each image in an artifact of tokens or latents: 10, 2 or 1. Of several, the second half are flips."""
    return 10 if config.get("crops") == "ten" else 1 + bool(config.get("flip", False))


def id_dtype(codebook_size: int) -> np.dtype:
    """The narrowest type for ids below `codebook_size`: uint16 up to 65,536 codes, else uint32."""
    return np.dtype(np.uint16 if codebook_size <= 1 << 16 else np.uint32)


def check_token_ids(ids: Tensor, keys: list[str], codebook_size: int) -> None:
    """Raise a DataError for an id outside the codebook: narrowing would wrap it around."""
    low, high = ids.aminmax()
    if low < 0 or high >= codebook_size:
        raise DataError(f"ids from {low} to {high} are outside a codebook of {codebook_size} codes")


def write_token_shard(draft: Draft, shard: EncodedShard) -> None:
    """Write the file of a shard, with its counts as its record."""
    name = SHARD_NAME.format(shard.number)
    with draft.write(name, images=len(shard.keys), skipped=shard.skipped) as path:
        write_token_file(path, shard.keys, shard.labels, shard.rows, shard.origins)


def write_token_file(
    path: Path,
    keys: Sequence[str],
    labels: Sequence[int],
    ids: np.ndarray,
    origins: Sequence[tuple[str, int]] | None = None,
) -> None:
    """Write one Parquet file: ids uint16 or uint32[images, V, N], of V views of each image; labels -1 where unknown;
    origins as `ImageSet.origin` gives them, None for images that are not stored."""
    rows_per_image, num_tokens = ids.shape[1:]
    table = sample_columns(keys, labels, origins, rows_per_image=rows_per_image)
    columns = {"key": pa.array(table["key"], pa.string())}
    if origins is not None:
        columns |= {field.name: pa.array(table[field.name], field.type) for field in ORIGIN_FIELDS}
    columns |= {
        "label": pa.array(table["label"], pa.int32()),
        "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), num_tokens),
    }
    if rows_per_image > 1:
        columns["flipped"] = pa.array(table["flipped"], pa.bool_())
    pq.write_table(pa.table(columns), path, compression="zstd")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some images: ids int64[B, N]; labels int64[B], -1 where unknown; flipped bool[B]."""

    keys: list[str]
    labels: Tensor
    ids: Tensor
    flipped: Tensor


def check_columns(schema: pa.Schema) -> None:
    """Raise a ValueError unless the columns are those of a token shard."""
    ids: Any = schema.field("ids").type if "ids" in schema.names else None
    types = {"key": pa.string(), "label": pa.int32(), "ids": ids, "flipped": pa.bool_()}
    types |= {field.name: field.type for field in ORIGIN_FIELDS}
    if len(set(schema.names)) < len(schema) or not {"key", "label", "ids"} <= set(schema.names) <= types.keys():
        raise ValueError("columns")
    if not pa.types.is_fixed_size_list(ids) or ids.value_type not in (pa.uint16(), pa.uint32()) or ids.list_size < 1:
        raise ValueError("ids")
    if any(schema.field(name).type != types[name] for name in schema.names):
        raise ValueError("types")


def read_tokens(path: Path, codebook_size: int) -> Tokens:
    """Read one token file.

    Raises:
        DataError: it is no token shard, or an id is outside the codebook.
    """
    try:
        with pq.ParquetFile(path) as file:
            check_columns(file.schema_arrow)
            table = file.read()
        column = table["ids"].combine_chunks()
        count = table.num_rows
        flat = column.flatten()
        if flat.null_count or any(table[name].null_count for name in table.column_names if name != "label"):
            raise ValueError("null")
        flat = flat.to_numpy().astype(np.int64)
        ids = torch.from_numpy(flat).view(count, column.type.list_size)
        labels = torch.from_numpy(table["label"].fill_null(-1).to_numpy().astype(np.int64))
        keys = table["key"].to_pylist()
    except (pa.ArrowException, ValueError, RuntimeError, OSError) as error:
        raise not_tokens(path, error) from None
    if ids.numel() and int(ids.max()) >= codebook_size:
        raise DataError(f"{path} holds id {int(ids.max())}, the codebook has {codebook_size} codes")
    flipped = table["flipped"].to_pylist() if "flipped" in table.column_names else [False] * count
    return Tokens(keys, labels, ids, torch.tensor(flipped, dtype=torch.bool))


def decode_tokens(
    draft: Draft,
    tokens: Artifact,
    tokenizer: ImageTokenizer,
    *,
    limit: int | None = None,
    groups: int | None = None,
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Decode tokens: write this rank's missing tars of PNG files, one per token shard, rank r of w every w-th.

    Only the first `limit` rows and the first `groups` groups of ids are decoded. Returns the facts, over all ranks.
    """
    size = fixed_size(tokens.facts["image_size"])
    views = views_per_image(tokens.config)
    crops = TEN_CROP_KEYS if views == 10 else ("",)
    total = tokens.facts["num_images"] * views
    left = num_rows = total if limit is None else min(total, limit)
    shards = dict[str, tuple[str, int]]()  # tar of this rank -> its token shard, rows to decode
    for number, name in enumerate(tokens.names("tokens-*.parquet")):
        take = min(count_rows(tokens.file(name)), left)
        left -= take
        if take and number % distributed.world_size() == distributed.rank():
            shards[f"shard-{number:06d}.tar"] = name, take
    missing = {target: shard for target, shard in shards.items() if draft.record(target) is None}
    mine, pending = (sum(take for _, take in part.values()) for part in (shards, missing))
    progress.start("detokenize", mine, done=mine - pending)
    for target, (name, take) in missing.items():
        part = read_tokens(tokens.verified_file(name), tokens.facts["codebook_size"])
        keys = tar_keys(
            key + crops[row % len(crops)] + ("-flipped" if flipped else "")
            for row, (key, flipped) in enumerate(zip(part.keys, part.flipped, strict=True))
        )
        with draft.write(target, images=take) as path, write_tar(path) as tar:
            for rows in chunks(range(take), batch_size):
                images = tokenizer.decode(part.ids[rows.start : rows.stop], size, groups=groups).cpu()
                for index, image in zip(rows, images, strict=True):
                    tar.write(keys[index], encode_png(image), "png", int(part.labels[index]))
                progress.advance(len(rows))
    return {"num_images": num_rows - left}


def count_rows(path: Path) -> int:
    """The number of rows of a token file, from its footer."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise not_tokens(path, error) from None


def not_tokens(path: Path, error: Exception) -> DataError:
    """The DataError for a file that is no token shard."""
    return DataError(f"{path} is not a token shard ({type(error).__name__})", "Tokenize the images again")
