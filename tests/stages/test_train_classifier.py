"""`vqpipe train-classifier` as a function: the artifact, its report, errors, two ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.tokenize_images import tokenize
from stages.train_classifier import train_classifier
from vqpipe.artifacts import open_artifact
from vqpipe.config import from_table
from vqpipe.data.examples import TokenSet, split_held_out
from vqpipe.errors import ArtifactError, ConfigError, DataError, WeightsError
from vqpipe.generation import train as job
from vqpipe.generation.base import Space
from vqpipe.generation.classifier import ClassifierConfig, build_classifier
from vqpipe.generation.validation import loss_and_accuracy

OPTIONS: dict[str, Any] = {"preset": "vit-tiny", "steps": 40, "global_batch_size": 9, "device": "cpu"}
SMALL = ["classifier.width=16", "classifier.depth=1", "classifier.num_heads=2", "classifier.drop_path=0.0"]
OVERRIDES = [*SMALL, "train.warmup_steps=1", "train.learning_rate=0.01", "examples.held_out=6", "train.log_every=20"]


def test_metrics_are_those_of_the_published_weights(
    drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def recorded(network: Any, *arguments: Any, **options: Any) -> dict[str, float]:
        measured.append({name: value.clone() for name, value in network.state_dict().items()})
        return loss_and_accuracy(network, *arguments, **options)

    monkeypatch.setattr(job, "loss_and_accuracy", recorded)
    overrides = [*OVERRIDES, "train.weight_ema=0.5"]
    train_classifier(drawn.tokens, drawn.tokenizer, tmp_path / "vit", overrides=overrides, **OPTIONS)
    artifact = open_artifact(tmp_path / "vit", "classifier")
    artifact.verify()
    metrics = json.loads(artifact.file("metrics.json").read_text())
    assert (metrics["recipe"], metrics["num_images"], metrics["num_classes"]) == ("vqpipe-classify-1", 6, 3)
    assert metrics["not_computed"] == {"top5": "there are 3 classes"}
    assert artifact.facts["top1"] == metrics["top1"]

    table = json.loads(artifact.file("config.json").read_text())
    space = from_table(Space, table["space"])
    model = build_classifier(from_table(ClassifierConfig, table["classifier"]), space)
    published = load_file(artifact.file("model.safetensors"))
    assert all(torch.equal(published[name], value) for name, value in measured[-1].items())
    model.load_state_dict(published)
    rest, held_out = split_held_out(TokenSet(open_artifact(drawn.tokens)), 6)
    assert held_out is not None
    with torch.no_grad():
        guesses = model.eval().logits(held_out.read(range(6), [False] * 6)).argmax(1).numpy()
        seen = model.logits(rest.read(range(18), [False] * 18)).argmax(1).numpy()
    assert metrics["top1"] == pytest.approx(np.mean(guesses == held_out.labels))
    assert np.mean(seen == rest.labels) > 0.6  # it learned those it saw; chance is a third


def test_accuracy_is_of_named_tokens_or_missing_without_held_out_images(drawn: Any, tmp_path: Path) -> None:
    short = OPTIONS | {"steps": 2}
    overrides = [*OVERRIDES, "examples.held_out=0", "train.validate_every=0"]
    train_classifier(
        drawn.tokens, drawn.tokenizer, tmp_path / "named", validation=drawn.tokens, overrides=overrides, **short
    )
    train_classifier(drawn.tokens, drawn.tokenizer, tmp_path / "none", overrides=overrides, **short)
    named, none = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("named", "none"))
    assert (named["num_images"], none["num_images"]) == (24, 0)
    assert "top1" in named
    assert "top1" not in none
    assert "no images were held out" in none["not_computed"]["top1"]


def test_labels_of_validation_tokens_are_those_of_training(drawn: Any, tmp_path: Path) -> None:
    pictures, short = tmp_path / "pictures", OPTIONS | {"preset": "linear-probe", "steps": 1}
    overrides = ["train.warmup_steps=1", "examples.held_out=0", "train.validate_every=1"]

    def train(name: str) -> None:
        tokenize([str(pictures)], drawn.tokenizer, tmp_path / name, num_workers=0, device="cpu")
        validation, out = tmp_path / name, tmp_path / f"probe-{name}"
        train_classifier(drawn.tokens, drawn.tokenizer, out, validation=validation, overrides=overrides, **short)

    for name in "12":
        shutil.copytree(drawn.pictures / name, pictures / name)
    with pytest.raises(ArtifactError, match=r"label 0 is the class 0 in .*tokens, and 1 in .*unlike\. .*classes\.txt"):
        train("unlike")
    (pictures / "classes.txt").write_text("0\n1\n2\n")
    train("listed")
    assert open_artifact(tmp_path / "listed").facts["class_names"] == ["0", "1", "2"]


def test_validation_labels_beyond_those_of_training_need_num_classes(drawn: Any, tmp_path: Path) -> None:
    short = OPTIONS | {"preset": "linear-probe", "steps": 1, "validation": drawn.tokens}
    overrides = ["train.warmup_steps=1", "examples.held_out=0", "train.validate_every=1"]
    shutil.copytree(drawn.pictures, tmp_path / "pictures", ignore=lambda *_: ["2"])
    tokens = tmp_path / "tokens"
    tokenize([str(tmp_path / "pictures")], drawn.tokenizer, tokens, num_workers=0, device="cpu")
    with pytest.raises(DataError, match=r"tokens has the label 2, .* are below 2\. Set examples\.num_classes=3"):
        train_classifier(tokens, drawn.tokenizer, tmp_path / "probe", overrides=overrides, **short)
    overrides.append("examples.num_classes=3")
    train_classifier(tokens, drawn.tokenizer, tmp_path / "probe", overrides=overrides, **short)


def test_a_linear_probe_is_trained(drawn: Any, tmp_path: Path) -> None:
    options = OPTIONS | {"preset": "linear-probe", "steps": 2}
    overrides = ["train.warmup_steps=1", "examples.held_out=6", "examples.num_classes=7"]
    train_classifier(drawn.tokens, drawn.tokenizer, tmp_path / "probe", overrides=overrides, **options)
    artifact = open_artifact(tmp_path / "probe")
    assert (artifact.facts["kind"], artifact.facts["num_parameters"]) == ("linear", 4 * 16 * 7 + 7)
    metrics = json.loads(artifact.file("metrics.json").read_text())
    assert (metrics["num_classes"], metrics["num_classes_seen"], metrics["chance"]) == (7, 3, 1 / 3)
    overrides.append("examples.mirror=false")
    train_classifier(drawn.tokens, drawn.tokenizer, tmp_path / "plain", overrides=overrides, **options)
    weights = (load_file(tmp_path / name / "model.safetensors")["head.weight"] for name in ("probe", "plain"))
    assert not torch.equal(*weights)  # flips were trained on too


@pytest.mark.parametrize("preset", ["vit-tiny", "linear-probe"])
def test_tokens_of_images_that_are_not_square_are_classified(drawn: Any, tmp_path: Path, preset: str) -> None:
    tokenize([str(drawn.pictures)], drawn.tokenizer, tmp_path / "wide", image_size="12x8", num_workers=0, device="cpu")
    overrides = [*(SMALL if preset == "vit-tiny" else []), "train.warmup_steps=1", "examples.held_out=6"]
    options = OPTIONS | {"preset": preset, "steps": 1}
    train_classifier(tmp_path / "wide", drawn.tokenizer, tmp_path / "out", overrides=overrides, **options)
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (table["image_size"], table["space"]["layout"]["grids"]) == ("12x8", [[4, 6]])


def test_invalid_options_are_refused(drawn: Any, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, *more: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            train_classifier(
                drawn.tokens, drawn.tokenizer, tmp_path / "out", overrides=[*OVERRIDES, *more], **OPTIONS | changes
            )
        assert not list(tmp_path.glob("out*"))

    refused(ConfigError, "needs classes", "examples.conditional=false")
    refused(ConfigError, "for vqpipe train-generator", preset="gpt-tiny")
    refused(ConfigError, r"needs held-out images.*or train\.validate_every=0", "examples.held_out=0")
    refused(ConfigError, r"classifier\.weights is not set.*classifier\.pretrained=false", "classifier.pretrained=true")
    refused(WeightsError, r"mae\.pth does not exist", f"classifier.weights={tmp_path / 'mae.pth'}")


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_train_to_the_weights_of_one(drawn: Any, tmp_path: Path) -> None:
    """Five held-out images in batches of two: one rank has one more batch."""
    settings = [*SMALL, "train.warmup_steps=1", "examples.held_out=5", "train.validate_every=1"]
    settings += ["train.parallel=fsdp", "train.weight_ema=0.5"]
    words = ["-m", "stages", "train-classifier", "--preset", "vit-tiny", "--steps", "3", "--global-batch-size", "4"]
    words += ["--tokens", str(drawn.tokens), "--tokenizer", str(drawn.tokenizer), "--device", "cpu"]
    words += [word for each in settings for word in ("--set", each)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for ranks in ("1", "2"):
        command = [*launch, ranks, *words, "--out", str(tmp_path / ranks)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (load_file(tmp_path / ranks / "model.safetensors") for ranks in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    reports = [json.loads((tmp_path / ranks / "metrics.json").read_text()) for ranks in "12"]
    assert reports[0]["top1"] == reports[1]["top1"]
