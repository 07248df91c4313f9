"""Token shards: one Parquet row an image, its ids as narrow as the codebook allows.

Columns: key string; label int32, null where unknown; ids fixed_size_list<uint16 or uint32>[N]; and, only where both an
image and its mirror image were stored, flipped bool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vqpipe.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """Some images' tokens: ids int64[B, N]; labels int64[B], -1 where unknown; flipped bool[B]."""

    keys: list[str]
    labels: Tensor
    ids: Tensor
    flipped: Tensor


def id_type(codebook_size: int) -> pa.DataType:
    """The narrowest type that holds every id below `codebook_size`: uint16 up to 65,536 codes, else uint32."""
    return pa.uint16() if codebook_size <= 1 << 16 else pa.uint32()


def write_tokens(path: Path, parts: Sequence[Tokens], codebook_size: int, num_tokens: int, *, flips: bool) -> None:
    """Write one shard.

    Raises:
        DataError: an id outside [0, codebook_size), which narrowing would silently wrap around.
    """
    keys = [key for part in parts for key in part.keys]
    ids = torch.cat([part.ids for part in parts]) if parts else torch.zeros(0, num_tokens, dtype=torch.int64)
    labels = torch.cat([part.labels for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    if ids.numel() and (ids.min() < 0 or ids.max() >= codebook_size):
        raise DataError(f"ids from {ids.min()} to {ids.max()} are outside a codebook of {codebook_size} codes")
    width = id_type(codebook_size)
    flat = pa.array(ids.flatten().cpu().numpy().astype(width.to_pandas_dtype()))
    columns = {
        "key": pa.array(keys, pa.string()),
        "label": pa.array([None if label < 0 else label for label in labels.tolist()], pa.int32()),
        "ids": pa.FixedSizeListArray.from_arrays(flat, num_tokens),
    }
    if flips:
        columns["flipped"] = pa.array([flag for part in parts for flag in part.flipped.tolist()], pa.bool_())
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_tokens(path: Path, codebook_size: int) -> Tokens:
    """Read one shard.

    Raises:
        DataError: it is not a token shard, or holds an id of `codebook_size` or more.
    """
    try:
        table = pq.read_table(path)
        column = table["ids"].combine_chunks()
        count = table.num_rows
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        ids = torch.from_numpy(flat).view(count, column.type.list_size)
        labels = torch.tensor([-1 if label is None else label for label in table["label"].to_pylist()]).long()
        keys = table["key"].to_pylist()
    except (pa.ArrowException, KeyError, AttributeError, OSError) as error:
        raise DataError(f"{path} is not a token shard ({type(error).__name__})", "Tokenize the images again") from None
    if ids.numel() and int(ids.max()) >= codebook_size:
        raise DataError(f"{path} holds id {int(ids.max())}, the codebook has {codebook_size} codes")
    flipped = table["flipped"].to_pylist() if "flipped" in table.column_names else [False] * count
    return Tokens(keys, labels, ids, torch.tensor(flipped, dtype=torch.bool))
