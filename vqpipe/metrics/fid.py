"""The Frechet Inception distance between reconstructions and the very crops they were made from (rFID).

Protocol "adm": uint8 images of any size through torch-fidelity's Inception-v3, whose weights and TF1 bilinear resize
are those of the 2015 graph that the ADM evaluation suite runs (Dhariwal & Nichol 2021), last pooling layer, 2,048
features. Mean and covariance come from streaming float64 sums, the distance from Heusel et al. 2017, eq. 6.

Letters: B images, D features.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from vqpipe.distributed import all_reduce_sum
from vqpipe.errors import DataError, NumericError, WeightsError
from vqpipe.weights import load_tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
NUM_FEATURES = 2048


class FrechetStatistics:
    """Mean and covariance of features, as float64 sums; memory D x D whatever the number of images."""

    def __init__(self, num_features: int = NUM_FEATURES, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Take in float[B, D].

        Raises:
            NumericError: NaN or infinity among the features.
        """
        if not bool(torch.isfinite(features).all()):
            raise NumericError("the feature network returned NaN or infinity", "Check its weights")
        wide = features.double()
        self.count += len(wide)
        self.sum += wide.sum(0)
        self.outer += wide.T @ wide

    def merged(self) -> "FrechetStatistics":
        """The sum over all ranks (a new object)."""
        whole = FrechetStatistics(len(self.sum), self.sum.device)
        for total, mine in ((whole.count, self.count), (whole.sum, self.sum), (whole.outer, self.outer)):
            all_reduce_sum(total.copy_(mine))
        return whole

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """float64[D] and the sample covariance float64[D, D].

        Raises:
            DataError: fewer than two images.
        """
        count = int(self.count)
        if count < 2:
            raise DataError(f"a covariance needs at least 2 images, got {count}")
        mean = self.sum / count
        return mean, (self.outer - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^1/2), the squared Wasserstein-2 distance between two Gaussians.

    Tr (A B)^1/2 is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2: symmetric, so a covariance of too
    few images gives no imaginary parts to drop.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave a tiny negative number for equal sets


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception-v3 up to its last pooling: uint8[B, 3, H, W] -> float32[B, 2048].

    Raises:
        WeightsError: `weights` is not the state dict that torch-fidelity publishes.
    """

    def __init__(self, weights: Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        load_tensors(weights)  # the library unpickles without restraint; after this the file is known to hold tensors
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except (RuntimeError, AttributeError, TypeError) as error:
            raise WeightsError(
                f"{weights} does not fit FID's Inception: {str(error).splitlines()[0]}", f"Fetch {INCEPTION_SOURCE}"
            ) from None

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[0]
        return features
