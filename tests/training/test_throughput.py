"""FLOPs of a step, against a count by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import Autoencoder, DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.throughput import FlopsPerImage, Throughput, count_flops, peak_of

SIZE = 32


Networks = tuple[Autoencoder, PatchDiscriminator, Objective]


@pytest.fixture
def networks(tiny_config: Callable[[], VqganConfig]) -> Networks:
    objective = Objective(ObjectiveConfig(l1=1.0, perceptual="none", codebook=1.0, commitment=0.25, adversarial=0.1))
    return build_autoencoder(tiny_config()), PatchDiscriminator(DiscriminatorConfig(base_channels=4)), objective


def convolutions(network: nn.Module, run: object) -> list[float]:
    """FLOPs of each convolution during `run()`, in order, by the textbook formula."""
    found: list[float] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        height, width = layer.kernel_size
        found.append(2.0 * output.numel() * layer.in_channels // layer.groups * height * width)

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        run()  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return found


def test_flops_equal_a_count_by_hand(networks: Networks) -> None:
    model, discriminator, objective = networks
    images = torch.zeros(1, 3, SIZE, SIZE)
    flops = count_flops(TokenizerTrainConfig(), model, discriminator, objective, SIZE)
    parts = convolutions(model, lambda: model.decode(model.latent(images)))
    tokens, channels = (SIZE // 2) ** 2, 16
    attention = 2 * 2 * (2 * tokens**2 * channels)  # two blocks, each queries x keys and shares x values
    # Forward, the gradient of the weights and that of the inputs, which the first layer does not need. The backward
    # pass of attention has four products, and computes queries x keys again.
    assert flops.autoencoder == 3 * sum(parts) - parts[0] + 3.5 * attention
    parts = convolutions(discriminator, lambda: discriminator(images))
    assert flops.discriminator == 8 * sum(parts) - 2 * parts[0]


def test_images_that_are_one_patch_of_the_discriminator_are_counted(networks: Networks) -> None:
    model, discriminator, objective = networks
    assert count_flops(TokenizerTrainConfig(), model, discriminator, objective, 16).discriminator > 0


def test_a_discriminator_that_is_not_used_has_no_flops_and_may_be_too_large_for_the_images(networks: Networks) -> None:
    model, discriminator, _ = networks
    alone = Objective(ObjectiveConfig(l1=1.0, perceptual="none"))
    assert count_flops(TokenizerTrainConfig(), model, discriminator, alone, 4).discriminator == 0


def test_counting_does_not_change_the_networks(networks: Networks) -> None:
    model, discriminator, objective = networks
    before = torch.get_rng_state()
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    frozen = count_flops(TokenizerTrainConfig(freeze=("encoder",)), model, discriminator, objective, SIZE)
    whole = count_flops(TokenizerTrainConfig(), model, discriminator, objective, SIZE)
    assert frozen.autoencoder < whole.autoencoder
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in discriminator.state_dict().items())
    parameters = [*model.parameters(), *discriminator.parameters()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(
    ("row", "added"),
    [
        ({"images_per_second": 10.0}, {"tflops": 30.0, "mfu": 0.3}),
        ({"images_per_second": 10.0, "loss/discriminator": 1.0}, {"tflops": 40.0, "mfu": 0.4}),
        ({"valid/psnr": 20.0}, {}),
    ],
)
def test_tflops_and_mfu_are_added_to_rows_of_training(row: dict[str, float], added: dict[str, float]) -> None:
    found = dict(row)
    Throughput(FlopsPerImage(autoencoder=3e12, discriminator=1e12), peak=100.0).on_log(found)
    assert found == row | added


def test_tflops_are_those_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    row = {"images_per_second": 40.0}
    Throughput(FlopsPerImage(autoencoder=3e12, discriminator=1e12), peak=100.0).on_log(row)
    assert (row["tflops"], row["mfu"]) == pytest.approx((30.0, 0.3))


def test_there_is_no_mfu_without_a_known_peak() -> None:
    row = {"images_per_second": 10.0}
    Throughput(FlopsPerImage(autoencoder=3e12, discriminator=1e12)).on_log(row)
    assert row == {"images_per_second": 10.0, "tflops": 30.0}


def test_the_peak_is_that_of_bf16_on_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    bf16, cuda = TokenizerTrainConfig(precision="bf16"), torch.device("cuda")
    assert peak_of(cuda, bf16) == 756.0
    assert peak_of(cuda, TokenizerTrainConfig(precision="fp32")) is None
    assert peak_of(torch.device("cpu"), bf16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_of(cuda, bf16) is None
