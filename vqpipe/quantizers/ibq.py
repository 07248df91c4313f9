"""`ibq`: index backpropagation, every code trained in every step through the softmax over codes.

Shi et al. 2024, "Scalable Image Tokenization with Index Backpropagation Quantization", section 3.
Shapes: B images, C channels, h x w positions, N = B * h * w vectors, K codes, n vectors of one chunk.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import CodebookConfig, Quantized, to_rows
from vqpipe.quantizers.lfq import shannon_entropy
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest

LOGITS_AT_ONCE = 2**24
"""Logits of vectors against codes held together: 64 MiB in float32, and a few times that in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class IbqConfig(CodebookConfig):
    """IBQ with the released temperature. Released weights: "commitment" 1, "codebook" 0.25, "entropy" 0.05.

    Codes are compared by inner product, which has no other metric; under `normalize` that is the cosine.
    """

    kind: ClassVar[str] = "ibq"

    entropy_temperature: float = 0.01
    """Of the softmax over codes in the entropy term alone; that of the codes has temperature 1."""
    sample_weight: float = 1.0
    """Of the mean entropy of a vector's own distribution, which is minimised, in the entropy term."""
    batch_weight: float = 1.0
    """Of the entropy of the mean distribution, which is maximised, in the entropy term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "l2":
            raise ConfigError("ibq compares inner products", "For cosines set model.quantizer.normalize = true")
        if self.entropy_temperature <= 0:
            raise ConfigError(f"entropy_temperature = {self.entropy_temperature} should be positive")


class IndexBackpropagationQuantizer(VectorQuantizer):
    """The id of z is argmax_k <z, e_k>, and its code is P E with P = onehot(id) + p - sg(p), p = softmax(<z, e_k>).

    So the value is row `id` of the codebook E, bit for bit, while the decoder's gradient reaches the latent and all
    codes through p, and that row directly; nothing is copied straight through. The losses, as released:

    - "commitment": mean (z - sg e_id)^2 + mean (z - P E)^2. The second, the paper's double quantization, has the
      same value and moves the codes too; the released code weighs both 1, and they cannot be told apart by weight.
    - "codebook": mean (e_id - sg z)^2.
    - "entropy": sample_weight * E[H(q)] - batch_weight * H(E[q]) in nats, q = softmax(<z, e_k> / temperature); E is
      over this rank's vectors, and the second entropy has LFQ's epsilon.

    The released code holds several N x K matrices, 17 GB each for 64 images at 2^18 codes. Here vectors pass in chunks,
    whose probabilities are forgotten and computed again in the backward pass.
    """

    config_class = IbqConfig
    loss_names = ("commitment", "codebook", "entropy")

    def __init__(self, config: IbqConfig) -> None:
        super().__init__(config)
        nn.init.normal_(self.codes)
        self.temperature = config.entropy_temperature
        self.sample_weight, self.batch_weight = config.sample_weight, config.batch_weight

    def forward(self, latent: Tensor) -> Quantized:
        with torch.autocast(latent.device.type, enabled=False):
            vectors = to_rows(self.on_sphere(latent.float(), dim=1))
            codebook = self.codebook()
            ids = most_similar(vectors, codebook, check=not self.training)
            chosen = self.embed(ids)
            expected, entropy = self.soften(vectors, codebook)
            codes = chosen + (expected - expected.detach())
            losses = {
                "commitment": F.mse_loss(vectors, chosen.detach()) + F.mse_loss(codes, vectors),
                "codebook": F.mse_loss(chosen, vectors.detach()),
                "entropy": entropy,
            }
            codes = codes.view(len(latent), -1, self.latent_dim).transpose(1, 2).reshape_as(latent)
            return Quantized(codes, ids.view(len(latent), -1), losses)

    def soften(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """float32[N, C], float32[K, C] -> p sg(E), the expected codes float32[N, C], and the entropy term, a scalar."""
        expected, sample, shares = [], vectors.new_zeros(()), vectors.new_zeros(len(codebook))
        for chunk in vectors.split(max(1, LOGITS_AT_ONCE // len(codebook))):
            part = checkpoint(self.soften_chunk, chunk, codebook, use_reentrant=False, preserve_rng_state=False)
            expected.append(part[0])
            sample, shares = sample + part[1] / len(vectors), shares + part[2] / len(vectors)
        return torch.cat(expected), self.sample_weight * sample - self.batch_weight * shannon_entropy(shares)

    def soften_chunk(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of n vectors: expected codes float32[n, C], the sum of their entropies, the sum of their q float32[K]."""
        logits = vectors @ codebook.T
        # Only the gradient of the expected codes is used: where none is recorded, they need not be computed.
        expected = logits.softmax(1) @ codebook.detach() if torch.is_grad_enabled() else torch.zeros_like(vectors)
        log_q = (logits / self.temperature).log_softmax(1)
        q = log_q.exp()
        return expected, -(q * log_q).sum(), q.sum(0)


@torch.no_grad()
def most_similar(vectors: Tensor, codes: Tensor, *, check: bool = True) -> Tensor:
    """The id of each vector's largest inner product, float32[N, C], float32[K, C] -> int64[N]; lowest id on ties.

    Nearest neighbours in one dimension more, in which all codes are made equally long (Bachrach et al. 2014).
    Products that differ by less than float32's rounding of the longest code's |e|^2 may win over each other.
    """
    squares = codes.square().sum(1)
    lift = (squares.max() - squares).sqrt()
    return nearest(F.pad(vectors, (0, 1)), torch.cat([codes, lift.unsqueeze(1)], dim=1), check=check)
