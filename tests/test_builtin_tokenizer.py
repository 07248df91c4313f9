"""`builtin:photos-f8`, the tokenizer inside the package, and the script that packs one."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vqpipe import Tokenizer
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import open_images
from vqpipe.errors import ConfigError
from vqpipe.quantizers import LcConfig, QuantizerConfig
from vqpipe.tokenizer_files import PRETRAINED

NAME = "builtin:photos-f8"
PACK = Path(__file__).resolve().parents[1] / "stages" / "runs" / "builtin" / "pack.py"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(NAME)


def reconstruct(tokenizer: Tokenizer, spec: str) -> tuple[float, int]:
    """Mean PSNR in dB of the first 48 images at 128 px, and the number of distinct codes."""
    batch = next(iter(OrderedBatches(open_images(spec), image_size=128, batch_size=48)))
    ids = tokenizer.encode(batch.images)
    errors = (tokenizer.decode(ids, 128).double() - batch.images) / 255
    return float((-10 * errors.square().mean(dim=(1, 2, 3)).log10()).mean()), len(ids.unique())


def test_file_is_under_7_mb_in_float16_and_opens_in_float32(tokenizer: Tokenizer) -> None:
    path = PRETRAINED / "photos-f8" / "model.safetensors"
    assert path.stat().st_size < 7_000_000
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert {tensor.dtype for tensor in tokenizer.autoencoder.state_dict().values()} == {torch.float32}
    assert (tokenizer.name, tokenizer.codebook_size, tokenizer.downsample_factor) == ("photos-f8", 16384, 8)


def test_photographs_are_reconstructed_within_bounds(tokenizer: Tokenizer) -> None:
    quality, codes = reconstruct(tokenizer, "builtin:photos/heldout")
    assert 25 < quality < 27
    assert codes > 2800


def test_drawn_pictures_are_reconstructed_within_bounds(
    tokenizer: Tokenizer, draw_folder: Callable[..., Path], tmp_path: Path
) -> None:
    quality, _ = reconstruct(tokenizer, str(draw_folder(tmp_path / "drawn", 8, side=128)))
    assert 26 < quality < 29


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "--images", "photos", "--out", "report", "--num-workers", "0"),
        ("reconstruct", "photos/00.png", "--out", "pair.png"),
        ("tokenize", "--images", "photos", "--out", "tokens", "--num-workers", "0"),
        ("detokenize", "--tokens", "tokens", "--out", "images"),
    ],
    ids=lambda words: words[0],
)
def test_commands_open_it_by_name(vqpipe: Callable[..., Any], folder: Path, words: tuple[str, ...]) -> None:
    done = vqpipe(folder, *words, "--tokenizer", NAME)
    assert done.returncode == 0, done.stderr
    assert (folder / words[words.index("--out") + 1]).exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draw_folder: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    draw_folder(folder / "photos", 3, side=140)
    return folder


def test_packed_tokenizer_gives_nearly_the_same_ids(
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer], tmp_path: Path
) -> None:
    trained = small_tokenizer(LcConfig(codebook_size=50, feature_dim=16, code_dim=4, codebook_init="uniform"))
    trained.save_pretrained(tmp_path / "trained")
    runpy.run_path(str(PACK))["pack"](tmp_path / "trained", tmp_path / "packed")
    packed = Tokenizer.from_pretrained(tmp_path / "packed")
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert (packed.encode(images) == trained.encode(images)).float().mean() > 0.98
    assert packed.image_size == 32


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"there is no tokenizer builtin:photos\. Use builtin:photos-f8"):
        Tokenizer.from_pretrained("builtin:photos")
