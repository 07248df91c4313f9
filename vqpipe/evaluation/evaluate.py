"""Evaluation of a tokenizer: one pass over images, resumable, to one result.

Each file is decoded once, cropped by every rule of its protocols, and encoded and decoded once per crop.

A saved state holds 32 MiB for a mean and a covariance of 2,048 features, 16 bytes for each code of a codebook, the
pictures of the report, and the features of metrics that keep them.

Shapes: B images of H x W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqpipe.artifacts import Artifact, Draft
from vqpipe.continuous import ImageAutoencoder
from vqpipe.data.images import ImageSet
from vqpipe.data.transforms import to_uint8
from vqpipe.evaluation.analysis import Analysis
from vqpipe.evaluation.image_pass import ImagePass
from vqpipe.evaluation.measurement import EvaluationMetrics
from vqpipe.evaluation.pictures import SelectedPictures
from vqpipe.evaluation.reconstruction import PackedCrops, Reconstructor
from vqpipe.files import read_rows
from vqpipe.image_size import parse_size
from vqpipe.metrics.config import EvalConfig
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.metrics.protocols import PROTOCOLS
from vqpipe.metrics.resumable import State
from vqpipe.progress import SILENT, Progress
from vqpipe.provenance import versions
from vqpipe.reports.evaluation import EvaluationResult, command_of

PACKAGES = ("vqpipe", "torch", "lpips", "torch-fidelity", "pillow")
"""Packages whose versions the numbers depend on."""
NATIVE_SIDE = 2048
"""Side of whole images in pixels, assumed for the shared memory of loader processes."""


def evaluate(
    images: ImageSet,
    autoencoder: ImageAutoencoder,
    config: EvalConfig,
    networks: FeatureNetworks,
    *,
    analyses: Sequence[Analysis] = (),
    limit: int | None = None,
    num_workers: int = -1,
    draft: Draft | None = None,
    progress: Progress = SILENT,
) -> EvaluationResult:
    """Measure an autoencoder on the first `limit` images. Every rank calls it.

    Args:
        draft: the report, for the saved states and the list of the unreadable images; None: nothing is saved.

    Raises:
        DataError: more unreadable images than `config.max_skipped`, or no images at all. The states are saved, so that
            a larger one continues from there.
    """
    run = EvaluationPass(autoencoder, config, networks, analyses, min(limit or len(images), len(images)))
    run.measure(images, num_workers, draft, progress)
    metrics, counts = run.metrics.compute()
    shown = run.pictures.selected()
    metrics |= run.reconstructor.counts()
    if analyses:
        metrics["analyses"] = {analysis.name: analysis.result() for analysis in analyses}
    metrics |= {
        "skipped": run.all_skipped.counts(),
        "tokenizer": description(autoencoder, run.size),
        "pictures": [{"number": i, "name": s.name, "psnr": s.psnr, "why": s.why} for i, s in enumerate(shown)],
        "versions": versions((*PACKAGES, *(["diffusers"] if autoencoder.codebook_size is None else []))),
    }
    if draft is not None:
        run.all_skipped.publish(draft, progress)
    artifact = autoencoder.artifact
    if artifact is not None and "train" in artifact.config:
        metrics["training"] = artifact.config
    return EvaluationResult(
        name=autoencoder.name,
        metrics=metrics,
        counts=counts.cpu(),
        shown=shown,
        history=training_log(artifact),
        commands=[command_of(artifact)] if artifact else [],
        analyses=[section for each in analyses for section in each.sections(metrics["analyses"][each.name])],
    )


class EvaluationPass(ImagePass):
    """The state of one pass over the images [0, stop)."""

    state_names: ClassVar[tuple[str, ...]] = ("metrics", "pictures", "reconstructor", "skipped")

    def __init__(
        self,
        autoencoder: ImageAutoencoder,
        config: EvalConfig,
        networks: FeatureNetworks,
        analyses: Sequence[Analysis],
        stop: int,
    ) -> None:
        super().__init__()
        self.autoencoder, self.config, self.analyses, self.stop = autoencoder, config, analyses, stop
        self.device = autoencoder.device
        self.size = parse_size(config.image_size)
        self.rules: dict[str, str] = {name: PROTOCOLS[name].crop_rule(self.size) for name in config.protocols}
        self.metrics = EvaluationMetrics(
            config, networks, autoencoder.codebook_size, autoencoder.num_groups, self.device
        )
        self.reconstructor = Reconstructor(autoencoder, config.tile)
        self.pictures = SelectedPictures(stop, config.num_pictures, config.num_extremes)

    def state(self) -> State:
        return super().state() | {"analyses": [analysis.state() for analysis in self.analyses]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        for analysis, saved in zip(self.analyses, state["analyses"], strict=True):
            analysis.load_state(saved)

    def measure(self, images: ImageSet, num_workers: int, draft: Draft | None, progress: Progress) -> None:
        """Measure this rank's share of the images, from the newest saved state on."""
        tiled = self.size is None or (self.config.tile is not None and max(self.size) > self.config.tile)
        packed = PackedCrops(list(self.rules.values()), self.size, self.metrics.needs_raw)
        batches = self.batches(
            "eval",
            images,
            self.stop,
            draft,
            save_seconds=self.config.save_seconds,
            max_skipped=self.config.max_skipped,
            image_size=max(self.size or (NATIVE_SIDE,)),
            batch_size=1 if tiled else self.config.batch_size,
            num_workers=num_workers,
            transform=packed,
            progress=progress,
        )
        with torch.no_grad():
            for batch in batches:
                self.update(*packed.split(batch.images), batch.keys, batch.indices)
                psnr = self.metrics.first.distortion.means().get("psnr", float("inf"))
                progress.note(f"PSNR {psnr:.2f} dB")

    def update(
        self, crops: Mapping[str, Tensor], raw: Tensor | None, keys: Sequence[str], positions: Sequence[int]
    ) -> None:
        """Reconstruct each crop of a batch, equal crops only once, and pass it to all metrics and analyses."""
        first, *others = crops
        originals = crops[first].to(self.device)
        self.reconstructor.count(originals)
        reconstruction = self.reconstructor(originals, list(self.metrics.prefixes))
        pairs = {first: (originals, reconstruction.images)}
        for rule in others:
            if torch.equal(crops[rule], crops[first]):  # square images of the right size have equal crops
                pairs[rule] = pairs[first]
            else:
                crop = crops[rule].to(self.device)
                pairs[rule] = (crop, self.reconstructor(crop).images)
        psnr = self.metrics.update(
            originals,
            reconstruction.images,
            reconstruction.ids,
            reconstruction.prefixes,
            others={name: pairs[rule] for name, rule in self.rules.items()},
            raw=None if raw is None else raw.to(self.device),
            positions=positions,
            keys=keys,
        ).tolist()
        rounded = to_uint8(reconstruction.images)
        if reconstruction.ids is not None:
            for analysis in self.analyses:
                analysis.update(originals, rounded, reconstruction.ids, keys)
        self.pictures.update(keys, positions, originals, rounded, psnr, reconstruction.prefixes)


def description(autoencoder: ImageAutoencoder, size: tuple[int, int] | None) -> dict[str, Any]:
    """The autoencoder's facts, for images of (H, W), or of their own sizes."""
    factor = autoencoder.downsample_factor
    table = autoencoder.describe(factor)
    sides = [f"H/{factor}", f"W/{factor}"] if size is None else [-(-side // factor) for side in size]
    return table | {"latent_shape": [table["latent_shape"][0], *sides]}


def training_log(artifact: Artifact | None) -> list[dict[str, Any]]:
    """The rows that `train` logged, if the tokenizer's artifact has them."""
    if artifact is None or not artifact.names("metrics.jsonl"):
        return []
    return read_rows(artifact.verified_file("metrics.jsonl"))


def check_size(autoencoder: ImageAutoencoder, config: EvalConfig) -> None:
    """Raise a DataError if the autoencoder cannot take images of `eval.image_size`. Square sizes must be multiples of
    the downsample factor; other sizes are padded and cropped back."""
    size = parse_size(config.image_size)
    if size is not None:
        factor = autoencoder.downsample_factor
        height, width = size if size[0] == size[1] else (-(-side // factor) * factor for side in size)
        autoencoder.latent_shape(height, width)
