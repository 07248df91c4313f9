import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from vqpipe import distributed
from vqpipe.config import to_request
from vqpipe.errors import ConfigError
from vqpipe.training import optim
from vqpipe.training.config import TrainConfig
from vqpipe.training.optim import WeightEma, finite_step, learning_rate, make_optimizer, set_learning_rate


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "end"),
    [
        ("constant", 2.0, 2.0, 2.0),
        ("linear", 0.5 + 1.5 * 0.75, 1.25, 0.5),
        ("cosine", 0.5 + 1.5 * 0.5 * (1 + math.cos(0.25 * math.pi)), 1.25, 0.5),
    ],
)
def test_learning_rate_warms_up_then_follows_its_schedule(
    schedule: Any, quarter: float, half: float, end: float
) -> None:
    config = TrainConfig(schedule=schedule, steps=110, warmup_steps=10, learning_rate=2.0, min_learning_rate=0.5)
    rates = [learning_rate(step, config) for step in (0, 5, 10, 35, 60, 110, 200)]
    assert rates == pytest.approx([0, 1, 2, quarter, half, end, end])


def test_a_constant_schedule_equals_a_cosine_between_equal_rates() -> None:
    """Presets wrote it that way before `schedule` was a setting."""
    constant = TrainConfig(schedule="constant", steps=97, warmup_steps=13, learning_rate=5.76e-4)
    cosine = dataclasses.replace(constant, schedule="cosine", min_learning_rate=5.76e-4)
    assert [learning_rate(step, constant) for step in range(98)] == [learning_rate(step, cosine) for step in range(98)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_rises_is_refused(schedule: Any) -> None:
    TrainConfig(schedule="constant", learning_rate=1e-4, min_learning_rate=1e-3)
    with pytest.raises(
        ConfigError, match=r"min_learning_rate = 0\.001 is more than .* = 0\.0001\. .*schedule=constant"
    ):
        TrainConfig(schedule=schedule, learning_rate=1e-4, min_learning_rate=1e-3)


def test_the_default_schedule_is_not_part_of_a_request() -> None:
    assert "schedule" not in to_request(TrainConfig())
    assert to_request(TrainConfig(schedule="linear"))["schedule"] == "linear"


def test_weight_ema_averages_weights_and_copies_buffers() -> None:
    network = nn.BatchNorm1d(2)
    average = WeightEma(network, 0.75)
    with torch.no_grad():
        network.weight.fill_(5.0)
        network.running_mean.fill_(3.0)  # type: ignore[union-attr]
    average.update(step=10_000)
    assert torch.allclose(average.network.weight, torch.full((2,), 1 + 0.25 * 4))
    assert torch.equal(average.network.running_mean, torch.full((2,), 3.0))  # type: ignore[arg-type]
    early = WeightEma(nn.Linear(1, 1), 0.999)
    with torch.no_grad():
        before = early.network.weight.clone()
        early.source.weight.add_(10.0)
    early.update(step=0)  # decay 1 / 10, not 0.999
    assert torch.allclose(early.network.weight, before + 9.0)


def test_weight_ema_without_decay_is_the_network() -> None:
    network = nn.Linear(1, 1)
    assert WeightEma(network, 0.0).network is network


def test_biases_and_norms_do_not_decay_and_the_quantizer_has_its_own_learning_rate() -> None:
    network, codes = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), nn.Parameter(torch.ones(5, 2))
    config = TrainConfig(optimizer="adamw", weight_decay=0.05)
    groups = make_optimizer(config, list(network.parameters()), [codes], 20.0).param_groups
    found = {(group["rate"], group["weight_decay"]): [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found == {(1.0, 0.05): [(4, 3, 1, 1)], (1.0, 0.0): [(4,), (4,), (4,)], (20.0, 0.05): [(5, 2)]}


def test_weight_ema_copies_running_statistics_in_every_step() -> None:
    network = nn.BatchNorm2d(3)
    average = WeightEma(network, 0.9)
    for step in range(3):
        network(torch.randn(4, 3, 5, 5) + step)
        average.update(step)
        assert torch.equal(average.network.running_mean, network.running_mean)
        assert torch.equal(average.network.running_var, network.running_var)


def test_weight_ema_copies_a_large_buffer_whenever_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "COPY_ALWAYS", 3)
    network = nn.Linear(1, 1)
    network.register_buffer("codes", torch.zeros(10))
    average = WeightEma(network, 0.9)
    for step, value in enumerate((1.0, 1.0, 2.0)):
        if not (network.codes == value).all():
            network.codes.fill_(value)
        average.update(step)
        assert torch.equal(average.network.codes, network.codes)


@pytest.mark.parametrize(("name", "kind"), [("adam", Adam), ("adamw", AdamW)])
def test_optimizer_has_its_settings(name: Any, kind: type[Optimizer]) -> None:
    config = TrainConfig(optimizer=name, betas=(0.7, 0.8), eps=1e-3)
    optimizer = make_optimizer(config, [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))])
    assert type(optimizer) is kind
    assert [(group["betas"], group["eps"]) for group in optimizer.param_groups] == 2 * [((0.7, 0.8), 1e-3)]


def test_learning_rate_of_a_group_is_multiplied_by_its_own_rate() -> None:
    optimizer = make_optimizer(TrainConfig(), [nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(2))], 20.0)
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.2])


@pytest.mark.parametrize(("clip_norm", "after"), [(1.5, 1.5), (0.0, 6.0)])
def test_gradients_are_clipped_and_their_norm_is_that_before(clip_norm: float, after: float) -> None:
    weight, config = nn.Parameter(torch.zeros(2, 2)), TrainConfig(clip_norm=clip_norm)
    optimizer = make_optimizer(config, [weight])
    weight.grad = torch.full((2, 2), 3.0)
    norm, skipped = finite_step(optimizer, config)
    assert (norm.item(), skipped.item()) == (6.0, False)
    assert weight.grad.norm().item() == pytest.approx(after, rel=1e-5)
    assert weight.any()


def test_step_is_skipped_where_the_gradient_of_another_rank_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda flag: flag + 1)
    weight, config = nn.Parameter(torch.zeros(2, 2)), TrainConfig()
    optimizer = make_optimizer(config, [weight])
    weight.grad = torch.ones(2, 2)
    _, skipped = finite_step(optimizer, config)
    assert skipped
    assert not weight.any()
