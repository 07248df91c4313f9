"""FLOPs of a training step, and the model FLOPs utilization (MFU) of a run.

An estimate: the matrix products and convolutions of the networks, forward and backward, counted once on one image
with fake tensors. As is usual for the MFU, it leaves out quantizing, the optimizers, the adaptive weight's extra
gradients, and recomputation under `train.activation_checkpointing`.
"""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vqpipe import distributed
from vqpipe.gpus import gpus_named
from vqpipe.losses.objective import Objective
from vqpipe.models import Autoencoder, PatchDiscriminator, build_autoencoder
from vqpipe.training.callbacks import Callback
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.running_metrics import Row
from vqpipe.training.tokenizer_task import frozen_parts


@dataclass(frozen=True)
class FlopsPerImage:
    """Floating-point operations of a step per training image; a multiply-add is two."""

    autoencoder: float
    """Of the autoencoder and LPIPS."""
    discriminator: float
    """Of the discriminator, in the steps of both networks, once it trains."""


def count_flops(
    config: TokenizerTrainConfig,
    model: Autoencoder,
    discriminator: PatchDiscriminator,
    objective: Objective,
    image_size: int,
) -> FlopsPerImage:
    """Count FLOPs on square images of `image_size` pixels, in about a second. The networks do not change."""
    device = model.last_layer.device
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        network = build_autoencoder(model.config)
        for part in frozen_parts(config, network):
            part.requires_grad_(False)
        images = torch.zeros(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as reconstruction_flops:
            reconstruction = network.decode(network.latent(images))
            loss = reconstruction.sum()
            if objective.perceptual is not None:
                loss = loss + objective.perceptual(images, reconstruction)
            loss.backward()
        if not objective.config.adversarial:  # the discriminator is not used, and the images may be too small for it
            return FlopsPerImage(float(reconstruction_flops.get_total_flops()), 0.0)
        critic = PatchDiscriminator(discriminator.config).eval()  # batch norms refuse a single value in training
        with FlopCounterMode(display=False) as adversarial_flops:
            fake = reconstruction.detach().requires_grad_()
            critic.requires_grad_(False)
            critic(fake).sum().backward()
            critic.requires_grad_(True)
            (critic(images) + critic(fake.detach())).sum().backward()
    return FlopsPerImage(float(reconstruction_flops.get_total_flops()), float(adversarial_flops.get_total_flops()))


class Throughput(Callback):
    """Adds `tflops`, TFLOP/s of each device, and `mfu`, their share of its peak in 0..1, to the rows of training.

    Args:
        peak: TFLOP/s of the device in the precision of the run; None where it is not known, and then there is no `mfu`.
    """

    def __init__(self, flops: FlopsPerImage, peak: float | None = None) -> None:
        self.flops, self.peak = flops, peak

    def on_log(self, row: Row) -> None:
        if "images_per_second" not in row:
            return
        flops = self.flops.autoencoder + (self.flops.discriminator if "loss/discriminator" in row else 0.0)
        row["tflops"] = flops * row["images_per_second"] / distributed.world_size() / 1e12
        if self.peak:
            row["mfu"] = row["tflops"] / self.peak


def peak_of(device: torch.device, config: TokenizerTrainConfig) -> float | None:
    """Peak TFLOP/s of the device in the precision of the run, where it is known: bf16 on one of `GPUS`."""
    if device.type != "cuda" or config.precision != "bf16":
        return None
    known = gpus_named(torch.cuda.get_device_name(device))
    return known[0].bf16 if known else None
