"""Metrics that need the features of all images at once: KID, precision and recall, Inception Score, by torch-fidelity.

Unlike a mean and a covariance, features grow with the number of images: 8 KiB an image for 2,048 of them, on each side.
They stay in memory, float32, up to a stated limit; beyond it the metric is left out with its reason.

Letters: n images, D features.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.metrics.state import Accumulator, Rows, State

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""torch-fidelity's defaults, of Binkowski et al. 2018: the mean over 100 draws of 1,000 images from each side."""
NEIGHBOURS = 3
"""k of precision and recall (Kynkaanniemi et al. 2019), as in the ADM suite."""
SPLITS = 10
"""Parts of the Inception Score, after a shuffle by a fixed seed; the ADM suite takes 5,000 images each, in order."""
SEED = 2020
PRC_BATCH = 2000
"""Rows of the n x n distances at a time: 400 MB at 50,000 images."""
KEPT = {"kid": "pool", "prc": "pool", "is": "logits"}
"""Metric -> the output of Inception that it keeps of every image."""


class KeptFeatures(Accumulator):
    """float32[n, D] gathered batch by batch, up to `most_bytes`; past that nothing is kept, and `overflown` says so."""

    accumulates: ClassVar[tuple[str, ...]] = ("bytes", "overflown")

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes = most_bytes
        self.rows: list[Tensor] = []
        self.bytes = 0
        self.overflown = False

    def update(self, features: Tensor) -> None:
        """Take in float[B, D]."""
        self.bytes += features.numel() * 4
        self.overflown = self.overflown or self.bytes > self.most_bytes
        if self.overflown:
            self.rows.clear()
        else:
            self.rows.append(features.float().cpu())

    def state(self) -> State:
        return super().state() | {"rows": Rows(self.rows)}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.rows = [] if self.overflown else state["rows"].parts

    def merged(self) -> Tensor | None:
        """float32[n, D] of all ranks in rank order, on rank 0 (elsewhere nothing); None where there were too many."""
        parts = distributed.gather_objects(None if self.overflown else len(self.rows))
        if None in parts:
            return None
        mine = torch.cat(self.rows).numpy() if self.rows else None
        gathered = [torch.from_numpy(part) for part in distributed.gather_objects(mine) if part is not None]
        return torch.cat(gathered) if distributed.is_main() and gathered else torch.zeros(0, 1)


def kid(reconstructions: Tensor, originals: Tensor) -> dict[str, float]:
    """Kernel Inception Distance of two float32[n, D], polynomial kernel of degree 3: mean and deviation over draws."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        reconstructions,
        originals,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=KID_SUBSET_SIZE,
        rng_seed=SEED,
        verbose=False,
    )
    return {"mean": found[KEY_METRIC_KID_MEAN], "std": found[KEY_METRIC_KID_STD], "subset_size": KID_SUBSET_SIZE}


def precision_recall(reconstructions: Tensor, originals: Tensor) -> dict[str, float]:
    """Shares of each set that lie within the other's balls to the third neighbour: two float32[n, D]."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        reconstructions,
        originals,
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=PRC_BATCH,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL], "k": NEIGHBOURS}


def inception_score(logits: Tensor) -> dict[str, float]:
    """Of float32[n, 1008]: mean and deviation over the splits (Salimans et al. 2016)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return {"mean": found[KEY_METRIC_ISC_MEAN], "std": found[KEY_METRIC_ISC_STD], "splits": SPLITS}


def too_few(metric: str, num_images: int) -> str | None:
    """Why so many images are not enough, or None."""
    least = {"kid": KID_SUBSET_SIZE, "prc": NEIGHBOURS + 1, "is": SPLITS}[metric]
    return None if num_images >= least else f"{num_images} images are fewer than the {least} it needs. Use more images."


def on_main(compute: Any, *features: Tensor) -> Any:
    """`compute(*features)` on rank 0, its result on every rank."""
    return distributed.broadcast_object(compute(*features) if distributed.is_main() else None)
