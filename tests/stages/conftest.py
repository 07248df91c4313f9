"""Tiny finished artifacts for the stages to read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqpipe import artifacts
from vqpipe.config import from_table
from vqpipe.models import AutoencoderConfig, build_autoencoder
from vqpipe.tokenizer_files import write_tokenizer

TINY: dict[str, Any] = {
    "kind": "vqgan",
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "z_channels": 8,
    "quantizer": {"kind": "vq", "codebook_size": 64, "code_dim": 4},
}


def publish_tokenizer(
    out: Path,
    seed: int = 0,
    history: list[dict[str, float]] | None = None,
    quantizer: dict[str, Any] | None = None,
    image_size: int = 32,
) -> Path:
    """Publish an untrained tokenizer: f = 2, 64 codes unless `quantizer` has others. `history`: its training log."""
    torch.manual_seed(seed)
    table = TINY | {"quantizer": quantizer or TINY["quantizer"]}
    autoencoder = build_autoencoder(from_table(AutoencoderConfig, table, "model"))
    draft = artifacts.start(out, "tokenizer", {"seed": seed}, {"images": "0" * 64})
    assert isinstance(draft, artifacts.Draft)
    with draft:
        write_tokenizer(draft, autoencoder, image_size)
        if history is not None:
            with draft.write("metrics.jsonl") as path:
                path.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        return draft.publish({"quantizer": "vq"}).path


@pytest.fixture(autouse=True)
def _fast_training(fast_training: None) -> None:
    """`fast_training`, for every test here."""


@pytest.fixture
def tiny_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_tokenizer(name, seed, history=rows, quantizer=table)` -> an untrained tokenizer artifact, as above."""
    return lambda name, *args, **options: publish_tokenizer(tmp_path / name, *args, **options)


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    """An untrained AutoencoderKL in diffusers' layout: f = 2, 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    network = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, **blocks)
    network.save_pretrained(tmp_path / "tiny-vae")
    return tmp_path / "tiny-vae"


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures of three classes with their tokenizer, tokens and generator."""

    folder: Path
    pictures: Path
    tokenizer: Path
    tokens: Path
    generator: Path
    """A llamagen of one layer, trained for 4 steps. (Building gpt imports a package that takes ten seconds.)"""


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """8 pictures of each of three classes, 8 px: their tokens, and a generator of these."""
    from stages.tokenize_images import tokenize
    from stages.train_generator import train_generator

    folder = tmp_path_factory.mktemp("drawn")
    made = Drawn(folder, *(folder / name for name in ("pictures", "tokenizer", "tokens", "generator")))
    rows, columns = np.mgrid[0:10, 0:10]
    for number in range(24):
        (made.pictures / str(number % 3)).mkdir(parents=True, exist_ok=True)
        waves = [np.sin(rows / (2 + number % 3) + s + number) + np.cos(columns / 2 + number) for s in range(3)]
        pixels = (np.stack(waves, -1) * 60 + 127).astype(np.uint8)
        Image.fromarray(pixels).save(made.pictures / str(number % 3) / f"{number}.png")
    publish_tokenizer(made.tokenizer, image_size=8)
    tokenize([str(made.pictures)], made.tokenizer, made.tokens, flip=True, num_workers=0, device="cpu")
    train_generator(made.tokenizer, made.generator, tokens=made.tokens, device="cpu", **LLAMAGEN)
    return made


LLAMAGEN: dict[str, Any] = {
    "preset": "llamagen-tiny",
    "steps": 4,
    "global_batch_size": 4,
    "overrides": [
        *("generator.layers=1", "generator.head_layers=1", "generator.width=16", "generator.heads=2"),
        *("train.warmup_steps=1", "train.learning_rate=0.02", "train.weight_ema=0.5"),
        *("examples.held_out=6", "train.sample_every=2", "train.save_every=2"),
        "train.log_every=1",
    ],
}
"""Options of train-generator for a very short run."""


@pytest.fixture
def llamagen_options() -> dict[str, Any]:
    """How `drawn.generator` was trained."""
    return {**LLAMAGEN, "overrides": list(LLAMAGEN["overrides"])}


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Ten drawn pictures of 40 x 48 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows, columns = np.mgrid[0:40, 0:48]
    for number in range(10):
        waves = [np.sin(rows / (3 + number) + shift) + np.cos(columns / (2 + number)) for shift in range(3)]
        Image.fromarray((np.stack(waves, -1) * 63 + 127).astype(np.uint8)).save(folder / f"drawn-{number}.png")
    return folder


@pytest.fixture
def tiny_training() -> dict[str, Any]:
    """Options of `train` for a tokenizer that takes a second for 8 steps of 4 images; without the number of steps."""
    settings = [
        *("data.image_size=32", "model.quantizer.kind=vq", "model.quantizer.codebook_size=40"),
        *("model.base_channels=8", "model.z_channels=8", "model.channel_multipliers=[1, 2]"),
        *("discriminator.base_channels=4", "train.warmup_steps=2", "train.save_every=3", "train.whiten_init=false"),
        *("objective.disc_start=4", "train.sample_every=8", "train.log_every=50", "objective.entropy=0.0"),
    ]
    return {"preset": "smoke", "global_batch_size": 4, "precision": "fp32", "device": "cpu", "overrides": settings}
