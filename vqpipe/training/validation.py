"""Held-out images during training: measured as `vqpipe eval` does, and the weights that did best on them."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet
from vqpipe.data.transforms import to_float, to_uint8
from vqpipe.errors import DataError
from vqpipe.files import flush_to_disk
from vqpipe.metrics import EvalConfig
from vqpipe.metrics.evaluation import Evaluation
from vqpipe.metrics.networks import FeatureNetworks
from vqpipe.models.autoencoder import Autoencoder
from vqpipe.tokenizer import save_weights
from vqpipe.training.history import Row

PSNR_LOST = 3.0
"""dB below the best, from which on a run is said to have fallen: twice the squared error."""
LPIPS_GROWN = 1.5
"""times the best, likewise."""


@dataclass(frozen=True)
class Validated:
    """One look at the held-out images."""

    row: Row
    """`valid/images`, `valid/psnr` (dB), `valid/ssim`, `valid/utilization`, `valid/perplexity` (mean over groups), and
    `valid/lpips_*` where a run is trained with LPIPS; the conventions are those of `metrics.json`."""
    counts: Tensor
    """int64[G, K]: how often each code was chosen, over all ranks."""


class Validation:
    """Measures an autoencoder on the first `limit` of the held-out images, centre crops, each rank its own share.

    Args:
        images: the held-out set.
        image_size: side of the crops, pixels.
        batch_size: images reconstructed together; what a training step passes at once fits, and is compiled for.
        limit: how many images, over all ranks.
        perceptual: LPIPS networks by key, as in `Distortion`.
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
    ) -> None:
        self.networks = FeatureNetworks(perceptual, None, {}, {})
        self.config = EvalConfig(image_size=image_size, batch_size=batch_size, prefixes=False)
        self.device = device
        rank, ranks, stop = distributed.rank(), distributed.world_size(), min(limit, len(images))
        self.batches = OrderedBatches(
            images,
            image_size=image_size,
            batch_size=self.config.batch_size,
            start=stop * rank // ranks,
            stop=stop * (rank + 1) // ranks,
            num_workers=num_workers,
        )

    @torch.no_grad()
    def measure(self, network: Autoencoder) -> Validated:
        """All ranks call it. Images that cannot be read are left out, and `valid/images` says how many were not.

        Raises:
            DataError: none can be read.
        """
        quantizer = network.quantizer
        evaluation = Evaluation(self.config, self.networks, quantizer.codebook_size, quantizer.num_groups, self.device)
        network.eval()
        for batch in self.batches:
            originals = batch.images.to(self.device)
            ids = network.encode(to_float(originals)).ids
            size = originals.shape[-1] // network.downsample_factor
            codes = quantizer.lookup(ids, quantizer.layout(size, size))  # by way of the ids, as a tokenizer is used
            evaluation.update(originals, to_uint8(network.decode(codes)), ids)
        if not evaluation.sizes_of_all().num_images:
            raise DataError("none of the validation images can be read", "Check --validation")
        result = evaluation.result()
        groups = result["perplexity_per_group"]
        names = ("psnr", "ssim", *self.networks.perceptual)
        row: Row = {
            "valid/images": result["num_images"],
            **{f"valid/{name}": result[name] for name in names if name in result},
            "valid/utilization": result["utilization"],
            "valid/perplexity": sum(groups) / len(groups),
        }
        return Validated(row, evaluation.counts.cpu())


class Best:
    """`best.safetensors` of a run: the weights that did best so far, and in the same file at which step and how well.

    One file, replaced in one rename: a run killed anywhere has the old best or the new one, whole. A resumed run that
    computes the best step again finds it no better than itself.

    Args:
        path: the file.
        measure: what decides, a key of `Validated.row`.
        higher: whether more of it is better.
    """

    def __init__(self, path: Path, measure: str, *, higher: bool) -> None:
        self.path, self.measure, self.higher = path, measure, higher
        self.step: int | None = None
        self.value = math.nan
        if path.is_file():
            with safe_open(path, "pt") as file:
                notes = file.metadata()
            self.step, self.value = int(notes["step"]), float(notes[measure])

    def fallen(self, row: Row) -> bool:
        """Whether `row` is so much worse than the best that the run may have collapsed."""
        value = row.get(self.measure, math.nan)
        return value < self.value - PSNR_LOST if self.higher else value > self.value * LPIPS_GROWN

    def offer(self, network: nn.Module, step: int, row: Row) -> bool:
        """Keep the weights (rank 0 writes) where they did better than any before; whether they did, on all ranks."""
        value = row.get(self.measure, math.inf if self.higher else math.nan)  # no PSNR: not a pixel was wrong
        better = value > self.value if self.higher else value < self.value
        if math.isnan(value) or not (better or self.step is None):
            return False
        self.step, self.value = step, value
        if distributed.is_main():
            temporary = self.path.with_name(f".writing-{self.path.name}")
            save_weights(network, temporary, {"step": str(step), self.measure: repr(value)})
            flush_to_disk(temporary)
            os.replace(temporary, self.path)
            flush_to_disk(self.path.parent)
        return True
