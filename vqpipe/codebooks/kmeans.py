"""k-means over stored features: Lloyd's algorithm on every vector, streamed block by block, or mini-batches.

Each iteration passes over all N vectors (none are subsampled), compares each with every center in float32, and sums in
64-bit fixed point: the centers are the same bytes for any number of ranks, except those of mini-batches (see `lloyd`).
VQGAN-LC clusters 1,300 images x 16 vectors of each class into 100 centers (`per_class`); its paper reads as one global
clustering, which is the default here.

Memory holds the centers and their sums (about 24 bytes per number), a few blocks of 65,536 vectors, the sample for the
initial centers (1 GB at most) and 36 bytes per vector, whatever the size of the features on disk.

Shapes: N vectors, K centers, D dimensions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts.states import States, read
from vqpipe.codebooks.codebook import Clustering
from vqpipe.codebooks.features import BLOCK_ROWS, FeatureSet
from vqpipe.codebooks.lloyd import PART, UNSAVED, CollectiveStates, Points, lloyd, mini_batch
from vqpipe.codebooks.seeding import num_candidates, plusplus_rows, sample_rows
from vqpipe.config import check_choices, resumable, to_request
from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError, DataError
from vqpipe.files import digest_json
from vqpipe.progress import SILENT, Progress

CENTER_BYTES = 24
"""Per number of the centers: float32 centers, their copy for the search, int64 sums, and a copy being saved."""
BLOCK_COPIES = 4
"""float32 blocks in memory: one being read, one in use, its differences, and the temporaries of the search."""
VECTOR_BYTES = 36
"""Per vector: its hash, the order of hashes, the distinct rows, its distance."""

Init = Literal["k-means++", "random"]
Select = Literal["kmeans", "random"]


@dataclass(frozen=True, kw_only=True)
class KmeansConfig:
    """Settings of the clustering; section [kmeans]."""

    k: int = 100_000
    """Codes in the codebook."""
    iterations: int = 20
    """Maximum number of Lloyd iterations; in mini-batch mode of epochs, passes over all vectors."""
    init: Init = "k-means++"
    """How the initial centers are chosen from the vectors."""
    per_class: bool = False
    """Cluster the vectors of each class separately into k / classes centers, concatenated in class order."""
    select: Select = "kmeans"
    """"random": the codes are k distinct vectors drawn at random, without clustering (the paper's ablation)."""
    tolerance: float = 1e-4
    """Stop when an iteration lowers the inertia by at most this share of the value before; 0: when it no
    longer falls."""
    batch: int = 0
    """Vectors per step of mini-batch k-means; 0: Lloyd's algorithm on all vectors."""
    gpu_share: float = resumable(default=0.5)
    """Share (0..1) of a GPU's free memory in which features are kept, in the precision they are stored in; larger ones
    are copied to the GPU in every pass. The codebook is the same."""

    def __post_init__(self) -> None:
        check_choices(self, "kmeans")
        if self.k < 1:
            raise ConfigError(f"kmeans.k = {self.k}", "A codebook has at least one code")
        if self.batch < 0 or not 0 <= self.gpu_share <= 1:
            raise ConfigError(
                f"kmeans.batch = {self.batch}, gpu_share = {self.gpu_share}", "batch is not below 0, gpu_share in 0..1"
            )
        if self.iterations < 0 or self.tolerance < 0:
            raise ConfigError(
                f"kmeans.iterations = {self.iterations}, tolerance = {self.tolerance}", "Neither is below 0"
            )

    @property
    def visits(self) -> int:
        """How often one sum may include a vector: once, in mini-batch mode once per epoch."""
        return max(1, self.iterations) if self.batch else 1


def kmeans(
    features: FeatureSet,
    config: KmeansConfig,
    *,
    seed: int,
    device: torch.device,
    checkpoints: Path | None = None,
    progress: Progress = SILENT,
) -> Clustering:
    """Cluster `features`. Every rank calls it and gets the same result.

    Args:
        checkpoints: folder for the state after the initial centers and after each iteration (per class: the result of
            each class). A call with the same arguments resumes from it and ends in the same bytes, on any number of
            ranks (mini-batches: see `lloyd`). None: nothing is saved.

    Raises:
        DataError: fewer vectors or fewer distinct vectors than centers; labels missing for `per_class`.
        ConfigError: `per_class` with a k that the number of classes does not divide; a k that exceeds the memory.
        NumericError: NaN or infinity in the features.
        ArtifactError: the features are not as published; `checkpoints` holds another clustering, or cannot be written.
    """
    if not config.per_class:  # before the features are hashed, which may take minutes
        check_enough(features.num_vectors, config.k, features.name, "vectors")
        check_memory(features, config.k, device)
    features.verify(progress)
    request = {**to_request(config), "seed": seed, "features": features.digest}
    digest = digest_json({**request, "num_vectors": features.num_vectors, "dim": features.dim})
    if config.per_class:
        return kmeans_per_class(features, config, seed, device, checkpoints, digest, progress)
    room = room_for_features(features, config.k, device, config.gpu_share)
    points = Points(features, device, shared=True, visits=config.visits, room=room, progress=progress)
    return cluster(points, config, config.k, (seed,), CollectiveStates(checkpoints, digest, progress))


def kmeans_per_class(
    features: FeatureSet,
    config: KmeansConfig,
    seed: int,
    device: torch.device,
    checkpoints: Path | None,
    digest: str,
    progress: Progress,
) -> Clustering:
    """k / classes centers for each class, in class order (VQGAN-LC's released code). Rank r of w takes the classes r,
    r + w, ... and saves the result of each in a folder of its own."""
    if features.labels is None or (features.labels < 0).any():
        missing = features.num_vectors if features.labels is None else int((features.labels < 0).sum())
        raise DataError(
            f"clustering per class needs labels; {missing:,} of {features.num_vectors:,} vectors have none",
            "Extract features from labeled images (class folders, tars with .cls), or leave out --per-class",
        )
    classes, sizes = np.unique(features.labels, return_counts=True)
    k, remainder = divmod(config.k, len(classes))
    if remainder or k == 0:
        raise ConfigError(
            f"k = {config.k} is not a multiple of the {len(classes)} classes", f"Use a multiple of {len(classes)}"
        )
    for label, size in zip(classes, sizes, strict=True):
        check_enough(int(size), k, f"class {label}", "vectors")
    codebook, counts = torch.zeros(config.k, features.dim), torch.zeros(config.k, dtype=torch.int64)
    summary = torch.zeros(len(classes), 4, dtype=torch.float64)  # inertia, iterations, converged, reseeded
    progress.start("k-means per class", features.num_vectors, "vectors")
    with distributed.sharing_errors():  # ranks with fewer classes wait here, longer than a sum of tensors may take
        for index in range(distributed.rank(), len(classes), distributed.world_size()):
            label = int(classes[index])
            states = States(checkpoints and checkpoints / f"class-{index:05d}", digest)
            path, problems = states.newest()
            for problem in problems:
                progress.message(f"class {label}, {problem}; this class is clustered again")
            if path is None:
                rows = np.flatnonzero(features.labels == label)
                result = cluster_class(features.subset(rows, f"class {label}"), config, k, (seed, label), device)
                states.save(0, {PART: result})
            else:
                result = dict(read(path).parts[PART])
            here = slice(index * k, (index + 1) * k)
            codebook[here], counts[here], summary[index] = (result[name] for name in ("codebook", "counts", "summary"))
            progress.note(f"class {index + 1} of {len(classes)}")
            progress.advance(int(sizes[index : index + distributed.world_size()].sum()))
    codebook += 0.0  # -0 becomes 0, as in a sum over several ranks
    for tensor in (codebook, counts, summary):
        tensor.copy_(distributed.all_reduce_sum(tensor.to(device)))
    inertia, iterations, converged, reseeded = summary.T
    mean = float((inertia * torch.from_numpy(sizes)).sum()) / features.num_vectors
    return Clustering(codebook, counts, (mean,), bool(converged.all()), int(iterations.max()), int(reseeded.sum()))


def cluster_class(
    features: FeatureSet, config: KmeansConfig, k: int, key: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Cluster the vectors of one class on this rank alone: `codebook`, `counts` and a `summary` of the result."""
    room = room_for_features(features, k, device, config.gpu_share)
    points = Points(features, device, shared=False, visits=config.visits, room=room)
    result = cluster(points, config, k, key, UNSAVED)
    numbers = (result.inertia, result.iterations, result.converged, result.reseeded)
    summary = torch.tensor(numbers, dtype=torch.float64)
    return {"codebook": result.codebook, "counts": result.counts, "summary": summary}


def cluster(points: Points, config: KmeansConfig, k: int, key: tuple[int, ...], states: CollectiveStates) -> Clustering:
    """Choose k initial centers among the points, then iterate; `key` seeds the random choices."""
    check_enough(len(points.distinct), k, points.features.name, "distinct vectors", points.features.num_vectors)
    iterations = 0 if config.select == "random" else config.iterations
    saved = states.newest("iterations")
    if saved is not None:
        centers = saved.parts[PART]["centers"].to(points.device)
    else:
        if config.select == "random" or config.init == "random":
            rows = np.sort(np.random.default_rng(key).choice(points.distinct, k, replace=False))
        else:
            rows = plusplus_rows(points, k, key, states)
        centers = points.features.take(rows).to(points.device)
        if points.shared:
            distributed.broadcast(centers)
        states.save("iterations", 0, {"centers": centers})
        states.discard("candidates", "choice")
    if config.batch and iterations:
        return mini_batch(points, centers, iterations, config.tolerance, config.batch, key, saved=saved, states=states)
    return lloyd(points, centers, iterations, config.tolerance, saved=saved, states=states)


def check_enough(found: int, k: int, name: str, what: str, of: int | None = None) -> None:
    if found < k:
        among = f" among its {of:,}" if of is not None else ""
        raise DataError(f"{name} has {found:,} {what}{among}, fewer than k = {k:,}", "Use more images, or a smaller k")


def check_memory(features: FeatureSet, k: int, device: torch.device) -> None:
    """Compare an estimate of the peak memory of a clustering with the free memory.

    Raises:
        ConfigError: it does not fit; the message names both.
    """
    num_vectors, dim = features.num_vectors, features.dim
    working = working_bytes(num_vectors, dim, k)
    if device.type == "cuda":
        check_fits(working, torch.cuda.mem_get_info(device)[0], k, dim, "the GPU")
        working = 8 * k * dim + block_bytes(num_vectors, dim)
    check_fits(working + VECTOR_BYTES * num_vectors, available_bytes(), k, dim, "this machine")


def check_fits(needed: int, free: int, k: int, dim: int, where: str) -> None:
    if needed > free:
        raise ConfigError(
            f"out of memory: k = {k:,} centers of dimension {dim} need about {needed / 1e9:,.2f} GB, {where} has"
            f" {free / 1e9:,.2f} GB free",
            "Use a smaller k, or a machine with more memory",
        )


def room_for_features(features: FeatureSet, k: int, device: torch.device, share: float) -> int:
    """Bytes of a GPU for features: `share` of what is free, less what the iterations need; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free = torch.cuda.mem_get_info(device)[0]
    return max(0, min(int(share * free), free - working_bytes(features.num_vectors, features.dim, k)))


def working_bytes(num_vectors: int, dim: int, k: int) -> int:
    """Memory of the iterations or of the seeding, whichever is larger, and of the blocks."""
    seeding = (4 * dim + 64) * sample_rows(num_vectors, dim, k) + 8 * num_candidates(k) * dim
    return max(CENTER_BYTES * k * dim, seeding) + block_bytes(num_vectors, dim)


def block_bytes(num_vectors: int, dim: int) -> int:
    return BLOCK_COPIES * 4 * min(BLOCK_ROWS, num_vectors) * dim
