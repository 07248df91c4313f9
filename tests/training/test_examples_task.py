"""ExamplesTask: training is the same on one process, on two replicated ranks and on two sharded ranks."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.errors import ArtifactError, ConfigError
from vqpipe.training.callbacks import Callback
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TrainConfig
from vqpipe.training.examples_task import ExamplesTask
from vqpipe.training.loop import train
from vqpipe.training.running_metrics import Row

BATCH, TOKENS, CODES, CLASSES, WIDTH = 8, 6, 11, 3, 10
"""Odd sizes: two ranks do not divide a weight evenly."""


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + scale * self.drop(F.gelu(self.mix(self.norm(x))))


class Flat(nn.Module):
    """Predicts each id from those before it and the label. Names no blocks."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.labels, self.ids = nn.Embedding(CLASSES, WIDTH), nn.Embedding(CODES, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, CODES)

    def forward(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.labels(labels)[:, None] + F.pad(self.ids(examples), (0, 0, 1, -1)).cumsum(1)
        for block in self.layers:
            x = block(x, scale=0.5)
        logits = self.head(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), examples.flatten())
        right = (logits.argmax(-1) == examples).float().mean()
        return {"total": loss, "train/accuracy": right}


class Blocked(Flat):
    """The same network with named blocks."""

    def blocks(self) -> Iterable[nn.Module]:
        return self.layers


@dataclass
class Tokens:
    examples: Tensor
    labels: Tensor
    keys: list[str]
    skipped: dict[int, str] = field(default_factory=dict)


class SyntheticTokens:
    """Example p of the run is a function of p: its label's multiples; a rank sees its share of each batch."""

    def from_sample(self, images_seen: int) -> Iterator[Tokens]:
        share = BATCH // distributed.world_size()
        while True:
            first = images_seen + distributed.rank() * share
            places = torch.arange(first, first + share)
            labels = places % CLASSES
            examples = (places[:, None] // 5 + (labels[:, None] + 1) * torch.arange(TOKENS)) % CODES
            yield Tokens(examples, labels, [str(place) for place in places.tolist()])
            images_seen += BATCH


class Recorder(Callback):
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.step = 0

    def on_log(self, row: Row) -> None:
        self.rows.append(row)

    def on_step_end(self, state: TrainState) -> None:
        self.step = state.step


def with_dropout() -> Blocked:
    return Blocked(dropout=0.2)


def run(
    folder: Path, make: Callable[[], nn.Module] = Blocked, *, stop_at: int = 10**6, **settings: Any
) -> tuple[TrainState, list[Row]]:
    torch.manual_seed(0)
    defaults = {"steps": 8, "learning_rate": 1e-2, "weight_ema": 0.9, "clip_norm": 1.0, "log_every": 3}
    config = TrainConfig(**{"global_batch_size": BATCH, **defaults, **settings})
    recorder = Recorder()
    state = train(
        ExamplesTask(make()),
        config,
        SyntheticTokens(),
        folder,
        seed=1,
        device=torch.device("cpu"),
        callbacks=[recorder],
        stop_requested=lambda: recorder.step >= stop_at,
    )
    return state, recorder.rows


def state_tensors(state: TrainState) -> dict[str, Tensor]:
    from vqpipe.training.networks import gathered

    parts = gathered({**state.tensors(), "published": state.published()})
    return {
        f"{part}/{name}": value.detach().clone() for part, tensors in parts.items() for name, value in tensors.items()
    }


def differing(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.allclose(first[name], second[name], rtol=0, atol=tolerance)]


def test_loss_falls_and_the_scalars_of_the_network_are_logged(tmp_path: Path) -> None:
    state, rows = run(tmp_path, steps=90, log_every=30)
    assert [row["step"] for row in rows] == [30, 60, 90]
    assert rows[-1]["loss/total"] < 0.8 * rows[0]["loss/total"]
    assert rows[-1]["train/accuracy"] > rows[0]["train/accuracy"] > 0
    expected = ("images_seen", "learning_rate", "gradient_norm", "images_per_second", "data_wait", "nonfinite_steps")
    assert set(expected) <= set(rows[0])
    assert not {"psnr", "utilization", "loss/train/accuracy"} & set(rows[0])
    assert set(state.published()) == set(Blocked().state_dict())


@pytest.mark.parametrize("stop_at", [2, 5])
def test_resumed_run_has_the_same_weights_and_log(tmp_path: Path, stop_at: int) -> None:
    straight, rows = run(tmp_path / "straight", with_dropout)
    cut, _ = run(tmp_path / "cut", with_dropout, stop_at=stop_at)
    assert cut.step == stop_at
    resumed, rest = run(tmp_path / "cut", with_dropout)
    assert differing(state_tensors(straight), state_tensors(resumed)) == []
    for here, there in zip(rows[-len(rest) :], rest, strict=True):
        assert all(here[name] == there[name] for name in ("step", "loss/total", "train/accuracy", "gradient_norm"))


def test_accumulation_and_activation_checkpointing_do_not_change_the_weights(tmp_path: Path) -> None:
    whole = state_tensors(run(tmp_path / "whole")[0])
    parts = state_tensors(run(tmp_path / "parts", accumulate=4)[0])
    assert differing(whole, parts, tolerance=2e-5) == []
    plain, again = (
        state_tensors(run(tmp_path / str(flag), with_dropout, activation_checkpointing=flag)[0])
        for flag in (False, True)
    )
    assert differing(plain, again) == []


def test_weight_average_does_not_share_checkpointed_blocks(tmp_path: Path) -> None:
    state, _ = run(tmp_path, activation_checkpointing=True)
    average = state.weight_ema.network.eval()
    batch = next(SyntheticTokens().from_sample(0))
    found = average(batch.examples, batch.labels)["total"]
    plain = Blocked().eval()
    plain.load_state_dict(state.published())
    assert found == plain(batch.examples, batch.labels)["total"]
    assert found != state.networks["model"].eval()(batch.examples, batch.labels)["total"]


def test_nonfinite_loss_moves_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "cross_entropy", lambda logits, ids: logits.sum() * float("nan"))
    state, rows = run(tmp_path, steps=3)
    assert state.nonfinite_steps == rows[-1]["nonfinite_steps"] == 3
    torch.manual_seed(0)
    before = Blocked().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.networks["model"].state_dict().items())


