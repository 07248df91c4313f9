"""KID, precision and recall and Inception Score against their formulas; the limit on kept features."""

import numpy as np
import pytest
import torch

from vqpipe.metrics import set_metrics
from vqpipe.metrics.set_metrics import FeatureBank, inception_score, kid, precision_recall, too_few


def test_kid_of_one_draw_of_all_images_is_the_unbiased_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_precision_and_recall_of_a_small_example() -> None:
    originals = torch.arange(10.0).view(-1, 1)
    reconstructions = torch.cat([torch.arange(8.0), torch.tensor([100.0, 200.0])]).view(-1, 1) + 0.1
    found = precision_recall(reconstructions, originals)
    assert found == {"precision": pytest.approx(0.8), "recall": 1.0, "k": 3}


def test_inception_score_of_certain_balanced_classes_is_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "SPLITS", 1)
    logits = 100 * torch.eye(4).repeat(5, 1)
    assert inception_score(logits)["mean"] == pytest.approx(4.0)
    assert inception_score(torch.zeros(20, 4))["mean"] == pytest.approx(1.0)


def test_inception_score_is_over_ten_splits_of_shuffled_images() -> None:
    logits = 3 * torch.eye(4, dtype=torch.float64).repeat_interleave(10, dim=0)  # sorted by class
    shares = torch.softmax(logits, 1).numpy()[np.random.RandomState(2020).permutation(40)].reshape(10, 4, 4)
    divergences = (shares * np.log(shares / shares.mean(1, keepdims=True))).sum(2).mean(1)
    scores = np.exp(divergences)
    expected = {"mean": pytest.approx(scores.mean()), "std": pytest.approx(scores.std()), "splits": 10}
    assert inception_score(logits) == expected


def test_features_are_kept_up_to_the_limit() -> None:
    kept = FeatureBank(max_bytes=4 * 6)
    kept.update(torch.ones(2, 3))
    features = kept.compute()
    assert features is not None
    assert torch.equal(features, torch.ones(2, 3))
    kept.update(torch.ones(1, 3))
    assert kept.compute() is None
    assert (kept.chunks.parts, kept.recent) == ([], [])


def test_kept_features_are_joined_to_chunks_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "CHUNK_BYTES", 4 * 3 * 4)
    kept = FeatureBank(max_bytes=1e6)
    rows = torch.arange(33.0).view(11, 3)
    for part in rows.split(2):
        kept.update(part)
    assert [len(chunk) for chunk in kept.chunks.parts] == [4, 4]
    features = kept.compute()
    assert features is not None
    assert torch.equal(features, rows)


def test_features_are_dropped_on_all_ranks_if_one_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = FeatureBank(max_bytes=100)
    kept.update(torch.ones(2, 3))
    monkeypatch.setattr(set_metrics.distributed, "gather_objects", lambda value: [value, True])
    assert kept.compute() is None


def test_too_few_images_give_a_reason() -> None:
    assert too_few("kid", 999) == "999 images are fewer than the 1000 it needs. Use more images."
    assert too_few("kid", 1000) is too_few("prc", 4) is too_few("is", 10) is None
