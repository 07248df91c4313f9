"""A training step does not wait for the GPU: it runs on fake CUDA tensors, which raise where their data is read.

`.item()`, `.cpu()`, `bool(tensor)`, `nonzero` and the like are errors on them. PyTorch's autograd engine needs a real
GPU, so the backward pass is replaced: all gradients are zero.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import (
    CvqConfig,
    EmaConfig,
    FsqConfig,
    LcConfig,
    LfqConfig,
    MultiGroupConfig,
    QuantizerConfig,
    SimVqConfig,
    VqConfig,
)
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.nonfinite import BatchNormStatistics
from vqpipe.training.running_metrics import StepOutput
from vqpipe.training.tokenizer_task import TokenizerTask

QUANTIZERS: dict[str, QuantizerConfig] = {
    "lc": LcConfig(codebook_size=64, feature_dim=16, code_dim=4),
    "vq": VqConfig(codebook_size=64, code_dim=4),
    "simvq": SimVqConfig(codebook_size=64, code_dim=4),
    "ema": EmaConfig(codebook_size=64, code_dim=4),
    "fsq": FsqConfig(levels=(8, 5, 5, 5)),
    "lfq": LfqConfig(code_dim=6),
    "multi_group": MultiGroupConfig(num_groups=2, group=VqConfig(codebook_size=64, code_dim=4), masking="off"),
    "multi_group of ema": MultiGroupConfig(num_groups=2, group=EmaConfig(codebook_size=64, code_dim=4), masking="off"),
    "multi_group of cvq": MultiGroupConfig(
        num_groups=2, group=CvqConfig(codebook_size=64, code_dim=4, normalize=True), masking="off"
    ),
}
READING = ("multi_group of cvq",)
"""Of these the update reads how many codes are unused: it computes distances of those alone, which takes less time."""
FAST = [(1, "lc"), (1, "multi_group of cvq"), (2, "ema")]
"""Cases that are tested each time: a fake step takes seconds. (Number of parts of a batch, quantizer.)"""
READS = (DataDependentOutputException, DynamicOutputShapeException)


class NoCopies(TorchDispatchMode):
    """An error for a copy from the GPU to the CPU, which waits for the GPU. (Fake tensors allow it.)"""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "cpu":
            assert not any(isinstance(each, Tensor) and each.is_cuda for each in args), f"{function} reads from the GPU"
        return result


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CUDA device of fake tensors, whose gradients are zero."""

    def backward(loss: Tensor) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(map(torch.zeros_like, [inputs] if isinstance(inputs, Tensor) else inputs))

    parameters: list[Tensor] = []
    register = torch.nn.Module.register_parameter

    def remember(module: torch.nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            parameters.append(parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", remember)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies(), torch.device("cuda"):
        yield torch.device("cuda")


def make_task(quantizer: QuantizerConfig, device: torch.device, **settings: Any) -> TokenizerTask:
    """A tokenizer that is trained with every term, on fake tensors."""
    config = VqganConfig(
        base_channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
        quantizer=quantizer,
    )
    model = build_autoencoder(config)
    for module in model.modules():
        if isinstance(getattr(module, "loaded", None), bool):
            module.loaded = True
    weights = dict.fromkeys(model.quantizer.loss_names, 0.1)
    objective = ObjectiveConfig(l1=1.0, charbonnier=1.0, perceptual="none", adversarial=0.1, lecam=0.1, **weights)
    task = TokenizerTask(
        model,
        PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=1)),
        Objective(objective, model.quantizer.loss_names),
    )
    task.prepare(TokenizerTrainConfig(clip_norm=1.0, weight_ema=0.9, **settings), device, model)
    task.connect()
    return task


def step(task: TokenizerTask, number: int) -> StepOutput[Any]:
    """The step without the copy of its images to the GPU."""
    images = torch.zeros(4, 3, 16, 16)
    reconstruction, values, skipped = task.autoencoder_step(images, number)
    more, not_moved = task.discriminator_step(images, reconstruction, number)
    return StepOutput(values | more, skipped, skipped | not_moved, reconstruction)


@pytest.mark.parametrize(
    ("accumulate", "kind"),
    [
        pytest.param(accumulate, kind, marks=[] if (accumulate, kind) in FAST else pytest.mark.slow)
        for accumulate in (1, 2)
        for kind in QUANTIZERS
    ],
)
def test_a_step_and_its_metrics_read_nothing_from_the_gpu(kind: str, accumulate: int, fake_cuda: torch.device) -> None:
    task = make_task(QUANTIZERS[kind], fake_cuda, accumulate=accumulate)
    metrics, statistics = task.running_metrics(), BatchNormStatistics(*task.networks.values())
    for number in range(2):
        statistics.remember()
        output = step(task, number)
        statistics.restore(output.skipped)
        metrics.update(output)
    assert output.result.images.is_cuda
    assert output.skipped.is_cuda


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("simvq", "multi_group of ema") else pytest.mark.slow)
        for kind in QUANTIZERS
        if kind not in READING
    ],
)
def test_the_update_of_a_codebook_reads_nothing_from_the_gpu(kind: str, fake_cuda: torch.device) -> None:
    task = make_task(QUANTIZERS[kind], fake_cuda)
    output = step(task, 0)
    task.model.quantizer.update(output.result.latent, output.result.quantized.ids)


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, bool, float, Tensor.nonzero, Tensor.unique])
def test_the_test_finds_a_read(read: Any, fake_cuda: torch.device) -> None:
    with pytest.raises((*READS, RuntimeError)):
        read(torch.zeros((), device=fake_cuda) if read in (Tensor.item, bool, float) else torch.zeros(3))


def test_the_test_finds_a_copy_to_the_cpu(fake_cuda: torch.device) -> None:
    with pytest.raises(AssertionError, match="reads from the GPU"):
        torch.zeros(3).cpu()
