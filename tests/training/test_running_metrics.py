"""Speed of steps, by a fake clock."""

import pytest
import torch

from vqpipe.training import running_metrics
from vqpipe.training.running_metrics import RunningMetrics, StepOutput


def test_paused_time_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(running_metrics.time, "perf_counter", lambda: now[0])
    measured: RunningMetrics[None] = RunningMetrics(torch.device("cpu"))
    finite = torch.zeros((), dtype=torch.bool)
    for seconds, paused in ((1.0, True), (2.0, False)):
        now[0] += 3.0
        measured.update(StepOutput({"loss": torch.ones(())}, finite, finite, None))
        with measured.untimed(paused):
            now[0] += seconds
        with measured.waiting():
            now[0] += 1.0
    row = measured.row(images_per_step=5)
    assert row["seconds_per_step"] == 5.0  # (3 + 1) + (3 + 2 + 1) seconds, two steps
    assert row["images_per_second"] == 1.0
    assert row["data_wait"] == 0.2
