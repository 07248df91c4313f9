"""Parity with MGVQ's released GPT-B with its head over four groups, on weights that are a function of their names.

The labels of the reference are the classes 207 and 980, its codebook is the tokenizer's as stored.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vqpipe.generation import SamplingConfig, Space
from vqpipe.generation.llamagen import LlamaGen, LlamaGenConfig
from vqpipe.quantizers import TokenLayout

GROUPS, CODES, CODE_DIM, SIDE = 4, 8192, 8, 4
LABELS = torch.tensor([207, 980])
CLOSE = {"rtol": 0, "atol": 1e-5}


class Case(NamedTuple):
    """Our model and the outputs of the released one."""

    model: LlamaGen
    want: dict[str, Tensor]
    keys: dict[str, list[int]]
    num_parameters: int


def released_name(ours: str) -> str:
    return ours.replace("img_projector.layers.", "img_projector.")


@pytest.fixture(scope="module")
def case(
    parity_outputs: Path,
    expected: Callable[[str], dict[str, Tensor]],
    filled: Callable[..., Tensor],
    uninitialized: Callable[[], AbstractContextManager[None]],
) -> Case:
    keys = json.loads((parity_outputs / "mgvq" / "keys_mgvq_gpt_b_g4.json").read_text())
    space = Space(
        layout=TokenLayout(((SIDE, SIDE),), GROUPS),
        codebook_size=CODES,
        latent_dim=GROUPS * CODE_DIM,
        code_dim=CODE_DIM,
        num_classes=1000,
    )
    with uninitialized():
        model = LlamaGen(LlamaGenConfig(), space).eval().requires_grad_(False)
    for ours, weight in model.named_parameters():
        name = released_name(ours)
        value = filled(name, keys["params"][name])
        weight.copy_(value[:, : GROUPS + 1] if name == "ar_head.pos_emb" else value)
    table = filled("quantize.embedding.weight", (GROUPS * CODES, CODE_DIM), embedding_scale=1.0)
    model.load_codebook(table.view(GROUPS, CODES, CODE_DIM))
    return Case(model, expected("mgvq/parity_mgvq_gpt_b_g4"), keys["params"], keys["param_count"])


def test_every_used_weight_has_the_released_name_and_shape(case: Case) -> None:
    ours = {released_name(name): list(weight.shape) for name, weight in case.model.named_parameters()}
    unused = {name for name in case.keys if "adaLN" in name}
    assert {**ours, "ar_head.pos_emb": [1, SIDE * SIDE, 768]} == {
        name: shape for name, shape in case.keys.items() if name not in unused
    }
    dead = sum(shape[0] * shape[1] for name, shape in case.keys.items() if name in unused)
    positions = (SIDE * SIDE - GROUPS - 1) * 768
    assert sum(weight.numel() for weight in case.model.parameters()) == case.num_parameters - dead - positions


def test_head(case: Case) -> None:
    logits = case.model.ar_head.head(case.model.ar_head(case.want["feature"][:, 0], case.want["ids"][:, :-1].long()))
    torch.testing.assert_close(logits[..., :128], case.want["logits_head128"][:, 1:], **CLOSE)
    moments = torch.stack([logits.mean(-1), logits.std(-1)], dim=-1)
    torch.testing.assert_close(moments, case.want["logits_meanstd"][:, 1:], **CLOSE)
    assert torch.equal(logits.argmax(-1), case.want["logits_argmax"][:, 1:].long())


def test_prefill(case: Case) -> None:
    none = torch.empty(2, 0, dtype=torch.long)
    trunk = case.model.trunk(LABELS, none)[:, 0]
    torch.testing.assert_close(trunk, case.want["prefill_hidden"], **CLOSE)
    logits = case.model.ar_head.head(case.model.ar_head(trunk, none))[:, 0, :128]
    torch.testing.assert_close(logits, case.want["prefill_logits_group0_head128"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_greedy_ids(case: Case, scale: float) -> None:
    sampling = SamplingConfig(temperature=0.0, cfg_scale=scale)
    ids = case.model.sample(LABELS, sampling, [torch.Generator(), torch.Generator()])
    assert torch.equal(ids.view(2, SIDE * SIDE, GROUPS), case.want[f"greedy_idx_cfg{scale}"].long())
