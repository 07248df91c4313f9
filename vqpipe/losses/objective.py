"""The training objective as a sum of named terms, each with its weight in the preset.

Shapes: B images of H x W pixels.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.config import resumable
from vqpipe.errors import ConfigError
from vqpipe.losses.adversarial import (
    adaptive_sum,
    hinge_discriminator_loss,
    hinge_generator_loss,
    imagewise_generator_loss,
    lecam_penalty,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
)
from vqpipe.losses.perceptual import Perceptual

RECONSTRUCTION_TERMS = ("l1", "l2", "charbonnier", "lpips")
QUANTIZER_TERMS = ("commitment", "codebook", "entropy")
PENALTIES = ("r1", "lecam")
"""Terms of the discriminator."""
GAN_LOSSES = {
    "hinge": (hinge_generator_loss, hinge_discriminator_loss),
    "non_saturating": (non_saturating_generator_loss, non_saturating_discriminator_loss),
    "non_saturating_hinge": (imagewise_generator_loss, hinge_discriminator_loss),
}
"""`gan_loss` -> what the autoencoder minimises, and what the discriminator does."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Section [objective]: the weight of each term, 0 for a term that is absent.

    VQGAN-LC as released: l1 1, lpips 1, commitment 0.1, codebook 0.033, adversarial 0.1 (adaptive, from step 50,000).
    The paper's equation 1 states the quantizer's weights 1.0 and 0.33; its code multiplies both by 0.1.
    """

    l1: float = 0.0
    """mean |x - x'| of pixels in [-1, 1]."""
    l2: float = 0.0
    """mean (x - x')^2."""
    charbonnier: float = 0.0
    """mean sqrt((x - x')^2 + eps^2), a smooth L1 (MGVQ)."""
    charbonnier_eps: float = 1e-3
    """eps above, in units of pixels in [-1, 1]."""
    lpips: float = 0.0
    """LPIPS distance; needs `perceptual`."""
    perceptual: Literal["vgg", "alex", "none"]
    """Backbone of LPIPS. "none", written down, trains without it."""
    lpips_weights: str = resumable("")
    """torchvision's file of the backbone, or the folder that holds it. The file counts by its content."""
    commitment: float = 0.0
    """Draws latents to their codes."""
    codebook: float = 0.0
    """Draws codes to their latents."""
    entropy: float = 0.0
    """Spreads the use of codes, for the quantizers that have such a term."""
    adversarial: float = 0.0
    """GAN loss of the autoencoder."""
    gan_loss: Literal["hinge", "non_saturating", "non_saturating_hinge"] = "hinge"
    """Of both networks. "hinge": Lim & Ye 2017, as VQGAN has it. "non_saturating": Goodfellow et al. 2014, the option
    "vanilla" of VQGAN's and LlamaGen's code. "non_saturating_hinge": the autoencoder's is non-saturating, of each
    image's mean logit, the discriminator's is hinge, as in the code of Open-MAGVIT2 and IBQ."""
    adaptive_weight: bool = True
    """Scale the adversarial term by the ratio of gradients at the last layer, as VQGAN does."""
    disc_start: int = 0
    """Optimizer step from which the discriminator trains and the adversarial term counts."""
    adversarial_warmup: int = 0
    """Steps after `disc_start` in which the adversarial weight rises from 0, on a line; the discriminator trains in
    full from `disc_start` on, so that it has learned something by the time it is listened to."""
    r1: float = 0.0
    """gamma of the R1 penalty: gamma/2 mean |grad D(x)|^2 over real images (Mescheder et al. 2018)."""
    r1_every: int = 16
    """Steps between two R1 penalties, each of which then counts so many times (lazy regularisation, Karras et al.
    2020, StyleGAN2, appendix B; Adam's settings, which they adapt to it, stay as they are)."""
    lecam: float = 0.0
    """LeCam regularisation of the discriminator (Tseng et al. 2021)."""
    lecam_decay: float = 0.999
    """Of LeCam's moving averages of the logits, per step; they start at 0. The paper's released code has 0.99, that of
    Open-MAGVIT2 and IBQ 0.999."""

    def __post_init__(self) -> None:
        for name, weight in (self.weights() | self.weights(*PENALTIES)).items():
            if weight < 0:
                raise ConfigError(f"objective.{name} = {weight} is negative", "Use 0 to leave the term out")
        if not any(self.weights(*RECONSTRUCTION_TERMS).values()):
            raise ConfigError("no objective compares images", "Give a weight to l1, l2, charbonnier or lpips")
        if (self.lpips > 0) != (self.perceptual != "none"):
            raise ConfigError(
                f"objective.lpips = {self.lpips} does not go with objective.perceptual = {self.perceptual!r}",
                'Give lpips a weight and perceptual = "vgg", or lpips = 0 and perceptual = "none"',
            )
        if self.charbonnier_eps <= 0 or min(self.disc_start, self.adversarial_warmup) < 0:
            raise ConfigError(
                "objective.charbonnier_eps must be positive, and disc_start and adversarial_warmup not negative"
            )
        if self.r1_every < 1 or not 0 <= self.lecam_decay < 1:
            raise ConfigError("objective.r1_every should be at least 1, and lecam_decay in [0, 1)")
        for name in PENALTIES:
            if getattr(self, name) and not self.adversarial:
                raise ConfigError(
                    f"objective.{name} regularises a discriminator, and there is none", "Give adversarial a weight"
                )

    def weights(self, *names: str) -> dict[str, float]:
        """The weights of these terms, or of all that the autoencoder minimises."""
        return {name: getattr(self, name) for name in names or (*RECONSTRUCTION_TERMS, *QUANTIZER_TERMS, "adversarial")}


