"""Stored patch features, read as one matrix in a fixed order that no sharding shows in.

N vectors of dimension D, in memory-mapped `.npy` shards: a `features` artifact, or any such files.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pyarrow import parquet
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.codebooks.watch import Watch
from vqpipe.errors import DataError
from vqpipe.files import hash_file

BLOCK_ROWS = 65_536


class FeatureSet:
    """Vectors in shards; rows are counted through all shards, and read as float32.

    Attributes:
        num_vectors: N.
        dim: D.
        dtype: what `stored` reads: float16 where every shard holds it, else float32.
        labels: int32[N], the class of each vector's image (-1: none), or None where no labels are known.
        digest, name, lineage: what an artifact made from these features says about its input.
        artifact: what it was opened from, if it was.
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
        self.digest = artifact.content if artifact else digest
        self.name = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        self.lineage = (
            artifact.lineage if artifact else {"kind": "data", "name": self.name, "content": digest, "inputs": {}}
        )
        self.first_rows = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.num_vectors = int(self.first_rows[-1])
        self.dim = int(self.shards[0].shape[1])
        self.dtype = np.float16 if all(shard.dtype == np.float16 for shard in self.shards) else np.float32

    @property
    def num_classes(self) -> int:
        """How many classes the labels name."""
        return 0 if self.labels is None else len(np.unique(self.labels))

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop as float32[stop - start, D]; they may lie in several shards."""
        return self.stored(start, stop).float()

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows start..stop as `read` gives them, but of type `dtype`; not to be written to.

        Rows of an array in memory are a view of it. (Torch does not take views of a file opened for reading.)
        """
        shard = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        first, last = (int(row) for row in self.first_rows[shard : shard + 2])
        view = self.shards[shard][start - first : stop - first]
        if stop <= last and view.dtype == self.dtype and view.flags.writeable and view.flags.c_contiguous:
            return torch.from_numpy(view)
        rows = np.empty((stop - start, self.dim), dtype=self.dtype)
        done = start
        while done < stop:
            first, last = (int(row) for row in self.first_rows[shard : shard + 2])
            upto = min(stop, last)
            rows[done - start : upto - start] = self.shards[shard][done - first : upto - first]
            done, shard = upto, shard + 1
        return torch.from_numpy(rows)

    def block_starts(self) -> range:
        """First rows of the blocks that `block` reads; together they cover all rows."""
        return range(0, self.num_vectors, BLOCK_ROWS)

    def block_stop(self, start: int) -> int:
        """The row after the last of the block at `start`."""
        return min(start + BLOCK_ROWS, self.num_vectors)

    def block(self, start: int) -> Tensor:
        """The block at `start`: float32[<= BLOCK_ROWS, D]."""
        return self.read(start, self.block_stop(start))

    def take(self, rows: np.ndarray) -> Tensor:
        """The vectors at `rows`, int64[R], in that order: float32[R, D]."""
        result = np.empty((len(rows), self.dim), dtype=np.float32)
        shard_of = np.searchsorted(self.first_rows, rows, side="right") - 1
        for index in np.unique(shard_of):
            here = shard_of == index
            result[here] = self.shards[index][rows[here] - self.first_rows[index]]
        return torch.from_numpy(result)

    def subset(self, rows: np.ndarray, name: str) -> "FeatureSet":
        """The vectors at `rows` as a feature set of its own, in memory."""
        return FeatureSet([self.take(rows).numpy()], [name])

    def check(self, watch: Watch) -> None:
        """Hash an artifact's shards again, each rank some of them: a flipped bit would move centres in silence.

        (Other files were hashed when they were opened: that is their digest.)

        Raises:
            ArtifactError: a shard is not what was published.
        """
        if self.artifact is not None:
            watch.phase("checking the features", self.num_vectors // distributed.world_size())
            self.artifact.check(self.names)

    def place(self, row: int) -> str:
        """Where a row is, for people: the shard's name and the row within it."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return f"{self.names[shard]}, row {row - int(self.first_rows[shard])}"


def open_features(sources: Sequence[Path | str]) -> FeatureSet:
    """Open one `features` artifact, or any number of `.npy` files of shape [n, dim], in the given order.

    Raises:
        DataError: no file, a file that is not a matrix of floating numbers, files of different dimensions, no rows.
        ArtifactError: a directory that is not a finished features artifact.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise DataError("no features were named", "Give --features a features artifact or .npy files")
    if len(paths) == 1 and paths[0].suffix != ".npy":
        return open_features_artifact(paths[0])
    shards = [open_matrix(path) for path in paths]
    digest = hashlib.sha256("".join(hash_file(path) for path in paths).encode()).hexdigest()
    return checked(FeatureSet(shards, [path.name for path in paths], digest=digest))


def open_features_artifact(path: Path) -> FeatureSet:
    """Open a features artifact with its labels (None where no image has one)."""
    artifact = open_artifact(path, "features")
    names = artifact.names("features-*.npy")
    if not names:
        raise DataError(f"{path} holds no feature shards", "Extract features from at least one image")
    columns = [
        parquet.read_table(artifact.whole(name), columns=["label", "num_rows"])
        for name in artifact.names("samples-*.parquet")
    ]
    labels = np.concatenate([column["label"].fill_null(-1).to_numpy() for column in columns]).astype(np.int32)
    rows = np.concatenate([column["num_rows"].to_numpy() for column in columns])
    features = FeatureSet(
        [open_matrix(artifact.file(name)) for name in names],
        names,
        np.repeat(labels, rows) if (labels >= 0).any() else None,
        artifact=artifact,
    )
    return checked(features)


def open_matrix(path: Path) -> np.ndarray:
    """Memory-map one `.npy` file, which must hold floating numbers in rows."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would open other formats too
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "Check the path") from None
    except Exception as error:  # its header is Python text, and hostile text makes the parser raise nearly anything
        if "mmap length" in str(error):
            raise DataError(
                f"{path} is cut short: it ends after {path.stat().st_size:,} bytes, in the middle of its rows",
                "Copy or extract it again",
            ) from None
        raise DataError(f"{path} is not a .npy array of numbers", "Save it with numpy.save, [n, dim] floats") from None
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise DataError(
            f"{path} holds {array.dtype} of shape {list(array.shape)}", "Features are floats of shape [n, dim]"
        )
    return array


def checked(features: FeatureSet) -> FeatureSet:
    """`features`, its shards known to have one dimension; otherwise a DataError that names the shard."""
    for shard, name in zip(features.shards, features.names, strict=True):
        if shard.shape[1] != features.dim:
            raise DataError(
                f"{name} has dimension {shard.shape[1]}, {features.names[0]} has {features.dim}",
                "Cluster features of one encoder at a time",
            )
    if features.num_vectors == 0:
        raise DataError(f"{features.name} holds no vectors", "Extract features from at least one image")
    return features
