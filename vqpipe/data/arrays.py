"""Rows of numbers in .npy files, as features and latents are stored, each file beside a list of its images.

Several files are read as one array: they are memory-mapped, so only the rows in use are in memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vqpipe.artifacts import Draft
from vqpipe.data.encode import EncodedShard
from vqpipe.errors import DataError, NumericError


def check_float16(rows: Tensor, keys: list[str], what: str) -> None:
    """Raise a NumericError, with the image's key, unless all values of float16[B, ...] are finite."""
    largest = (rows.view(torch.int16) & 0x7FFF).flatten(1).amax(dim=1)  # without the sign bit
    finite = largest < 0x7C00  # infinity; NaN is larger. torch.isfinite is 30 times as slow on float16
    if not finite.all():
        raise NumericError(
            f"NaN, or values beyond float16's 65504, in the {what} of image {keys[int((~finite).nonzero()[0])]}",
            "Check that image and the weights of the network",
        )


def write_rows(draft: Draft, shard: EncodedShard, samples: pa.Table, **record: Any) -> None:
    """Write the list and the array of a shard; the array last, so that its record marks both as complete. The rows of
    an image follow each other."""
    rows = shard.rows.reshape(-1, *shard.rows.shape[2:])
    with draft.write(f"samples-{shard.number:05d}.parquet") as path:
        pq.write_table(samples, path, compression="zstd")
    record = {"images": len(shard.keys), "rows": len(rows), "skipped": shard.skipped, **record}
    with draft.write(shard.name, **record) as path:
        np.save(path, rows, allow_pickle=False)


def map_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file.

    Raises:
        DataError: it is absent, cut short, or not a .npy file of numbers.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")  # np.load also opens other formats
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "Check the path") from None
    except Exception as error:  # the header is Python source, and parsing malformed source raises nearly any exception
        if "mmap length" in str(error):
            raise DataError(
                f"{path} is cut short: it ends after {path.stat().st_size:,} bytes, in the middle of its rows",
                "Copy or make it again",
            ) from None
        raise DataError(f"{path} is not a .npy array of numbers", "Save it with numpy.save") from None


def first_rows(shards: Sequence[np.ndarray]) -> np.ndarray:
    """int64[shards + 1]: the number of the first row of each shard, and of all rows."""
    return np.cumsum([0, *map(len, shards)])


def take_rows(shards: Sequence[np.ndarray], rows: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """The rows of these numbers, int64[R], in that order: [R, ...] of `dtype`."""
    firsts, taken = first_rows(shards), np.empty((len(rows), *shards[0].shape[1:]), dtype)
    places = np.searchsorted(firsts, rows, side="right") - 1
    for number in np.unique(places):
        here = places == number
        taken[here] = shards[number][rows[here] - firsts[number]]
    return taken
