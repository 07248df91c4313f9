"""File names that are not UTF-8, or have control characters or line breaks, as inputs and as --out of every command.

(Those of tokenize, eval, prepare-data and reconstruct: test_input_remarks.py.)
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.cli import COMMANDS, load
from stages.detokenize import detokenize
from stages.extract_features import extract_features
from stages.generate import generate
from stages.import_checkpoint import import_checkpoint
from stages.kmeans import kmeans
from stages.train import train
from stages.train_classifier import train_classifier
from stages.train_generator import train_generator
from vqpipe.artifacts import open_artifact
from vqpipe.errors import ArtifactError

ODD = [os.fsdecode(b"caf\xe9"), "esc\x1b[31m", "line\nbreak"]
SETTINGS = [
    *("data.image_size=16", "model.base_channels=8", "model.z_channels=8"),
    *("model.quantizer.code_dim=4", "train.warmup_steps=1", "discriminator.base_channels=4", "train.whiten_images=8"),
]
CLASSIFIER = ["train.validate_every=0", "examples.held_out=0", "train.warmup_steps=1", "classifier.depth=1"]


@pytest.mark.parametrize("odd", [ODD[0], pytest.param(ODD[1] + ODD[2], marks=pytest.mark.slow)])
def test_odd_names_are_read_and_written(
    odd: str, drawn: Any, llamagen_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / f"in {odd}"
    inside.mkdir()
    for name in ("pictures", "tokenizer", "tokens", "generator"):
        shutil.copytree(getattr(drawn, name), inside / f"{name} {odd}")
    pictures, tokenizer, tokens, generator = (
        inside / f"{name} {odd}" for name in ("pictures", "tokenizer", "tokens", "generator")
    )
    preset = inside / f"{odd}.toml"
    preset.write_text(
        "extends = 'smoke'\n[kmeans]\nk = 20\n[features]\nimage_size = 16\npatch_size = 4\ncomponents = 8\n"
    )
    np.save(inside / f"{odd}.npy", np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32))
    torch.save(torch.randn(200, 8), inside / f"{odd}.pth")
    made = tmp_path / ("made" if "\udce9" in odd else f"made {odd}")
    shared: dict[str, Any] = {"device": "cpu"}
    extract_features([str(pictures)], made / "features", preset=str(preset), num_workers=0, **shared)
    kmeans([made / "features"], made / "codebook", preset=str(preset), **shared)
    kmeans([inside / f"{odd}.npy"], made / "of-array", k=20, **shared)
    training = {"preset": str(preset), "overrides": SETTINGS, "steps": 1, "global_batch_size": 2, "precision": "fp32"}
    train([str(pictures)], made / "trained", inside / f"{odd}.npy", validation=[str(pictures)], **training, **shared)
    shutil.copytree(made / "trained", inside / f"from {odd}")
    training["overrides"] = [*SETTINGS, "train.whiten_init=false"]
    train([str(pictures)], made / "tuned", inside / f"{odd}.pth", source=inside / f"from {odd}", **training, **shared)
    train_generator(tokenizer, made / "generator", tokens=tokens, **shared, **llamagen_options)
    latent = {"preset": "sit-tiny", "overrides": ["train.warmup_steps=1", "generator.patch_size=4"], "steps": 1}
    latent |= {"images": [str(pictures)], "num_workers": 0, "global_batch_size": 2}
    train_generator(tokenizer, made / "sit", **latent, **shared)
    generate(generator, made / "images", num_images=3, **shared)
    generate(generator, made / "png", num_images=3, form="png", **shared)
    detokenize(tokens, tokenizer, made / "png-2", form="png", limit=2, **shared)
    options = {"preset": "vit-tiny", "overrides": CLASSIFIER, "steps": 1, "global_batch_size": 2}
    train_classifier(tokens, tokenizer, made / "classifier", **options, **shared)
    for artifact in made.iterdir():
        open_artifact(artifact).verify()
        for written in artifact.rglob("*.json*"):
            for line in (
                written.read_bytes().decode().splitlines() if written.suffix == ".jsonl" else [written.read_text()]
            ):
                assert not any("\udc80" <= letter <= "\udcff" for letter in str(json.loads(line)))
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in COMMANDS if any("--out" in p.opts for p in load(name).params)])
def test_every_command_refuses_an_out_that_is_not_utf8_before_it_works(name: str, tmp_path: Path) -> None:
    command = load(name)
    option = next(parameter for parameter in command.params if "--out" in parameter.opts)
    context = command.make_context(name, [], resilient_parsing=True)
    context.resilient_parsing = False
    with pytest.raises(ArtifactError, match=r"--out .*caf\\xe9 is not UTF-8\. Choose another name"):
        option.process_value(context, str(tmp_path / ODD[0]))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_an_odd_name_is_named_in_the_error(tmp_path: Path) -> None:
    for odd in ODD:
        file = tmp_path / f"{odd}.pth"
        torch.save({"x": torch.zeros(2)}, file)
        with pytest.raises(Exception, match=r"is not|no |cannot") as caught:
            import_checkpoint(str(file), tmp_path / "out")
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
