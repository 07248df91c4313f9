"""The hinge GAN losses and VQGAN's adaptive weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_WEIGHT = 1e4
SMALLEST_GRADIENT = 1e-4


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(x'): the generator wants its images to be called real."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2 (Lim & Ye 2017; the half is VQGAN's)."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_layer: Tensor,
    maximum: float = LARGEST_WEIGHT,
    epsilon: float = SMALLEST_GRADIENT,
) -> Tensor:
    """How much stronger the reconstruction pulls at the last layer than the discriminator does, a detached scalar.

    |grad reconstruction_loss| / (|grad generator_loss| + epsilon), clamped to [0, maximum] (Esser et al. 2021, eq. 7,
    where epsilon is 1e-6; in their code and VQGAN-LC's, which we follow, 1e-4). The reconstruction loss holds the
    pixel and perceptual terms with their weights, and no quantizer term.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (reconstruction.norm() / (adversarial.norm() + epsilon)).clamp(0, maximum).detach()
