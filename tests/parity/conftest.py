"""Shared by the parity tests: weights that are a function of their released names, and one input image."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.models import Autoencoder

NONE: Mapping[str, str] = {}


def filled_weight(name: str, shape: Sequence[int], embedding_scale: float = 0.02) -> Tensor:
    """The weight called `name` in the reference; codebooks are scaled by `embedding_scale`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    noise = torch.randn(tuple(shape), generator=generator)
    if name.endswith(("embedding.weight", "embeddings.weight")):
        return embedding_scale * noise
    return 1 + 0.02 * noise if len(shape) == 1 and name.endswith(".weight") else 0.02 * noise


@torch.no_grad()
def fill_network(
    network: nn.Module, prefix: str = "", *, names: Mapping[str, str] = NONE, embedding_scale: float = 0.02
) -> None:
    """Fill every weight, and a frozen codebook, by its released name: `names[ours]`, else prefix + ours."""
    for ours, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) or ours.endswith("codes"):
            tensor.copy_(filled_weight(names.get(ours, prefix + ours), tensor.shape, embedding_scale))


@pytest.fixture(scope="session")
def filled() -> Callable[..., Tensor]:
    """filled(name, shape): the weight of that name."""
    return filled_weight


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """fill(network, prefix, names=..., embedding_scale=...): fill a network in place."""
    return fill_network


@pytest.fixture(scope="session")
def image() -> Callable[[int], Tensor]:
    """image(side): the input of the reference, float[1, 3, side, side]."""
    return lambda side: torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def expected(parity_outputs: Path) -> Callable[[str], dict[str, Tensor]]:
    """expected("family/file"): the outputs of the reference by name."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(parity_outputs / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}

    return read


@pytest.fixture(scope="session")
def assert_tokens(image: Callable[[int], Tensor]) -> Callable[[Autoencoder, dict[str, Tensor], int], None]:
    """assert_tokens(model, want, side): compare latents, ids and codes with the reference of MGVQ or LlamaGen."""

    def assert_tokens(model: Autoencoder, want: dict[str, Tensor], side: int) -> None:
        encoded = model.encoder(image(side))
        torch.testing.assert_close(encoded[0], want[f"enc{side}"], rtol=0, atol=1e-3)
        latent = model.quant_conv(encoded)
        torch.testing.assert_close(latent[0], want[f"pre{side}"], rtol=0, atol=1e-4)
        quantized = model.quantizer(latent)
        released = want[f"idx{side}"].long()
        ids = quantized.ids.view_as(released)
        clear = want[f"margin{side}"] > 1e-3  # the two nearest codes differ by more than rounding
        assert clear.float().mean() > 0.9
        assert torch.equal(ids[clear], released[clear])
        assert (ids != released).float().mean() <= 1e-3
        agree = (ids == released).all(1).view(latent.shape[2:])
        torch.testing.assert_close(quantized.codes[0][:, agree], want[f"quant{side}"][:, agree], rtol=0, atol=1e-6)

    return assert_tokens


@pytest.fixture(scope="session")
def assert_image() -> Callable[[Tensor, dict[str, Tensor], str], None]:
    """assert_image(image, want, name): compare all pixels at 64 px, else 8 x 8 means and a center crop."""

    def assert_image(image: Tensor, want: dict[str, Tensor], name: str) -> None:
        close = {"rtol": 0, "atol": 1e-4}
        side = image.shape[-1]
        if side == 64:
            torch.testing.assert_close(image, want[f"{name}64"], **close)
        else:
            torch.testing.assert_close(F.avg_pool2d(image, 8), want[f"{name}{side}_avg8"], **close)
            torch.testing.assert_close(image[:, 112:144, 112:144], want[f"{name}{side}_crop"], **close)
        moments = torch.stack([image.mean((1, 2)), image.std((1, 2))], dim=1)
        torch.testing.assert_close(moments, want[f"{name}{side}_meanstd"], **close)

    return assert_image
