"""The images of some classes, drawn at random (VQGAN-LC, Figure 5: 100 categories of ImageNet)."""

from typing import Any

import numpy as np
import torch

from vqpipe.data.images import ImageSet, SelectedImages
from vqpipe.data.sources import NO_LABEL
from vqpipe.errors import DataError


def draw_classes(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, dict[str, Any]]:
    """The images of `count` of the classes that have images, in their order, and for `metrics.json` the classes drawn,
    by name where they have one.

    Raises:
        DataError: no image has a class, or there are fewer classes.
    """
    present = np.unique(images.labels[images.labels != NO_LABEL])
    if not len(present):
        raise DataError(
            f"--random-classes {count}: the images of {images.name} have no classes"
            + (f" ({images.unlabeled})" if images.unlabeled else ""),
            "Give a folder with a subfolder for each class, or tars with labels",
        )
    if count > len(present):
        raise DataError(f"--random-classes {count}: {images.name} has {len(present)} classes", "Draw at most that many")
    order = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))
    classes = np.sort(present[order[:count].numpy()])
    names = [images.class_names[label] if images.class_names else int(label) for label in classes]
    chosen = SelectedImages(images, np.flatnonzero(np.isin(images.labels, classes)))
    return chosen, {"classes": names, "num_classes": len(present), "seed": seed}
