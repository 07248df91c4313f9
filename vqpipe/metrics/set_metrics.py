"""Distances between two sets of images by the features of a network: FID, sFID, KID, precision and recall, and the
Inception Score of one set.

    FeatureStatistics   accumulates one set: moments of features, and features that are kept
    SetStatistics       its result over all ranks, which can be stored in a file
    set_distances       two of those -> numbers, and reasons for those that are not computed

KID, precision and recall, and the Inception Score need the features of all images at once: 8 KiB per image for 2,048
features. They are kept in memory as float32, up to a limit; beyond it these metrics are not computed.

Shapes: B images of a batch, H x W pixels, n images, D features.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.errors import DataError
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.metrics.frechet import Moments, frechet_distance
from vqpipe.metrics.inception import INCEPTION_SIZE, SIZES, clean_resize_all
from vqpipe.metrics.resumable import Resumable, Rows, State, summed
from vqpipe.weights import load_tensors

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""torch-fidelity's defaults, of Binkowski et al. 2018: the mean over 100 draws of 1,000 images from each side."""
NEIGHBOURS = 3
"""k of precision and recall (Kynkaanniemi et al. 2019), as in the ADM suite."""
SPLITS = 10
"""Parts of the Inception Score, after a shuffle by a fixed seed; the ADM suite takes 5,000 images each, in order."""
SEED = 2020
PRC_BATCH = 2000
"""Rows of the n x n distances at a time: 400 MB at 50,000 images."""
MOMENTS = {"fid": "pool", "sfid": "spatial"}
"""Metric -> the output of Inception whose mean and covariance it compares."""
FEATURES = {"kid": "pool", "prc": "pool", "is": "logits"}
"""Metric -> the output of Inception that it needs of every image."""
CHUNK_BYTES = 4 << 20
"""Kept features are joined to tensors of at least this size, which a saved state stores once."""


class FeatureBank(Resumable):
    """Keeps features, float32[n, D], up to `max_bytes`; beyond that nothing is kept, and `overflown` is set."""

    state_names: ClassVar[tuple[str, ...]] = ("num_bytes", "overflown", "chunks", "recent")

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.overflown = False
        self.chunks = Rows([])
        self.recent: list[Tensor] = []
        """Batches that do not fill a chunk yet."""

    def update(self, features: Tensor) -> None:
        """Append float[B, D]."""
        self.num_bytes += features.numel() * 4
        self.overflown = self.overflown or self.num_bytes > self.max_bytes
        if self.overflown:
            self.chunks, self.recent = Rows([]), []
            return
        self.recent.append(features.float().cpu())
        if sum(part.nbytes for part in self.recent) >= CHUNK_BYTES:
            self.chunks, self.recent = Rows([*self.chunks.parts, torch.cat(self.recent)]), []

    def state(self) -> State:
        self.recent = [torch.cat(self.recent)] if self.recent else []
        return super().state()

    def compute(self) -> Tensor | None:
        """float32[n, D] of all ranks in rank order, on rank 0 (elsewhere empty); None if any rank has overflown."""
        if any(distributed.gather_objects(self.overflown)):
            return None
        own = [*self.chunks.parts, *self.recent]
        gathered = distributed.gather_objects(torch.cat(own).numpy() if own else None)
        parts = [torch.from_numpy(part) for part in gathered if part is not None]
        return torch.cat(parts) if distributed.is_main() and parts else torch.zeros(0, 1)


@dataclass
class SetStatistics:
    """The features of a set of images, over all ranks."""

    num_images: int
    moments: dict[str, Moments] = field(default_factory=dict)
    """By output of Inception."""
    extractors: dict[str, Moments] = field(default_factory=dict)
    """By name of a further network."""
    features: dict[str, Tensor | None] = field(default_factory=dict)
    """By output of Inception, float32[n, D] on rank 0; None where they exceeded the memory limit."""

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {"num_images": torch.tensor(self.num_images)}
        for group, members in (("moments", self.moments), ("named", self.extractors)):
            for name, moments in members.items():
                for part in moments.state_names:
                    tensors[f"{group}/{name}/{part}"] = getattr(moments, part).cpu().contiguous()
        if (kept := self.features.get("pool")) is not None:
            tensors["kept"] = kept.cpu().contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "SetStatistics":
        """Read the file that `save` wrote.

        Raises:
            WeightsError: the file is damaged.
        """
        tensors = load_tensors(path)
        groups: dict[str, dict[str, Moments]] = {"moments": {}, "named": {}}
        for place, value in tensors.items():
            group, slash, rest = place.partition("/")
            if slash:
                name, _, part = rest.rpartition("/")
                size = len(tensors[f"{group}/{name}/sum"])
                setattr(groups[group].setdefault(name, Moments(size, device)), part, value.to(device))
        features = {"pool": tensors["kept"]} if "kept" in tensors else {}
        return cls(int(tensors["num_images"]), groups["moments"], groups["named"], features)


