"""Parity with LlamaGen's released tokenizer and discriminator, on weights that are a function of their names."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vqpipe.models import Autoencoder, DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import VqConfig

CODES = VqConfig(codebook_size=16384, code_dim=8, normalize=True)
VQ16 = VqganConfig(quantizer=CODES)
VQ8 = VqganConfig(channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,), quantizer=CODES)
MIDDLE = ("block_1", "attn_1", "block_2")
SIDES = [64, pytest.param(256, marks=pytest.mark.slow)]


def our_name(released: str, levels: int) -> str:
    """Our name of LlamaGen's parameter `released`, in networks with `levels` levels."""
    name = released.replace("quantize.embedding.weight", "quantizer.codes").replace(".res.", ".block.")
    name = re.sub(r"^encoder\.conv_blocks\.(\d+)", r"encoder.down.\1", name)
    name = re.sub(r"^decoder\.conv_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    return re.sub(r"\.mid\.(\d)", lambda found: f".mid.{MIDDLE[int(found[1])]}", name)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def released_keys(parity_outputs: Path, name: str) -> dict[str, dict[str, list[int]]]:
    return json.loads((parity_outputs / "mgvq" / f"keys_llamagen_{name}.json").read_text())


@pytest.fixture(scope="module")
def model(
    parity_outputs: Path,
    filled: Callable[..., Tensor],
    uninitialized: Callable[[], AbstractContextManager[None]],
) -> Autoencoder:
    shapes = released_keys(parity_outputs, "vq16")["params"]
    levels = len(VQ16.channel_multipliers)
    weights = {our_name(name, levels): filled(name, shape, embedding_scale=1.0) for name, shape in shapes.items()}
    with uninitialized():
        model = build_autoencoder(VQ16).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def want(expected: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return expected("mgvq/parity_llamagen_vq16")


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "total"),
    [(VQ16, 29_298_176, 42_449_795, 71_883_403), (VQ8, 28_559_232, 41_415_171, 70_109_835)],
    ids=["vq16", "vq8"],
)
def test_number_of_parameters_is_as_published(config: VqganConfig, encoder: int, decoder: int, total: int) -> None:
    with torch.device("meta"):
        model = build_autoencoder(config)
    assert (size_of(model.encoder), size_of(model.decoder), size_of(model)) == (encoder, decoder, total)


def test_discriminator_has_the_released_shapes(parity_outputs: Path) -> None:
    keys = released_keys(parity_outputs, "patchgan")
    discriminator = PatchDiscriminator(DiscriminatorConfig(num_layers=3)).eval()
    shapes = {name: list(tensor.shape) for name, tensor in discriminator.state_dict().items()}
    assert shapes == keys["params"] | keys["buffers"]
    assert size_of(discriminator) == keys["param_count"]


@pytest.mark.parametrize("side", SIDES)
def test_image_to_tokens(
    model: Autoencoder, want: dict[str, Tensor], assert_tokens: Callable[..., None], side: int
) -> None:
    assert_tokens(model, want, side)


@pytest.mark.parametrize("side", SIDES)
def test_tokens_to_image(
    model: Autoencoder, want: dict[str, Tensor], assert_image: Callable[..., None], side: int
) -> None:
    cells = side // model.downsample_factor
    codes = model.quantizer.lookup(want[f"idx{side}"].long().view(1, -1), model.quantizer.layout(cells, cells))
    torch.testing.assert_close(codes[0], want[f"quant{side}"], rtol=0, atol=1e-6)
    decoded = model.decode(codes)[0]
    assert_image(decoded, want, "dec")
    assert_image(decoded, want, "decode_code")
