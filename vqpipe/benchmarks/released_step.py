"""The training step of the released VQGAN-LC, as a baseline: the same operations in the same order.

Zhu et al. 2024, "Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%"; rewritten from
vqgan-gpt-lc/models/models_vq.py and engine_training_vqgan.py. Float32, default memory format, no fused optimizer. Its
losses and gradients equal those of our step. Left out: LPIPS, which the released code computes a second time for the
discriminator, and the loss scaler for float16.

Shapes: B images, N latent vectors, K codes, C channels of a code.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.benchmarks.search import expansion
from vqpipe.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from vqpipe.losses.objective import ObjectiveConfig
from vqpipe.models import Autoencoder, PatchDiscriminator
from vqpipe.quantizers.base import to_rows
from vqpipe.quantizers.lc import FrozenCodebookQuantizer
from vqpipe.training.config import TrainConfig


class ReleasedStep:
    """Copies of both networks with their optimizers; `step` trains them on one batch."""

    def __init__(
        self, model: Autoencoder, discriminator: PatchDiscriminator, objective: ObjectiveConfig, train: TrainConfig
    ) -> None:
        self.model = copy.deepcopy(model).train().to(memory_format=torch.contiguous_format)
        self.discriminator = copy.deepcopy(discriminator).train().to(memory_format=torch.contiguous_format)
        self.discriminator.requires_grad_(True)
        self.objective = objective
        quantizer = self.model.quantizer
        assert isinstance(quantizer, FrozenCodebookQuantizer)
        self.quantizer = quantizer
        self.counts = torch.zeros(quantizer.codebook_size, device=quantizer.codes.device)
        self.optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), train.learning_rate, train.betas, train.eps)
            for network in (self.model, self.discriminator)
        )

    def step(self, images: Tensor) -> None:
        """float[B, 3, H, W] in [-1, 1]: a step of the autoencoder, then one of the discriminator."""
        loss, ids = self.autoencoder_loss(images)
        self.counts += F.one_hot(ids, len(self.counts)).sum(dim=0)
        descend(self.optimizer, loss)
        descend(self.discriminator_optimizer, self.discriminator_loss(images))

    def autoencoder_loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the autoencoder, and the ids, int64[N]. The discriminator is not frozen: backward also computes
        the gradient of its weights."""
        reconstruction, quantizer_loss, ids = self.reconstruct(images)
        distance = self.objective.l1 * (images - reconstruction).abs().mean()
        adversarial = hinge_generator_loss(self.discriminator(reconstruction))
        weight = self.objective.adversarial * adaptive_weight(distance, adversarial, self.model.last_layer)
        return distance + quantizer_loss + weight * adversarial, ids

    def discriminator_loss(self, images: Tensor) -> Tensor:
        """The loss of the discriminator, on images reconstructed a second time, with a backward pass through that
        reconstruction at weight 0."""
        reconstruction, quantizer_loss, _ = self.reconstruct(images)
        distance = (images - reconstruction).abs().mean()
        real, fake = self.discriminator(images.clone()), self.discriminator(reconstruction.detach().clone())
        return hinge_discriminator_loss(real, fake) + 0 * (distance + quantizer_loss)

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction, the weighted loss of the quantizer, and the ids, int64[N].

        All K codes are projected, compared and looked up with gradient.
        """
        latent = self.model.latent(images)
        vectors, codes = to_rows(latent), self.quantizer.project(self.quantizer.codes)
        ids = expansion(vectors, codes)
        chosen = F.embedding(ids, codes)
        loss = self.objective.commitment * (chosen.detach() - vectors).square().mean()
        loss = loss + self.objective.codebook * (chosen - vectors.detach()).square().mean()
        straight_through = vectors + (chosen - vectors).detach()
        batch, channels, height, width = latent.shape
        grid = straight_through.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return self.model.decode(grid), loss, ids


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward and step, with the synchronization of logging the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
