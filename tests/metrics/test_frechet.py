"""The Frechet distance against its closed form, scipy and torch-fidelity."""

import pytest
import torch

from vqpipe.errors import DataError, NumericError
from vqpipe.metrics import resumable
from vqpipe.metrics.frechet import Moments, frechet_distance


def statistics(features: torch.Tensor, batches: int = 1) -> Moments:
    gathered = Moments(features.shape[1])
    for part in features.tensor_split(batches):
        gathered.update(part)
    return gathered


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n samples whose sample mean and covariance are exactly those given."""
    draws = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws = draws - draws.mean(0)
    whitened = draws @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(draws.T))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_distance_of_gaussians_with_one_basis_is_the_closed_form() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    variances_a, variances_b = torch.tensor([[4.0, 1, 9, 0.25, 1, 2], [1.0, 1, 4, 1, 16, 2]]).double()
    mean_a, mean_b = torch.zeros(6).double(), torch.arange(6).double()
    a = with_moments(mean_a, basis @ torch.diag(variances_a) @ basis.T, n=50, seed=2)
    b = with_moments(mean_b, basis @ torch.diag(variances_b) @ basis.T, n=70, seed=3)
    expected = 55 + (variances_a.sqrt() - variances_b.sqrt()).square().sum().item()
    assert frechet_distance(statistics(a, batches=4), statistics(b)) == pytest.approx(expected, rel=1e-10)


def test_distance_of_gaussians_with_two_bases_agrees_with_scipy() -> None:
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


def test_distance_of_a_set_to_itself_is_zero_even_with_fewer_images_than_features() -> None:
    few = torch.rand(10, 64, generator=torch.Generator().manual_seed(5)) * 3
    assert frechet_distance(statistics(few), statistics(few, batches=3)) < 1e-6


def test_nan_features_raise() -> None:
    with pytest.raises(NumericError):
        Moments(2).update(torch.tensor([[0.0, float("nan")]]))


def test_distance_equals_torch_fidelity_on_the_same_features() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    random = torch.Generator().manual_seed(6)
    a, b = torch.randn(2, 300, 24, generator=random, dtype=torch.float64) * torch.linspace(0.5, 3, 24)
    b = b + 0.2
    found = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(
        found["frechet_inception_distance"], rel=1e-8
    )


def test_compute_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    mine, theirs = statistics(features[:11]), statistics(features[11:])
    others = iter([theirs.count, theirs.sum, theirs.outer])
    monkeypatch.setattr(resumable, "all_reduce_sum", lambda tensor: tensor.add_(next(others)))
    mean, covariance = mine.merged().mean_and_covariance()
    torch.testing.assert_close(mean, features.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, torch.cov(features.T), rtol=1e-12, atol=1e-12)
    assert int(mine.count) == 11


def test_covariance_of_one_image_raises() -> None:
    with pytest.raises(DataError, match="at least 2"):
        statistics(torch.zeros(1, 2)).mean_and_covariance()
