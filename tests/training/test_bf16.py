"""Training in bfloat16 by autocast, on the CPU: losses and gradients of a step are close to those in float32."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import BridgedQuantizer, Quantizer, QuantizerConfig
from vqpipe.quantizers.lc import FrozenCodebookQuantizer
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.tokenizer_task import TokenizerTask

EXAMPLES = runpy.run_path(str(Path(__file__).resolve().parents[1] / "quantizers" / "test_contract.py"))["EXAMPLES"]
QUANTIZERS: dict[str, QuantizerConfig] = {config.kind: config for config in reversed(EXAMPLES.values())}
"""The first example of each kind."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "hinge": {"l1": 1.0, "adversarial": 0.1},
    "non_saturating, lecam": {"l2": 1.0, "adversarial": 0.1, "gan_loss": "non_saturating", "lecam": 0.1},
    "non_saturating_hinge, r1": {"charbonnier": 1.0, "adversarial": 0.1, "gan_loss": "non_saturating_hinge"}
    | {"adaptive_weight": False, "r1": 1.0, "r1_every": 1},
    "log_l2": {"log_l2": 1.0},
}
LOSS, FACTOR, COSINE = 0.06, 0.3, 0.6
"""Tolerances: of losses; of the factor of the adversarial term, a ratio of norms of gradients; and the least cosine of
a network's gradients in both precisions. A number in bfloat16 has a relative error up to 2^-9, and some 20 layers
multiply it by about 20^0.5. Latents near the border of two cells then get another code, whose gradient is another one:
with images that differ by 2^-7, the gradients of the same networks in float32 have cosines from 0.7."""
ENTROPY = 0.001
"""Weight of the entropy term. Its softmax multiplies the differences of latents by 100, in float32 as well: at weight
0.1, images that differ by 2^-7 leave a cosine of 0.2."""


def start(quantizer: Quantizer) -> None:
    """Load or draw codes where they are absent or all equal."""
    if isinstance(quantizer, FrozenCodebookQuantizer):
        with torch.no_grad():
            quantizer.codes.normal_()
        quantizer.loaded = True
    if isinstance(quantizer, BridgedQuantizer):
        torch.nn.init.normal_(quantizer.bridge.head.weight)


def step(config: QuantizerConfig, precision: Any, objective: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The values of a first step, and the gradient of each network."""
    torch.manual_seed(0)
    model = build_autoencoder(
        VqganConfig(
            base_channels=16,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            z_channels=16,
            quantizer=config,
        )
    )
    start(model.quantizer)
    coarse = torch.randn(4, 3, 4, 4)
    images = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic").clamp(-1, 1)
    model.whiten_init(images)
    weights = {name: ENTROPY if name == "entropy" else 0.1 for name in model.quantizer.loss_names}
    terms = Objective(ObjectiveConfig(perceptual="none", **weights | objective), model.quantizer.loss_names)
    task = TokenizerTask(model, PatchDiscriminator(DiscriminatorConfig(base_channels=8)), terms)
    task.prepare(TokenizerTrainConfig(precision=precision, global_batch_size=4), torch.device("cpu"), model)
    task.connect()
    torch.manual_seed(1)
    reconstruction, values, skipped = task.autoencoder_step(images, 0)
    assert not skipped
    gradients = [gradient_of(model)]
    if task.adversarial:
        values |= task.discriminator_step(images, reconstruction, 0)[0]
        gradients.append(gradient_of(task.discriminator))
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert reconstruction.images.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    return values, gradients


def gradient_of(network: torch.nn.Module) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])


def assert_close(config: QuantizerConfig, objective: dict[str, Any]) -> None:
    (wide, wide_gradients), (narrow, narrow_gradients) = (step(config, name, objective) for name in ("fp32", "bf16"))
    for name, value in wide.items():
        tolerance = FACTOR if name == "loss/adversarial_weight" else LOSS
        if name.startswith("loss/"):
            assert narrow[name].item() == pytest.approx(value.item(), rel=tolerance, abs=LOSS), name
    for pair in zip(wide_gradients, narrow_gradients, strict=True):
        cosine = torch.nn.functional.cosine_similarity(*pair, dim=0)
        assert cosine > COSINE


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_step_of_each_quantizer_is_close_to_float32(name: str) -> None:
    assert_close(QUANTIZERS[name], {"l1": 1.0})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_each_objective_is_close_to_float32(name: str) -> None:
    assert_close(QUANTIZERS["vq"], OBJECTIVES[name])
