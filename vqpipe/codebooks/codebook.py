"""A codebook of k-means: the result of a clustering, and codebook files.

Shapes: K codes, D dimensions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.codebooks.features import open_matrix
from vqpipe.errors import DataError, NumericError
from vqpipe.files import hash_file
from vqpipe.search import first_copies
from vqpipe.weights import load_tensors

CODEBOOK_FILE = "codebook.safetensors"


@dataclass(frozen=True)
class Clustering:
    """The result of k-means: centers of features, each of them in use."""

    codebook: Tensor
    """float32[K, D], all rows different."""
    counts: Tensor
    """int64[K]: vectors nearest to each code; at least 1."""
    history: tuple[float, ...]
    """Inertia (mean squared distance of a vector to its code) before the first iteration and after each, then after
    each pass that filled empty clusters. In mini-batch mode that of each epoch, measured while the centers move, then
    the exact one."""
    converged: bool
    """Whether `tolerance` ended the run, not the maximum number of iterations."""
    iterations: int
    """Lloyd iterations; in mini-batch mode, epochs."""
    reseeded: int = 0
    """How many times an empty cluster's center was moved to a vector far from its own center."""

    @property
    def inertia(self) -> float:
        """Mean squared distance of a vector to its code."""
        return self.history[-1]

    def save(self, path: Path) -> None:
        """Write `codebook` float32[K, D] and `counts` int64[K] as safetensors."""
        save_file({"codebook": self.codebook.cpu().contiguous(), "counts": self.counts.cpu()}, path)

    def cluster_sizes(self) -> dict[str, float]:
        """Vectors in the smallest, median and largest cluster, and the share of all vectors in the largest 1 % of the
        clusters."""
        ordered = self.counts.sort().values
        top = ordered[-max(1, len(ordered) // 100) :]
        return {
            "smallest": int(ordered[0]),
            "median": int(ordered[len(ordered) // 2]),
            "largest": int(ordered[-1]),
            "share_in_largest_percent": int(top.sum()) / int(ordered.sum()),
        }

    def distinct_codes(self) -> int:
        """Number of different codes; K, unless codes coincide in float32."""
        first = first_copies(self.codebook)
        return len(self.codebook) if first is None else len(first.unique())

    def facts(self) -> dict[str, Any]:
        """The facts of the codebook artifact."""
        return {
            "k": len(self.codebook),
            "dim": self.codebook.shape[1],
            "inertia": self.inertia,
            "iterations": self.iterations,
            "converged": self.converged,
            "num_vectors": int(self.counts.sum()),
            "distinct_codes": self.distinct_codes(),
            "reseeded": self.reseeded,
            "cluster_sizes": self.cluster_sizes(),
            "inertia_per_iteration": list(self.history),
        }


def codebook_input(path: Path) -> Artifact | str:
    """The codebook at `path` as an input of another artifact: the artifact, or the sha256 of a file."""
    return open_artifact(path, "codebook") if path.is_dir() else hash_file(path)


def load_codebook(source: Artifact | Path | str) -> Tensor:
    """Load float32[K, D] from a codebook artifact, its file, a `.npy`, or a released `.pth` (one bare tensor).

    Raises:
        ArtifactError: a directory that is not a published codebook.
        WeightsError: a file that cannot be read as tensors.
        DataError: something other than one matrix of floating-point numbers, or copies of one code.
        NumericError: NaN or infinity.
    """
    if not isinstance(source, Artifact) and Path(source).is_dir():
        source = open_artifact(source, "codebook")
    path = source.verified_file(CODEBOOK_FILE) if isinstance(source, Artifact) else Path(source)
    if path.suffix == ".npy":
        codebook = torch.from_numpy(np.array(open_matrix(path), dtype=np.float32))
    else:
        tensors: Any = load_tensors(path)
        codebook = tensors["codebook"] if isinstance(tensors, dict) and "codebook" in tensors else tensors
    if not isinstance(codebook, Tensor) or codebook.ndim != 2 or not codebook.is_floating_point():
        raise DataError(f"{path} does not hold one codebook of shape [K, dim]", "Give what vqpipe kmeans publishes")
    codebook = codebook.float().contiguous()
    if not bool(torch.isfinite(codebook).all()):
        raise NumericError(f"the codebook {path} holds NaN or infinity", "Make it again")
    if len(codebook) > 1 and bool((codebook == codebook[0]).all()):
        raise DataError(f"all {len(codebook):,} codes of {path} are equal", "Make it again, from other features")
    return codebook
