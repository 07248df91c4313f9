"""`vqpipe plan`, --plan, and the first line of `vqpipe train`."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import estimates
from vqpipe.errors import ConfigError
from vqpipe.planning.devices import DEVICES
from vqpipe.planning.estimate import Plan, Training
from vqpipe.progress import SILENT
from vqpipe.training.config import TrainConfig

SHALLOW = ("--set", "model.channel_multipliers=[1]", "--set", "discriminator.num_layers=1")
"""A third of the operations to trace."""


def test_a_plan_is_printed_as_a_table_and_as_json(vqpipe: Callable[..., Any], tmp_path: Path) -> None:
    command = ("plan", "train", "--preset", "smoke", *SHALLOW, "--gpu", "l40s", "--gpus", "2")
    done = vqpipe(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "memory: activations" in done.stdout
    assert "2 x l40s" in done.stdout
    table = json.loads(vqpipe(tmp_path, *command, "--json").stdout)
    assert table["device"] == "l40s"
    assert table["fits"] is True
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_gpu_is_an_error(vqpipe: Callable[..., Any], tmp_path: Path) -> None:
    done = vqpipe(tmp_path, "plan", "train", "--preset", "smoke", "--gpu", "h1000")
    assert done.returncode == 1
    assert "Did you mean h100?" in done.stderr


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("train", ["--batch-size", "8"]),
        ("train", ["--num-images", "8"]),
        ("tokenize", ["--tokenizer", "mgvq-f16-g4"]),
        ("kmeans", ["--batch-size", "8"]),
        ("kmeans", ["--set", "train.steps=3"]),
        ("extract-features", ["--set", "kmeans.k=3"]),
        ("presets", ["--gpu", "h200"]),
        ("presets", ["--set", "train.steps=3"]),
    ],
)
def test_an_option_that_a_stage_does_not_read_is_an_error(stage: Any, words: list[str]) -> None:
    from stages.plan import plan

    names = {"--batch-size": "batch_size", "--num-images": "num_images", "--tokenizer": "tokenizer", "--gpu": "gpu"}
    value: Any = [words[1]] if words[0] == "--set" else int(words[1]) if words[1].isdigit() else words[1]
    options = {"preset": None if stage == "presets" else "smoke", names.get(words[0], "overrides"): value}
    with pytest.raises(ConfigError, match=f"does not read (the section|{words[0]})"):
        plan(stage, **options)


def test_kmeans_is_planned_for_the_images_that_features_are_taken_from(
    vqpipe: Callable[..., Any], tmp_path: Path
) -> None:
    command = ("plan", "kmeans", "--preset", "smoke", "--gpu", "h100", "--json")
    limited = vqpipe(tmp_path, *command, "--set", "features.limit=1000")
    assert json.loads(limited.stdout) == json.loads(vqpipe(tmp_path, *command, "--num-images", "1000").stdout)


def train(vqpipe: Callable[..., Any], folder: Path, *options: str) -> Any:
    return vqpipe(
        folder,
        *("train", "--preset", "smoke", "--images", "photos", "--out", "out", "--steps", "1"),
        *("--set", "model.quantizer.codebook_init=uniform", "--set", "train.warmup_steps=0", *SHALLOW, *options),
    )


def test_training_begins_with_its_estimate(
    vqpipe: Callable[..., Any], draw_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_folder(tmp_path / "photos", 8, side=64)
    small = ("--set", "data.image_size=16")
    planned = train(vqpipe, tmp_path, *small, "--plan")
    assert planned.returncode == 0, planned.stderr
    assert "a step" in planned.stdout
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.setattr(estimates, "LEAST_STEPS", 1)
    done = train(vqpipe, tmp_path, *small)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()[:2]] == [
        "estimating memory and time",
        "estimate",
    ]


def test_a_long_run_on_a_cpu_is_told_how_many_steps_take_half_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"settings": {}, "memory": {}, "flops": {}, "disk": {}}
    run: dict[str, Any] = {"stage": "train", "devices": 1, "steps": 1000, "images_per_step": 4, **sizes}
    gpu = DEVICES["h100"]
    cpu = replace(gpu, name="cpu")
    for device, seconds in ((cpu, 18.0), (cpu, 3.6), (gpu, 18.0)):
        plan = Plan(device=device, seconds_per_step=seconds, **run)
        estimates.say_or_refuse(partial(replace, plan))
    assert [line for line in capsys.readouterr().err.splitlines() if "first look" in line] == [
        "for a first look, --steps 100 takes about 30 minutes"
    ]


def test_bf16_is_named_where_the_processor_computes_it_faster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "say_or_refuse", lambda plan: None)
    training = Training("train", TrainConfig(), lambda *arguments: pytest.fail("nothing is traced"))
    for faster, expected in ((True, "faster on this processor: --precision bf16\n"), (False, "")):
        monkeypatch.setattr(estimates, "bf16_is_faster", lambda device, faster=faster: faster)
        estimates.check_fits(training, torch.device("cpu"), tmp_path / "out", SILENT)
        assert capsys.readouterr().err == expected


def test_training_that_does_not_fit_is_refused_before_it_begins(
    vqpipe: Callable[..., Any], draw_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_folder(tmp_path / "photos", 8, side=64)
    small = replace(DEVICES["h100"], memory=1e8, context=0.0)
    monkeypatch.setattr(estimates, "device_of", lambda device: small)
    monkeypatch.setattr(estimates, "LEAST_STEPS", 1)
    done = train(vqpipe, tmp_path)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
    assert "--set train.accumulate=" in done.stderr
    assert not (tmp_path / "out.partial").exists()


def test_help_does_not_import_pytorch() -> None:
    code = "import sys, stages.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
