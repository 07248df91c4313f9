"""Skipped steps: running statistics are restored, and too many in a row end the run."""

from typing import Any

import pytest
import torch
from torch import nn

from vqpipe.errors import NumericError
from vqpipe.training.nonfinite import BatchNormStatistics, NonfiniteSteps


def test_running_statistics_of_a_skipped_step_are_restored() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2))
    statistics = BatchNormStatistics(network)
    statistics.remember()
    network(torch.randn(4, 3, 5, 5))
    statistics.restore(torch.tensor(False))
    moved = [tensor.clone() for tensor in statistics.tensors()]
    assert len(moved) == 4
    assert not torch.equal(moved[0], torch.zeros(3))
    statistics.remember()
    network(torch.full((4, 3, 5, 5), torch.nan))
    assert not torch.isfinite(statistics.tensors()[0]).any()
    statistics.restore(torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(statistics.tensors(), moved, strict=True))


def test_only_skipped_steps_in_a_row_end_a_run() -> None:
    state: Any = type("State", (), {"nonfinite_steps": 0, "nonfinite_in_a_row": 0})()
    skipped_steps: list[int] = []
    nonfinite = NonfiniteSteps(state, 2, lambda step, keys: skipped_steps.append(step))
    for step, skipped in enumerate([True, False, True, False, False, True]):
        nonfinite.add(step, torch.tensor(skipped), ["a"])
    assert skipped_steps == [0, 2, 5]
    assert state.nonfinite_steps == 3
    with pytest.raises(NumericError, match=r"2 steps in a row .* step 6, images b, c\. .*another --out"):
        nonfinite.add(6, torch.tensor(True), ["b", "c"])
