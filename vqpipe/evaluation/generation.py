"""Evaluation of generated images: FID, sFID, KID, Inception Score, precision and recall against references.

What a protocol fixes, besides 50,000 samples and classes in equal parts:

| | adm | cleanfid-raw |
|---|---|---|
| samples | at the evaluated size, else PIL's antialiased bicubic (as MGVQ makes 256 px of 384) | the same |
| references | ADM's center crop | whole images, resized to 299 x 299 without their aspect ratio |
| resize to 299 | bilinear as in TensorFlow 1 | PIL's bicubic of each channel (clean-fid) |
| used by | LlamaGen, MGVQ (Table 4), DiT, SiT | VQGAN-LC (Tables 4 and 5) |

Both: Inception-v3 of 2015 in torch-fidelity's conversion. IS is of 10 splits after a shuffle. Without the shuffle each
split would contain only a tenth of the classes, which lowers the score. Precision and recall have k = 3 and compare all
samples with NUM_KEPT references, as in the ADM suite, whose reference file has 10,000 images. KID uses the same
references.

Statistics of the references may come from ADM's own file (VIRTUAL_imagenet256_labeled.npz), whose means and covariances
were computed by the TensorFlow graph itself.

Shapes: B images of S x S pixels, n images, D features.
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vqpipe import artifacts, distributed
from vqpipe.artifacts import Artifact, Draft
from vqpipe.config import difference
from vqpipe.data.images import ImageSet, open_images
from vqpipe.data.tokens import read_tokens
from vqpipe.errors import ConfigError, DataError
from vqpipe.evaluation.image_pass import ImagePass
from vqpipe.evaluation.reconstruction import PackedCrops
from vqpipe.files import hash_file
from vqpipe.metrics.feature_networks import FeatureNetworks, feature_size
from vqpipe.metrics.frechet import Moments
from vqpipe.metrics.inception import SIZES, SPATIAL_CHANNELS
from vqpipe.metrics.set_metrics import MOMENTS, FeatureStatistics, SetStatistics, set_distances
from vqpipe.metrics.usage import CodeUsage, usage_of
from vqpipe.progress import SILENT, Progress
from vqpipe.weights import LPIPS_BACKBONES
from vqpipe.words import in_ranges

NUM_KEPT = 10_000
"""References whose features are kept, for precision, recall and KID."""
METRICS = ("fid", "sfid", "is", "kid", "prc")
SHEET_IMAGES = 64
"""Samples on the contact sheet."""
FEATURE_GB = 8.0
"""Memory for features of the samples over all ranks; 50,000 samples take 0.6."""

ProtocolName = Literal["adm", "cleanfid-raw"]


@dataclass(frozen=True)
class GenerationConfig:
    """How both sides are measured."""

    protocol: ProtocolName
    image_size: int
    batch_size: int = 32
    num_workers: int = -1
    max_skipped: float = 0.01
    """Largest share of unreadable images, 0..1."""
    fid_min_images: int = 2049
    """With fewer images FID and sFID are not computed."""
    save_seconds: float = 60.0
    """Seconds between two saved states of a rank; 0: after each batch."""


class GenerationPass(ImagePass):
    """What a pass over one set of images has accumulated on this rank."""

    state_names: ClassVar[tuple[str, ...]] = ("statistics", "shown", "skipped")

    def __init__(self, statistics: FeatureStatistics) -> None:
        super().__init__()
        self.statistics = statistics
        self.shown: list[Tensor] = []
        """Samples of the contact sheet, uint8[3, S, S]."""


class GenerationEvaluator:
    """Measures sets of images under one protocol."""

    def __init__(
        self,
        config: GenerationConfig,
        networks: FeatureNetworks,
        device: torch.device,
        progress: Progress = SILENT,
    ) -> None:
        self.config, self.networks, self.device, self.progress = config, networks, device, progress
        self.extractor_sizes = {name: feature_size(name, net, device) for name, net in networks.extractors.items()}
        perceptual = {name for name, _ in LPIPS_BACKBONES.values()}
        self.weights = {name: digest for name, digest in networks.sha256.items() if name not in perceptual}
        self.request: dict[str, Any] = {"protocol": config.protocol, "image_size": config.image_size}
        self.request |= {"weights": self.weights, "extractor": networks.extractor_sha256}
        """What statistics of references depend on."""

    def references(self, names: Sequence[str], target: Path) -> tuple[SetStatistics, Artifact | ImageSet | str]:
        """Statistics of the references, and the source that they were read from.

        Args:
            names: images, as of `open_images`; an artifact of statistics; or ADM's .npz.
            target: artifact for the statistics of images, where they are computed once.

        Raises:
            ConfigError: the statistics are of another protocol, size or network.
            ArtifactError: `target` holds the statistics of other images or settings.
        """
        first = Path(names[0])
        if len(names) == 1 and first.suffix == ".npz":
            if self.extractor_sizes or self.config.protocol != "adm":
                raise ConfigError(f"{first} is for the protocol adm and Inception alone", "Give the images themselves")
            return self.adm_statistics(first), hash_file(first)
        if len(names) == 1 and artifacts.is_artifact(first):
            artifact = artifacts.open_artifact(first)
            if artifact.kind == "statistics":
                if (before := {key: artifact.config[key] for key in self.request}) != self.request:
                    changed = difference(before, self.request)
                    raise ConfigError(f"{first} was measured with other settings: {changed}", "Use the same settings")
                return SetStatistics.load(artifact.verified_file("statistics.safetensors"), self.device), artifact
        images = open_images(names)
        for line in images.remarks:
            self.progress.message(f"reference: {line}")
        if self.networks.inception is None and not self.extractor_sizes:
            return SetStatistics(len(images)), images
        draft = artifacts.start(target, "statistics", self.request, {"images": images}, option="--statistics")
        if isinstance(draft, artifacts.Draft):
            with draft:
                draft = self.publish_references(draft, images)
                self.progress.message(f"reference statistics: {draft.path}")
        return SetStatistics.load(draft.verified_file("statistics.safetensors"), self.device), draft

    def publish_references(self, draft: Draft, images: ImageSet) -> Artifact:
        """Publish means and covariances of the references, and the features of some.

        Raises:
            DataError: more than `max_skipped` are unreadable. The state is saved, so that a larger one continues from
                there.
        """
        run = GenerationPass(self.statistics(["pool"]))
        num_kept = min(NUM_KEPT, len(images))
        kept = set(np.linspace(0, len(images) - 1, num_kept).round().astype(int).tolist())
        raw = self.config.protocol == "cleanfid-raw" and self.networks.inception is not None
        for positions, crops, uncropped in self.batches(run, draft, "references", images, len(images), "adm", raw):
            run.statistics.update(crops, uncropped, [i for i, position in enumerate(positions) if position in kept])
        statistics = run.statistics.compute()
        if distributed.is_main():
            with draft.write("statistics.safetensors") as path:
                statistics.save(path)
        run.all_skipped.publish(draft, self.progress)
        return draft.publish({"num_images": statistics.num_images} | images.facts)

    def adm_statistics(self, path: Path) -> SetStatistics:
        """ADM's file, with the features of its images on every rank."""
        statistics, images = read_adm_file(path, self.device)
        height, width = images.shape[2:]
        if height != self.config.image_size or width != self.config.image_size:
            size = self.config.image_size
            what = f"reference: the images in {path} are {width}x{height}, the samples are measured at {size}x{size}"
            self.progress.message(f"{what}, so the metrics include the difference in size")
        if self.networks.inception is not None:
            parts = images.split(self.config.batch_size)
            features = [self.networks.inception(part.to(self.device))["pool"].cpu() for part in parts]
            statistics.features = {"pool": torch.cat(features)}
        return statistics

    def measure(
        self, draft: Draft, images: ImageSet, stop: int, references: SetStatistics
    ) -> tuple[dict[str, Any], Tensor]:
        """The content of `metrics.json` for the samples [0, stop), and some of them, uint8[n, 3, S, S].

        Raises:
            DataError: there are no samples, or more than `max_skipped` are unreadable. The state is saved, so that a
                larger one continues from there.
        """
        run = GenerationPass(self.statistics(["pool", "logits"]))
        sheet = {number * stop // min(SHEET_IMAGES, stop) for number in range(min(SHEET_IMAGES, stop))}
        for positions, crops, _ in self.batches(run, draft, "samples", images, stop, "cover", raw=False):
            run.statistics.update(crops)
            run.shown += [crop.cpu() for position, crop in zip(positions, crops, strict=True) if position in sheet]
        samples = run.statistics.compute()
        if samples.num_images == 0:
            raise DataError("there are no samples to measure", "Check --images and --limit")
        run.all_skipped.publish(draft, self.progress)
        absent = self.networks.inception is None
        numbers, reasons = set_distances(
            samples,
            references,
            [] if absent else METRICS,
            min_images=self.config.fid_min_images,
            memory=f"{FEATURE_GB:g} GB",
            nouns=("samples", "references"),
        )
        if absent:
            reasons |= dict.fromkeys(METRICS, self.networks.absent["rfid"].removeprefix("rFID "))
        for table in (numbers, reasons):
            if "is" in table:
                table["inception_score"] = table.pop("is")
        metrics = {
            "protocol": self.config.protocol,
            "num_images": samples.num_images,
            "num_references": references.num_images,
            "image_size": self.config.image_size,
            **numbers,
            "not_computed": reasons,
            "weights": self.weights,
        }
        return metrics, torch.stack([image for part in distributed.gather_objects(run.shown) for image in part])

    def statistics(self, features: Sequence[str]) -> FeatureStatistics:
        """Empty statistics that keep these outputs of Inception."""
        return FeatureStatistics(
            self.networks,
            "tf1" if self.config.protocol == "adm" else "clean",
            self.device,
            moments=tuple(MOMENTS.values()),
            features=features,
            max_bytes=FEATURE_GB * 1e9 / 2 / distributed.world_size(),
            extractor_sizes=self.extractor_sizes,
        )

    def batches(
        self, run: GenerationPass, draft: Draft, title: str, images: ImageSet, stop: int, rule: str, raw: bool
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """This rank's images after the newest saved state, which `run` is restored to: their positions, uint8[B, 3, S,
        S], and float32[B, 3, 299, 299] with `raw`."""
        config = self.config
        packed = PackedCrops([rule], (config.image_size, config.image_size), raw)
        batches = run.batches(
            title,
            images,
            stop,
            draft,
            save_seconds=config.save_seconds,
            max_skipped=config.max_skipped,
            image_size=config.image_size,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            transform=packed,
            progress=self.progress,
        )
        for batch in batches:
            crops, uncropped = packed.split(batch.images)
            yield batch.indices, crops[rule].to(self.device), None if uncropped is None else uncropped.to(self.device)


def samples_artifact(images: Sequence[str]) -> Artifact | None:
    """The artifact of samples, if `images` is a single artifact."""
    return opened_artifact(images[0]) if len(images) == 1 else None


def origin_of(samples: Artifact | None) -> dict[str, Any]:
    """The `generator` (name and content), the `classes` and the settings `sampling` of samples of `vqpipe generate`;
    else empty."""
    if samples is None or "generate" not in samples.config:
        return {}
    generator = samples.lineage["inputs"]["generator"]
    return {
        "generator": {key: generator[key] for key in ("name", "content")},
        "classes": in_ranges(samples.config["classes"]),
        "sampling": samples.config["generate"],
    }


def code_usage(samples: Artifact | None, num_images: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The use of codes by the first images of an artifact of `vqpipe generate --keep-ids`.

    Returns:
        `usage_of` their ids, with `num_ids`, `codebook_size` and `num_groups`; and the reason if there are no ids.
    """
    if samples is None or "codebook_size" not in samples.facts:
        return {}, {"utilization": "ids are only known for the samples of one vqpipe generate --keep-ids"}
    sizes = {key: samples.facts[key] for key in ("codebook_size", "num_groups")}
    usage, left, num_ids = CodeUsage(**sizes), num_images, 0
    for name in samples.names("ids-*.parquet"):
        ids = read_tokens(samples.verified_file(name), sizes["codebook_size"]).ids[:left]
        usage.update(ids)
        left, num_ids = left - len(ids), num_ids + ids.numel()
    return {**usage_of(usage.counts), "num_ids": num_ids, **sizes}, {}


def opened_artifact(path: str) -> Artifact | None:
    """The artifact at `path`, if it is one."""
    folder = Path(path)
    return artifacts.open_artifact(folder) if "://" not in path and artifacts.is_artifact(folder) else None


def evaluated_size(images: Sequence[str], references: Sequence[str], progress: Progress) -> int:
    """The size to measure at where none is given: that of the images in ADM's .npz, else `generated_size`."""
    size = generated_size(images)
    stored = adm_size(Path(references[0])) if len(references) == 1 and references[0].endswith(".npz") else None
    if stored is None or stored == (size, size) or stored[0] != stored[1]:
        return size
    remark = f"samples are measured at {stored[0]} pixels, the size of the images in {references[0]}"
    progress.message(f"{remark}; --image-size sets another")
    return stored[0]


def generated_size(images: Sequence[str]) -> int:
    """The image size of artifacts of `generate` or `detokenize`, if all have the same; else 256."""
    opened = [opened_artifact(each) for each in images]
    sizes = {None if artifact is None else artifact.facts.get("image_size") for artifact in opened}
    size = sizes.pop()
    return size if not sizes and isinstance(size, int) else 256


def adm_size(path: Path) -> tuple[int, int] | None:
    """(H, W) of the images in ADM's .npz, from the header of their array; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            _, height, width, _ = np.lib.format.read_array_header_1_0(file)[0]
    except Exception:  # `read_adm_file` says what is wrong with the file
        return None
    return height, width


def read_adm_file(path: Path, device: torch.device) -> tuple[SetStatistics, Tensor]:
    """The reference that ADM publishes, and its sample of images, uint8[n, 3, H, W].

    Raises:
        DataError: another file, or a damaged one.
    """
    hint = "Fetch VIRTUAL_imagenet256_labeled.npz again, or give images as --reference"
    pairs = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
            gaussians = {name: [np.asarray(arrays[each], np.float64) for each in pair] for name, pair in pairs.items()}
    except Exception as error:  # readers raise many types on damaged files
        what = f"--reference {path} is no reference of the ADM suite, or it is damaged ({type(error).__name__})"
        raise DataError(what, hint) from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise DataError(f"--reference {path}: arr_0 is {images.dtype}{list(images.shape)}, not uint8[n, H, W, 3]", hint)
    moments = {}
    for name, (mean, covariance) in gaussians.items():
        size, names = SIZES[name], " and ".join(pairs[name])
        if (mean.shape, covariance.shape) != ((size,), (size, size)):
            found = f"{list(mean.shape)} and {list(covariance.shape)}, not [{size}] and [{size}, {size}]"
            raise DataError(f"--reference {path}: {names} are {found}", hint)
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError(f"--reference {path}: {names} hold NaN or infinity", hint)
        if name == "spatial":  # TensorFlow's maps are flattened with their channels last
            order = np.arange(size).reshape(-1, SPATIAL_CHANNELS).T.flatten()
            mean, covariance = mean[order], covariance[np.ix_(order, order)]
        moments[name] = gaussian_moments(mean, covariance, device)
    return SetStatistics(len(images), moments), torch.from_numpy(images).permute(0, 3, 1, 2)


def gaussian_moments(mean: np.ndarray, covariance: np.ndarray, device: torch.device) -> Moments:
    """Moments with this mean and sample covariance, as of two images."""
    moments = Moments(len(mean), device)
    center = torch.from_numpy(mean).double().to(device)
    moments.count.fill_(2)
    moments.sum = 2 * center
    moments.outer = torch.from_numpy(covariance).double().to(device) + 2 * torch.outer(center, center)
    return moments
