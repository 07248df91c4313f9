"""The training objective: a weighted sum of named terms, with the weights in the preset.

Shapes: B images of H x W pixels.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.config import added, check_choices, check_range, nearest_name, resumable
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

RECONSTRUCTION_TERMS = ("l1", "l2", "log_l2", "charbonnier", "lpips")
QUANTIZER_TERMS = ("commitment", "codebook", "entropy", "decorrelation", "prior", "rate")
PENALTIES = ("r1", "lecam")
"""Terms of the discriminator."""
GAN_LOSSES = {
    "hinge": (hinge_generator_loss, hinge_discriminator_loss),
    "non_saturating": (non_saturating_generator_loss, non_saturating_discriminator_loss),
    "non_saturating_hinge": (imagewise_generator_loss, hinge_discriminator_loss),
}
"""`gan_loss` -> the loss of the autoencoder and the loss of the discriminator."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Section [objective]: the weight of each term; 0 omits the term.

    VQGAN-LC as released: l1 1, lpips 1, commitment 0.1, codebook 0.033, adversarial 0.1 (adaptive, from step 50,000).
    Equation 1 of the paper has quantizer weights 1.0 and 0.33; its code multiplies both by 0.1.
    """

    l1: float = 0.0
    """mean |x - x'| of pixels in [-1, 1]."""
    l2: float = 0.0
    """mean (x - x')^2."""
    log_l2: float = added(0.0)
    """log(mean (x - x')^2), the reconstruction term of an evidence bound with a learned variance (SQ-VAE)."""
    charbonnier: float = 0.0
    """mean sqrt((x - x')^2 + eps^2), a smooth L1 (MGVQ)."""
    charbonnier_eps: float = 1e-3
    """eps of the charbonnier term, for pixels in [-1, 1]."""
    lpips: float = 0.0
    """LPIPS; needs `perceptual`."""
    perceptual: Literal["vgg", "alex", "squeeze", "none"]
    """Backbone of LPIPS; "none" trains without it. Required, so that it is not omitted by accident."""
    lpips_weights: str = resumable(default="")
    """torchvision's file of the backbone, or the folder that contains it. Identified by content, not by path. Another
    file in its layout works as well; the term is then LPIPS's formula with those weights."""
    commitment: float = 0.0
    """Moves latents towards their codes."""
    codebook: float = 0.0
    """Moves codes towards their latents."""
    entropy: float = 0.0
    """Entropy regularization, for quantizers with that term."""
    decorrelation: float = added(0.0)
    """Keeps the channels of the codes from being correlated (`vq` with decorrelate)."""
    prior: float = added(0.0)
    """Draws the use of the codes to a uniform prior (`regvq`)."""
    rate: float = added(0.0)
    """Draws the rate of each vector to log2 K bits (`gq`)."""
    adversarial: float = 0.0
    """GAN loss of the autoencoder."""
    gan_loss: Literal["hinge", "non_saturating", "non_saturating_hinge"] = "hinge"
    """GAN loss of both networks. "hinge": Lim & Ye 2017, as in VQGAN. "non_saturating": Goodfellow et al. 2014, the
    option "vanilla" in the code of VQGAN and LlamaGen. "non_saturating_hinge": non-saturating on the mean logit of each
    image for the autoencoder, hinge for the discriminator, as in the code of Open-MAGVIT2 and IBQ."""
    adaptive_weight: bool = True
    """Scale the adversarial term by the ratio of gradient norms at the last layer, as in VQGAN."""
    disc_start: int = 0
    """Optimizer step at which the discriminator and the adversarial term start."""
    adversarial_warmup: int = 0
    """Steps after `disc_start` over which the adversarial weight increases linearly from 0. The discriminator itself
    trains from `disc_start` on."""
    r1: float = 0.0
    """gamma of the R1 penalty: gamma/2 mean |grad D(x)|^2 over real images (Mescheder et al. 2018)."""
    r1_every: int = 16
    """Steps between two R1 penalties, each of which is multiplied by this number (lazy regularization, Karras et al.
    2020, StyleGAN2, appendix B; their adjustment of Adam's settings is omitted)."""
    lecam: float = 0.0
    """LeCam regularization of the discriminator (Tseng et al. 2021)."""
    lecam_decay: float = 0.999
    """Decay of LeCam's moving averages of the logits, per step; they start at 0. The paper's released code has 0.99,
    that of Open-MAGVIT2 and IBQ 0.999."""

    def __post_init__(self) -> None:
        check_choices(self, "objective")
        weighted = (*RECONSTRUCTION_TERMS, *QUANTIZER_TERMS, "adversarial", *PENALTIES)
        check_range(self, "objective", "[0, inf)", *weighted, "disc_start", "adversarial_warmup")
        check_range(self, "objective", "(0, inf)", "charbonnier_eps")
        check_range(self, "objective", "[1, inf)", "r1_every")
        check_range(self, "objective", "[0, 1)", "lecam_decay")
        if not any(self.weights(RECONSTRUCTION_TERMS).values()):
            raise ConfigError(
                "the objective has no reconstruction term", "Set objective.l1, l2, log_l2, charbonnier or lpips"
            )
        if (self.lpips > 0) != (self.perceptual != "none"):
            raise ConfigError(
                f"objective.lpips = {self.lpips} does not fit objective.perceptual = {self.perceptual!r}",
                'Set a weight lpips and perceptual = "vgg", "alex" or "squeeze", or lpips = 0 and perceptual = "none"',
            )
        for name in PENALTIES:
            if getattr(self, name) and not self.adversarial:
                raise ConfigError(
                    f"objective.{name} needs a discriminator, and objective.adversarial is 0",
                    "Set objective.adversarial",
                )

    def weights(self, terms: Iterable[str]) -> dict[str, float]:
        """The weights of these terms."""
        return {name: getattr(self, name) for name in terms}


