"""What k-means comes to: centres, how many vectors each has, and how it got there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vqpipe.search import first_copies

LARGEST_SHARE = 100  # the largest 1 / 100 of the clusters are looked at together


@dataclass(frozen=True)
class Clustering:
    """Centres of features, every one of them in use."""

    codes: Tensor
    """float32[K, D], all different."""
    counts: Tensor
    """int64[K]: vectors nearest to each code; at least 1."""
    history: tuple[float, ...]
    """Inertia (mean squared distance of a vector to its code) before the first iteration and after each, then after
    each pass that filled empty clusters. In mini-batch mode each epoch's, its vectors measured as they came, then the
    exact one at the end."""
    converged: bool
    """Whether `tolerance` ended it, rather than the cap on iterations."""
    iterations: int
    """Of Lloyd; in mini-batch mode, epochs."""
    reseeded: int = 0
    """How many times a centre without vectors was moved to a vector far from its own."""

    @property
    def inertia(self) -> float:
        """Mean squared distance of a vector to its code."""
        return self.history[-1]

    def save(self, path: Path) -> None:
        """Write `codebook` float32[K, D] and `counts` int64[K] as safetensors."""
        save_file({"codebook": self.codes.cpu().contiguous(), "counts": self.counts.cpu()}, path)

    def sizes(self) -> dict[str, float]:
        """Vectors in the smallest, the median and the largest cluster, and the share of all in the largest 1 %."""
        ordered = self.counts.sort().values
        top = ordered[-max(1, len(ordered) // LARGEST_SHARE) :]
        return {
            "smallest": int(ordered[0]),
            "median": int(ordered[len(ordered) // 2]),
            "largest": int(ordered[-1]),
            "share_in_largest_percent": int(top.sum()) / int(ordered.sum()),
        }

    def distinct(self) -> int:
        """How many codes differ from all others: K, where the search can tell them apart."""
        first = first_copies(self.codes)
        return len(self.codes) if first is None else len(first.unique())

    def facts(self) -> dict[str, Any]:
        """What the artifact says of itself."""
        return {
            "k": len(self.codes),
            "dim": self.codes.shape[1],
            "inertia": self.inertia,
            "iterations": self.iterations,
            "converged": self.converged,
            "num_vectors": int(self.counts.sum()),
            "distinct_codes": self.distinct(),
            "reseeded": self.reseeded,
            "cluster_sizes": self.sizes(),
            "inertia_per_iteration": list(self.history),
        }
