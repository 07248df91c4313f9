"""A continuous autoencoder beside diffusers' own way to open and run it, and folders that cannot be opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqpipe import Tokenizer
from vqpipe.continuous import WEIGHTS, ContinuousAutoencoder, open_autoencoder
from vqpipe.data.transforms import to_float, to_uint8
from vqpipe.errors import ArtifactError, ConfigError, DataError, NumericError, WeightsError


@pytest.fixture(scope="module")
def network() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    return AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=4, **blocks).eval()


@pytest.fixture
def folder(network: Any, tmp_path: Path) -> Path:
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_latents_and_images_are_those_of_diffusers(network: Any, folder: Path, images: torch.Tensor) -> None:
    opened = open_autoencoder(folder)
    assert isinstance(opened, ContinuousAutoencoder)
    latents = opened.encode(images)
    with torch.no_grad():
        expected = network.encode(to_float(images)).latent_dist.mean
        again = network.decode(expected).sample
    # Weights read from a file lie otherwise in memory, and some CPUs then take another convolution.
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    difference = opened.decode(latents, (32, 24)).int() - to_uint8(again).int()
    assert difference.abs().max() <= 1
    assert difference.ne(0).float().mean() < 0.01
    assert (opened.downsample_factor, opened.latent_shape(32, 24)) == (4, (4, 8, 6))
    assert opened.name == "vae"


def test_the_attention_names_of_2022_and_half_precision_are_read(folder: Path, images: torch.Tensor) -> None:
    before = open_autoencoder(folder).encode(images)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / WEIGHTS)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(open_autoencoder(folder).encode(images), before)
    save_file({key: value.half() for key, value in tensors.items()}, folder / WEIGHTS)
    assert torch.allclose(open_autoencoder(folder).encode(images), before, atol=1e-2)


def test_its_digest_follows_weights_and_config(folder: Path) -> None:
    first = ContinuousAutoencoder.from_pretrained(folder).digest
    tensors = load_file(folder / WEIGHTS)
    save_file({key: value * 2 for key, value in tensors.items()}, folder / WEIGHTS)
    second = ContinuousAutoencoder.from_pretrained(folder).digest
    change_config(folder, norm_num_groups=2)
    assert len({first, second, ContinuousAutoencoder.from_pretrained(folder).digest}) == 3


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def lose_a_key(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, folder / WEIGHTS)


def leave_only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def change_config(folder: Path, **settings: Any) -> None:
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(table | settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_short, "cannot be read as weights"),
        (lose_a_key, r"do not fit their config: .*decoder\.conv_in\.bias"),
        (leave_only_a_pickle, "its pickle is not opened. Fetch config.json and diffusion_pytorch_model.safetensors of"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors. Fetch"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json of diffusers"),
        (lambda folder: change_config(folder, _class_name="AutoencoderTiny"), "diffusers' AutoencoderTiny"),
        (lambda folder: change_config(folder, norm_num_groups=3), "does not describe an AutoencoderKL"),
        (lambda folder: change_config(folder, depth=3), "does not describe an AutoencoderKL: .*'depth'"),
        (lambda folder: change_config(folder, latent_channels=5), "do not fit their config"),
        (lambda folder: change_config(folder, in_channels=4), "not for images of three channels"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(folder: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(folder)
    with pytest.raises(WeightsError, match=said) as told:
        open_autoencoder(folder)
    assert "\n" not in str(told.value)


def test_released_ones_are_not_downloaded_but_asked_for() -> None:
    with pytest.raises(WeightsError, match=r"not downloaded\. Fetch .* of stabilityai/sd-vae-ft-mse \(SD-VAE\) or"):
        open_autoencoder("stabilityai/sd-vae-ft-mse")
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        open_autoencoder("/absent")


def test_it_has_no_tokens_and_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"continuous autoencoder \(diffusers' AutoencoderKL\), which has no tokens"):
        Tokenizer.from_pretrained(folder)


def test_wrong_images_and_latents_are_refused(folder: Path, images: torch.Tensor) -> None:
    opened = open_autoencoder(folder)
    with pytest.raises(DataError, match="does not divide into cells of 4"):
        opened.encode(images[:, :, :30])
    with pytest.raises(DataError, match="not those of"):
        opened.decode(torch.zeros(1, 4, 8, 6), (32, 32))
    with pytest.raises(DataError, match="Leave --groups out"):
        opened.decode(torch.zeros(1, 4, 8, 8), (32, 32), groups=1)
    with pytest.raises(NumericError, match="NaN"):
        opened.decode(torch.full((1, 4, 8, 8), float("nan")), (32, 32))
