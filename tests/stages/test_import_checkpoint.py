"""`vqpipe import-checkpoint`: imported weights give the published ids and pixels and work in the other commands.

For the reference outputs, checkpoints are written in the released layout, filled by name.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages import cli, signals
from stages.evaluate import evaluate
from stages.import_checkpoint import import_checkpoint
from stages.tokenize_images import tokenize
from stages.train import train
from vqpipe import Tokenizer
from vqpipe.artifacts import open_artifact
from vqpipe.models import Autoencoder, DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import LcConfig, VqConfig

SIZES: dict[str, Any] = {"base_channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 6}
SAME_SIZES = [f"model.{key}={value}" for key, value in SIZES.items()] + [
    "model.attention_resolutions=[128]",
    "model.quantizer.kind=vq",
    "model.quantizer.codebook_size=20",
    "model.quantizer.code_dim=5",
    "discriminator.base_channels=4",
    "discriminator.num_layers=3",
]


@pytest.fixture
def taming() -> dict[str, Any]:
    """A small VQGAN of f = 2 with its discriminator, in the layout of taming-transformers."""
    torch.manual_seed(0)
    sizes = {**SIZES, "channel_multipliers": tuple(SIZES["channel_multipliers"])}
    quantizer = VqConfig(codebook_size=20, code_dim=5)
    model = build_autoencoder(VqganConfig(quantizer=quantizer, attention_resolutions=(128,), **sizes))
    weights = {
        name.replace("quantizer.codes", "quantize.embedding.weight"): value
        for name, value in model.state_dict().items()
    }
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=3)).state_dict()
    weights |= {f"loss.discriminator.{name}": value for name, value in discriminator.items()}
    weights["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    return {"state_dict": weights, "epoch": 7, "optimizer_states": [{"state": {}}]}


def test_imported_tokenizer_works_in_tokenize_eval_and_fine_tuning(
    taming: dict[str, Any], picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "last.ckpt", tmp_path / "imported"
    torch.save(taming, file)
    import_checkpoint(file, out, device="cpu")
    assert "ignored in the training state: epoch, optimizer_states" in capsys.readouterr().err
    artifact = open_artifact(out, "tokenizer")
    artifact.verify()
    facts = {"quantizer": "vq", "codebook_size": 20, "num_groups": 1, "downsample_factor": 2, "family": "taming"}
    assert artifact.facts == facts
    assert set(artifact.names()) == {"README.md", "config.json", "discriminator.safetensors", "model.safetensors"}
    assert "last.ckpt" in (out / "README.md").read_text(encoding="utf-8")
    import_checkpoint(file, out, family="auto", device="cpu")
    assert "already published" in capsys.readouterr().err

    images = [str(picture_folder)]
    tokenize(images, out, tmp_path / "tokens", image_size=32, device="cpu")
    assert open_artifact(tmp_path / "tokens").facts["num_tokens"] == 256
    evaluate(images, out, tmp_path / "report", image_size=32, device="cpu")
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["num_images"] == 10

    settings = [*SAME_SIZES, "data.image_size=32", "train.whiten_init=false", "objective.disc_start=0"]
    settings += ["train.learning_rate=0.0", "train.warmup_steps=0", "train.global_batch_size=2"]
    train(images, tmp_path / "tuned", preset="smoke", steps=2, source=out, overrides=settings, device="cpu")
    for name in ("model.safetensors", "discriminator.safetensors"):
        before, after = load_file(out / name), load_file(tmp_path / "tuned" / name)
        changed = [key for key, value in before.items() if not torch.equal(after[key], value)]
        assert all("running" in key or "batches" in key for key in changed)  # the learning rate is 0


def test_codebook_released_in_a_separate_file(tmp_path: Path) -> None:
    quantizer = LcConfig(codebook_size=20, code_dim=4, feature_dim=6)
    model = build_autoencoder(
        VqganConfig(quantizer=quantizer, base_channels=8, channel_multipliers=(1, 2), z_channels=6)
    )
    codebook = torch.randn(20, 6)
    model.quantizer.load_codebook(codebook)
    weights = {
        name.replace("quantizer.projector.0", "codebook_projection"): value
        for name, value in model.state_dict().items()
        if not name.startswith(("quantizer.codes", "quantizer.shift", "quantizer.scale"))
    }
    torch.save({"model": weights}, tmp_path / "lc.pth")
    torch.save(codebook, tmp_path / "codebook-100K.pth")
    import_checkpoint(tmp_path / "lc.pth", tmp_path / "out", codebook=tmp_path / "codebook-100K.pth", device="cpu")
    images = 2 * torch.rand(2, 3, 16, 16) - 1
    imported = Tokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(imported.encode(images), Tokenizer(model).encode(images))
    assert set(open_artifact(tmp_path / "out").inputs) == {"checkpoint", "codebook"}


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """refuse(words): run the command, check that it fails and leaves no files, and return its one error line."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}

    def refuse(*words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["vqpipe", "import-checkpoint", *words, "--out", "published"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert (ended.value.code, captured.out) == (1, "")
        assert not list(tmp_path.glob("published*"))
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line

    yield refuse
    for number, handler in before.items():
        signal.signal(number, handler)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.marker),)