class FeatureStatistics(Resumable):
    """Statistics of the features of one set of images.

    Args:
        resize: from 8-bit pixels to Inception's input.
        moments: outputs of Inception whose mean and covariance are accumulated.
        features: outputs of Inception that are kept of every image.
        max_bytes: memory of this rank for each kept output.
        extractor_sizes: further networks, by name -> number of features.
    """

    state_names: ClassVar[tuple[str, ...]] = ("num_images", "moments", "extractors", "banks")

    def __init__(
        self,
        networks: FeatureNetworks,
        resize: Literal["tf1", "clean"],
        device: torch.device,
        *,
        moments: Collection[str] = (),
        features: Collection[str] = (),
        max_bytes: float = 0.0,
        extractor_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.outputs = tuple(dict.fromkeys((*moments, *features)))
        self.inception: nn.Module | None = networks.inception if self.outputs else None
        self.resize = resize
        self.networks = networks.extractors
        self.num_images = 0
        found = self.inception is not None
        self.moments = {name: Moments(SIZES[name], device) for name in moments if found}
        self.banks = {name: FeatureBank(max_bytes) for name in features if found}
        self.extractors = {name: Moments(size, device) for name, size in (extractor_sizes or {}).items()}

    def update(self, images: Tensor, resized: Tensor | None = None, keep: Sequence[int] | None = None) -> None:
        """Accumulate uint8[B, 3, H, W].

        Args:
            resized: float[B, 3, 299, 299], Inception's input where that is not `images`.
            keep: indices of the images whose features are kept; None: all.

        Raises:
            DataError: `resized` has another shape.
            NumericError: a network returned NaN or infinity.
        """
        self.num_images += len(images)
        if self.inception is not None:
            if resized is None:
                resized = clean_resize_all(images) if self.resize == "clean" else images
            elif resized.shape[1:] != (3, INCEPTION_SIZE, INCEPTION_SIZE):
                raise DataError(f"references of shape {list(resized.shape)} are not resized for Inception")
            features = self.inception(resized, self.outputs)
            for name, moments in self.moments.items():
                moments.update(features[name])
            for name, bank in self.banks.items():
                if keep is None or len(keep) > 0:
                    bank.update(features[name] if keep is None else features[name][list(keep)])
        for name, moments in self.extractors.items():
            with torch.inference_mode():
                moments.update(self.networks[name](images))

    def compute(self) -> SetStatistics:
        """The statistics over all ranks."""
        return SetStatistics(
            num_images=sum(distributed.gather_objects(self.num_images)),
            moments=summed(self.moments),
            extractors=summed(self.extractors),
            features={name: bank.compute() for name, bank in self.banks.items()},
        )


def set_distances(
    samples: SetStatistics,
    references: SetStatistics,
    metrics: Collection[str],
    *,
    min_images: int,
    memory: str,
    nouns: tuple[str, str] = ("images", "images"),
) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers of `metrics` ("fid", "sfid", "kid", "prc", "is"), `frechet` by extractor where there are any, and
    the reason of each that is not computed. Every rank calls it.

    Args:
        min_images: below this number of images, distances of means and covariances are not computed.
        memory: name of the memory limit of kept features, for reasons.
        nouns: what the two sets are called in reasons.
    """
    numbers: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    fewest, noun = min((samples.num_images, nouns[0]), (references.num_images, nouns[1]))

    def too_few_for_covariance(least: int) -> str | None:
        few = f"{fewest:,} {noun} are fewer than the {least:,} that a covariance of its features needs. "
        remedy = "Use more images." if fewest < 2 else "Use more images, or name a smaller --fid-min-images."
        return few + remedy if fewest < least else None

    for name, moments in samples.extractors.items():
        reason = too_few_for_covariance(min(min_images, len(moments.sum) + 1))
        if reason is not None:
            reasons[f"frechet {name}"] = reason
        else:
            distance = frechet_distance(references.extractors[name], moments)
            numbers.setdefault("frechet", {})[name] = distance
    for name in metrics:
        if name in MOMENTS:
            output = MOMENTS[name]
            if (reason := too_few_for_covariance(min_images)) is not None:
                reasons[name] = reason
            else:
                numbers[name] = frechet_distance(references.moments[output], samples.moments[output])
            continue
        own, others = (each.features.get(FEATURES[name]) for each in (samples, references))
        if (reason := too_few(name, samples.num_images if name == "is" else fewest)) is not None:
            reasons[name] = reason
        elif own is None or (others is None and name != "is"):
            reasons[name] = f"the features of {samples.num_images:,} {nouns[0]} need more memory than {memory}"
        elif name == "is":
            numbers[name] = distributed.on_main(partial(inception_score, own))
        else:
            compute: Any = {"kid": kid, "prc": precision_recall}[name]
            numbers[name] = distributed.on_main(partial(compute, own, others))
    return numbers, reasons


def kid(samples: Tensor, references: Tensor) -> dict[str, float]:
    """Kernel Inception Distance of two float32[n, D], polynomial kernel of degree 3: mean and deviation over draws."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        samples, references, kid_subsets=KID_SUBSETS, kid_subset_size=KID_SUBSET_SIZE, rng_seed=SEED, verbose=False
    )
    return {"mean": found[KEY_METRIC_KID_MEAN], "std": found[KEY_METRIC_KID_STD], "subset_size": KID_SUBSET_SIZE}


def precision_recall(samples: Tensor, references: Tensor) -> dict[str, float]:
    """Share of each set inside the other's balls, which reach from each image to its third neighbor: two float32[n, D]
    tensors."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        samples, references, prc_neighborhood=NEIGHBOURS, prc_batch_size=PRC_BATCH, save_cpu_ram=True, verbose=False
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL], "k": NEIGHBOURS}


def inception_score(logits: Tensor) -> dict[str, float]:
    """Mean and deviation over the splits of float32[n, 1008] (Salimans et al. 2016)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return {"mean": found[KEY_METRIC_ISC_MEAN], "std": found[KEY_METRIC_ISC_STD], "splits": SPLITS}


def too_few(metric: str, num_images: int) -> str | None:
    """The reason if the metric needs more images, else None."""
    least = {"kid": KID_SUBSET_SIZE, "prc": NEIGHBOURS + 1, "is": SPLITS}[metric]
    return None if num_images >= least else f"{num_images} images are fewer than the {least} it needs. Use more images."
