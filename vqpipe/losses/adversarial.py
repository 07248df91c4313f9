"""GAN losses on logits, what keeps a discriminator in check, and VQGAN's adaptive weight.

Shapes: B images of H x W pixels; logits are float[B, ...], one per patch, in any precision: all is taken in float32.
D is the discriminator, x an image, x' its reconstruction.
"""

from collections.abc import Callable
from typing import Any

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


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean -log sigmoid(D(x')) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits.float()).mean()


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean -log sigmoid(D(x)) + mean -log(1 - sigmoid(D(x')))) / 2 (Goodfellow et al. 2014, eq. 1).

    taming-transformers and LlamaGen call it "vanilla", the half is theirs. LlamaGen's "non-saturating" discriminator
    loss gives its cross-entropy the logits as targets and the targets as logits; we do not follow it there.
    """
    return 0.5 * (F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean())


def imagewise_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean over images of -log sigmoid(an image's mean logit), as the code of Open-MAGVIT2 and IBQ has it."""
    return F.softplus(-fake_logits.float().flatten(1).mean(1)).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """1/2 mean |grad_x D(x)|^2 over real images, with gradient for the discriminator (Mescheder et al. 2018, eq. 9).

    D(x) is the mean logit of an image, so that a weight means the same for any number of patches; the gradient is
    that of the batch's sum, which is each image's own but for what BatchNorm shares. Runs the discriminator once
    more, in float32 whatever autocast says, and differentiates it twice, which torch.compile's networks do not support.
    """
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        images = images.detach().float().requires_grad_()
        scores = discriminator(images).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, logit_means: Tensor) -> Tensor:
    """mean max(0, D(x) - m')^2 + mean max(0, m - D(x'))^2, float[2] `logit_means` = (m, m') (Tseng et al. 2021).

    m and m' are moving averages of the logits on real images and on reconstructions: the more each kind is called
    what it is, beyond the other's average, the harder it is drawn back. The paper's penalty has the squares alone;
    the max is in its released code, and in that of Open-MAGVIT2 and IBQ.
    """
    real_mean, fake_mean = logit_means.detach()
    above, below = real_logits.float() - fake_mean, real_mean - fake_logits.float()
    return F.relu(above).square().mean() + F.relu(below).square().mean()


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """How much stronger the reconstruction pulls at the last layer than the discriminator does, a detached scalar.

    |grad reconstruction_loss| / (|grad generator_loss| + epsilon), clamped to [0, 1e4] (Esser et al. 2021, eq. 7,
    where epsilon is 1e-6; in their code and VQGAN-LC's, which we follow, 1e-4). The reconstruction loss holds the
    pixel and perceptual terms with their weights, and no quantizer term.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return ratio_of_norms(reconstruction, adversarial)


def ratio_of_norms(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """`adaptive_weight` of two gradients at the last layer."""
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + SMALLEST_GRADIENT)
    return ratio.clamp(0, LARGEST_WEIGHT).detach()


def adaptive_sum(
    reconstruction_loss: Tensor, generator_loss: Tensor, images: Tensor, last_layer: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """reconstruction_loss + w * generator_loss, and w = `weight` * adaptive_weight of the two, a detached scalar.

    Both losses are differentiated once, at the reconstruction `images` (float[B, 3, H, W]) from which both were
    computed, for the weight and for the step together; the plain order goes back through LPIPS and the discriminator
    a second time. So the graph behind the two losses is spent here, and the sum's gradient is known at `images` alone.
    """
    (compared,) = torch.autograd.grad(reconstruction_loss, images)
    (adversarial,) = torch.autograd.grad(generator_loss, images)
    pulls = [torch.autograd.grad(images, last_layer, each, retain_graph=True)[0] for each in (compared, adversarial)]
    factor = weight * ratio_of_norms(*pulls)
    value = reconstruction_loss.detach() + factor * generator_loss.detach()
    gradient = torch.add(compared.float(), factor * adversarial.float()).to(images.dtype)
    return WithGradient.apply(images, value, gradient), factor


class WithGradient(torch.autograd.Function):
    """A scalar whose gradient at a tensor is known."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None, None
