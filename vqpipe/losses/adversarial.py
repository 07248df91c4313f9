"""GAN losses on logits, discriminator regularization, and VQGAN's adaptive weight.

Shapes: B images of H x W pixels; logits are float[B, ...], one per patch, of any precision; losses are float32.
D is the discriminator, x an image, x' its reconstruction.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WEIGHT = 1e4
EPSILON = 1e-4


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(x')."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2 (Lim & Ye 2017; the half is VQGAN's)."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean -log sigmoid(D(x')) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits.float()).mean()


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean -log sigmoid(D(x)) + mean -log(1 - sigmoid(D(x')))) / 2 (Goodfellow et al. 2014, eq. 1).

    taming-transformers and LlamaGen call it "vanilla", with the factor 1/2. LlamaGen's "non-saturating"
    discriminator loss swaps logits and targets of its cross-entropy; we do not follow it.
    """
    return 0.5 * (F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean())


def imagewise_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean over images of -log sigmoid(mean logit of the image), as in the code of Open-MAGVIT2 and IBQ."""
    return F.softplus(-fake_logits.float().flatten(1).mean(1)).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """1/2 mean |grad_x D(x)|^2 over real images, with gradient for the discriminator (Mescheder et al. 2018, eq. 9).

    D(x) is the mean logit of an image, so the penalty does not depend on the number of patches. The gradient is that of
    the sum over the batch, i.e. of each image separately except through BatchNorm. This runs the discriminator again,
    in float32 under any autocast, and differentiates it twice, which compiled networks do not support.
    """
    with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
        images = images.detach().float().requires_grad_()
        scores = discriminator(images).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, logit_means: Tensor) -> Tensor:
    """mean max(0, D(x) - m')^2 + mean max(0, m - D(x'))^2, float[2] `logit_means` = (m, m') (Tseng et al. 2021).

    m and m' are moving averages of the logits on real images and on reconstructions. The penalty limits how far the
    logits of one kind move beyond the average of the other. In the paper it has no max; in its released code, and in
    that of Open-MAGVIT2 and IBQ, it has.
    """
    real_mean, fake_mean = logit_means.detach()
    above, below = real_logits.float() - fake_mean, real_mean - fake_logits.float()
    return F.relu(above).square().mean() + F.relu(below).square().mean()


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of the gradient norms of the two losses at the last layer, a detached scalar.

    |grad reconstruction_loss| / (|grad generator_loss| + epsilon), clamped to [0, 1e4] (Esser et al. 2021, eq. 7,
    where epsilon is 1e-6; in their code and VQGAN-LC's, which we follow, 1e-4). The reconstruction loss is the weighted
    sum of the pixel and perceptual terms, without quantizer terms.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return ratio_of_norms(reconstruction, adversarial)


def ratio_of_norms(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """`adaptive_weight` from the two gradients at the last layer."""
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + EPSILON)
    return ratio.clamp(0, MAX_WEIGHT).detach()


def adaptive_sum(
    reconstruction_loss: Tensor, generator_loss: Tensor, images: Tensor, last_layer: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Return reconstruction_loss + w * generator_loss, and w = `weight` * adaptive_weight, a detached scalar.

    Each loss is differentiated once with respect to the reconstructed `images` (float[B, 3, H, W]); the result is used
    for the weight and for the training step, which saves a second backward pass through LPIPS and the discriminator.
    The graphs of the two losses are freed; the gradient of the sum is available at `images` only.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, images)
    (adversarial,) = torch.autograd.grad(generator_loss, images)
    at_last_layer = [
        torch.autograd.grad(images, last_layer, gradient, retain_graph=True)[0]
        for gradient in (reconstruction, adversarial)
    ]
    factor = weight * ratio_of_norms(*at_last_layer)
    value = reconstruction_loss.detach() + factor * generator_loss.detach()
    gradient = torch.add(reconstruction.float(), factor * adversarial.float()).to(images.dtype)
    return WithGradient.apply(images, value, gradient), factor


class WithGradient(torch.autograd.Function):
    """A scalar with a given value and a given gradient with respect to a tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None, None
