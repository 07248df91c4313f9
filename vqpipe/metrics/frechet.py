"""The Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), from streaming float64 sums.

With Inception's features (`inception.py`) it is FID, and between reconstructions and originals rFID. With the features
of another network it is named after that network.

Shapes: B images, D features.
"""

from typing import ClassVar

import torch
from torch import Tensor

from vqpipe.errors import DataError, NumericError
from vqpipe.metrics.resumable import Resumable


class Moments(Resumable):
    """Mean and covariance of features, as float64 sums; memory D x D for any number of images."""

    state_names: ClassVar[tuple[str, ...]] = ("count", "sum", "outer")

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Accumulate float[B, D].

        Raises:
            NumericError: NaN or infinity among the features.
        """
        if not bool(torch.isfinite(features).all()):
            raise NumericError("the feature network returned NaN or infinity", "Check its weights")
        wide = features.to(self.sum.device, torch.float64)
        self.count += len(wide)
        self.sum += wide.sum(0)
        self.outer += wide.T @ wide

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """float64[D] and the sample covariance float64[D, D] of this rank.

        Raises:
            DataError: fewer than two images.
        """
        count = int(self.count)
        if count < 2:
            raise DataError(f"a covariance needs at least 2 images, got {count}")
        mean = self.sum / count
        return mean, (self.outer - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^1/2), the squared Wasserstein-2 distance between two Gaussians.

    Tr (A B)^1/2 is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2. That matrix is symmetric, so a
    covariance of too few images causes no imaginary parts.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave a tiny negative number for equal sets
