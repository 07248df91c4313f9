"""k-means over stored features: Lloyd's algorithm on every vector, streamed block by block, or mini-batches.

Each iteration passes over all N vectors (nothing is subsampled in silence), finds nearest centres exactly, and sums in
64-bit fixed point, where order does not matter: the centres are the same for any number of ranks. VQGAN-LC clusters
1,300 images x 16 vectors of each class into 100 centres (`per_class`); its paper reads as one global clustering, which
is the default here.

Memory is that of the centres and their sums (about 24 bytes per number), a few blocks of 65,536 vectors, the sample for
the first centres (1 GB at most) and 36 bytes per vector, whatever the size of the features on disk.

N vectors, K centres, D dimensions.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.artifacts.saved import Checkpoints, Saved
from vqpipe.codebooks.clustering import Clustering
from vqpipe.codebooks.feature_set import FeatureSet, open_matrix
from vqpipe.codebooks.lloyd import lloyd
from vqpipe.codebooks.memory import check_memory, room_for_features
from vqpipe.codebooks.mini_batch import mini_batch
from vqpipe.codebooks.points import Points
from vqpipe.codebooks.seeding import plusplus_rows
from vqpipe.codebooks.watch import Watch
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.files import digest_json, hash_file
from vqpipe.weights import load_tensors

__all__ = ["Clustering", "KmeansConfig", "codebook_input", "kmeans", "lloyd", "load_codebook"]

CODEBOOK_FILE = "codebook.safetensors"


@dataclass(frozen=True, kw_only=True)
class KmeansConfig:
    """How features become a codebook; section [kmeans]."""

    k: int = 100_000
    """Codes in the codebook."""
    iterations: int = 20
    """Lloyd iterations at most; in mini-batch mode, epochs: passes over all vectors."""
    init: Literal["k-means++", "random"] = "k-means++"
    """How the first centres are chosen from the vectors."""
    per_class: bool = False
    """Cluster each class of images by itself into k / classes centres, concatenated in class order."""
    select: Literal["kmeans", "random"] = "kmeans"
    """"random": the codes are k distinct vectors drawn at random, and nothing is clustered (the paper's ablation)."""
    tolerance: float = 1e-4
    """Stop when an iteration lowers the inertia by less than this share of it; 0 runs all iterations."""
    batch: int = 0
    """Vectors per step of mini-batch k-means; 0: every iteration of Lloyd's takes all vectors."""
    gpu_share: float = 0.5
    """Share (0..1) of a GPU's free memory up to which features stay there, in the precision they are stored in; larger
    ones are copied there in every pass. The codebook is the same."""

    def __post_init__(self) -> None:
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
        for name, choices in (("init", ("k-means++", "random")), ("select", ("kmeans", "random"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"kmeans.{name} = {getattr(self, name)!r} is not a choice", f"Use {' or '.join(choices)}"
                )


def kmeans(
    features: FeatureSet,
    config: KmeansConfig,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], None] = lambda inertia: None,
    checkpoints: Path | None = None,
    watch: Watch | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Clustering:
    """Cluster `features`. Every rank calls it, and every rank gets the same result.

    Args:
        on_step: hears the inertia after each pass over the features; per class, after each class.
        checkpoints: a directory for the state after the first centres and after each iteration (per class: each
            class's result). A call with the same arguments goes on from there, on any number of ranks, to the same
            bytes. None: an interrupted run starts again.
        watch: hears how far it is, block by block.
        on_note: hears, in words, of a saved state that is damaged.

    Raises:
        DataError: fewer vectors or fewer distinct vectors than centres; labels missing for `per_class`.
        ConfigError: `per_class` with a k that the number of classes does not divide; a k beyond the memory.
        NumericError: NaN or infinity in the features.
        ArtifactError: the features are not what was published; `checkpoints` holds another clustering, or cannot be
            written.
    """
    watch = watch or Watch()
    features.check(watch)
    asked = {**asdict(config), "gpu_share": None, "seed": seed, "features": features.digest}
    request = digest_json({**asked, "num_vectors": features.num_vectors, "dim": features.dim})
    states = Checkpoints(checkpoints, request, on_note, shared=not config.per_class)
    if config.per_class:
        return kmeans_per_class(features, config, seed, device, on_step, states, watch)
    check_enough(features.num_vectors, config.k, features.name, "vectors")
    check_memory(features, config.k, device)
    room = room_for_features(features, config.k, device, config.gpu_share)
    points = Points(features, device, shared=True, visits=visits(config), room=room, watch=watch)
    return cluster(points, config, config.k, (seed,), on_step, states)


def kmeans_per_class(
    features: FeatureSet,
    config: KmeansConfig,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], None],
    checkpoints: Checkpoints,
    watch: Watch,
) -> Clustering:
    """k / classes centres of each class by itself, in class order (VQGAN-LC's released code). Ranks take turns."""
    if features.labels is None or (features.labels < 0).any():
        missing = features.num_vectors if features.labels is None else int((features.labels < 0).sum())
        raise DataError(
            f"clustering per class needs labels; {missing:,} of {features.num_vectors:,} vectors have none",
            "Extract features from labelled images (class folders, tars with .cls), or leave out --per-class",
        )
    classes, sizes = np.unique(features.labels, return_counts=True)
    each, rest = divmod(config.k, len(classes))
    if rest or each == 0:
        raise ConfigError(
            f"k = {config.k} is not a multiple of the {len(classes)} classes", f"Use a multiple of {len(classes)}"
        )
    for label, size in zip(classes, sizes, strict=True):
        check_enough(int(size), each, f"class {label}", "vectors")
    codes, counts = torch.zeros(config.k, features.dim), torch.zeros(config.k, dtype=torch.int64)
    summary = torch.zeros(len(classes), 4, dtype=torch.float64)  # inertia, iterations, converged, reseeded
    watch.phase("k-means per class", features.num_vectors)
    for index, label in enumerate(classes):
        if index % distributed.world_size() != distributed.rank():
            continue
        result = checkpoints.newest(f"class-{index}")
        if result is None:
            rows = np.flatnonzero(features.labels == label)
            result = of_class(features.subset(rows, f"class {label}"), config, each, (seed, int(label)), device)
            checkpoints.save(f"class-{index}", result)
        here = slice(index * each, (index + 1) * each)
        codes[here], counts[here], summary[index] = (result.tensors[name] for name in ("codes", "counts", "summary"))
        on_step(float(summary[index, 0]))
        watch.note(f"class {index + 1} of {len(classes)}")
        watch.advance(int(sizes[index : index + distributed.world_size()].sum()))
    for tensor in (codes, counts, summary):
        tensor.copy_(distributed.all_reduce_sum(tensor.to(device)))
    inertia, iterations, converged, reseeded = summary.T
    mean = float((inertia * torch.from_numpy(sizes)).sum()) / features.num_vectors
    return Clustering(codes, counts, (mean,), bool(converged.all()), int(iterations.max()), int(reseeded.sum()))