def test_activation_checkpointing_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Flat names no blocks"):
        run(tmp_path, Flat, activation_checkpointing=True)


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop_at=3)
    with pytest.raises(ArtifactError, match="it has a part ema, which this run does not have"):
        run(tmp_path, weight_ema=0.0)


# Two ranks.


def final_state(folder: Path, parallel: str, stop_at: int = 10**6) -> dict[str, Tensor]:
    """The final state of a run, on one of its ranks."""
    state, _ = run(folder, parallel=parallel, stop_at=stop_at, accumulate=2 if parallel == "fsdp" else 1)
    return state_tensors(state)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_give_the_weights_of_one(
    on_two_ranks: Callable[..., list[Any]], tmp_path: Path, parallel: str
) -> None:
    alone = state_tensors(run(tmp_path / "alone")[0])
    assert differing(alone, on_two_ranks(final_state, tmp_path / "two", parallel)[0], tolerance=2e-5) == []


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_of_two_ranks_resumes_on_two_on_one_and_with_the_other_parallelism(
    on_two_ranks: Callable[..., list[Any]], tmp_path: Path, parallel: str
) -> None:
    straight, _ = on_two_ranks(final_state, tmp_path / "straight", parallel)
    on_two_ranks(final_state, tmp_path / "cut", parallel, 5)
    for copy in ("one", "other"):
        shutil.copytree(tmp_path / "cut", tmp_path / copy)
    assert differing(straight, state_tensors(run(tmp_path / "one")[0]), tolerance=2e-5) == []
    other = "ddp" if parallel == "fsdp" else "fsdp"
    assert differing(straight, on_two_ranks(final_state, tmp_path / "other", other)[0], tolerance=2e-5) == []
    assert differing(straight, on_two_ranks(final_state, tmp_path / "cut", parallel)[0]) == []
