"""Token shards: one Parquet row an image, its ids as narrow as the codebook allows.

Columns: key string; label int32, null where unknown; ids fixed_size_list<uint16 or uint32>[N]; and, only where both an
image and its mirror image were stored, flipped bool. The mirror image's row follows the image's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vqpipe.data.encode import RowEncoder
from vqpipe.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """Some images' tokens: ids int64[B, N]; labels int64[B], -1 where unknown; flipped bool[B]."""

    keys: list[str]
    labels: Tensor
    ids: Tensor
    flipped: Tensor


def id_dtype(codebook_size: int) -> np.dtype:
    """The narrowest type that holds every id below `codebook_size`: uint16 up to 65,536 codes, else uint32."""
    return np.dtype(np.uint16 if codebook_size <= 1 << 16 else np.uint32)


def token_encoder(
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    codebook_size: int,
    num_tokens: int,
    flips: bool,
    precision: str = "fp32",
) -> RowEncoder:
    """How `write_shards` makes tokens: `encode` is the tokenizer's, uint8[B, 3, S, S] -> int64[B, N].

    With `flips` the ids of the mirror image follow those of the image: int64[B, 2, N]. `precision` "bf16" is for the
    convolutions; the search of the codes stays in float32, of slightly other vectors.
    """

    def views(images: Tensor) -> Tensor:
        if precision == "bf16" and device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)  # the layout its bf16 convolutions want
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return torch.stack([encode(view) for view in ([images, images.flip(-1)] if flips else [images])], dim=1)

    def check(ids: Tensor, keys: list[str]) -> None:
        low, high = ids.aminmax()
        if low < 0 or high >= codebook_size:
            raise DataError(f"ids from {low} to {high} are outside a codebook of {codebook_size} codes")

    return RowEncoder(
        encode=views,
        check=check,  # narrowing would silently wrap around
        device=device,
        row_shape=(1 + flips, num_tokens),
        dtype=id_dtype(codebook_size),
    )


def write_tokens(path: Path, keys: list[str], labels: Sequence[int], ids: np.ndarray) -> None:
    """Write one shard: ids uint16 or uint32[images, views, N], the second view being the mirror image; labels -1 where
    unknown. With two views a row says of which it is."""
    views, num_tokens = ids.shape[1:]
    columns = {
        "key": pa.array([key for key in keys for _ in range(views)], pa.string()),
        "label": pa.array([None if label < 0 else label for label in labels for _ in range(views)], pa.int32()),
        "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), num_tokens),
    }
    if views > 1:
        columns["flipped"] = pa.array([view > 0 for _ in keys for view in range(views)], pa.bool_())
    pq.write_table(pa.table(columns), path, compression="zstd")


def check_columns(schema: pa.Schema) -> None:
    """Raise a ValueError unless a file has the columns of a token shard."""
    ids: Any = schema.field("ids").type if "ids" in schema.names else None
    types = {"key": pa.string(), "label": pa.int32(), "ids": ids, "flipped": pa.bool_()}
    if len(set(schema.names)) < len(schema) or not {"key", "label", "ids"} <= set(schema.names) <= types.keys():
        raise ValueError("columns")
    if not pa.types.is_fixed_size_list(ids) or ids.value_type not in (pa.uint16(), pa.uint32()) or ids.list_size < 1:
        raise ValueError("ids")
    if any(schema.field(name).type != types[name] for name in schema.names):
        raise ValueError("types")


def read_tokens(path: Path, codebook_size: int) -> Tokens:
    """Read one shard.

    Raises:
        DataError: it is not a token shard, or holds an id of `codebook_size` or more.
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
        raise DataError(f"{path} is not a token shard ({type(error).__name__})", "Tokenize the images again") from None
    if ids.numel() and int(ids.max()) >= codebook_size:
        raise DataError(f"{path} holds id {int(ids.max())}, the codebook has {codebook_size} codes")
    flipped = table["flipped"].to_pylist() if "flipped" in table.column_names else [False] * count
    return Tokens(keys, labels, ids, torch.tensor(flipped, dtype=torch.bool))