def of_class(features: FeatureSet, config: KmeansConfig, k: int, key: tuple[int, ...], device: torch.device) -> Saved:
    """One class's centres, as a state to save."""
    room = room_for_features(features, k, device, config.gpu_share)
    points = Points(features, device, shared=False, visits=visits(config), room=room)
    result = cluster(points, config, k, key, lambda inertia: None, Checkpoints(None))
    numbers = (result.inertia, result.iterations, result.converged, result.reseeded)
    summary = torch.tensor(numbers, dtype=torch.float64)
    return Saved(0, {"codes": result.codes, "counts": result.counts, "summary": summary})


def cluster(
    points: Points,
    config: KmeansConfig,
    k: int,
    key: tuple[int, ...],
    on_step: Callable[[float], None],
    checkpoints: Checkpoints,
) -> Clustering:
    """Choose k centres among the points, then move them; `key` is what random choices are a function of."""
    check_enough(len(points.distinct), k, points.features.name, "distinct vectors", points.features.num_vectors)
    iterations = 0 if config.select == "random" else config.iterations
    saved = checkpoints.newest("iterations", points.device)
    if saved is None:
        if config.select == "random" or config.init == "random":
            rows = np.sort(np.random.default_rng(key).choice(points.distinct, k, replace=False))
        else:
            rows = plusplus_rows(points, k, key, checkpoints)
        centres = points.features.take(rows).to(points.device)
        if points.shared:
            distributed.broadcast(centres)
        saved = Saved(0, {"centres": centres})
        checkpoints.save("iterations", saved)
        checkpoints.discard("candidates", "choice")
    centres = saved.tensors["centres"].to(points.device)
    if config.batch and iterations:
        return mini_batch(
            points,
            centres,
            iterations,
            config.tolerance,
            config.batch,
            key,
            on_step,
            saved=saved,
            checkpoints=checkpoints,
        )
    return lloyd(
        points,
        centres,
        iterations,
        config.tolerance,
        on_step,
        history=tuple(saved.state.get("history", ())),
        reseeded=saved.state.get("reseeded", 0),
        checkpoints=checkpoints,
    )


def visits(config: KmeansConfig) -> int:
    """How often one sum may meet a vector: once, or in mini-batch mode once in each epoch."""
    return max(1, config.iterations) if config.batch else 1


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
    path = source.whole(CODEBOOK_FILE) if isinstance(source, Artifact) else Path(source)
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
