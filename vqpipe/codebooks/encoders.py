"""Patch encoders: the interface, average pooling, and patch-pca, which needs no pretrained weights.

To add an encoder, subclass `PatchEncoder` (`pretrained.Normalized` for a network with weights) and add its kind to
`features.ENCODERS`.

Shapes: B images, S their side, g the side of the grid of patches, D the dimension of a feature, p the side of a patch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet, SelectedImages
from vqpipe.data.transforms import to_float
from vqpipe.device import reduced_precision
from vqpipe.errors import ConfigError, DataError
from vqpipe.progress import SILENT, Progress

FIT_IMAGES = 1000
"""Maximum number of images that the PCA is fitted on."""
FIT_BATCH = 16
"""Images decoded at a time to fit the PCA."""


class PatchEncoder(nn.Module, ABC):
    """A frozen network from images to one feature per patch.

    Attributes:
        image_size: S.
        grid_size: g.
        dim: D.
        default_pool: side of the grid after average pooling, unless another is given.
        transform: preprocessing of a decoded image to uint8[3, S, S]; None: ADM's center crop.
    """

    image_size: int
    grid_size: int
    dim: int
    default_pool: int
    transform: Callable[[Image.Image], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Of its parameters and buffers; the CPU where it has none."""
        return next((tensor.device for tensor in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """uint8[B, 3, S, S] -> float32[B, D, g, g]."""

    def encode(self, images: Tensor, pool: int, precision: str = "fp32") -> Tensor:
        """uint8[B, 3, S, S] -> float16[B, pool * pool, D], computed in "fp32" or "bf16" and averaged in float32."""
        precision_context = reduced_precision(self, images.device, precision)
        with torch.inference_mode():
            with precision_context:
                features = self(images)
            return pool_features(features.float(), pool).half()


def check_pool(encoder: PatchEncoder, pool: int | None) -> int:
    """Side of the grid after pooling: `pool`, or the encoder's default.

    Raises:
        ConfigError: it is larger than the encoder's grid.
    """
    pool = pool or encoder.default_pool
    if pool > encoder.grid_size:
        raise ConfigError(
            f"a grid of {encoder.grid_size} x {encoder.grid_size} patches cannot be averaged to {pool} x {pool}",
            f"Use --pool {encoder.grid_size} or less",
        )
    return pool


def pool_features(features: Tensor, pool: int) -> Tensor:
    """Average pooling of float32[B, D, g, g] to float32[B, pool * pool, D], row-major.

    This is the "additional average pooling layer" of VQGAN-LC's paper, as `torch.nn.functional.adaptive_avg_pool2d`:
    cell i covers the rows from floor(i * g / pool) to ceil((i + 1) * g / pool), excluded. Where `pool` divides g, the
    cells are squares, as in the released code (16 x 16 CLIP tokens to 4 x 4). Otherwise (7 x 7 or 14 x 14 to 4 x 4)
    neighboring cells overlap.
    """
    side = features.shape[-1]
    # Where the pool divides the grid, both functions give the same averages, but not the same last bits.
    pooled = F.adaptive_avg_pool2d(features, pool) if side % pool else F.avg_pool2d(features, side // pool)
    return pooled.flatten(2).transpose(1, 2)


class PatchPca(PatchEncoder):
    """Whitened principal components of pixel patches, after Coates & Ng 2012 ("Learning feature representations with
    k-means"). It needs no download, so codebooks can be made offline.

    Patches are the p x p x 3 pixels of the grid, in [-1, 1]. Unlike in the paper, their brightness and contrast are not
    normalized, because the codes of a tokenizer must represent them. The projection is one convolution.
    """

    RIDGE = 1e-6
    """Added to each variance, in units of the largest: directions without variance stay near 0."""

    def __init__(self, image_size: int = 256, patch_size: int = 8, components: int = 64) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"patches of {patch_size} pixels do not tile an image of {image_size}",
                f"Set features.image_size to a multiple of {patch_size}, or features.patch_size",
            )
        if not 1 <= components <= 3 * patch_size**2:
            raise ConfigError(
                f"{components} components of patches with {3 * patch_size**2} values",
                f"Set features.components to 1 to {3 * patch_size**2}",
            )
        self.image_size, self.dim = image_size, components
        self.grid_size = self.default_pool = image_size // patch_size
        self.project = nn.Conv2d(3, components, patch_size, stride=patch_size).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(to_float(images))

    def fit(
        self,
        images: ImageSet,
        limit: int | None,
        count: int,
        seed: int,
        *,
        num_workers: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        """Fit the components on about `count` patches of images drawn with `seed` from the first `limit`.

        Unreadable images are skipped.

        Raises:
            DataError: no image can be read, or all patches are equal.
        """
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(min(len(images), limit or len(images)))[:FIT_IMAGES])
        progress.start("fitting patch-pca", len(chosen))
        each = -(-count // len(chosen))
        size = 3 * self.project.kernel_size[0] ** 2
        number, total, products = 0, np.zeros(size), np.zeros((size, size))
        readable = OrderedBatches(
            SelectedImages(images, chosen), image_size=self.image_size, batch_size=FIT_BATCH, num_workers=num_workers
        )
        for batch in readable:
            rows = [random.permutation(self.grid_size**2)[:each] for _ in batch.keys]
            some = to_float(
                torch.cat([image[row] for image, row in zip(self.patches(batch.images), rows, strict=True)])
            ).double()
            number, total = number + len(some), total + some.sum(dim=0).numpy()
            products += (some.T @ some).numpy()  # not NumPy: its threads and PyTorch's would wait for each other
            progress.advance(len(batch.keys))
        if number == 0:
            raise DataError(f"none of {len(chosen)} images of {images.name} can be read", "Check the images")
        mean = total / number
        self.set_components(mean, products / number - np.outer(mean, mean))

    def patches(self, images: Tensor) -> Tensor:
        """uint8[B, 3, S, S] -> uint8[B, g * g, 3 * p * p], row-major."""
        side = self.project.kernel_size[0]
        return images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def set_components(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        """Whiten: eigenvectors of the covariance, each over the root of its variance; largest entry made positive.

        The last bits of LAPACK's eigenvectors may depend on the number of threads: with patches of 16 pixels they do,
        with those of 8 pixels they were the same with one and two.
        """
        variances, vectors = np.linalg.eigh(covariance)
        order = np.argsort(-variances, kind="stable")[: self.dim]
        variances, vectors = variances[order], vectors[:, order]
        if variances[0] <= 0:
            raise DataError("all patches of the images are equal", "Use photographs")
        largest = np.abs(vectors).argmax(axis=0)
        vectors *= np.sign(vectors[largest, np.arange(self.dim)])
        whiten = (vectors / np.sqrt(np.maximum(variances, 0) + self.RIDGE * variances[0])).T
        self.project.weight.copy_(torch.from_numpy(whiten).view_as(self.project.weight))
        bias: Tensor = self.project.bias  # type: ignore[assignment]  # nn.Conv2d has one by default
        bias.copy_(torch.from_numpy(-whiten @ mean))

    def save(self, path: Path) -> None:
        """Write the fitted projection: weight float32[D, 3, p, p], bias float32[D]."""
        save_file({name: tensor.contiguous() for name, tensor in self.project.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        """Load a projection written by `save`."""
        self.project.load_state_dict(load_file(path))
