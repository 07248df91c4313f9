"""A step of the tokenizer's training: its optimizers, the losses of the discriminator, and the numbers of a row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.models.autoencoder import Reconstruction
from vqpipe.quantizers import Quantized, VqConfig, build_quantizer
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.running_metrics import StepOutput
from vqpipe.training.tokenizer_task import TokenizerMetrics, TokenizerTask

CPU = torch.device("cpu")
IMAGES = torch.full((4, 3, 8, 8), 0.5)
MakeTask = Callable[..., TokenizerTask]


class Brightness(nn.Module):
    """In place of a discriminator: the mean over an image of x, or of x^2 / 2, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.squared = False

    def forward(self, images: Tensor) -> Tensor:
        values = images.square() / 2 if self.squared else images
        return self.weight * values.mean((1, 2, 3)).unsqueeze(1)


@pytest.fixture
def make_task(tiny_config: Callable[[], VqganConfig]) -> MakeTask:
    """`make_task(quantizer_rate=1.0, **objective)`: a task that is ready for its first step."""

    def make(quantizer_rate: float = 1.0, **objective: Any) -> TokenizerTask:
        torch.manual_seed(0)
        model = build_autoencoder(tiny_config())
        weights = {"l1": 1.0, "commitment": 0.1, "codebook": 0.1, "adversarial": 0.1, "perceptual": "none"}
        terms = Objective(ObjectiveConfig(**weights | objective), model.quantizer.loss_names)
        task = TokenizerTask(model, Brightness(), terms)  # type: ignore[arg-type]
        task.prepare(TokenizerTrainConfig(global_batch_size=4, quantizer_rate=quantizer_rate), CPU, model)
        task.connect()
        return task

    return make


def reconstruction_of(value: float) -> Reconstruction:
    """Reconstructions of IMAGES that are `value` everywhere."""
    return Reconstruction(torch.full_like(IMAGES, value), IMAGES, Quantized(IMAGES, torch.zeros(4, 1), {}))


def test_quantizer_has_its_own_learning_rate(make_task: MakeTask) -> None:
    task = make_task(quantizer_rate=20.0)
    rates = {id(p): group["rate"] for group in task.optimizers["optimizer"].param_groups for p in group["params"]}
    for name, parameter in task.model.named_parameters():
        assert rates[id(parameter)] == (20.0 if name.startswith("quantizer.") else 1.0)


def test_discriminator_learns_to_tell_images_from_reconstructions(make_task: MakeTask) -> None:
    task = make_task(lecam=0.01, lecam_decay=0.5)
    values, _ = task.discriminator_step(IMAGES, reconstruction_of(-0.25), step=0)
    assert (values["loss/real_logit"].item(), values["loss/fake_logit"].item()) == (0.5, -0.25)
    assert values["loss/discriminator"] >= 0.5 * (1 - 0.5) + 0.5 * (1 - 0.25)
    assert task.objective.logit_means.tolist() == [0.25, -0.125]
    assert task.discriminator.weight > 1  # larger logits of images, smaller ones of reconstructions


def test_r1_penalty_is_that_of_images(make_task: MakeTask) -> None:
    task = make_task(r1=1.0, r1_every=1)
    task.discriminator.squared = True  # the gradient of each of n values x is x / n
    values, _ = task.discriminator_step(IMAGES, reconstruction_of(0.0), step=0)
    assert values["loss/r1"].item() == pytest.approx(0.5 * 0.5**2 / (3 * 8 * 8))


def test_squared_error_is_that_of_clamped_images_and_the_loss_is_not(make_task: MakeTask) -> None:
    task = make_task(adversarial=0.0)
    with torch.no_grad():
        task.model.last_layer.zero_()
        task.model.decoder.conv_out.bias.fill_(3.0)  # clamped to 1
    _, values, _ = task.autoencoder_step(IMAGES, 0)
    assert values["squared_error"].item() == pytest.approx(0.5**2)
    assert values["loss/l1"].item() == pytest.approx(2.5)


def test_psnr_and_tokens_of_a_row_leave_out_skipped_steps() -> None:
    metrics = TokenizerMetrics(build_quantizer(VqConfig(codebook_size=8, code_dim=2)), CPU)
    for error, code, skipped in ((0.02, 1, False), (0.06, 3, False), (float("nan"), 5, True)):
        quantized = Quantized(torch.zeros(1, 2, 2, 2), torch.full((1, 4), code), {})
        result = Reconstruction(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2, 2), quantized)
        flag = torch.tensor(skipped)
        metrics.update(StepOutput({"squared_error": torch.tensor(error)}, flag, flag, result))
    row = metrics.compute()
    assert row["psnr"] == pytest.approx(20.0)  # a mean squared error of 0.04, peak to peak 2
    assert (row["window_tokens"], row["utilization"], row["perplexity"]) == (8, 0.25, pytest.approx(2.0))
