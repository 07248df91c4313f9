"""The pipeline end to end, as commands on drawn pictures: every stage, every stage again, and refused requests."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages import demo
from stages.cli import load
from vqpipe import Tokenizer
from vqpipe.artifacts import open_artifact
from vqpipe.config import all_subclasses
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import open_images
from vqpipe.errors import ArtifactError
from vqpipe.quantizers import Quantizer

Vqpipe = Callable[..., Any]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SETTINGS = [
    *("data.image_size=32", "kmeans.k=40", "features.patch_size=4", "features.image_size=32", "features.components=16"),
    *("model.quantizer.feature_dim=16", "model.quantizer.codebook_size=40", "model.base_channels=8"),
    *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4", "train.steps=8"),
    *("train.warmup_steps=2", "train.global_batch_size=4", "train.save_every=3", "train.whiten_images=16"),
    *("objective.disc_start=4", "train.sample_every=8", "train.log_every=3", "eval.image_size=32"),
]
SECTIONS = {"features": ["features"], "codebook": ["kmeans"], "report": ["eval"]}
"""What the stages read of the settings; `tokenizer` reads the others."""


def tiny(kind: str) -> list[str]:
    """The preset and the settings that the stage reads."""
    others = {name for names in SECTIONS.values() for name in names}
    names = {setting.partition(".")[0] for setting in SETTINGS}
    read = SECTIONS.get(kind, names - others)
    return ["--preset", "smoke", *(f"--set={each}" for each in SETTINGS if each.partition(".")[0] in read)]


STAGES = {
    "features": ["extract-features", "--images", "pictures"],
    "codebook": ["kmeans", "--features", "features"],
    "tokenizer": ["train", "--images", "pictures", "--codebook", "codebook"],
    "tokens": ["tokenize", "--images", "pictures", "--tokenizer", "tokenizer", "--flip"],
    "images": ["detokenize", "--tokens", "tokens", "--tokenizer", "tokenizer"],
    "report": ["eval", "--images", "pictures", "--tokenizer", "tokenizer"],
}
WEIGHTS = {"gq": "objective.rate=0.001", "regvq": "objective.prior=0.01"}
"""Quantizer -> the weight of a loss that the preset has no weight for."""
WITH_PRESET = ("features", "codebook", "tokenizer", "report")
KINDS = sorted({cls.config_class.kind for cls in all_subclasses(Quantizer) if "config_class" in vars(cls)} - {"lc"})
"""Every quantizer but `lc`, which the stages above use."""
DIFFERENT = ("ema", "fsq", "gq", "lfq", "multi_group", "multi_scale")
"""An update of the codebook, no codebook, a loss of its own, bits, groups, several grids: the others are like these."""
OTHERWISE = {
    "features": ["--pool", "2"],
    "codebook": ["--seed", "1"],
    "tokenizer": ["--steps", "9"],
    "tokens": ["--image-size", "16"],
    "images": ["--limit", "3"],
    "report": ["--limit", "3"],
}


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stages"]
    return subprocess.run(
        [sys.executable, *program, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def run_command(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    load(words[0]).main(words[1:], standalone_mode=False)


def command(kind: str, out: str | None = None) -> list[str]:
    return [*STAGES[kind], *(tiny(kind) if kind in WITH_PRESET else []), "--out", out or kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vqpipe: Vqpipe) -> Path:
    """A folder where every stage has run on 24 drawn pictures of two classes."""
    folder = tmp_path_factory.mktemp("line")
    random = np.random.default_rng(0)
    for number in range(24):
        small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        path = folder / "pictures" / f"class-{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    for kind in STAGES:
        done = vqpipe(folder, *command(kind))
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{kind}\n"
    return folder


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_publishes_its_kind_of_artifact(folder: Path, kind: str) -> None:
    artifact = open_artifact(folder / kind, kind)
    artifact.verify()
    assert not (folder / f"{kind}.partial").exists()


def test_inspect_prints_facts_and_lineage(folder: Path, vqpipe: Vqpipe) -> None:
    tokens = open_artifact(folder / "tokens")
    assert tokens.facts["num_images"] == 24
    assert tokens.facts["num_tokens"] == 16 * 16
    assert tokens.facts["layout"] == {"grids": [[16, 16]], "num_groups": 1}
    tokenizer = tokens.lineage["inputs"]["tokenizer"]
    assert tokenizer["inputs"]["codebook"]["inputs"]["features"]["inputs"]["images"]["name"] == "pictures"
    drawn = vqpipe(folder, "inspect", "tokens", "--verify").stdout
    assert all(kind in drawn for kind in ("tokens", "tokenizer", "codebook", "features", "pictures"))
    manifest = json.loads(vqpipe(folder, "inspect", "tokens", "--json").stdout)
    assert manifest["content"] == tokens.digest


@pytest.mark.parametrize("kind", STAGES)
def test_same_command_again_changes_nothing_and_other_settings_are_refused(
    folder: Path, kind: str, vqpipe: Vqpipe
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / kind).rglob("*")}
    again = vqpipe(folder, *command(kind))
    assert (again.returncode, again.stdout) == (0, f"{kind}\n")
    assert "already published" in again.stderr
    other = vqpipe(folder, *command(kind), *OTHERWISE[kind])
    assert other.returncode == 1
    assert other.stdout == ""
    key = OTHERWISE[kind][0].lstrip("-").replace("-", "_")
    assert f"error: {kind} exists and was made with other settings" in other.stderr
    assert key in other.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / kind).rglob("*")} == before


def test_detokenized_images_equal_the_tokenizers_reconstructions(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    (batch,) = OrderedBatches(open_images([folder / "pictures"]), image_size=32, batch_size=24)
    stored = {sample.key: sample for sample in open_images([str(folder / "images" / "shard-*.tar")])}
    assert len(stored) == 48
    for view, suffix in ((batch.images, ""), (batch.images.flip(-1), "-flipped")):
        expected = tokenizer.decode(tokenizer.encode(view), (32, 32))
        for key, label, image in zip(batch.keys, batch.labels.tolist(), expected, strict=True):
            sample = stored[key.removesuffix(".png") + suffix]
            pixels = decode_png(sample.image)
            assert sample.label == label
            assert torch.equal(pixels, image), key


def decode_png(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


@pytest.mark.parametrize(
    "kind", ["tokens", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("features", "images"))]
)
def test_two_ranks_write_the_same_bytes(folder: Path, kind: str, on_two_ranks: Callable[..., list[Any]]) -> None:
    on_two_ranks(run_command, folder, command(kind, f"{kind}-2"))
    assert open_artifact(folder / f"{kind}-2").digest == open_artifact(folder / kind).digest


@pytest.mark.slow
def test_two_ranks_train_on_the_same_images_as_one(folder: Path) -> None:
    done = torchrun(folder, *command("tokenizer", "tokenizer-2"))
    assert done.returncode == 0, done.stderr
    one, two = (open_artifact(folder / name).facts for name in ("tokenizer", "tokenizer-2"))
    assert one["images_seen"] == two["images_seen"] == 32
    assert two["training_psnr"] == pytest.approx(one["training_psnr"], abs=0.5)


def test_fine_tuning_starts_from_the_tokenizer(folder: Path, vqpipe: Vqpipe) -> None:
    words = ["train", "--images", "pictures", *tiny("tokenizer"), "--steps", "2", "--set", "train.whiten_init=false"]
    words += ["--set", "train.learning_rate=0.0", "--set", "objective.disc_start=0", "--from", "tokenizer"]
    done = vqpipe(folder, *words, "--out", "tuned")
    assert done.returncode == 0, done.stderr
    first, tuned = (Tokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tuned"))
    before, after = (each.autoencoder.state_dict() for each in (first, tuned))
    assert all(torch.equal(value, before[name]) for name, value in after.items())  # the learning rate is 0
    assert open_artifact(folder / "tuned").lineage["inputs"]["from"]["name"] == "tokenizer"


@pytest.mark.parametrize(
    "kind", [kind if kind in DIFFERENT else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_every_quantizer_trains_tokenizes_and_is_evaluated(folder: Path, kind: str, vqpipe: Vqpipe) -> None:
    shared = [word for word in tiny("tokenizer") if "model.quantizer." not in word] + ["--set=data.image_size=16"]
    words = ["train", "--images", "pictures", *shared, "--set", f"model.quantizer.kind={kind}"]
    weight = ["--set", WEIGHTS[kind]] if kind in WEIGHTS else []
    done = vqpipe(folder, *words, *weight, "--steps", "3", "--set", "objective.disc_start=1", "--out", kind)
    assert done.returncode == 0, done.stderr
    for words in (["tokenize", "--image-size", "16"], ["eval", "--image-size", "16", "--limit", "4"]):
        out = f"{kind}-{words[0]}"
        done = vqpipe(folder, *words, "--images", "pictures", "--tokenizer", kind, "--out", out)
        assert done.returncode == 0, done.stderr
    facts = open_artifact(folder / f"{kind}-tokenize").facts
    tokenizer = Tokenizer.from_pretrained(folder / kind)
    assert facts["codebook_size"] == tokenizer.codebook_size
    assert facts["num_tokens"] == tokenizer.layout(16, 16).num_tokens
    metrics = json.loads((folder / f"{kind}-eval" / "metrics.json").read_text())
    assert len(metrics["utilization_per_group"]) == tokenizer.num_groups


def test_fine_tuning_another_model_is_refused_with_the_difference(folder: Path, vqpipe: Vqpipe) -> None:
    settings = ["--set", "model.base_channels=16", "--set", "train.whiten_init=false"]
    words = ["train", "--images", "pictures", *tiny("tokenizer"), *settings, "--from", "tokenizer"]
    done = vqpipe(folder, *words, "--out", "wider")
    assert done.returncode == 1
    assert "error: tokenizer is another model than the preset's: model.base_channels was 8, now 16" in done.stderr
    assert not list(folder.glob("wider*"))


def test_tokens_of_another_tokenizer_are_refused(
    folder: Path, tiny_tokenizer: Callable[..., Path], vqpipe: Vqpipe
) -> None:
    another = tiny_tokenizer("another")
    refused = vqpipe(folder, "detokenize", "--tokens", "tokens", "--tokenizer", str(another), "--out", "x")
    assert refused.returncode == 1
    assert "was made by tokenizer" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--images", "pictures", "--preset", "smoke", "--out", "y"], "lc quantizer has no codebook yet"),
        (["train", "--images", "pictures", "--out", "y"], "no preset was named"),
        (["train", "--images", "nowhere", "--preset", "smoke", "--out", "y"], "nowhere"),
        (["kmeans", "--features", "features", "--k", "1000000", "--out", "y"], "fewer than k = 1,000,000"),
        (["tokenize", "--images", "pictures", "--tokenizer", "codebook", "--out", "y"], "is of kind codebook"),
        (["tokenize", "--images", "pictures", "--tokenizer", "tokenizer", "--image-size", "31", "--out", "y"], "cells"),
        (["extract-features", "--images", "pipe:cat x", "--out", "y"], "pipe:"),
        (["train", "--images", "pictures", "--preset", "smol", "--out", "y"], "Did you mean"),
    ],
)
def test_invalid_requests_are_a_one_line_error(folder: Path, words: list[str], message: str, vqpipe: Vqpipe) -> None:
    done = vqpipe(folder, *words)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("y*"))


def test_wrong_usage_exits_with_2(folder: Path, vqpipe: Vqpipe) -> None:
    assert vqpipe(folder, "tokenize", "--nonsense").returncode == 2
    wrong = vqpipe(folder, "kmeans", "--features", "features", "--init", "forgy", "--out", "y")
    assert wrong.returncode == 2
    assert "'forgy' is not one of 'k-means++', 'random'" in " ".join(wrong.stderr.replace("│", " ").split())
    assert not list(folder.glob("y*"))


def test_the_demo_writes_into_no_folder_with_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "extract_features", lambda *images, **options: pytest.fail("begun"))
    (tmp_path / "mine.txt").touch()
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ArtifactError, match=r"is not a folder of vqpipe demo\. Choose another --out"):
            demo.demo(out)
    (tmp_path / "features.partial").mkdir()
    demo.check_folder(tmp_path)
