"""k-means over stored features: Lloyd's algorithm on every vector, streamed block by block.

Each iteration passes over all N vectors (nothing is subsampled in silence), finds nearest centres exactly, and sums in
64-bit fixed point, where order does not matter: the centres are the same for any number of ranks. VQGAN-LC clusters
1,300 images x 16 vectors of each class into 100 centres (`per_class`); its paper reads as one global clustering, which
is the default here.

N vectors, K centres, D dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.codebooks.feature_set import FeatureSet, open_matrix
from vqpipe.codebooks.points import Points
from vqpipe.codebooks.seeding import plusplus_rows
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.files import hash_file
from vqpipe.search import nearest
from vqpipe.weights import load_tensors

CODEBOOK_FILE = "codebook.safetensors"
RESCUES = 100  # passes that may follow the last iteration to fill empty clusters; one or two are usual


@dataclass(frozen=True, kw_only=True)
class KmeansConfig:
    """How features become a codebook; section [kmeans]."""

    k: int = 100_000
    """Codes in the codebook."""
    iterations: int = 20
    """Lloyd iterations at most."""
    init: Literal["k-means++", "random"] = "k-means++"
    """How the first centres are chosen from the vectors."""
    per_class: bool = False
    """Cluster each class of images by itself into k / classes centres, concatenated in class order."""
    select: Literal["kmeans", "random"] = "kmeans"
    """"random": the codes are k distinct vectors drawn at random, and nothing is clustered (the paper's ablation)."""
    tolerance: float = 1e-4
    """Stop when an iteration lowers the inertia by less than this share of it; 0 runs all iterations."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"kmeans.k = {self.k}", "A codebook has at least one code")
        if self.iterations < 0 or self.tolerance < 0:
            raise ConfigError(
                f"kmeans.iterations = {self.iterations}, tolerance = {self.tolerance}", "Neither is below 0"
            )
        for name, choices in (("init", ("k-means++", "random")), ("select", ("kmeans", "random"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"kmeans.{name} = {getattr(self, name)!r} is not a choice", f"Use {' or '.join(choices)}"
                )


@dataclass(frozen=True)
class Clustering:
    """Centres of features, every one of them in use."""

    codes: Tensor
    """float32[K, D], all different."""
    counts: Tensor
    """int64[K]: vectors nearest to each code; at least 1."""
    history: tuple[float, ...]
    """Inertia (mean squared distance of a vector to its code) before the first iteration and after each."""
    converged: bool
    """Whether `tolerance` ended it, rather than the cap on iterations."""
    iterations: int

    @property
    def inertia(self) -> float:
        """Mean squared distance of a vector to its code."""
        return self.history[-1]

    def save(self, path: Path) -> None:
        """Write `codebook` float32[K, D] and `counts` int64[K] as safetensors."""
        save_file({"codebook": self.codes.cpu().contiguous(), "counts": self.counts.cpu()}, path)

    def facts(self) -> dict[str, Any]:
        """What the artifact says of itself."""
        return {
            "k": len(self.codes),
            "dim": self.codes.shape[1],
            "inertia": self.inertia,
            "iterations": self.iterations,
            "converged": self.converged,
            "num_vectors": int(self.counts.sum()),
            "inertia_per_iteration": list(self.history),
        }


def kmeans(
    features: FeatureSet,
    config: KmeansConfig,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], None] = lambda inertia: None,
) -> Clustering:
    """Cluster `features`. Every rank calls it, and every rank gets the same result.

    `on_step` hears the inertia after each pass over the features; per class, after each class.

    Raises:
        DataError: fewer vectors or fewer distinct vectors than centres; labels missing for `per_class`.
        ConfigError: `per_class` with a k that the number of classes does not divide.
        NumericError: NaN or infinity in the features.
    """
    if config.per_class:
        return kmeans_per_class(features, config, seed=seed, device=device, on_step=on_step)
    check_enough(features.num_vectors, config.k, features.name, "vectors")
    points = Points(features, device, shared=True)
    return cluster(points, config, config.k, np.random.default_rng(seed), on_step)


def kmeans_per_class(
    features: FeatureSet,
    config: KmeansConfig,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], None],
) -> Clustering:
    """k / classes centres of each class by itself, in class order (VQGAN-LC's released code). Ranks take turns."""
    if features.labels is None or (features.labels < 0).any():
        missing = features.num_vectors if features.labels is None else int((features.labels < 0).sum())
        raise DataError(
            f"clustering per class needs labels; {missing:,} of {features.num_vectors:,} vectors have none",
            "Extract features from labelled images (class folders, tars with .cls), or leave out --per-class",
        )
    classes = np.unique(features.labels)
    each, rest = divmod(config.k, len(classes))
    if rest or each == 0:
        raise ConfigError(
            f"k = {config.k} is not a multiple of the {len(classes)} classes", f"Use a multiple of {len(classes)}"
        )
    codes, counts = torch.zeros(config.k, features.dim), torch.zeros(config.k, dtype=torch.int64)
    summary = torch.zeros(len(classes), 3, dtype=torch.float64)  # inertia, iterations, converged
    for index, label in enumerate(classes):
        rows = np.flatnonzero(features.labels == label)
        check_enough(len(rows), each, f"class {label}", "vectors")
        if index % distributed.world_size() != distributed.rank():
            continue
        points = Points(features.subset(rows, f"class {label}"), device, shared=False)
        result = cluster(points, config, each, np.random.default_rng([seed, int(label)]), lambda inertia: None)
        here = slice(index * each, (index + 1) * each)
        codes[here], counts[here] = result.codes, result.counts
        summary[index] = torch.tensor([result.inertia * len(rows), result.iterations, result.converged])
        on_step(result.inertia)
    for tensor in (codes, counts, summary):
        tensor.copy_(distributed.all_reduce_sum(tensor.to(device)))
    inertia, iterations, converged = summary.T
    history = (float(inertia.sum()) / features.num_vectors,)
    return Clustering(codes, counts, history, bool(converged.all()), int(iterations.max()))


def cluster(
    points: Points, config: KmeansConfig, k: int, random: np.random.Generator, on_step: Callable[[float], None]
) -> Clustering:
    """Choose k centres among the points, then run Lloyd's iterations on them."""
    check_enough(len(points.distinct), k, points.features.name, "distinct vectors", points.features.num_vectors)
    if config.select == "random" or config.init == "random":
        rows = np.sort(random.choice(points.distinct, k, replace=False))
    else:
        rows = plusplus_rows(points.features, points.distinct, k, random, points.device)
    centres = points.features.take(rows).to(points.device)
    if points.shared:
        distributed.broadcast(centres)
    iterations = 0 if config.select == "random" else config.iterations
    return lloyd(points, centres, iterations, config.tolerance, on_step)


def lloyd(
    points: Points, centres: Tensor, iterations: int, tolerance: float, on_step: Callable[[float], None]
) -> Clustering:
    """Lloyd's iterations from float32[K, D] `centres` (Lloyd 1982), ending with every cluster in use.

    Clusters without a vector take the vectors farthest from their centres, the lowest row first among equals. Each such
    step lowers the inertia, so that it ends; it may go on for some passes after the last iteration.
    """
    history: list[float] = []
    while True:
        sums, counts, distances = assign(points, centres)
        history.append(float(distances.double().mean()))
        on_step(history[-1])
        done = len(history) - 1
        converged = done > 0 and history[-2] - history[-1] <= tolerance * history[-2]
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty) == 0 and (converged or done >= iterations):
            return Clustering(centres.cpu(), counts.cpu(), tuple(history), converged, done)
        if done >= iterations + RESCUES:
            raise NumericError(
                f"{len(empty)} of {len(centres)} clusters stay empty", "The features differ by less than float32 shows"
            )
        if done < iterations:
            means = (sums.double() / (points.scale * counts.clamp(min=1)[:, None])).float()
            centres = torch.where(counts[:, None] > 0, means, centres)
        if len(empty):
            rows = farthest(distances.numpy(), points.distinct, len(empty))
            centres[empty[: len(rows)]] = points.features.take(rows).to(centres)


def assign(points: Points, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every vector to its nearest centre, over all ranks.

    Returns:
        sums: int64[K, D] in units of 1 / points.scale, counts: int64[K], distances: squared, float32[N] on the CPU.
    """
    sums = torch.zeros(centres.shape, dtype=torch.int64, device=points.device)
    counts = torch.zeros(len(centres), dtype=torch.int64, device=points.device)
    distances = torch.zeros(points.features.num_vectors)
    for start, block in points.blocks():
        ids = nearest(block, centres)
        distances[start : start + len(block)] = (block - centres[ids]).square_().sum(dim=1).cpu()
        sums.index_add_(0, ids, block.double().mul_(points.scale).round_().long())
        counts += torch.bincount(ids, minlength=len(centres))
    return points.total(sums), points.total(counts), points.total(distances)


def farthest(distances: np.ndarray, distinct: np.ndarray, count: int) -> np.ndarray:
    """The `count` distinct rows with the largest distances above 0 (or fewer), farthest first, then lowest row."""
    rows = distinct[np.argsort(-distances[distinct], kind="stable")[:count]]
    return rows[distances[rows] > 0]


def check_enough(found: int, k: int, name: str, what: str, of: int | None = None) -> None:
    if found < k:
        among = f" among its {of:,}" if of is not None else ""
        raise DataError(f"{name} has {found:,} {what}{among}, fewer than k = {k:,}", "Use more images, or a smaller k")


def codebook_input(path: Path) -> Artifact | str:
    """What a stage that reads the codebook at `path` names as its input: the artifact, or a file's sha256."""
    return open_artifact(path, "codebook") if path.is_dir() else hash_file(path)


def load_codebook(source: Artifact | Path | str) -> Tensor:
    """A codebook as float32[K, D]: a codebook artifact, its file, a `.npy`, or a released `.pth` (one bare tensor).

    Raises:
        ArtifactError: a directory that is not a finished codebook.
        WeightsError: a file that cannot be read as tensors.
        DataError: something other than one matrix of numbers.
        NumericError: NaN or infinity in it.
    """
    if not isinstance(source, Artifact) and Path(source).is_dir():
        source = open_artifact(source, "codebook")
    path = source.file(CODEBOOK_FILE) if isinstance(source, Artifact) else Path(source)
    if path.suffix == ".npy":
        codes = torch.from_numpy(np.array(open_matrix(path), dtype=np.float32))
    else:
        tensors: Any = load_tensors(path)
        codes = tensors["codebook"] if isinstance(tensors, dict) and "codebook" in tensors else tensors
    if not isinstance(codes, Tensor) or codes.ndim != 2 or not codes.is_floating_point():
        raise DataError(f"{path} does not hold one codebook of shape [K, dim]", "Give what vqpipe kmeans publishes")
    if not bool(torch.isfinite(codes).all()):
        raise NumericError(f"the codebook {path} holds NaN or infinity", "Make it again")
    return codes.float().contiguous()
