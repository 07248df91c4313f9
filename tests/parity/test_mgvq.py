"""Parity with MGVQ's released code from image to tokens and back, on weights that are a function of their names."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vqpipe.models import Autoencoder, DcaeConfig, build_autoencoder
from vqpipe.quantizers import MultiGroupConfig

CONFIGS = {
    "mgvq_f8c32_g4": DcaeConfig(
        widths=(128, 256, 512, 512),
        encoder_depths=(0, 4, 8, 2),
        decoder_depths=(0, 5, 10, 2),
        quantizer=MultiGroupConfig(),
    ),
    "mgvq_f16c32_g4": DcaeConfig(quantizer=MultiGroupConfig()),
}
SIDES = [64, pytest.param(256, marks=pytest.mark.slow)]


class Case(NamedTuple):
    """A released model and its outputs."""

    model: Autoencoder
    want: dict[str, Tensor]
    keys: dict[str, dict[str, list[int]]]


@pytest.fixture(scope="module", params=CONFIGS)
def case(
    request: pytest.FixtureRequest,
    parity_outputs: Path,
    expected: Callable[[str], dict[str, Tensor]],
    fill: Callable[..., None],
    filled: Callable[..., Tensor],
    uninitialized: Callable[[], AbstractContextManager[None]],
) -> Case:
    keys = json.loads((parity_outputs / "mgvq" / f"keys_{request.param}.json").read_text())
    with uninitialized():
        model = build_autoencoder(CONFIGS[request.param]).eval().requires_grad_(False)
    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        fill(model.get_submodule(part), f"{part}.")
    name = "quantize.embedding.weight"
    codes = filled(name, keys["params"][name], embedding_scale=1.0)
    for group, part in zip(model.quantizer.groups, codes.chunk(model.quantizer.num_groups), strict=True):
        group.codes.copy_(part)
    return Case(model, expected(f"mgvq/parity_{request.param}"), keys)


def codes_of(case: Case, side: int, groups: int = 4) -> Tensor:
    """The codes of the released ids; all but the first `groups` groups are masked."""
    ids = case.want[f"idx{side}"].long().clone()
    ids[:, groups:] = -1
    cells = side // case.model.downsample_factor
    return case.model.quantizer.lookup(ids.view(1, -1), case.model.quantizer.layout(cells, cells))


def test_every_weight_has_the_released_name_and_shape(case: Case) -> None:
    ours = {name: list(tensor.shape) for name, tensor in case.model.state_dict().items()}
    released = case.keys["params"] | case.keys["buffers"]
    assert {name: shape for name, shape in ours.items() if not name.startswith("quantizer.")} == {
        name: shape for name, shape in released.items() if not name.startswith("quantize.")
    }
    parameters = sum(parameter.numel() for parameter in case.model.parameters())
    assert parameters == case.keys["param_count"]


@pytest.mark.parametrize("side", SIDES)
def test_image_to_tokens(case: Case, assert_tokens: Callable[..., None], side: int) -> None:
    assert_tokens(case.model, case.want, side)


@pytest.mark.parametrize("side", SIDES)
def test_tokens_to_image(case: Case, assert_image: Callable[..., None], side: int) -> None:
    codes = codes_of(case, side)
    torch.testing.assert_close(codes[0], case.want[f"quant{side}"], rtol=0, atol=1e-6)
    decoded = case.model.decode(codes)[0]
    assert_image(decoded, case.want, "dec")
    assert_image(decoded, case.want, "deck4_")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("groups", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))])
def test_first_groups_to_image(case: Case, assert_image: Callable[..., None], groups: int, side: int) -> None:
    decoded = case.model.decode(codes_of(case, side, groups))[0]
    assert_image(decoded, case.want, f"deck{groups}_")
