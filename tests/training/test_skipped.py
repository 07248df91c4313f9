"""A training run ends for unusable images only when they are too many for certain, on one rank and on two."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vqpipe.artifacts import Artifact, Draft
from vqpipe.config import from_table
from vqpipe.data.images import open_images
from vqpipe.distributed import is_main, world_size
from vqpipe.errors import DataError
from vqpipe.progress import Silent
from vqpipe.reports import plots
from vqpipe.training.checkpoint import checkpoints
from vqpipe.training.run import Run
from vqpipe.training.tokenizer_run import RunInputs, TokenizerRecipe, start_tokenizer_run, train_tokenizer

NUM, STEPS, BATCH = 125, 13, 20  # two epochs
BAD = (17, 100)  # one is 0.8 %, two are 1.6 %
QUANTIZER = {"kind": "vq", "codebook_size": 16, "code_dim": 4}
SMALL = {"base_channels": 4, "channel_multipliers": [1, 1], "num_res_blocks": 1, "attention_resolutions": []}


def recipe(max_skipped: float) -> TokenizerRecipe:
    return from_table(
        TokenizerRecipe,
        {
            "model": {"kind": "vqgan", **SMALL, "z_channels": 4, "quantizer": QUANTIZER},
            "objective": {"l1": 1.0, "perceptual": "none", "commitment": 0.1, "codebook": 0.1, "adversarial": 0.0},
            "discriminator": {"base_channels": 4, "num_layers": 1},
            "data": {"image_size": 8, "num_workers": 0, "max_skipped": max_skipped},
            "train": {
                "steps": STEPS,
                "global_batch_size": BATCH,
                "whiten_init": False,
                "log_every": 4,
                "save_every": 9,
                "sample_every": STEPS,
            },
        },
    )


class Messages(Silent):
    """Keeps the lines for the user."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def run(
    folder: Path, name: str, number: int, max_skipped: float = 0.01, stop: Callable[[], bool] = lambda: False
) -> tuple[Artifact | None, list[str]]:
    """Train on the images of `folder`, of which `number` cannot be used. Returns the tokenizer, and the messages."""
    torch.manual_seed(0)
    inputs, messages = RunInputs(images=open_images([folder / f"bad-{number}"])), Messages()
    draft = start_tokenizer_run(folder / name, recipe(max_skipped), inputs, seed=0)
    assert isinstance(draft, Draft)
    with draft:
        options = Run(draft=draft, seed=0, device=torch.device("cpu"), progress=messages, stop_requested=stop)
        made = train_tokenizer(options, recipe(max_skipped), inputs)
    return made, messages.lines


def names(file: Path) -> list[str]:
    return pq.read_table(file)["key"].to_pylist()


def weights(artifact: Artifact | None) -> str:
    assert artifact is not None
    return str(artifact.manifest.files["model.safetensors"]["sha256"])


def check_below(folder: Path) -> None:
    """0.8 % under 1 % trains through both epochs, also when it is resumed."""
    whole, lines = run(folder, "whole", 1)
    assert whole is not None
    assert whole.facts["skipped"] == {"empty": 1}
    assert names(whole.verified_file("skipped.parquet")) == ["017"]
    said = "1 of 125 images cannot be used (1 empty): 017 of bad-1 (empty); all are listed in "
    said += str(whole.file("skipped.parquet"))
    assert said in lines or not is_main()

    stopped, _ = run(folder, "resumed", 1, stop=iter([False, world_size() > 1, True]).__next__)  # after step 3, or 10
    assert stopped is None
    made, _ = run(folder, "resumed", 1)
    assert made is not None
    assert made.facts["skipped"] == {"empty": 1}
    assert weights(made) == weights(whole)


def check_above(folder: Path) -> None:
    """1.6 % under 1 % stops with names and a checkpoint; a larger tolerance continues at that step."""
    straight, _ = run(folder, "straight", 2, max_skipped=0.05)
    steps = []
    for _ in range(2):  # the same command again stops at the same step
        with pytest.raises(DataError) as stopped:
            run(folder, "stopped", 2)
        partial = folder / "stopped.partial"
        assert stopped.value.what == (
            "2 of 125 images cannot be used (2 empty), more than the 1 % allowed: 017 of bad-2 (empty), 100 of bad-2"
            f" (empty); all are listed in {partial / 'skipped.parquet'}"
        )
        assert stopped.value.hint.startswith("Raise --set data.max_skipped: the same command continues")
        assert names(partial / "skipped.parquet") == ["017", "100"]
        steps.append(checkpoints(partial).newest()[0].name if is_main() else "")
    assert steps[0] == steps[1]
    made, lines = run(folder, "stopped", 2, max_skipped=0.05)
    assert made is not None
    assert f"resuming at step {int(steps[0].rpartition('-')[2])}" in lines if is_main() else True
    assert made.config["data"]["max_skipped"] == 0.05
    assert weights(made) == weights(straight)
    rows = [json.loads(line)["step"] for line in made.file("metrics.jsonl").read_text().splitlines()]
    assert rows == [*range(4, STEPS, 4), STEPS]


CHECKS = {"below": check_below, "above": check_above}


def no_svg(figure: object, salt: str) -> str:
    """In the place of `plots.to_svg`, which takes half the time of a short run."""
    return "<svg></svg>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders of 125 images, one and two of which are empty files."""
    for number in (1, 2):
        (tmp_path / f"bad-{number}").mkdir()
    rng = np.random.default_rng(0)
    for i in range(NUM):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "BMP")
        for number in (1, 2):
            data = b"" if i in BAD[:number] else file.getvalue()
            (tmp_path / f"bad-{number}" / f"{i:03d}.bmp").write_bytes(data)
    return tmp_path


@pytest.mark.usefixtures("fast_training")
@pytest.mark.parametrize("name", CHECKS)
def test_one_rank(folder: Path, name: str) -> None:
    CHECKS[name](folder)


def check_all(folder: Path) -> None:
    plots.to_svg = no_svg
    for check in CHECKS.values():
        check(folder)


@pytest.mark.slow
def test_two_ranks(folder: Path, on_two_ranks: Callable[..., list[Any]]) -> None:
    on_two_ranks(check_all, folder)
