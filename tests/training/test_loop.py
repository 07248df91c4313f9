"""The training loop on a tiny tokenizer: it learns, resumes bit for bit, and skips steps without a finite gradient."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages import signals
from vqpipe import distributed
from vqpipe.data.batches import Batch
from vqpipe.errors import ConfigError, NumericError
from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import (
    Autoencoder,
    AutoencoderConfig,
    DcaeConfig,
    DiscriminatorConfig,
    PatchDiscriminator,
    VqganConfig,
    build_autoencoder,
)
from vqpipe.progress import Throttle
from vqpipe.quantizers import EmaConfig, LcConfig, QuantizerConfig, VqConfig
from vqpipe.training.callbacks import Callback
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.loop import seed_step, stop_on_any_rank, train
from vqpipe.training.running_metrics import Row
from vqpipe.training.tokenizer_task import TokenizerTask

STEPS, BATCH = 12, 4
Poison = Callable[[Iterable[int]], None]
QUANTIZERS: dict[str, QuantizerConfig] = {
    "lc": LcConfig(codebook_size=64, feature_dim=16, code_dim=4, codebook_init="uniform"),
    "ema": EmaConfig(codebook_size=64, code_dim=4),
    "vq": VqConfig(codebook_size=64, code_dim=4),
}


class Photographs:
    """Smooth random images; image p of the run is a function of p."""

    def __init__(self, batch: int = BATCH, stall_at: int | None = None) -> None:
        self.batch, self.stall_at = batch, stall_at

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        while True:
            if images_seen == self.stall_at:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(60)
            places = range(images_seen, images_seen + self.batch)
            images = torch.stack([self.picture(place) for place in places])
            yield Batch(images, torch.full((self.batch,), -1), [f"p{place}" for place in places], list(places))
            images_seen += self.batch

    def picture(self, position: int) -> Tensor:
        noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(position))
        return (torch.nn.functional.interpolate(noise, size=16, mode="bilinear")[0] * 255).to(torch.uint8)


SIZES: dict[str, Any] = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 8}
MODELS: dict[str, AutoencoderConfig] = {
    kind: VqganConfig(**SIZES, attention_resolutions=(), quantizer=quantizer) for kind, quantizer in QUANTIZERS.items()
}
MODELS["batch norms"] = DcaeConfig(
    quant_conv="full",
    widths=(8, 8),
    encoder_depths=(0, 1),
    decoder_depths=(0, 1),
    attention_from=2,
    latent_channels=8,
    quantizer=QUANTIZERS["ema"],
)


def networks(kind: str) -> tuple[Autoencoder, PatchDiscriminator]:
    """The model of this kind, and a discriminator."""
    torch.manual_seed(7)
    return build_autoencoder(MODELS[kind]), PatchDiscriminator(DiscriminatorConfig(base_channels=4))


def run(
    folder: Path,
    kind: str = "lc",
    stop_at: int | None = None,
    disc_start: int = 4,
    on_step: Callable[[TrainState], None] = lambda state: None,
    interruptible: Callable[[], AbstractContextManager[object]] = nullcontext,
    stall_at: int | None = None,
    seed: int = 3,
    **settings: object,
) -> "tuple[TrainState, Recorder]":
    model, discriminator = networks(kind)
    weights = {"l1": 1.0, "commitment": 0.1, "codebook": 0.033, "adversarial": 0.1}
    objective = Objective(
        ObjectiveConfig(perceptual="none", disc_start=disc_start, **weights), model.quantizer.loss_names
    )  # type: ignore[arg-type]
    config = TokenizerTrainConfig(
        **{  # type: ignore[arg-type]
            "steps": STEPS,
            "global_batch_size": BATCH,
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "weight_ema": 0.9,
            "log_every": 3,
            "save_every": 5,
            "sample_every": 6,
            **settings,
        }
    )
    recorder = Recorder(on_step)
    state = train(
        TokenizerTask(model, discriminator, objective),
        config,
        Photographs(config.global_batch_size, stall_at),
        folder,
        seed=seed,
        device=torch.device("cpu"),
        callbacks=[recorder],
        stop_requested=lambda: stop_at is not None and recorder.step >= stop_at,
        interruptible=interruptible,
    )
    return state, recorder


class Recorder(Callback):
    """Records the hooks of a run."""

    def __init__(self, on_step: Callable[[TrainState], None]) -> None:
        self.rows: list[Row] = []
        self.partial_rows: list[Row] = []
        self.previews: list[int] = []
        self.skipped: list[int] = []
        self.step = self.ended = 0
        self.on_step = on_step

    def on_log(self, row: Row) -> None:
        self.rows.append(row)

    def on_partial_row(self, row: Row) -> None:
        self.partial_rows.append(row)

    def on_preview(self, step: int, network: Any) -> None:
        self.previews.append(step)

    def on_skipped_step(self, step: int, keys: Sequence[str]) -> None:
        self.skipped.append(step)

    def on_step_end(self, state: TrainState) -> None:
        self.step = state.step
        self.on_step(state)

    def on_end(self) -> None:
        self.ended += 1


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part, tensors in state.tensors().items() for name, value in tensors.items()}


def differing(first: TrainState, second: TrainState) -> list[str]:
    """The names under which two states differ."""
    here, there = state_tensors(first), state_tensors(second)
    assert here.keys() == there.keys()
    return [name for name in here if not torch.equal(here[name], there[name])]


def test_run_that_is_stopped_twice_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, recorder = run(tmp_path / "straight", "vq")
    for stop_at in (2, 9):  # before and after the discriminator starts
        assert run(tmp_path / "cut", "vq", stop_at=stop_at)[0].step == stop_at
    resumed, rest = run(tmp_path / "cut", "vq")
    assert straight.step == resumed.step == STEPS
    assert differing(straight, resumed) == []
    assert rest.rows[-1]["loss/total"] == pytest.approx(recorder.rows[-1]["loss/total"], abs=1e-6)


def test_signal_during_a_stalled_read_saves_a_checkpoint_within_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = run(tmp_path / "whole")
    start = time.monotonic()
    with signals.StopAfterStep() as stop:
        state, _ = run(tmp_path / "cut", interruptible=stop.interruptible, stall_at=7 * BATCH)
        assert stop.requested()
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == "SIGTERM: stopping, and saving what was trained\n"
    assert state.step == 7
    resumed, _ = run(tmp_path / "cut")
    assert resumed.step == STEPS
    assert differing(whole, resumed) == []


def test_loss_falls_and_rows_have_losses_quality_and_speed(tmp_path: Path) -> None:
    rows = run(tmp_path, "vq", steps=60, log_every=10)[1].rows
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["loss/l1"] < 0.8 * rows[0]["loss/l1"]
    assert rows[-1]["psnr"] > rows[0]["psnr"]
    assert 0 < rows[-1]["utilization"] <= 1
    assert rows[-1]["window_tokens"] == 10 * BATCH * 64
    assert {"loss/adversarial", "loss/discriminator", "loss/commitment", "learning_rate", "data_wait"} <= set(rows[-1])


def test_too_many_skipped_steps_end_the_run_and_move_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Poison
) -> None:
    run(tmp_path, stop_at=5)
    poison(range(100))
    with pytest.raises(NumericError, match=r"3 steps in a row .* the last was step 7, images p28, p29, p30 and 1 more"):
        run(tmp_path, max_nonfinite_steps=3)
    monkeypatch.undo()
    assert differing(run(tmp_path / "straight")[0], run(tmp_path)[0]) == []


def test_a_discriminator_that_does_not_move_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Objective.discriminator_loss

    def infinite(self: Objective, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = loss(self, *args, **kwargs)
        return total * math.inf, terms

    statistics: list[Tensor] = []

    def remember(state: TrainState) -> None:
        statistics.append(state.networks["discriminator"].main[3].running_mean.clone())  # type: ignore[index]

    monkeypatch.setattr(Objective, "discriminator_loss", infinite)
    with pytest.raises(NumericError, match="3 steps in a row"):
        run(tmp_path, max_nonfinite_steps=3, on_step=remember)
    assert torch.equal(statistics[-1], statistics[3])


@pytest.mark.parametrize("kind", ["lc", "ema"])
def test_skipped_step_moves_nothing_and_is_counted(tmp_path: Path, poison: Poison, kind: str) -> None:
    poison([2, 3, 9])
    state, recorder = run(tmp_path, kind, disc_start=100)
    rows = recorder.rows
    assert recorder.skipped == [2, 3, 9]
    assert state.nonfinite_steps == rows[-1]["nonfinite_steps"] == 3
    assert rows[0]["nonfinite_steps"] == 1
    assert all(torch.isfinite(value).all() for value in state_tensors(state).values() if value.is_floating_point())
    assert all(math.isfinite(value) for row in rows for value in row.values())
    before: list[dict[str, Tensor]] = []
    poison([4])

    def remember(state: TrainState) -> None:
        parts = state.tensors()
        both = {**parts["model"], **{f"adam {name}": value for name, value in parts["optimizer"].items()}}
        before.append({name: value.clone() for name, value in both.items()})

    run(tmp_path / "again", kind, disc_start=100, on_step=remember)
    assert before[3].keys() == before[4].keys()
    assert all(torch.equal(value, before[4][name]) for name, value in before[3].items())
    assert any(not torch.equal(value, before[5][name]) for name, value in before[4].items())


@pytest.mark.parametrize("kind", ["lc", "ema", pytest.param("vq", marks=pytest.mark.slow)])
def test_accumulation_is_the_same_step(tmp_path: Path, kind: str) -> None:
    """Four parts of 8 images against one of 32, without a discriminator, whose batch norm depends on the parts.

    Gradients are compared (Adam's first moment is half of them): Adam turns tiny differences into whole steps.
    """
    states = []
    for accumulate in (1, 4):
        settings = {"accumulate": accumulate, "steps": 1, "log_every": 1, "warmup_steps": 0, "global_batch_size": 32}
        states.append(run(tmp_path / str(accumulate), kind, disc_start=100, **settings))
    (whole, one), (parts, several) = states
    moments = [name for name in whole.tensors()["optimizer"] if name.endswith("exp_avg")]
    assert len(moments) > 10
    for name in moments:
        pair = (state.tensors()["optimizer"][name] for state in (parts, whole))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)
    for name, value in whole.networks["model"].quantizer.named_buffers():  # moved by all 32 images at once
        torch.testing.assert_close(
            dict(parts.networks["model"].quantizer.named_buffers())[name], value, rtol=0, atol=1e-6
        )
    assert several.rows[0]["loss/l1"] == pytest.approx(one.rows[0]["loss/l1"], abs=1e-6)


def test_frozen_parts_stay_and_the_others_train(tmp_path: Path) -> None:
    fresh = dict(networks("ema")[0].state_dict())
    trained = run(tmp_path, "ema", freeze=("encoder", "codebook"))[0].networks["model"].state_dict()
    for name, value in fresh.items():
        still = name.startswith(("encoder.", "quant_conv.", "quantizer."))
        assert torch.equal(value, trained[name]) == still, name


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    fresh = dict(networks("batch norms")[0].state_dict())
    trained = run(tmp_path, "batch norms", freeze=("encoder", "codebook"))[0].networks["model"].state_dict()
    moved = {name for name, value in fresh.items() if not torch.equal(value, trained[name])}
    assert any("running_mean" in name for name in moved)
    assert not any(name.startswith(("encoder.", "quant_conv.", "quantizer.")) for name in moved)


@pytest.mark.parametrize("kind", ["lc", "batch norms"])
def test_activation_checkpointing_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    plain, recomputed = (run(tmp_path / str(flag), kind, activation_checkpointing=flag)[0] for flag in (False, True))
    assert differing(plain, recomputed) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at it
def test_compiled_networks_are_one_graph_each_and_train_the_same(tmp_path: Path) -> None:
    from vqpipe.training.networks import compiled_graphs

    before = compiled_graphs()
    plain, compiled = (run(tmp_path / str(flag), steps=6, compile=flag)[1].rows for flag in (False, True))
    assert compiled_graphs() - before <= 5  # encoder, decoder, and the discriminator with and without gradients
    assert compiled[-1]["loss/l1"] == pytest.approx(plain[-1]["loss/l1"], rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: -1.0} for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip_norm", "eps")),
        *({"quantizer_rate": rate} for rate in (-1.0, math.nan, math.inf)),
        *({"betas": betas} for betas in ((1.0, 0.9), (0.5, -0.1))),
        *({"weight_ema": decay} for decay in (1.0, -0.5)),
        {"whiten_images": 0},
    ],
)
def test_numbers_that_no_training_can_use_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{next(iter(wrong))} = .* It must be"):
        TokenizerTrainConfig(**wrong)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_outside_32_bits_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"the seed {seed} is not in \[0, 2\*\*32\)"):
        run(tmp_path, seed=seed)
    assert run(tmp_path, seed=2**32 - 1, steps=2)[0].step == 2


def test_random_numbers_of_a_step_repeat_at_no_other_step_or_seed() -> None:
    def noise(seed: int, step: int) -> tuple[float, ...]:
        seed_step(seed, step)
        return tuple(torch.rand(4).tolist())

    assert noise(0, 3) == noise(0, 3)
    places = [(0, 3), (0, 3 + 2**20), (1, 3), (1, 3 + 48_573), (2**32 - 1, 3)]
    assert len({noise(*place) for place in places}) == len(places)
    seed_step(0, 3)
    assert torch.initial_seed() == 6582426945856704739  # equal on every platform


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 is not divisible by 1 ranks x 3 parts"):
        run(tmp_path, accumulate=3)


def test_on_end_is_called_also_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "whole")[1].ended == 1
    ended: list[bool] = []
    monkeypatch.setattr(Recorder, "on_end", lambda self: ended.append(True))

    def fail(state: TrainState) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "failing", on_step=fail)
    assert ended == [True]


def test_numbers_of_the_first_steps_come_before_the_first_row(tmp_path: Path) -> None:
    _, recorder = run(tmp_path / "a", log_every=8)
    assert [row["step"] for row in recorder.partial_rows] == [1, 2, 5]
    assert [row["step"] for row in recorder.rows] == [8, 12]
    assert recorder.partial_rows[0].keys() == recorder.rows[0].keys() - {
        name for name in recorder.rows[0] if "discriminator" in name or "logit" in name or "adversarial" in name
    }
    _, recorder = run(tmp_path / "b", log_every=1)
    assert recorder.partial_rows == []
    _, again = run(tmp_path / "c", stop_at=6, log_every=50), run(tmp_path / "c", log_every=50)[1]
    assert [row["step"] for row in again.partial_rows] == [7, 8, 11]  # steps of the process that resumed


def test_previews_come_with_rows_when_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path / "a")[1].previews == []  # too short a run
    monkeypatch.setattr(Throttle, "due", lambda self: True)
    assert run(tmp_path / "b")[1].previews == [1, 2, 3, 9]  # rows at 3, 6, 9, 12; samples at 6 and 12


def test_throttled_action_is_repeated_by_the_clock_and_takes_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    throttle = Throttle(first=15.0, every=60.0, growth=1.5, longest=100.0, share=0.02, longest_pause=300.0)

    def waits(cost: float) -> float:
        """Seconds until the action is due again, of an action that takes `cost` seconds."""
        with throttle.timed():
            clock[0] += cost
        ended = clock[0]
        while not throttle.due():
            clock[0] += 1.0
        return clock[0] - ended

    while not throttle.due():
        clock[0] += 1.0
    assert clock[0] == 115.0
    assert [waits(cost) for cost in (0.0, 0.0, 0.0, 0.0, 4.0, 9.0)] == [60.0, 90.0, 100.0, 100.0, 200.0, 300.0]


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def number(seed: int, step: int, rank: int) -> float:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        seed_step(seed, step)
        return torch.rand(()).item()

    assert number(1, 5, 0) == number(1, 5, 0)
    assert len({number(*each) for each in ((1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0))}) == 4


def test_a_stop_of_any_rank_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "any_rank", lambda condition, device: True)  # the other rank
    stops = [stop_on_any_rank(step, lambda: False, torch.device("cpu")) for step in (4, 5, 6)]
    assert stops == [False, True, False]
