"""`lfq`: lookup-free quantization, the sign of every channel, the quantizer of MAGVIT-v2 and Open-MAGVIT2.

Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", section 3.1;
Luo et al. 2024, "Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-Regressive Visual Generation".
Shapes: B images, D channels of a position, G groups of b = D / G channels with one id each, h x w positions,
N = B * h * w vectors, n channels of one joint distribution.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.config import check_range
from vqpipe.quantizers.base import GridQuantizer, Quantized, QuantizerConfig, straight_through, to_rows

EPSILON = 1e-5
"""Added to each mean probability inside the logarithm, as released. Keeps gradients finite for codes far from every
vector. With 2^18 codes, where the uniform probability is 4e-6, it also lowers the largest batch entropy from 12.5 to
11.2."""


@dataclass(frozen=True, kw_only=True)
class SignConfig(QuantizerConfig):
    """The settings that `lfq` and `bsq` share."""

    code_dim: int = 18
    """D, channels of the latent and bits of a position."""
    entropy_temperature: float
    """Temperature of the softmax over codes in the entropy term."""
    sample_weight: float = 1.0
    """Weight of the mean entropy of each vector's distribution, which is minimized, in the entropy term."""
    batch_weight: float = 1.0
    """Weight of the entropy of the mean distribution, which is maximized, in the entropy term."""
    entropy_bits: int
    """Channels per joint distribution in the batch entropy."""

    def __post_init__(self) -> None:
        check_range(self, "model.quantizer", "[1, 24]", "entropy_bits")  # it takes 2^entropy_bits numbers
        check_range(self, "model.quantizer", "(0, inf)", "entropy_temperature")


class SignQuantizer(GridQuantizer):
    """Each channel becomes +scale where it is positive, else -scale; channel g b + i is bit i of id g.

    The distribution p over codes in the entropy term is factored over channels:

    - the entropy of a vector is the sum of the D binary entropies of its channels, exactly;
    - the mean of p over vectors is the product of two N x 2^(n/2) matrices, one for each half of n = `entropy_bits`
      channels, exactly. The entropies of consecutive groups of n channels are summed.
    """

    epsilon: ClassVar[float]
    """Added to each mean probability inside the logarithm."""

    def __init__(self, config: SignConfig, *, bits: int, scale: float = 1.0) -> None:
        groups = config.code_dim // bits
        super().__init__(config, codebook_size=2**bits, latent_dim=config.code_dim, num_groups=groups)
        self.bits, self.scale = bits, scale
        self.temperature, self.entropy_bits = config.entropy_temperature, config.entropy_bits
        self.sample_weight, self.batch_weight = config.sample_weight, config.batch_weight

    @abstractmethod
    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """The losses of float32[B, D, h, w] with these codes."""

    def quantize(self, latent: Tensor) -> Quantized:
        bits = latent > 0
        codes = (2.0 * bits - 1) * self.scale
        by_group = bits.unflatten(1, (self.num_groups, self.bits)).permute(0, 3, 4, 1, 2)  # [B, h, w, G, b]
        ids = (by_group.long() << torch.arange(self.bits, device=latent.device)).sum(-1).flatten(1)
        losses = self.losses(latent, codes)
        return Quantized(straight_through(latent, codes), ids, losses)

    def embed(self, ids: Tensor) -> Tensor:
        bits = ids.unsqueeze(-1) >> torch.arange(self.bits, device=ids.device) & 1
        return ((2.0 * bits - 1) * self.scale).flatten(-2)

    def entropy(self, vectors: Tensor) -> Tensor:
        """The entropy term of float32[N, D], a scalar; low where ids are certain and diverse."""
        logits = 4 * self.scale * vectors / self.temperature  # log p(+) - log p(-) of each channel
        sample = binary_entropy(logits).sum(1).mean()
        batch = sum(joint_entropy(group, self.epsilon) for group in logits.split(self.entropy_bits, dim=1))
        return self.sample_weight * sample - self.batch_weight * batch


@dataclass(frozen=True, kw_only=True)
class LfqConfig(SignConfig):
    """2^D implicit codes, the corners of a cube. The defaults are Open-MAGVIT2's."""

    kind: ClassVar[str] = "lfq"

    entropy_temperature: float = 0.01
    """Temperature of the softmax over codes in the entropy term; much larger latents have an entropy near 0."""
    entropy_bits: int = 18
    """Channels per joint distribution in the batch entropy, which takes 2^entropy_bits numbers. With fewer than D, the
    entropies of consecutive groups of channels are summed, an upper bound of the joint entropy."""

    def __post_init__(self) -> None:
        check_range(self, "model.quantizer", "[1, 62]", "code_dim")  # the bits of an int64 id
        super().__post_init__()


class LookupFreeQuantizer(SignQuantizer):
    """Each channel becomes +1 where it is positive, else -1; channel i is bit i of the id.

    "commitment" is the mean of (latent - code)^2. "entropy" is sample_weight * E[H(p)] - batch_weight * H(E[p])
    in nats, with p = softmax(2 <z, c> / temperature) over all 2^D codes c, which is softmax(-|z - c|^2 / temperature)
    since all codes are equally long. As released, E is the mean over the vectors of this rank, not of the global batch.
    The released code computes an N x 2^D matrix, and omits the term in evaluation. Here p is factored over channels;
    the default of `entropy_bits` gives the joint entropy of all channels.
    """

    config_class = LfqConfig
    loss_names = ("commitment", "entropy")
    epsilon = EPSILON

    def __init__(self, config: LfqConfig) -> None:
        super().__init__(config, bits=config.code_dim)

    def losses(self, latent: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {"commitment": F.mse_loss(latent, codes), "entropy": self.entropy(to_rows(latent))}


def binary_entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of an event whose log-odds are `logits`, elementwise."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def joint_entropy(logits: Tensor, epsilon: float) -> Tensor:
    """The entropy in nats of the distribution over the 2^n sign patterns, averaged over vectors.

    Args:
        logits: float[N, n], log-odds of the sign +1 of each channel.
    """
    low, high = (joint_probabilities(half) for half in logits.tensor_split(2, dim=1))
    mean = high.T @ low / logits.shape[0]
    return shannon_entropy(mean, epsilon)


def joint_probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities float[N, 2^n] of sign patterns from log-odds float[N, n]; channel 0 is bit 0."""
    patterns = logits.new_ones(logits.shape[0], 1)
    for channel in logits.T.unsqueeze(2):
        patterns = torch.cat([patterns * torch.sigmoid(-channel), patterns * torch.sigmoid(channel)], dim=1)
    return patterns


def shannon_entropy(probabilities: Tensor, epsilon: float = EPSILON) -> Tensor:
    """-sum p log(p + epsilon) over all elements, a scalar in nats."""
    return -(probabilities * (probabilities + epsilon).log()).sum()
