"""`vqpipe train-generator` as a function: the artifact, resuming, latents, errors, two ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stages import estimates, signals
from stages.tokenize_images import tokenize
from stages.train_generator import train_generator
from vqpipe.artifacts import open_artifact
from vqpipe.data.examples import TokenSet, split_held_out
from vqpipe.data.latents import open_latents
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.files import read_rows
from vqpipe.generation import sit
from vqpipe.generation.image_generator import image_rngs, open_generator
from vqpipe.generation.validation import validation_losses
from vqpipe.planning import estimate
from vqpipe.reports.pictures import contact_sheet, from_png
from vqpipe.training.callbacks import ProgressCallback

LATENT = {
    "ldm": ["generator.base_channels=32", "generator.channel_multipliers=[1]", "generator.attention_factors=[]"],
    "dit": ["generator.patch_size=4"],
    "sit": ["generator.patch_size=4"],
}


def test_the_artifact_has_weights_tokenizer_log_samples_and_facts(drawn: Any) -> None:
    artifact = open_artifact(drawn.generator, "generator")
    artifact.verify()
    wanted = {"model.safetensors", "config.json", "metrics.jsonl", "report.html", "tokenizer/model.safetensors"}
    assert wanted <= set(artifact.names("*") + artifact.names("*/*"))
    assert set(artifact.inputs) == {"tokens", "tokenizer"}
    facts = artifact.facts
    assert (facts["kind"], facts["num_classes"], facts["images_seen"], facts["steps"]) == ("llamagen", 3, 16, 4)
    opened = open_generator(drawn.generator)
    assert facts["num_parameters"] == sum(p.numel() for p in opened.generator.parameters())
    assert (opened.image_size, opened.classes, opened.statistics) == (8, (0, 1, 2), None)
    assert (opened.sampling.cfg_scale, opened.sampling.top_p) == (1.5, 0.95)  # as llamagen-tiny has them
    rows = read_rows(artifact.file("metrics.jsonl"))
    assert [row["step"] for row in rows if "valid/total" in row] == [2, 4]
    assert facts["valid_loss"] == [row["valid/total"] for row in rows if "valid/total" in row][-1]
    sheet = from_png(artifact.file("pictures/step-00000004.png").read_bytes())
    published = opened.sample(torch.arange(16) % 3, opened.sampling, image_rngs(0, range(16)))
    assert torch.equal(sheet, from_png(contact_sheet(published, 4)))


def test_its_codebook_is_the_tokenizer_s(drawn: Any) -> None:
    opened = open_generator(drawn.generator)
    codes = opened.generator.state_dict()["img_projector.codes"]
    torch.testing.assert_close(codes[0], opened.tokenizer.autoencoder.quantizer.codebook())


def test_the_validation_loss_is_that_of_the_published_weights(drawn: Any) -> None:
    """Recomputed on the held-out images, in evaluation mode."""
    artifact, opened = open_artifact(drawn.generator), open_generator(drawn.generator)
    _, held_out = split_held_out(TokenSet(open_artifact(drawn.tokens)), 6)
    assert held_out is not None
    total = 0.0
    for places in (range(4), range(4, 6)):
        labels = torch.from_numpy(held_out.labels[list(places)])
        total += len(places) * float(
            opened.generator.loss(held_out.read(places, [False] * len(places)), labels)["total"]
        )
    assert artifact.facts["valid_loss"] == pytest.approx(total / 6, rel=1e-5)
    assert "loss: cross-entropy in nats per id." in artifact.file("report.html").read_text()


def test_the_same_run_is_not_repeated_and_another_is_refused(
    drawn: Any, llamagen_options: dict[str, Any], capsys: Any
) -> None:
    train_generator(drawn.tokenizer, drawn.generator, tokens=drawn.tokens, device="cpu", **llamagen_options)
    assert "already published" in capsys.readouterr().err
    llamagen_options["overrides"].append("train.log_every=2")
    train_generator(drawn.tokenizer, drawn.generator, tokens=drawn.tokens, device="cpu", **llamagen_options)
    with pytest.raises(ArtifactError, match=r"train\.steps was 4, now 5"):
        train_generator(
            drawn.tokenizer, drawn.generator, tokens=drawn.tokens, device="cpu", **llamagen_options | {"steps": 5}
        )


def test_an_interrupted_run_resumes_to_the_same_weights_and_samples(
    drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_step_end, steps = ProgressCallback.on_step_end, []

    def cut(self: ProgressCallback, state: Any) -> None:
        on_step_end(self, state)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressCallback, "on_step_end", cut)
    for expected in (signals.Interrupted, None):
        options = {"tokens": drawn.tokens, "device": "cpu", **llamagen_options}
        if expected is None:
            train_generator(drawn.tokenizer, tmp_path / "cut", **options)
        else:
            with pytest.raises(expected) as caught:
                train_generator(drawn.tokenizer, tmp_path / "cut", **options)
            assert caught.value.code == 143
            assert not (tmp_path / "cut").exists()
    whole, resumed = open_artifact(drawn.generator), open_artifact(tmp_path / "cut")
    assert len(steps) == 4
    for name in ("model.safetensors", "config.json", "pictures/step-00000004.png"):
        assert whole.manifest.files[name]["sha256"] == resumed.manifest.files[name]["sha256"]


@pytest.mark.parametrize(
    "kind", ["sit", pytest.param("dit", marks=pytest.mark.slow), pytest.param("ldm", marks=pytest.mark.slow)]
)
def test_latents_are_encoded_once_and_read_by_other_runs(
    drawn: Any, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"preset": f"{kind}-tiny", "steps": 2, "global_batch_size": 4, "device": "cpu"}
    options["overrides"] = [*LATENT[kind], "train.warmup_steps=1", "generate.steps=2", "examples.num_classes=5"]
    latents = tmp_path / "latents"
    train_generator(
        drawn.tokenizer, tmp_path / "a", images=[str(drawn.pictures)], latents=latents, num_workers=0, **options
    )
    stored = open_artifact(latents, "latents")
    assert stored.facts["num_latents"] == 48  # each image and its mirror image
    assert stored.facts["class_names"] == ["0", "1", "2"]
    capsys.readouterr()
    options["overrides"] += ["train.validate_every=1"]  # does not change the weights
    train_generator(drawn.tokenizer, tmp_path / "b", latents=latents, validation=latents, **options)
    assert "images/s: " not in capsys.readouterr().err
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    opened = open_generator(tmp_path / "a")
    assert opened.statistics is not None
    assert list(opened.statistics.mean) == stored.facts["mean"]
    assert (opened.generator.num_classes, opened.classes) == (5, (0, 1, 2))
    loss = "velocity" if kind == "sit" else "noise"
    assert f"loss: mean squared error of the {loss}" in open_artifact(tmp_path / "a").file("report.html").read_text()


def test_validation_latents_are_normalized_by_the_statistics_of_training(drawn: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preset": "sit-tiny", "steps": 1, "global_batch_size": 4, "device": "cpu"}
    options["overrides"] = [*LATENT["sit"], "train.warmup_steps=1", "generate.steps=2"]
    dark = tmp_path / "dark"
    dark.mkdir()
    for file in drawn.pictures.glob("0/*.png"):
        Image.open(file).point(lambda value: value // 6).save(dark / file.name)
    train_generator(drawn.tokenizer, tmp_path / "a", images=[str(drawn.pictures)], num_workers=0, **options)
    unlabelled = options | {"overrides": [*options["overrides"], "examples.conditional=false"]}
    train_generator(drawn.tokenizer, tmp_path / "b", images=[str(dark)], num_workers=0, **unlabelled)
    a, b = tmp_path / "a.latents", tmp_path / "b.latents"
    train_generator(drawn.tokenizer, tmp_path / "c", latents=a, validation=b, **unlabelled)
    opened, latents = open_generator(tmp_path / "c"), open_latents(b)
    assert opened.statistics == open_latents(a).statistics != latents.statistics
    latents.statistics = opened.statistics
    expected = validation_losses(opened.generator, latents, batch_size=4, device=torch.device("cpu"))
    assert open_artifact(tmp_path / "c").facts["valid_loss"] == pytest.approx(expected["total"], rel=1e-6)


def test_held_out_latents_of_another_size_are_refused(drawn: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preset": "sit-tiny", "steps": 1, "global_batch_size": 4, "device": "cpu"}
    options["overrides"] = [*LATENT["sit"], "train.warmup_steps=1", "generate.steps=2"]
    images, larger = [str(drawn.pictures)], 16
    train_generator(drawn.tokenizer, tmp_path / "a", images=images, num_workers=0, **options)
    train_generator(drawn.tokenizer, tmp_path / "b", images=images, num_workers=0, image_size=larger, **options)
    with pytest.raises(ArtifactError, match="another shape of latents"):
        train_generator(
            drawn.tokenizer,
            tmp_path / "c",
            latents=tmp_path / "a.latents",
            validation=tmp_path / "b.latents",
            **options,
        )


def test_a_flipped_bit_in_latents_is_found_before_training(drawn: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preset": "sit-tiny", "steps": 1, "global_batch_size": 4, "device": "cpu"}
    options["overrides"] = [*LATENT["sit"], "train.warmup_steps=1", "generate.steps=2"]
    train_generator(drawn.tokenizer, tmp_path / "a", images=[str(drawn.pictures)], num_workers=0, **options)
    shard = tmp_path / "a.latents" / "latents-00000.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"latents-00000\.npy is damaged"):
        train_generator(drawn.tokenizer, tmp_path / "b", latents=tmp_path / "a.latents", **options)


def test_raw_latents_are_not_normalized(drawn: Any, tmp_path: Path) -> None:
    overrides = [*LATENT["sit"], "train.warmup_steps=1", "generate.steps=2", "examples.raw=true"]
    options: dict[str, Any] = {"preset": "sit-tiny", "steps": 1, "global_batch_size": 4, "overrides": overrides}
    images = [str(drawn.pictures)]
    train_generator(drawn.tokenizer, tmp_path / "raw", images=images, num_workers=0, device="cpu", **options)
    opened = open_generator(tmp_path / "raw")
    assert opened.statistics is not None
    assert set(opened.statistics.mean) == {0.0}
    assert set(opened.statistics.std) == {1.0}


def test_invalid_options_are_refused(
    drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    def refused(error: type[Exception], match: str, tokenizer: Path = drawn.tokenizer, **changes: Any) -> None:
        options = {"tokens": drawn.tokens, "device": "cpu", **llamagen_options, **changes}
        with pytest.raises(error, match=match):
            train_generator(tokenizer, tmp_path / "out", **options)
        assert not list(tmp_path.glob("out*"))

    refused(ConfigError, "trained on tokens: no tokens were named", tokens=None)
    images = [str(drawn.pictures)]
    refused(ConfigError, "trained on tokens: --images and --latents are for dit, ldm, sit", images=images)
    latent = {"preset": "sit-tiny", "overrides": ["train.warmup_steps=1"]}
    refused(ConfigError, "trained on latents: --tokens is for gpt, llamagen", **latent)
    refused(ConfigError, "trained on latents: no images were named", **latent, tokens=None)
    refused(ConfigError, "for vqpipe train", preset="smoke")
    refused(ConfigError, "no preset was named", preset=None)
    refused(ConfigError, r"--image-size 16 is not the size of the images in .*tokens, 8\.", image_size=16)
    early = ["train.warmup_steps=1", "generate.sampler=ddpm", "generate.steps=2", *LATENT["sit"]]
    options = {"preset": "sit-tiny", "overrides": early, "tokens": None, "latents": drawn.folder / "latents"}
    options |= {"images": [str(drawn.pictures)], "num_workers": 0}
    refused(ConfigError, "needs predicted noise", **options)  # before the first step, not at the first samples
    many = ["train.warmup_steps=1", "generate.steps=1001", *LATENT["dit"]]
    refused(ConfigError, "the noise schedule has 1000", **{**options, "preset": "dit-tiny", "overrides": many})
    unused = ["train.warmup_steps=1", "generate.steps=2"]
    refused(ConfigError, "generate.steps is for generators trained on latents", overrides=unused)
    refused(ArtifactError, "was made by tokenizer", tokenizer=tiny_tokenizer("other", seed=1))
    refused(DataError, "label 2 is out of range", overrides=["train.warmup_steps=1", "examples.num_classes=2"])
    too_many = {"overrides": ["train.warmup_steps=1", "examples.held_out=20"]}
    refused(DataError, r"examples\.held_out = 20 of 24 images.*--set examples\.held_out=12", **too_many)
    refused(ConfigError, "needs held-out images", overrides=["train.warmup_steps=1", "train.validate_every=2"])
    refused(
        ConfigError, "trained with class dropout", overrides=["train.warmup_steps=1", "generator.class_dropout=0.0"]
    )
    held = {"validation": drawn.tokens}
    refused(ConfigError, "and --validation both name held-out images", **held)


def test_too_many_held_out_images_are_refused_before_the_estimate(
    drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "check_fits", lambda *_: pytest.fail("estimated"))
    options = {"tokens": drawn.tokens, "limit": 10, "device": "cpu", **llamagen_options}
    with pytest.raises(DataError, match=r"examples\.held_out = 6 of 10 images.*--set examples\.held_out=5"):
        train_generator(drawn.tokenizer, tmp_path / "out", **options)


def test_the_check_of_sampling_before_training_takes_two_steps(
    drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def heun(velocity: Any, noise: torch.Tensor, steps: int) -> torch.Tensor:
        taken.append(steps)
        return noise

    monkeypatch.setattr(sit, "heun", heun)
    options: dict[str, Any] = {"preset": "sit-tiny", "steps": 1, "global_batch_size": 4, "device": "cpu"}
    options["overrides"] = [*LATENT["sit"], "train.warmup_steps=1", "generate.steps=40"]
    train_generator(drawn.tokenizer, tmp_path / "out", images=[str(drawn.pictures)], num_workers=0, **options)
    assert taken == [2, 40]  # before training, and the samples of its page


def test_images_without_labels_are_trained_on_as_the_error_says(
    drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [str(drawn.pictures / "0")]
    tokenize(pictures, drawn.tokenizer, tmp_path / "tokens", num_workers=0, device="cpu")
    options = {"tokens": tmp_path / "tokens", "device": "cpu", **llamagen_options, "steps": 1}
    options["overrides"] += ["examples.held_out=0"]
    with pytest.raises(DataError, match=r"8 of 8 images have no label.*--set examples\.conditional=false"):
        train_generator(drawn.tokenizer, tmp_path / "out", **options)
    options["overrides"] += ["examples.conditional=false"]
    train_generator(drawn.tokenizer, tmp_path / "out", **options)
    assert "generate.cfg_scale is 1, not 1.5" in " ".join(capsys.readouterr().err.split())
    opened = open_generator(tmp_path / "out")
    assert (opened.generator.num_classes, opened.classes, opened.sampling.cfg_scale) == (None, (), 1.0)


def test_missing_labels_are_found_before_images_are_encoded(drawn: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"preset": "sit-tiny", "steps": 1, "global_batch_size": 4, "device": "cpu"}
    options |= {"overrides": [*LATENT["sit"], "train.warmup_steps=1"], "images": [str(drawn.pictures / "0")]}
    with pytest.raises(DataError, match=r"8 of 8 images have no label"):
        train_generator(drawn.tokenizer, tmp_path / "out", num_workers=0, **options)
    assert not list(tmp_path.glob("out*"))


def test_a_plan_is_for_the_size_of_the_stored_images(
    drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"num_workers": 0, "device": "cpu"}
    tokenize([str(drawn.pictures)], drawn.tokenizer, tmp_path / "tokens", image_size="16", **options)
    planned = list[int]()
    monkeypatch.setattr(estimate, "generator_training", lambda recipe, model, size: planned.append(size))
    monkeypatch.setattr(estimates, "plan_here", lambda training, device: None)
    monkeypatch.setattr(estimates, "show", lambda plan: None)
    for tokens in ("tokens", "absent"):
        options = {"tokens": tmp_path / tokens, "plan": True, **llamagen_options}
        train_generator(drawn.tokenizer, tmp_path / "out", device="cpu", **options)
    assert planned == [16, 8]  # 8: the tokenizer's


def test_limit_trains_on_the_first_images(drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path) -> None:
    options = {"device": "cpu", **llamagen_options, "steps": 1}
    options["overrides"] = [*llamagen_options["overrides"], "examples.held_out=0", "train.validate_every=0"]
    tokenize([str(drawn.pictures)], drawn.tokenizer, tmp_path / "few", limit=8, flip=True, num_workers=0, device="cpu")
    train_generator(drawn.tokenizer, tmp_path / "of-few", tokens=tmp_path / "few", **options)
    train_generator(drawn.tokenizer, tmp_path / "limited", tokens=drawn.tokens, limit=8, **options)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("of-few", "limited")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert open_artifact(tmp_path / "limited").config["limit"] == 8
    options |= {"preset": "sit-tiny", "overrides": ["train.warmup_steps=1", *LATENT["sit"]]}
    images = {"images": [str(drawn.pictures)], "num_workers": 0, "limit": 7}
    train_generator(drawn.tokenizer, tmp_path / "sit", **options, **images)
    assert open_artifact(tmp_path / "sit.latents").facts["num_images"] == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parallel", "average"), [("gpt", "ddp", "0.0"), ("llamagen", "fsdp", "0.0"), ("llamagen", "fsdp", "0.5")]
)
def test_two_ranks_train_to_the_weights_of_one(
    drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, kind: str, parallel: str, average: str
) -> None:
    """Without random numbers by rank (dropout, dropped classes); sums over ranks round differently.

    Between steps the network is validated and sampled, which gathers its weights if they are sharded.
    """
    own = [each for each in llamagen_options["overrides"] if kind == "llamagen" or "head_layers" not in each]
    overrides = [*own, "generator.dropout=0.0", "generator.class_dropout=0.0"]
    overrides += ["generate.cfg_scale=1.0", f"train.weight_ema={average}", "train.validate_every=1"]
    words = [
        "train-generator",
        "--preset",
        f"{kind}-tiny",
        "--steps",
        "4",
        "--global-batch-size",
        "4",
        "--device",
        "cpu",
    ]
    words += ["--tokens", str(drawn.tokens), "--tokenizer", str(drawn.tokenizer)]
    words += [word for each in [*overrides, f"train.parallel={parallel}"] for word in ("--set", each)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for ranks in ("1", "2"):
        command = [*launch, ranks, "-m", "stages", *words, "--out", str(tmp_path / ranks)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (load_file(tmp_path / ranks / "model.safetensors") for ranks in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    rows = [read_rows(tmp_path / ranks / "metrics.jsonl") for ranks in "12"]
    for name in ("loss/total", "valid/total"):
        assert [row[name] for row in rows[0] if name in row] == pytest.approx(
            [row[name] for row in rows[1] if name in row], rel=1e-4
        )
    sheets = [from_png((tmp_path / ranks / "pictures" / "step-00000004.png").read_bytes()) for ranks in "12"]
    assert (sheets[0] != sheets[1]).float().mean() < 0.05  # rounding may change an id of an image or two
    assert json.loads((tmp_path / "2" / "manifest.json").read_text())["provenance"]["world_size"] == 2