def test_errors_are_one_line_and_leave_no_files(
    taming: dict[str, Any], tmp_path: Path, refuse: Callable[..., str]
) -> None:
    torch.save(taming, tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "truncated.ckpt").write_bytes(content[: len(content) // 2])
    assert "cannot be read as weights" in refuse("truncated.ckpt")
    (tmp_path / "lc").mkdir()
    assert refuse("lc") == "error: lc is a folder. Name the file of weights in it."
    (tmp_path / "lc" / "manifest.json").write_text('{"name": "of a web page"}')
    assert refuse("lc") == "error: lc is a folder. Name the file of weights in it."
    (tmp_path / "lc" / "manifest.json").write_text('{"schema": 1, "kind": "codebook", "request": "", "files": {}}')
    assert refuse("lc") == "error: lc is a vqpipe artifact, not a file of weights. It needs no import."
    assert "absent.ckpt is neither a file nor a name of vqpipe zoo" in refuse("absent.ckpt")
    assert "Known are vqgan-lc" not in refuse("last.ckpt", "--family", "mgvq")
    assert "Did you mean taming" in refuse("last.ckpt", "--family", "tamming")
    torch.save(torch.eye(20, 6), tmp_path / "codes.pth")
    assert "contains a codebook or needs none" in refuse("last.ckpt", "--codebook", "codes.pth")

    weights, key = taming["state_dict"], "decoder.norm_out.bias"
    broken = {
        "has unexpected weights: extra.weight": {**weights, "extra.weight": torch.zeros(1)},
        "lacks decoder.norm_out.bias": {
            name: value for name, value in weights.items() if name != "decoder.norm_out.bias"
        },
        "has shape [3], not [8]": {**weights, key: torch.zeros(3)},
        "contains NaN": {**weights, key: torch.full((8,), torch.nan)},
        "Known are vqgan-lc, mgvq": {"vision.patch_embedding.weight": torch.zeros(1)},
        "no code in it was executed": {**weights, "a": Attack(tmp_path / "ran")},
    }
    for message, state in broken.items():
        torch.save({"state_dict": state}, tmp_path / "broken.ckpt")
        assert message in refuse("broken.ckpt")
    assert not (tmp_path / "ran").exists()


def filled(name: str, shape: list[int], embedding_scale: float) -> Tensor:
    """The weight called `name` in the reference; buffers have their defaults."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith(("running_mean", "codebook_used", "embed_prob", "cluster_size")):
        return torch.zeros(shape)
    if name.endswith("running_var"):
        return torch.ones(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) & 0x7FFFFFFF))
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.02 * noise
    return (embedding_scale if name.endswith(("embedding.weight", "embeddings.weight")) else 0.02) * noise


@pytest.fixture
def imported(tmp_path: Path) -> Iterator[Callable[..., Autoencoder]]:
    """imported(state, family): write a training state, import it, and open the tokenizer."""

    def imported(state: dict[str, Any], family: str) -> Autoencoder:
        torch.save(state, tmp_path / "released.pt")
        import_checkpoint(tmp_path / "released.pt", tmp_path / "out", device="cpu")
        assert open_artifact(tmp_path / "out").facts["family"] == family
        return Tokenizer.from_pretrained(tmp_path / "out").autoencoder

    yield imported
    shutil.rmtree(tmp_path)  # a gigabyte


def image() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_ids(found: Tensor, expected: Any, gap: Any, smallest: float) -> None:
    """Compare ids where the two nearest codes differ by more than rounding."""
    clear = torch.from_numpy(gap).flatten() > smallest
    assert clear.float().mean() > 0.9
    assert torch.equal(found.flatten()[clear], torch.from_numpy(expected).flatten().long()[clear])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lc_f16_cb1", "fc_f16", "ema_f16", "vqgan_f16"])
@torch.no_grad()
def test_vqgan_lc_matches_the_published_tokenizer(
    parity_outputs: Path, imported: Callable[..., Autoencoder], variant: str
) -> None:
    keys = json.loads((parity_outputs / "vqgan_lc" / "keys.json").read_text())[variant]
    scale = 1.0 if variant.endswith("_cb1") else 0.02
    weights = {name: filled(name, shape, scale) for name, shape in keys.items()}
    if "embed_avg" in weights:
        weights["embed_avg"] = weights["tok_embeddings.weight"]
    state = {"model": {f"module.{name}": value for name, value in weights.items()}, "args": argparse.Namespace(lr=5e-4)}
    model = imported(state, "vqgan-lc")
    with np.load(parity_outputs / "vqgan_lc" / f"{variant}.npz") as want:
        quantized = model.encode(image())
        gap = 1e-4 if variant == "vqgan_f16" else 1e-5
        assert_ids(quantized.ids, want["s64_tokens"], want["s64_top2_dist_gap"], gap)
        decoded = model.decode(quantized.codes)
        torch.testing.assert_close(decoded, torch.from_numpy(want["s64_dec"]), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "keys", "arrays"),
    [
        ("llamagen", "keys_llamagen_vq16", "parity_llamagen_vq16"),
        ("mgvq", "keys_mgvq_f16c32_g4", "parity_mgvq_f16c32_g4"),
        ("mgvq", "keys_mgvq_f8c32_g4", "parity_mgvq_f8c32_g4"),
    ],
)
@torch.no_grad()
def test_llamagen_and_mgvq_match_the_published_tokenizers(
    parity_outputs: Path, imported: Callable[..., Autoencoder], family: str, keys: str, arrays: str
) -> None:
    table = json.loads((parity_outputs / "mgvq" / f"{keys}.json").read_text())
    shapes = {**table["params"], **table["buffers"]}
    model = imported({"model": {name: filled(name, shape, 1.0) for name, shape in shapes.items()}}, family)
    with np.load(parity_outputs / "mgvq" / f"{arrays}.npz") as want:
        assert_ids(model.encode(image()).ids, want["idx64"], want["margin64"], 1e-3)
        ids = torch.from_numpy(want["idx64"]).long().flatten()[None]
        side = 64 // model.downsample_factor
        decoded = model.decode(model.quantizer.lookup(ids, model.quantizer.layout(side, side)))
        torch.testing.assert_close(decoded[0], torch.from_numpy(want["dec64"]), rtol=0, atol=1e-4)
