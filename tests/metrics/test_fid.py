"""The Frechet distance beside its closed form, and Inception weights read from a file the test writes."""

from pathlib import Path

import pytest
import torch

from vqpipe.errors import NumericError, WeightsError
from vqpipe.metrics.fid import INCEPTION_FILE, FrechetStatistics, InceptionFeatures, frechet_distance


def statistics(features: torch.Tensor, batches: int = 1) -> FrechetStatistics:
    gathered = FrechetStatistics(features.shape[1])
    for part in features.tensor_split(batches):
        gathered.update(part)
    return gathered


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n samples whose sample mean and covariance are exactly those given."""
    draws = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws = draws - draws.mean(0)
    whitened = draws @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(draws.T))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_gaussians_with_one_basis_have_the_textbook_distance() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    variances_a, variances_b = torch.tensor([[4.0, 1, 9, 0.25, 1, 2], [1.0, 1, 4, 1, 16, 2]]).double()
    mean_a, mean_b = torch.zeros(6).double(), torch.arange(6).double()
    a = with_moments(mean_a, basis @ torch.diag(variances_a) @ basis.T, n=50, seed=2)
    b = with_moments(mean_b, basis @ torch.diag(variances_b) @ basis.T, n=70, seed=3)
    expected = 55 + (variances_a.sqrt() - variances_b.sqrt()).square().sum().item()
    assert frechet_distance(statistics(a, batches=4), statistics(b)) == pytest.approx(expected, rel=1e-10)


def test_gaussians_with_two_bases_agree_with_scipy() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    random = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 200, 8, dtype=torch.float64, generator=random) @ torch.randn(
        2, 8, 8, dtype=torch.float64, generator=random
    )
    root = scipy_linalg.sqrtm(torch.cov(a.T).numpy() @ torch.cov(b.T).numpy())
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(
        float(expected - 2 * root.real.trace()), rel=1e-8
    )


def test_a_set_is_at_distance_zero_from_itself_even_with_fewer_images_than_features() -> None:
    few = torch.rand(10, 64, generator=torch.Generator().manual_seed(5)) * 3
    assert frechet_distance(statistics(few), statistics(few, batches=3)) < 1e-6


def test_nan_features_are_refused() -> None:
    with pytest.raises(NumericError):
        FrechetStatistics(2).update(torch.tensor([[0.0, float("nan")]]))


def test_inception_is_read_from_a_file_and_gives_2048_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        random_network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path / INCEPTION_FILE
    torch.save(random_network.state_dict(), file)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = InceptionFeatures(file)(images)
    assert features.shape == (2, 2048)
    assert torch.equal(features, random_network(images)[0])


def test_a_file_that_is_no_inception_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(WeightsError, match="does not fit FID's Inception"):
        InceptionFeatures(other)
    (tmp_path / "text.pth").write_text("<html>not found</html>", encoding="utf-8")
    with pytest.raises(WeightsError):
        InceptionFeatures(tmp_path / "text.pth")
