"""Evaluation of a tokenizer: one pass over images, resumable, to one result.

Each file is decoded once, cropped by every rule of its protocols, and encoded and decoded once per crop. Each rank
measures a contiguous share of the images and saves its state in a folder of its own, from which a killed evaluation
continues:

    RUN/states/rank-0/images-00000064/     what rank 0 accumulated over the first 64 images of its share

A state holds 32 MiB for a mean and a covariance of 2,048 features, 16 bytes for each code of a codebook, the pictures
of the report, and the features of metrics that keep them.

Shapes: B images of H x W pixels.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Artifact, Draft, states
from vqpipe.config import difference
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet
from vqpipe.data.skipped import Skipped, merged
from vqpipe.data.transforms import to_uint8
from vqpipe.evaluation.analysis import Analysis
from vqpipe.evaluation.measurement import EvaluationMetrics
from vqpipe.evaluation.pictures import SelectedPictures
from vqpipe.evaluation.reconstruction import Autoencoder, PackedCrops, Reconstructor, rank_share
from vqpipe.files import read_rows
from vqpipe.image_size import parse_size
from vqpipe.metrics.config import EvalConfig
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.metrics.protocols import PROTOCOLS
from vqpipe.metrics.resumable import Resumable, State, pack, unpack
from vqpipe.progress import SILENT, Progress
from vqpipe.provenance import versions
from vqpipe.reports.evaluation import EvaluationResult, command_of
from vqpipe.words import counted

PACKAGES = ("vqpipe", "torch", "lpips", "torch-fidelity", "pillow")
"""Packages whose versions the numbers depend on."""
FORMAT = 4
"""Version of the saved states; others are not resumed."""
MAX_PAUSE = 10
"""Largest interval between saves, as a multiple of `save_seconds`."""
MAX_SHARE = 0.05
"""Saves are less frequent if they take more than this share of the time."""
NATIVE_SIDE = 2048
"""Side of whole images in pixels, assumed for the shared memory of loader processes."""


def evaluate(
    images: ImageSet,
    autoencoder: Autoencoder,
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
    skipped = run.measure(images, num_workers, Checkpoints(draft, config.save_seconds), progress)
    metrics, counts = run.metrics.compute()
    shown = run.pictures.selected()
    metrics |= run.reconstructor.counts()
    if analyses:
        metrics["analyses"] = {analysis.name: analysis.result() for analysis in analyses}
    metrics |= {
        "skipped": skipped.counts(),
        "tokenizer": description(autoencoder, run.size),
        "pictures": [{"number": i, "name": s.name, "psnr": s.psnr, "why": s.why} for i, s in enumerate(shown)],
        "versions": versions((*PACKAGES, *(["diffusers"] if autoencoder.codebook_size is None else []))),
    }
    if draft is not None:
        skipped.publish(draft, progress)
    artifact = autoencoder.artifact
    return EvaluationResult(
        name=autoencoder.name,
        metrics=metrics,
        counts=counts.cpu(),
        shown=shown,
        history=training_log(artifact),
        commands=[command_of(artifact)] if artifact else [],
        analyses=[section for each in analyses for section in each.sections(metrics["analyses"][each.name])],
    )


class EvaluationPass(Resumable):
    """The state of one pass over the images [0, stop)."""

    state_names: ClassVar[tuple[str, ...]] = ("metrics", "pictures", "reconstructor", "skipped")

    def __init__(
        self,
        autoencoder: Autoencoder,
        config: EvalConfig,
        networks: FeatureNetworks,
        analyses: Sequence[Analysis],
        stop: int,
    ) -> None:
        self.autoencoder, self.config, self.analyses, self.stop = autoencoder, config, analyses, stop
        self.device = autoencoder.device
        self.size = parse_size(config.image_size)
        self.rules: dict[str, str] = {name: PROTOCOLS[name].crop_rule(self.size) for name in config.protocols}
        self.metrics = EvaluationMetrics(
            config, networks, autoencoder.codebook_size, autoencoder.num_groups, self.device
        )
        self.reconstructor = Reconstructor(autoencoder, config.tile)
        self.pictures = SelectedPictures(stop, config.num_pictures, config.num_extremes)
        self.skipped: dict[int, str] = {}
        """Position -> reason of each unreadable image of this rank."""

    def state(self) -> State:
        return super().state() | {"analyses": [analysis.state() for analysis in self.analyses]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.skipped = merged([self.skipped])
        for analysis, saved in zip(self.analyses, state["analyses"], strict=True):
            analysis.load_state(saved)

    def measure(self, images: ImageSet, num_workers: int, checkpoints: "Checkpoints", progress: Progress) -> Skipped:
        """Measure this rank's share of the images, from the newest saved state on. Returns the unreadable images of all
        ranks."""
        tiled = self.size is None or (self.config.tile is not None and max(self.size) > self.config.tile)
        batch_size = 1 if tiled else self.config.batch_size
        first, stop = rank_share(self.stop, batch_size)
        done = checkpoints.resume(self, range(first, stop), progress)
        packed = PackedCrops(list(self.rules.values()), self.size, self.metrics.needs_raw)
        batches = OrderedBatches(
            images,
            spans=[range(done, stop)],
            image_size=max(self.size or (NATIVE_SIDE,)),
            batch_size=batch_size,
            num_workers=num_workers,
            transform=packed,
        )
        progress.start("eval", stop - first, done=done - first)
        skipped, allowed = Skipped(images, self.stop, self.skipped), self.config.max_skipped
        if done < stop:
            skipped.check(allowed, checkpoints.draft, so_far=True)
        with torch.no_grad():
            for piece in batches.pieces():
                self.skipped |= piece.skipped
                if piece.batch is not None:
                    self.update(*packed.split(piece.batch.images), piece.batch.keys, piece.batch.indices)
                psnr = self.metrics.first.distortion.means().get("psnr", float("inf"))
                progress.note(f"PSNR {psnr:.2f} dB")
                checkpoints.save_if_due(self, piece.positions.stop)
                progress.advance(len(piece.positions))
                if skipped.exceeds(allowed) and piece.positions.stop < stop:
                    checkpoints.save(self, piece.positions.stop)
                    skipped.check(allowed, checkpoints.draft, so_far=True)
        skipped = Skipped(images, self.stop, merged(distributed.gather_objects(self.skipped)))
        if skipped.exceeds(allowed):
            checkpoints.save(self, stop)
        else:
            checkpoints.save_last(self, stop)
        skipped.check(allowed, checkpoints.draft)
        return skipped

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


class Checkpoints:
    """Saves and restores the state of a pass over images, each rank in a folder of its own.

    Args:
        seconds: interval between saves; 0: after each batch.
    """

    def __init__(self, draft: Draft | None, seconds: float) -> None:
        self.draft = draft
        folder = None if draft is None else draft.path / "states" / f"rank-{distributed.rank()}"
        self.states = states.States(folder, "" if draft is None else draft.request, prefix="images")
        self.seconds = self.pause = seconds
        self.share = range(0)
        """The positions of this rank's images in the set."""
        self.done = 0
        """The images before it are in the newest state."""
        self.has_state = False
        self.saved = time.monotonic()

    def resume(self, run: Resumable, share: range, progress: Progress) -> int:
        """Restore the newest usable state; return the position to continue from. Every rank calls it, with the
        positions of its images."""
        self.share, self.done = share, share.start
        path, problems = self.states.newest()
        if path is not None:
            state = states.read(path)
            if state.values["made_by"] != self.made_by():
                reason = difference(state.values["made_by"], self.made_by())
                problems = [f"{path.name}: saved by another run ({reason})"]
                path = None
            else:
                run.load_state(unpack(state.values["content"], {**state.parts["once"], **state.parts["state"]}))
                self.done, self.has_state = share.start + state.step, True
        if path is None and problems:
            self.states.discard()
            problems = [f"{problems[0]}; no other state can be used, the pass starts from the beginning"]
        ranks = distributed.gather_objects((problems, self.done - share.start))
        for problem in dict.fromkeys(problem for found, _ in ranks for problem in found):
            progress.message(problem)
        if count := sum(count for _, count in ranks):
            progress.message(f"resuming after {counted(count, 'images')}")
        self.saved = time.monotonic()
        return self.done

    def save_if_due(self, run: Resumable, done: int) -> None:
        """Save the state after the images up to `done`, if it is time."""
        if time.monotonic() - self.saved >= self.pause:
            self.save(run, done)

    def save_last(self, run: Resumable, done: int) -> None:
        """Save the final state if any state was saved before, so that a resume does not repeat the last images."""
        if self.has_state and self.done != done:
            self.save(run, done)

    def save(self, run: Resumable, done: int) -> None:
        """Write the state.

        Raises:
            ArtifactError: it cannot be written (disk full or read-only).
        """
        began = time.monotonic()
        content, tensors, unchanging = pack(run.state())
        once = {name: tensors.pop(name) for name in unchanging}
        values = {"made_by": self.made_by(), "content": content}
        self.states.save(
            done - self.share.start, {"state": tensors, "once": once}, values, unchanging={"once": unchanging}
        )
        self.has_state, self.done, self.saved = True, done, time.monotonic()
        self.pause = max(self.seconds, min((self.saved - began) / MAX_SHARE, self.seconds * MAX_PAUSE))

    def made_by(self) -> dict[str, Any]:
        """What must be equal for a state to be resumed, besides the request."""
        share = [self.share.start, self.share.stop]  # it depends on the batch size, which the request does not have
        run = {"format": FORMAT, "ranks": distributed.world_size(), "share": share}
        return {**run, **versions(("vqpipe", "torch"))}


def description(autoencoder: Autoencoder, size: tuple[int, int] | None) -> dict[str, Any]:
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


def check_size(autoencoder: Autoencoder, config: EvalConfig) -> None:
    """Raise a DataError if the autoencoder cannot take images of `eval.image_size`. Square sizes must be multiples of
    the downsample factor; other sizes are padded and cropped back."""
    size = parse_size(config.image_size)
    if size is not None:
        factor = autoencoder.downsample_factor
        height, width = size if size[0] == size[1] else (-(-side // factor) * factor for side in size)
        autoencoder.check_size(height, width)
