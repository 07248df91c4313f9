"""How fast steps are, by a clock that the test sets."""

import pytest
import torch

from vqpipe.training import window
from vqpipe.training.running_metrics import RunningMetrics, StepOutput


def test_what_is_no_step_is_left_out_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(window.time, "perf_counter", lambda: now[0])
    measured: RunningMetrics[None] = RunningMetrics(torch.device("cpu"))
    for seconds, apart in ((1.0, True), (2.0, False)):
        now[0] += 3.0
        measured.add(StepOutput({"loss": torch.ones(())}, torch.zeros((), dtype=torch.bool), None))
        with measured.apart(apart):
            now[0] += seconds
        with measured.waiting():
            now[0] += 1.0
    row = measured.row(images_per_step=5)
    assert row["seconds_per_step"] == 5.0  # (3 + 1) + (3 + 2 + 1) seconds, two steps
    assert row["images_per_second"] == 1.0
    assert row["data_wait"] == 0.2
