"""KID, precision and recall and Inception Score beside their formulas; the limit on kept features."""

import pytest
import torch

from vqpipe.metrics import set_metrics
from vqpipe.metrics.set_metrics import KeptFeatures, inception_score, kid, precision_recall, too_few


def test_kid_of_one_draw_of_everything_is_the_unbiased_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "KID_SUBSET_SIZE", 50)
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 8, generator=random), torch.randn(50, 8, generator=random) + 0.5

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.double() @ y.double().T / 8 + 1) ** 3

    off_diagonal = ~torch.eye(50, dtype=torch.bool)
    expected = kernel(a, a)[off_diagonal].mean() + kernel(b, b)[off_diagonal].mean() - 2 * kernel(a, b).mean()
    found = kid(a, b)
    assert found["mean"] == pytest.approx(float(expected), rel=1e-4)
    assert found["std"] == pytest.approx(0, abs=1e-5)


def test_precision_and_recall_by_hand() -> None:
    originals = torch.arange(10.0).view(-1, 1)
    reconstructions = torch.cat([torch.arange(8.0), torch.tensor([100.0, 200.0])]).view(-1, 1) + 0.1
    found = precision_recall(reconstructions, originals)
    assert found == {"precision": pytest.approx(0.8), "recall": 1.0, "k": 3}


def test_inception_score_of_sure_and_even_classes_is_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "SPLITS", 1)
    logits = 100 * torch.eye(4).repeat(5, 1)
    assert inception_score(logits)["mean"] == pytest.approx(4.0)
    assert inception_score(torch.zeros(20, 4))["mean"] == pytest.approx(1.0)


def test_kept_features_end_at_their_limit() -> None:
    kept = KeptFeatures(most_bytes=4 * 6)
    kept.update(torch.ones(2, 3))
    merged = kept.merged()
    assert merged is not None
    assert torch.equal(merged, torch.ones(2, 3))
    kept.update(torch.ones(1, 3))
    assert kept.merged() is None
    assert kept.rows == []


def test_one_overflown_rank_leaves_all_without(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptFeatures(most_bytes=100)
    kept.update(torch.ones(2, 3))
    monkeypatch.setattr(set_metrics.distributed, "gather_objects", lambda value: [value, None])
    assert kept.merged() is None


def test_too_few_images_have_a_reason() -> None:
    assert too_few("kid", 999) == "999 images are fewer than the 1000 it needs. Use more images."
    assert too_few("kid", 1000) is too_few("prc", 4) is too_few("is", 10) is None
