"""The training objective as a sum of named terms, each with its weight in the preset.

Shapes: B images of H x W pixels.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from vqpipe.losses.perceptual import Perceptual

QUANTIZER_TERMS = ("commitment", "codebook", "entropy")


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
    lpips_weights: str = ""
    """torchvision's file of the backbone, or the folder that holds it."""
    commitment: float = 0.0
    """Draws latents to their codes."""
    codebook: float = 0.0
    """Draws codes to their latents."""
    entropy: float = 0.0
    """Spreads the use of codes, for the quantizers that have such a term."""
    adversarial: float = 0.0
    """Hinge GAN loss of the autoencoder."""
    adaptive_weight: bool = True
    """Scale the adversarial term by the ratio of gradients at the last layer, as VQGAN does."""
    disc_start: int = 0
    """Optimizer step from which the discriminator trains and the adversarial term counts."""

    def __post_init__(self) -> None:
        for name, weight in self.weights().items():
            if weight < 0:
                raise ConfigError(f"objective.{name} = {weight} is negative", "Use 0 to leave the term out")
        if not any(self.weights(*RECONSTRUCTION_TERMS).values()):
            raise ConfigError("no objective compares images", "Give a weight to l1, l2, charbonnier or lpips")
        if (self.lpips > 0) != (self.perceptual != "none"):
            raise ConfigError(
                f"objective.lpips = {self.lpips} does not go with objective.perceptual = {self.perceptual!r}",
                'Give lpips a weight and perceptual = "vgg", or lpips = 0 and perceptual = "none"',
            )
        if self.charbonnier_eps <= 0 or self.disc_start < 0:
            raise ConfigError("objective.charbonnier_eps must be positive, and disc_start not negative")

    def weights(self, *names: str) -> dict[str, float]:
        """The weights of these terms, or of all."""
        return {name: getattr(self, name) for name in names or (*RECONSTRUCTION_TERMS, *QUANTIZER_TERMS, "adversarial")}


RECONSTRUCTION_TERMS = ("l1", "l2", "charbonnier", "lpips")


class Objective(nn.Module):
    """total = sum over terms of weight * term, with every term the quantizer makes accounted for.

    Args:
        config: the weights.
        quantizer_terms: the quantizer's `loss_names`.

    Raises:
        ConfigError: the quantizer makes a term that has no weight.
        WeightsError: LPIPS is asked for and its backbone is absent.
    """

    def __init__(self, config: ObjectiveConfig, quantizer_terms: Collection[str] = ()) -> None:
        super().__init__()
        for name in quantizer_terms:
            if not getattr(config, name, 0.0):
                raise ConfigError(
                    f"the quantizer makes the term {name!r}, which has no weight", f"Set objective.{name} to a number"
                )
        self.config = config
        self.perceptual = None if config.perceptual == "none" else Perceptual(config.perceptual, config.lpips_weights)

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminator takes part in optimizer step `step` (the first is 0)."""
        return self.config.adversarial > 0 and step >= self.config.disc_start

    def generator_loss(
        self,
        images: Tensor,
        reconstruction: Tensor,
        quantizer_losses: Mapping[str, Tensor],
        fake_logits: Tensor | None = None,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the autoencoder minimises in one step.

        Args:
            images, reconstruction: float[B, 3, H, W] in [-1, 1], the second with gradient and not clamped.
            quantizer_losses: unweighted scalars.
            fake_logits: of the discriminator on `reconstruction`; None before `disc_start`.
            last_layer: the decoder's last weight; needed with `fake_logits` where the weight is adaptive.

        Returns:
            The total, and every term as it is before its weight, detached, with the total and, under a
            discriminator, `adversarial_weight`, the factor that multiplied its term.
        """
        terms = self.reconstruction_terms(images.float(), reconstruction.float())
        compared = torch.stack([self.config.weights()[name] * term for name, term in terms.items()]).sum()
        total = compared
        for name, term in quantizer_losses.items():
            terms[name] = term
            total = total + getattr(self.config, name) * term
        if fake_logits is not None:
            terms["adversarial"] = hinge_generator_loss(fake_logits)
            weight = torch.full_like(compared.detach(), self.config.adversarial)
            if self.config.adaptive_weight:
                if last_layer is None:
                    raise TypeError("an adaptive weight needs last_layer")
                weight = weight * adaptive_weight(compared, terms["adversarial"], last_layer)
            total = total + weight * terms["adversarial"]
            terms["adversarial_weight"] = weight
        return total, {name: term.detach() for name, term in terms.items()} | {"total": total.detach()}

    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises, given its logits on images and on detached reconstructions.

        Returns:
            The loss, and to log: it and the mean logits, whose distance says how easily it tells the two apart.
        """
        loss = hinge_discriminator_loss(real_logits, fake_logits)
        means = {"real_logit": real_logits.detach().mean(), "fake_logit": fake_logits.detach().mean()}
        return loss, {"discriminator": loss.detach(), **means}

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
