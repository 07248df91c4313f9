"""How much arithmetic a training step is, and how much of it the device does a second.

An estimate: the matrix products and convolutions of the networks, forward and backward, counted once on one image
without computing any (on fake tensors). Quantizing, the optimizers, the adaptive weight's extra gradients and
what is computed again under `train.activation_checkpointing` are not in it, as is usual for the MFU.
"""

import re
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vqpipe import distributed
from vqpipe.losses.objective import Objective
from vqpipe.models import Autoencoder, PatchDiscriminator, build_autoencoder
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.history import Row
from vqpipe.training.tokenizer_task import frozen_parts

# bf16 tensor-core peaks without sparsity, TFLOP/s, from NVIDIA's data sheet of each product (half of what a sheet gives
# with sparsity). By words of the name that torch.cuda.get_device_name gives; the first that fits counts.
BF16_PEAKS = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations that one training image costs; a multiplication and an addition are two."""

    autoencoder: float
    """Of the autoencoder and LPIPS."""
    discriminator: float
    """Of the discriminator, in both steps, once it trains."""


def count_work(
    config: TokenizerTrainConfig,
    model: Autoencoder,
    discriminator: PatchDiscriminator,
    objective: Objective,
    image_size: int,
) -> Work:
    """Count it for square images of `image_size` pixels; about a second. The networks stay as they are."""
    device = model.last_layer.device
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        network, critic = build_autoencoder(model.config), PatchDiscriminator(discriminator.config)
        for part in frozen_parts(config, network):
            part.requires_grad_(False)
        images = torch.zeros(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as generator:
            again = network.decode(network.latent(images))
            loss = again.sum()
            if objective.perceptual is not None:
                loss = loss + objective.perceptual(images, again)
            loss.backward()
        with FlopCounterMode(display=False) as adversarial:
            fake = again.detach().requires_grad_()
            critic.requires_grad_(False)
            critic(fake).sum().backward()
            critic.requires_grad_(True)
            (critic(images) + critic(fake.detach())).sum().backward()
    return Work(float(generator.get_total_flops()), float(adversarial.get_total_flops()))


def bf16_peak(device_name: str) -> float | None:
    """TFLOP/s in bf16, dense; None for a device that is not in the table, and for a slice of one (MIG)."""
    if "MIG" in device_name:
        return None
    return next((peak for words, peak in BF16_PEAKS.items() if re.search(rf"\b{words}\b", device_name)), None)


@dataclass(frozen=True)
class Throughput:
    """Turns images a second into arithmetic a second."""

    work: Work
    peak: float | None = None
    """TFLOP/s of the device in the precision trained in; None where we do not know it."""

    def of(self, row: Row) -> Row:
        """`tflops`, TFLOP/s of each device, and `mfu`, their share of its peak in 0..1 where that is known."""
        image = self.work.autoencoder + (self.work.discriminator if "loss/discriminator" in row else 0.0)
        tflops = image * row["images_per_second"] / distributed.world_size() / 1e12
        return {"tflops": tflops} | ({"mfu": tflops / self.peak} if self.peak else {})


def throughput(
    config: TokenizerTrainConfig,
    model: Autoencoder,
    discriminator: PatchDiscriminator,
    objective: Objective,
    image_size: int,
    device: torch.device,
) -> Throughput:
    """Count the work of a run that is about to start on `device`. A share of the peak is told of bf16 on a GPU."""
    known = device.type == "cuda" and config.precision == "bf16"
    peak = bf16_peak(torch.cuda.get_device_name(device)) if known else None
    return Throughput(count_work(config, model, discriminator, objective, image_size), peak)
