"""Commands that refuse too many unreadable images: the option that the message names works in that command."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.eval_generation import eval_generation
from stages.evaluate import evaluate
from stages.extract_features import extract_features
from stages.prepare_data import prepare_data
from stages.tokenize_images import tokenize
from stages.train import train
from vqpipe.artifacts import open_artifact
from vqpipe.errors import DataError

SMALL = {
    "train": [
        *("data.image_size=32", "model.quantizer.kind=vq", "model.quantizer.codebook_size=40", "model.base_channels=8"),
        *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4"),
        *("train.warmup_steps=1", "train.whiten_init=false", "objective.entropy=0.0"),
    ],
    "extract-features": ["features.image_size=32", "features.patch_size=4", "features.components=8"],
}
COMMANDS: dict[str, Callable[..., Any]] = {
    "eval": lambda images, tokenizer, out, **more: evaluate(images, tokenizer, out, device="cpu", **more),
    "eval-generation": lambda images, tokenizer, out, **more: eval_generation(
        images, images, out, image_size=8, num_workers=0, device="cpu", **more
    ),
    "extract-features": lambda images, tokenizer, out, **more: extract_features(images, out, device="cpu", **more),
    "prepare-data": lambda images, tokenizer, out, **more: prepare_data("folder", Path(images[0]), out, **more),
    "tokenize": lambda images, tokenizer, out, **more: tokenize(images, tokenizer, out, device="cpu", **more),
    "train": lambda images, tokenizer, out, **more: train(
        images, out, preset="smoke", steps=2, global_batch_size=8, device="cpu", **more
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_option_that_the_message_names_accepts_the_skipped_images(
    command: str,
    tiny_tokenizer: Callable[..., Path],
    picture_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vqpipe.data.batches.MIN_IMAGES_SEEN", 1)
    (picture_folder / "drawn-3.png").write_bytes(b"no picture")
    settings = SMALL.get(command, [])
    options = {"overrides": settings} if settings else {}

    def run(out: str, **more: Any) -> None:
        COMMANDS[command]([str(picture_folder)], tiny_tokenizer(f"of-{out}"), tmp_path / out, **options | more)

    with pytest.raises(DataError, match="images cannot be used") as refused:
        run("strict")
    named = re.search(r"or raise (--max-skipped|--set \S+), and choose another --out", refused.value.hint)
    assert named is not None
    setting = named[1].removeprefix("--set ")
    run(
        "lenient",
        **{"max_skipped": 0.5} if setting == "--max-skipped" else {"overrides": [*settings, f"{setting}=0.5"]},
    )
    assert open_artifact(tmp_path / "lenient").path == tmp_path / "lenient"
