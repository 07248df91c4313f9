"""The images of some classes, drawn at random (VQGAN-LC, Figure 5: 100 categories of ImageNet)."""

from typing import Any

import numpy as np
import torch

from vqpipe.data.images import ImageSet, SelectedImages
from vqpipe.data.sources import NO_LABEL
from vqpipe.errors import DataError


class RandomClasses(SelectedImages):
    """The images of some classes of a set, in its order.

    Args:
        classes: int64[n], the labels of these classes, ascending.
        num_classes: how many they were drawn from.
    """

    def __init__(self, images: ImageSet, classes: np.ndarray, num_classes: int, seed: int) -> None:
        super().__init__(images, np.flatnonzero(np.isin(images.labels, classes)))
        self.classes, self.drawn_from, self.seed = classes, num_classes, seed

    def describe(self) -> dict[str, Any]:
        """For `metrics.json`: the classes, by name where they have one."""
        names = [self.class_names[label] if self.class_names else int(label) for label in self.classes]
        return {"classes": names, "num_classes": self.drawn_from, "seed": self.seed}


def draw_classes(images: ImageSet, count: int, seed: int) -> RandomClasses:
    """The images of `count` of the classes that have images.

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
    return RandomClasses(images, np.sort(present[order[:count].numpy()]), len(present), seed)