class Objective(nn.Module):
    """total = sum over terms of weight * term, with every term the quantizer makes accounted for.

    Its `state_dict` is what a checkpoint must hold of it: LeCam's moving averages, nothing without LeCam. They move in
    `update` alone; both losses leave them as they are.

    Args:
        config: the weights.
        quantizer_terms: the quantizer's `loss_names`.

    Raises:
        ConfigError: the quantizer makes a term that has no weight.
        WeightsError: LPIPS is asked for and its backbone is absent.
    """

    logit_means: Tensor
    """float32[2], with LeCam: averages of the logits on images and on reconstructions."""

    def __init__(self, config: ObjectiveConfig, quantizer_terms: Collection[str] = ()) -> None:
        super().__init__()
        for name in quantizer_terms:
            if not getattr(config, name, 0.0):
                raise ConfigError(
                    f"the quantizer makes the term {name!r}, which has no weight", f"Set objective.{name} to a number"
                )
        self.config = config
        self.perceptual = None if config.perceptual == "none" else Perceptual(config.perceptual, config.lpips_weights)
        self.gan_losses = GAN_LOSSES[config.gan_loss]
        if config.lecam:
            self.register_buffer("logit_means", torch.zeros(2))

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminator takes part in optimizer step `step` (the first is 0)."""
        return self.config.adversarial > 0 and step >= self.config.disc_start

    def adversarial_weight_at(self, step: int | None) -> float:
        """The weight of the adversarial term in step `step`, before any adaptive factor."""
        config = self.config
        if not config.adversarial_warmup:
            return config.adversarial
        if step is None:
            raise TypeError("a warm-up of the adversarial weight needs step")
        return config.adversarial * min(1.0, max(0, step - config.disc_start) / config.adversarial_warmup)

    def r1_at(self, step: int) -> bool:
        """Whether the discriminator's loss holds the R1 penalty in step `step`."""
        return self.config.r1 > 0 and self.adversarial_at(step) and step % self.config.r1_every == 0

    def generator_loss(
        self,
        images: Tensor,
        reconstruction: Tensor,
        quantizer_losses: Mapping[str, Tensor],
        fake_logits: Tensor | None = None,
        last_layer: Tensor | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the autoencoder minimises in one step.

        Args:
            images, reconstruction: float[B, 3, H, W] in [-1, 1], the second with gradient and not clamped.
            quantizer_losses: unweighted scalars.
            fake_logits: of the discriminator on this `reconstruction`; None before `disc_start`.
            last_layer: the decoder's last weight; needed with `fake_logits` where the weight is adaptive.
            step: the optimizer step; needed with `fake_logits` where the weight warms up.

        Returns:
            The total, and every term as it is before its weight, detached, with the total and, under a
            discriminator, `adversarial_weight`, the factor that multiplied its term.
        """
        terms = self.reconstruction_terms(images.float(), reconstruction.float())
        total = torch.stack([self.config.weights()[name] * term for name, term in terms.items()]).sum()
        if fake_logits is not None:
            terms["adversarial"] = self.gan_losses[0](fake_logits)
            weight = self.adversarial_weight_at(step)
            factor = torch.full_like(total.detach(), weight)
            if self.config.adaptive_weight and weight > 0:
                if last_layer is None:
                    raise TypeError("an adaptive weight needs last_layer")
                total, factor = adaptive_sum(total, terms["adversarial"], reconstruction, last_layer, weight)
            else:
                total = total + factor * terms["adversarial"]
            terms["adversarial_weight"] = factor
        for name, term in quantizer_losses.items():
            terms[name] = term
            total = total + getattr(self.config, name) * term
        return total, {name: term.detach() for name, term in terms.items()} | {"total": total.detach()}

    def discriminator_loss(
        self,
        real_logits: Tensor,
        fake_logits: Tensor,
        step: int | None = None,
        images: Tensor | None = None,
        discriminator: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises, given its logits on images and on detached reconstructions.

        Args:
            real_logits, fake_logits: float[B, ...].
            step, images, discriminator: for the R1 penalty, which runs the discriminator on the images once more: the
                optimizer step, float[B, 3, H, W] in [-1, 1], and the network's own `forward`, neither compiled nor
                wrapped.

        Returns:
            The loss, and to log: it and the mean logits, whose distance says how easily it tells the two apart; with
            LeCam its penalty, and in the steps that have one that of R1, both before their weights.
        """
        config, terms = self.config, {}
        loss = self.gan_losses[1](real_logits, fake_logits)
        if config.lecam:
            terms["lecam"] = lecam_penalty(real_logits, fake_logits, self.logit_means)
            loss = loss + config.lecam * terms["lecam"]
        if config.r1:
            if step is None or images is None or discriminator is None:
                raise TypeError("the R1 penalty needs step, images and discriminator")
            if self.r1_at(step):
                terms["r1"] = r1_penalty(discriminator, images)
                loss = loss + config.r1 * config.r1_every * terms["r1"]
        terms |= {
            "discriminator": loss,
            "real_logit": real_logits.float().mean(),
            "fake_logit": fake_logits.float().mean(),
        }
        return loss, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def update(self, real_logit: Tensor, fake_logit: Tensor, skipped: Tensor | None = None) -> None:
        """Move LeCam's averages towards the mean logits of a step (scalars, as `discriminator_loss` returns them).

        Once after each step of the discriminator, with the means over its micro-batches, on every rank: the averages
        move alike on all. Where `skipped`, a bool on the device, is true they stay. Released codes move them before
        the loss, which then differs by `1 - lecam_decay` of a batch's mean; moved after it, a skipped step leaves no
        trace, and micro-batches add up to their batch.
        """
        if not self.config.lecam:
            return
        means = torch.stack([real_logit, fake_logit]).float()
        means = distributed.all_reduce_sum(means) / distributed.world_size()
        moved = self.logit_means.lerp(means, 1 - self.config.lecam_decay)
        self.logit_means.copy_(moved if skipped is None else torch.where(skipped, self.logit_means, moved))

    def reconstruction_terms(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """The terms that compare images and have a weight, unweighted."""
        config, difference = self.config, images - reconstruction
        terms: dict[str, Tensor] = {}
        if config.l1:
            terms["l1"] = difference.abs().mean()
        if config.l2:
            terms["l2"] = F.mse_loss(reconstruction, images)
        if config.charbonnier:
            terms["charbonnier"] = (difference.square() + config.charbonnier_eps**2).sqrt().mean()
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(images, reconstruction)
        return terms
