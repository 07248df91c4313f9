"""Losses on tensors: adversarial, perceptual, and the objective as their weighted sum."""

from vqpipe.losses.adversarial import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
)
from vqpipe.losses.objective import Objective, ObjectiveConfig
from vqpipe.losses.perceptual import Perceptual

__all__ = [
    "Objective",
    "ObjectiveConfig",
    "Perceptual",
    "adaptive_weight",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "r1_penalty",
]
