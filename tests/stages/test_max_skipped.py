"""Commands that refuse too many unreadable images: they name them, and the option that the message names continues with
what is written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import recipe
from stages.console import ProgressBar
from stages.eval_generation import eval_generation
from stages.evaluate import evaluate
from stages.extract_features import extract_features
from stages.kmeans import kmeans
from stages.prepare_data import prepare_data
from stages.tokenize_images import tokenize
from stages.train import train
from vqpipe.artifacts import open_artifact
from vqpipe.data.images import ImageSet, open_images
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.generation.latents import encode_latents
from vqpipe.tokenizer import Tokenizer

SMALL = {
    "train": [
        *("data.image_size=32", "model.quantizer.kind=vq", "model.quantizer.codebook_size=40", "model.base_channels=8"),
        *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4"),
        *("train.warmup_steps=1", "train.whiten_init=false", "objective.entropy=0.0"),
    ],
    "extract-features": ["features.image_size=32", "features.patch_size=4", "features.components=8"],
}


def latents(images: list[str], tokenizer: Path, out: Path, max_skipped: float = 0.01) -> None:
    with ProgressBar() as progress:
        opened, options = Tokenizer.from_pretrained(tokenizer), {"image_size": 32, "flip": False}
        encode_latents(out, open_images(images), opened, **options, max_skipped=max_skipped, progress=progress)


COMMANDS: dict[str, Callable[..., Any]] = {
    "eval": lambda images, tokenizer, out, **more: evaluate(
        images, tokenizer, out, batch_size=2, num_workers=0, device="cpu", **more
    ),
    "eval-generation": lambda images, tokenizer, out, **more: eval_generation(
        images, images, out, image_size=8, num_workers=0, device="cpu", **more
    ),
    "extract-features": lambda images, tokenizer, out, **more: extract_features(
        images, out, num_workers=0, device="cpu", **more
    ),
    "latents": latents,
    "prepare-data": lambda images, tokenizer, out, **more: prepare_data(
        "folder", Path(images[0]), out, shard_size=4, **more
    ),
    "tokenize": lambda images, tokenizer, out, **more: tokenize(
        images, tokenizer, out, num_workers=0, device="cpu", **more
    ),
    "train": lambda images, tokenizer, out, **more: train(
        images, out, preset="smoke", steps=2, global_batch_size=8, precision="fp32", device="cpu", **more
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_option_that_the_message_names_continues_with_what_is_written(
    command: str,
    tiny_tokenizer: Callable[..., Path],
    picture_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (picture_folder / "drawn-3.png").write_bytes(b"no picture")
    tokenizer, settings = tiny_tokenizer("tokenizer"), SMALL.get(command, [])
    read: list[int] = []
    original = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, i: (read.append(i), original(self, i))[1])

    def run(tolerance: dict[str, Any] | None = None) -> list[int]:
        read.clear()
        options = {"overrides": settings} if settings else {}
        COMMANDS[command]([str(picture_folder)], tokenizer, tmp_path / "out", **options | (tolerance or {}))
        return list(read)

    with pytest.raises(DataError, match=r"images cannot be used \(1 not-an-image\), more than the") as refused:
        run()
    first, partial = list(read), tmp_path / "out.partial"
    assert f"drawn-3 of pictures (not-an-image); all are listed in {partial / 'skipped.parquet'}" in refused.value.what
    row = {"key": "drawn-3", "shard": "pictures", "index": 3, "reason": "not-an-image"}
    assert pq.read_table(partial / "skipped.parquet").to_pylist() == [row]
    with pytest.raises(ArtifactError, match="is not finished"):
        open_artifact(partial.with_suffix(""))

    named = re.match(
        r"Raise (--max-skipped|--set \S+): the same command continues .* another --\w+", refused.value.hint
    )
    assert named is not None
    setting = named[1].removeprefix("--set ")

    def allow(share: float) -> dict[str, Any]:
        named = {"max_skipped": share}
        return named if setting == "--max-skipped" else {"overrides": [*settings, f"{setting}={share}"]}

    capsys.readouterr()
    second = run(allow(0.1))
    if command != "train":  # which reads the pictures of its report again
        assert not set(first) & set(second), "an image was used twice"
    assert "drawn-3 of pictures (not-an-image); all are listed in" in capsys.readouterr().err
    made = open_artifact(tmp_path / "out")
    made.verify()
    assert pq.read_table(made.file("skipped.parquet")).to_pylist() == [row]
    assert made.facts.get("skipped", {"not-an-image": 1}) == {"not-an-image": 1}
    (tolerance,) = (
        table["max_skipped"] for table in (made.config, made.config.get("data", {})) if "max_skipped" in table
    )
    assert tolerance == 0.1

    run(allow(0.2))
    assert "already published" in capsys.readouterr().err or command == "latents"
    (picture_folder / "drawn-3.png").unlink()
    with pytest.raises(
        ArtifactError, match=r"a file of pictures was .*\. Choose another --\w+, or restore those files"
    ):
        run(allow(0.1))


def test_set_of_a_section_that_the_command_does_not_read_is_an_error(tmp_path: Path) -> None:
    def refused(section: str, reads: str) -> Any:
        return pytest.raises(
            ConfigError, match=rf"--set {section}.*: this command does not read .* It reads {reads}\.$"
        )

    images = ["builtin:photos"]
    with refused("data.max_skipped=0.1", r"\[features\]"):
        extract_features(images, tmp_path / "out", overrides=["data.max_skipped=0.1"], device="cpu")
    with refused("eval", r"\[kmeans\]"):
        kmeans(tmp_path / "features", tmp_path / "out", overrides=["eval.max_skipped=0.1"], device="cpu")
    with refused("eval", r"\[model\], \[objective\], \[data\], \[discriminator\], \[train\]"):
        train(images, tmp_path / "out", preset="smoke", overrides=["eval.max_skipped=0.1"], device="cpu")
    with refused("data", r"\[eval\]"):
        recipe.load("smoke", ["data.max_skipped=0.1"], reads=["eval"])
    with pytest.raises(ConfigError, match=r"--set dat\.x: no such section\. Did you mean data\?"):
        recipe.load("smoke", ["dat.x=1"], reads=["eval"])
    with pytest.raises(ConfigError, match=r"--set train is a section\. Write --set train\.NAME=VALUE"):
        recipe.load_tokenizer("smoke", ["train=5"])
    assert recipe.load("smoke", ["eval.max_skipped=0.1"], reads=["eval"]).eval.max_skipped == 0.1


def test_eval_refuses_the_tolerance_of_training(
    tiny_tokenizer: Callable[..., Path], picture_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--set data\.max_skipped=0\.1: this command does not read the section"):
        evaluate(
            [str(picture_folder)],
            tiny_tokenizer("tokenizer"),
            tmp_path / "out",
            overrides=["data.max_skipped=0.1"],
            device="cpu",
        )
