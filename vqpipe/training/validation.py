"""Validation of a tokenizer during training, and the weights that did best."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet
from vqpipe.data.transforms import to_float, to_uint8
from vqpipe.errors import ArtifactError, DataError
from vqpipe.files import atomic_write, disk_errors
from vqpipe.metrics.distortion import Distortion
from vqpipe.metrics.usage import CodeUsage, usage_of
from vqpipe.models.autoencoder import Autoencoder
from vqpipe.progress import SILENT, Progress
from vqpipe.reports.training import in_words
from vqpipe.training.callbacks import Callback
from vqpipe.training.networks import batch_norms
from vqpipe.training.running_metrics import Row
from vqpipe.weights import save_weights
from vqpipe.words import counted

VALUE = "value"
"""The key of the value in the header of the best weights: not the name of the measure, which follows the file name of
the weights of the perceptual loss."""
PSNR_DROP = 3.0
"""A run may have collapsed if its PSNR is this many dB below the best (3 dB: twice the squared error)."""
LPIPS_RISE = 1.5
"""A run may have collapsed if its LPIPS exceeds the best by this factor."""


class BestWeights:
    """`best.safetensors` of a run: the weights of the best validation so far, with its step and value in the header.

    The file is replaced in one rename: a killed run has the old best or the new one, whole. A resumed run that computes
    the best step again does not replace it.

    Args:
        measure: the number that decides, a key of the validation's row.
    """

    def __init__(self, path: Path, measure: str, *, higher_is_better: bool) -> None:
        self.path, self.measure, self.higher_is_better = path, measure, higher_is_better
        self.step: int | None = None
        self.value = math.nan
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    notes = file.metadata()
                self.step, self.value = int(notes["step"]), float(notes[VALUE])
            except (SafetensorError, KeyError, ValueError, TypeError) as error:
                raise ArtifactError(
                    f"{path} is damaged ({type(error).__name__})",
                    "Delete it: the best is then that of later validations",
                ) from None

    def collapsed(self, row: Row) -> bool:
        """Whether `row` is so much worse than the best that the run may have collapsed."""
        value = row.get(self.measure, math.nan)
        return value < self.value - PSNR_DROP if self.higher_is_better else value > self.value * LPIPS_RISE

    def keep_if_best(self, network: nn.Module, step: int, row: Row) -> bool:
        """Keep the weights (rank 0 writes) if they are the best so far. Returns whether they are, on every rank.

        Raises:
            ArtifactError: they cannot be written (disk full or read-only), raised on every rank.
        """
        # There is no PSNR where every reconstruction equals its original.
        value = row.get(self.measure, math.inf if self.higher_is_better else math.nan)
        better = value > self.value if self.higher_is_better else value < self.value
        if math.isnan(value) or not (better or self.step is None):
            return False
        self.step, self.value = step, value
        distributed.on_main(lambda: self.save(network))
        return True

    def save(self, network: nn.Module) -> None:
        """Write the weights with their step and value."""
        with disk_errors(self.path), atomic_write(self.path) as temporary:
            save_weights(network, temporary, {"step": str(self.step), VALUE: repr(self.value)})


class Validation(Callback):
    """Measures an autoencoder on the first `limit` held-out images, center crops, each rank its own share.

    The conventions are those of `metrics.json`.

    Args:
        image_size: side of the crops, pixels.
        batch_size: images per batch; use that of training, which fits in memory and is already compiled.
        limit: number of images, over all ranks.
        perceptual: LPIPS networks by key, as in `Distortion`.
        best: keeps the best weights.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        image_size: int,
        batch_size: int,
        limit: int,
        perceptual: dict[str, nn.Module],
        num_workers: int,
        device: torch.device,
        best: BestWeights | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.perceptual, self.device, self.best, self.progress = perceptual, device, best, progress
        rank, ranks, stop = distributed.rank(), distributed.world_size(), min(limit, len(images))
        self.batches = OrderedBatches(
            images,
            spans=[range(stop * rank // ranks, stop * (rank + 1) // ranks)],
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.fields: dict[str, Any] = {}

    def on_validate(self, step: int, network: Autoencoder) -> Row:
        row, counts = self.measure(network)
        note = f"On {counted(row['valid/images'], 'held-out images')}, at step {step:,}."
        self.fields = {"counts": counts, "counts_note": note}
        if self.best is not None:
            self.update_best(self.best, network, step, row)
        return row

    def update_best(self, best: BestWeights, network: Autoencoder, step: int, row: Row) -> None:
        """Keep the weights if they are the best, and warn where the run may have collapsed."""
        is_best = best.keep_if_best(network, step, row)
        value = in_words(best.measure, row.get(best.measure, math.inf))
        self.progress.message(f"step {step:,}: {value}" + (", the best so far" if is_best else ""))
        if best.collapsed(row):
            self.progress.message(
                f"far worse than at step {best.step:,} ({in_words(best.measure, best.value)}): the run may have"
                f" collapsed. Check the curves in {best.path.with_name('report.html')}; `--publish best` publishes the"
                " weights of that step"
            )

    @torch.no_grad()
    def measure(self, network: Autoencoder) -> tuple[Row, Tensor]:
        """The numbers of a row, and how often each code was chosen, int64[G, K]; both over all ranks.

        The row has `valid/images` (those that could be read), `valid/psnr` (dB), `valid/ssim`, `valid/utilization`,
        `valid/perplexity` (mean over groups), and `valid/lpips_*` or `valid/perceptual_*` for each perceptual network.
        Every rank calls it.

        Raises:
            DataError: no image can be read.
        """
        quantizer = network.quantizer
        distortion = Distortion(self.perceptual, ("psnr", "ssim"))
        usage = CodeUsage(quantizer.codebook_size, quantizer.num_groups, self.device)
        network.eval()
        for norm in batch_norms(network):  # those that are published: ranks have statistics of their own
            for statistic in norm.buffers():
                distributed.broadcast(statistic)
        for batch in self.batches:
            originals = batch.images.to(self.device)
            ids = network.encode(to_float(originals)).ids
            size = originals.shape[-1] // network.downsample_factor
            codes = quantizer.lookup(ids, quantizer.layout(size, size))  # through the ids, as a tokenizer is used
            distortion.update(originals, to_uint8(network.decode(codes)))
            usage.update(ids)
        whole = distortion.merged()
        if not whole.num_images:
            raise DataError("none of the validation images can be read", "Check --validation")
        counts, means = usage.merged().counts, whole.means()
        codes_in_use = usage_of(counts)
        perplexity = codes_in_use["perplexity_per_group"]
        assert isinstance(perplexity, list)
        row: Row = {
            "valid/images": whole.num_images,
            **{f"valid/{name}": means[name] for name in ("psnr", "ssim", *self.perceptual) if name in means},
            "valid/utilization": codes_in_use["utilization"],
            "valid/perplexity": sum(perplexity) / len(perplexity),
        }
        return row, counts.cpu()

    def report_fields(self) -> Mapping[str, Any]:
        best = {} if self.best is None else {"best_step": self.best.step, "best_measure": self.best.measure}
        return self.fields | best