class Objective(nn.Module):
    """The weighted sum of the terms; every loss of the quantizer must have a weight.

    Its `state_dict` has LeCam's moving averages, and is empty without LeCam. They change in `update` only.

    Args:
        config: the weights.
        quantizer_terms: the quantizer's `loss_names`.
        perceptual: the LPIPS term, in place of the one that `config` describes.

    Raises:
        ConfigError: a loss of the quantizer has no weight, or is not one of `QUANTIZER_TERMS`.
        WeightsError: the backbone of LPIPS is absent.
    """

    logit_means: Tensor
    """float32[2], with LeCam: moving averages of the logits on images and on reconstructions."""

    def __init__(
        self,
        config: ObjectiveConfig,
        quantizer_terms: Collection[str] = (),
        *,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        for name in quantizer_terms:
            if name not in QUANTIZER_TERMS:
                raise ConfigError(f"the quantizer has the unknown loss {name!r}", nearest_name(name, QUANTIZER_TERMS))
            if not getattr(config, name):
                raise ConfigError(
                    f"the quantizer has the loss {name!r}, which has no weight", f"Set objective.{name} above 0"
                )
        self.config = config
        self.unused = [name for name in QUANTIZER_TERMS if getattr(config, name) and name not in quantizer_terms]
        """Terms that have a weight, and that the quantizer does not have."""
        if perceptual is None and config.perceptual != "none":
            perceptual = Perceptual(config.perceptual, config.lpips_weights)
        self.perceptual = perceptual
        self.gan_losses = GAN_LOSSES[config.gan_loss]
        if config.lecam:
            self.register_buffer("logit_means", torch.zeros(2))

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminator is used in optimizer step `step` (from 0)."""
        return self.config.adversarial > 0 and step >= self.config.disc_start

    def adversarial_weight_at(self, step: int) -> float:
        """The weight of the adversarial term in step `step`, without the adaptive factor."""
        config = self.config
        if not config.adversarial_warmup:
            return config.adversarial
        return config.adversarial * min(1.0, max(0, step - config.disc_start) / config.adversarial_warmup)

    def r1_at(self, step: int) -> bool:
        """Whether the loss of the discriminator has the R1 penalty in step `step`."""
        return self.config.r1 > 0 and self.adversarial_at(step) and step % self.config.r1_every == 0

    def autoencoder_loss(
        self,
        images: Tensor,
        reconstruction: Tensor,
        quantizer_losses: Mapping[str, Tensor],
        *,
        fake_logits: Tensor | None,
        last_layer: Tensor,
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder.

        Args:
            images, reconstruction: float[B, 3, H, W] in [-1, 1], the second with gradient and not clamped.
            quantizer_losses: unweighted scalars.
            fake_logits: of the discriminator on `reconstruction`; None before `disc_start`.
            last_layer: the last weight of the decoder, for the adaptive weight.
            step: the optimizer step, for the warmup of the adversarial weight.

        Returns:
            The total, and a dict to log: the total, each unweighted term, and, with `fake_logits`,
            `adversarial_weight`, the factor of the adversarial term; all detached.

        Raises:
            ConfigError: a loss of the quantizer has no place in [objective].
        """
        terms = self.reconstruction_terms(images.float(), reconstruction.float())
        total = torch.stack([getattr(self.config, name) * term for name, term in terms.items()]).sum()
        if fake_logits is not None:
            terms["adversarial"] = self.gan_losses[0](fake_logits)
            weight = self.adversarial_weight_at(step)
            factor = torch.full_like(total.detach(), weight)
            if self.config.adaptive_weight and weight > 0:
                total, factor = adaptive_sum(total, terms["adversarial"], reconstruction, last_layer, weight)
            else:
                total = total + factor * terms["adversarial"]
            terms["adversarial_weight"] = factor
        for name, term in quantizer_losses.items():
            if name not in QUANTIZER_TERMS:
                known = f"Its losses are among {', '.join(QUANTIZER_TERMS)}"
                raise ConfigError(f"the quantizer returned the unknown loss {name!r}", known)
            terms[name] = term
            total = total + getattr(self.config, name) * term
        return total, {name: term.detach() for name, term in terms.items()} | {"total": total.detach()}

    def discriminator_loss(
        self,
        real_logits: Tensor,
        fake_logits: Tensor,
        *,
        step: int,
        images: Tensor,
        discriminator: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the discriminator.

        Args:
            real_logits, fake_logits: float[B, ...], on images and on detached reconstructions.
            step, images, discriminator: for R1: the optimizer step, float[B, 3, H, W] in [-1, 1], and the network, not
                compiled and without a DDP or FSDP wrapper.

        Returns:
            The loss, and a dict to log: the loss, the mean logits, and the unweighted penalties of LeCam and, in the
            steps that have it, of R1; all detached.
        """
        config, terms = self.config, {}
        loss = self.gan_losses[1](real_logits, fake_logits)
        if config.lecam:
            terms["lecam"] = lecam_penalty(real_logits, fake_logits, self.logit_means)
            loss = loss + config.lecam * terms["lecam"]
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
        """Update LeCam's moving averages with the mean logits of a step, the same on every rank.

        Call it once after each step of the discriminator. The released codes update before the loss, which then differs
        by `1 - lecam_decay` of the mean of a batch; updating after it makes skipped steps and micro-batches exact.

        Args:
            real_logit, fake_logit: scalars of `discriminator_loss`, averaged over micro-batches.
            skipped: a bool on the device; where true, the averages stay.
        """
        if not self.config.lecam:
            return
        means = torch.stack([real_logit, fake_logit]).float()
        means = distributed.all_reduce_sum(means) / distributed.world_size()
        moved = self.logit_means.lerp(means, 1 - self.config.lecam_decay)
        self.logit_means.copy_(moved if skipped is None else torch.where(skipped, self.logit_means, moved))

    def reconstruction_terms(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """The reconstruction terms with a weight, unweighted."""
        config, difference = self.config, images - reconstruction
        terms: dict[str, Tensor] = {}
        if config.l1:
            terms["l1"] = difference.abs().mean()
        if config.l2:
            terms["l2"] = F.mse_loss(reconstruction, images)
        if config.log_l2:
            terms["log_l2"] = F.mse_loss(reconstruction, images).clamp(min=1e-10).log()
        if config.charbonnier:
            terms["charbonnier"] = (difference.square() + config.charbonnier_eps**2).sqrt().mean()
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(images, reconstruction)
        return terms
