"""One network with a loss: alone, on two ranks that hold it whole, and on two that share it, it is the same training.

Run as a script under torchrun, this file is one run: `test_generator_task.py FOLDER STEPS PARALLEL [STOP_AT]`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.errors import ArtifactError, ConfigError
from vqpipe.training.config import TrainConfig
from vqpipe.training.generator_task import GeneratorTask
from vqpipe.training.history import Row
from vqpipe.training.listener import Silence
from vqpipe.training.loop import train
from vqpipe.training.state import TrainState

BATCH, TOKENS, CODES, CLASSES, WIDTH = 8, 6, 11, 3, 10
"""No two ranks divide a weight of WIDTH x CODES rows evenly."""


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + scale * self.drop(F.gelu(self.mix(self.norm(x))))


class Flat(nn.Module):
    """Guesses each id from those before it and the label."""

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


class Guesser(Flat):
    """The same, and it names its blocks."""

    def blocks(self) -> Iterable[nn.Module]:
        return self.layers


@dataclass
class Tokens:
    examples: Tensor
    labels: Tensor
    keys: list[str]


class Sentences:
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


class Noting(Silence):
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.step = 0

    def log(self, row: Row) -> None:
        self.rows.append(row)

    def advance(self, state: TrainState) -> None:
        self.step = state.step


def forgetful() -> Guesser:
    return Guesser(dropout=0.2)


def run(
    folder: Path, make: Callable[[], nn.Module] = Guesser, *, stop_at: int = 10**6, **settings: Any
) -> tuple[TrainState, list[Row]]:
    torch.manual_seed(0)
    defaults = {
        "steps": 8,
        "learning_rate": 1e-2,
        "weight_ema": 0.9,
        "clip_norm": 1.0,
        "log_every": 3,
        "save_every": 1000,
    }
    config = TrainConfig(**{"global_batch_size": BATCH, **defaults, **settings})
    noting = Noting()
    state = train(
        GeneratorTask(make()),
        config,
        Sentences(),
        folder,
        seed=1,
        device=torch.device("cpu"),
        listener=noting,
        stop_asked=lambda: noting.step >= stop_at,
    )
    return state, noting.rows


def everything(state: TrainState) -> dict[str, Tensor]:
    from vqpipe.training.sharding import gathered

    parts = gathered({**state.tensors(), "published": state.published()})
    return {
        f"{part}/{name}": value.detach().clone() for part, tensors in parts.items() for name, value in tensors.items()
    }


def unlike(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.allclose(first[name], second[name], rtol=0, atol=tolerance)]


def test_it_learns_and_logs_what_the_network_says(tmp_path: Path) -> None:
    state, rows = run(tmp_path, steps=90, log_every=30)
    assert [row["step"] for row in rows] == [30, 60, 90]
    assert rows[-1]["loss/total"] < 0.8 * rows[0]["loss/total"]
    assert rows[-1]["train/accuracy"] > rows[0]["train/accuracy"] > 0
    expected = {
        "step",
        "images_seen",
        "learning_rate",
        "gradient_norm",
        "images_per_second",
        "data_wait",
        "nonfinite_steps",
    }
    assert expected <= set(rows[0])
    assert not {"psnr", "utilization", "loss/train/accuracy"} & set(rows[0])
    assert set(state.published()) == set(Guesser().state_dict())


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_run_that_is_cut_is_the_same_run_and_has_the_same_log(tmp_path: Path, stop_at: int) -> None:
    straight, rows = run(tmp_path / "straight", forgetful)
    cut, _ = run(tmp_path / "cut", forgetful, stop_at=stop_at)
    assert cut.step == stop_at
    resumed, rest = run(tmp_path / "cut", forgetful)
    assert unlike(everything(straight), everything(resumed)) == []
    for here, there in zip(rows[-len(rest) :], rest, strict=True):
        assert {name: here[name] for name in ("step", "loss/total", "train/accuracy", "gradient_norm")} == {
            name: there[name] for name in ("step", "loss/total", "train/accuracy", "gradient_norm")
        }


def test_a_batch_in_parts_and_blocks_computed_again_are_the_same_training(tmp_path: Path) -> None:
    whole = everything(run(tmp_path / "whole")[0])
    parts = everything(run(tmp_path / "parts", accumulate=4)[0])
    assert unlike(whole, parts, tolerance=2e-5) == []
    plain, again = (
        everything(run(tmp_path / str(flag), forgetful, activation_checkpointing=flag)[0]) for flag in (False, True)
    )
    assert unlike(plain, again) == []


def test_the_average_of_a_network_that_recomputes_has_its_own_blocks(tmp_path: Path) -> None:
    state, _ = run(tmp_path, activation_checkpointing=True)
    average = state.weight_ema.network.eval()
    batch = next(Sentences().from_sample(0))
    found = average(batch.examples, batch.labels)["total"]
    plain = Guesser().eval()
    plain.load_state_dict(state.published())
    assert found == plain(batch.examples, batch.labels)["total"]
    assert found != state.networks["model"].eval()(batch.examples, batch.labels)["total"]


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "cross_entropy", lambda logits, ids: logits.sum() * float("nan"))
    state, rows = run(tmp_path, steps=3)
    assert state.nonfinite_steps == rows[-1]["nonfinite_steps"] == 3
    torch.manual_seed(0)
    before = Guesser().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.networks["model"].state_dict().items())


def test_what_names_no_blocks_cannot_recompute(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Flat names no blocks"):
        run(tmp_path, Flat, activation_checkpointing=True)


def test_another_network_s_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop_at=3)
    with pytest.raises(ArtifactError, match="it has a part ema, which this run has not"):
        run(tmp_path, weight_ema=0.0)


# Two ranks.


def ranks(count: int, folder: Path, steps: int, parallel: str, *stop_at: int) -> dict[str, Tensor]:
    """Everything after a run of `count` ranks, as rank 0 holds it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = [__file__, str(folder), str(steps), parallel, *map(str, stop_at)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, *words], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "final.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_does(tmp_path: Path, parallel: str) -> None:
    alone = everything(run(tmp_path / "alone")[0])
    assert unlike(alone, ranks(2, tmp_path / "two", 8, parallel), tolerance=2e-5) == []


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_ranks_goes_on_with_two_with_one_and_with_the_other_kind(tmp_path: Path, parallel: str) -> None:
    straight = ranks(2, tmp_path / "straight", 8, parallel)
    ranks(2, tmp_path / "cut", 8, parallel, 5)
    for copy in ("one", "other"):
        shutil.copytree(tmp_path / "cut", tmp_path / copy)
    assert unlike(straight, everything(run(tmp_path / "one")[0]), tolerance=2e-5) == []
    other = "ddp" if parallel == "fsdp" else "fsdp"
    assert unlike(straight, ranks(2, tmp_path / "other", 8, other), tolerance=2e-5) == []
    assert unlike(straight, ranks(2, tmp_path / "cut", 8, parallel)) == []


def main(folder: str, steps: str, parallel: str, stop_at: str = "1000000") -> None:
    """One rank of one run; rank 0 writes down what came out."""
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with distributed.connect(torch.device("cpu")):
        state, _ = run(
            Path(folder),
            steps=int(steps),
            parallel=parallel,
            stop_at=int(stop_at),
            accumulate=2 if parallel == "fsdp" else 1,
        )
        found = everything(state)
        if distributed.is_main():
            save_file({name: value.contiguous() for name, value in found.items()}, f"{folder}/final.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
