"""`ibq`: index backpropagation, which trains every code in every step through the softmax over codes.

Shi et al. 2024, "Scalable Image Tokenization with Index Backpropagation Quantization", section 3.
Shapes: B images, C channels, h x w positions, N = B * h * w vectors, K codes, n vectors of one chunk.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.quantizers.base import LOGITS_PER_CHUNK, CodebookConfig, Quantized, by_image, from_rows, to_rows
from vqpipe.quantizers.lfq import shannon_entropy
from vqpipe.quantizers.vq import VectorQuantizer
from vqpipe.search import nearest


@dataclass(frozen=True, kw_only=True)
class IbqConfig(CodebookConfig):
    """IBQ. Released loss weights: "commitment" 1, "codebook" 0.25, "entropy" 0.05.

    The search maximizes the inner product; with `normalize` that is the cosine. `metric` must stay "l2".
    """

    kind: ClassVar[str] = "ibq"

    entropy_temperature: float = 0.01
    """Temperature of the softmax over codes in the entropy term; the softmax of the codes has temperature 1."""
    sample_weight: float = 1.0
    """Weight of the mean entropy of each vector's distribution, which is minimized, in the entropy term."""
    batch_weight: float = 1.0
    """Weight of the entropy of the mean distribution, which is maximized, in the entropy term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric != "l2":
            raise ConfigError("ibq compares inner products", "For cosines set model.quantizer.normalize = true")
        check_range(self, "model.quantizer", "(0, inf)", "entropy_temperature")


class IndexBackpropagationQuantizer(VectorQuantizer):
    """The id of z is argmax_k <z, e_k>, and its code is P E with P = onehot(id) + p - sg(p), p = softmax(<z, e_k>).

    The value is exactly row `id` of the codebook E. The decoder's gradient reaches the latent and all codes through p,
    and that row directly; there is no straight-through estimator. The losses, as released:

    - "commitment": mean (z - sg e_id)^2 + mean (z - P E)^2. The second term, the paper's double quantization, has the
      same value and trains the codes too. The released code weights both by 1, and so does this one.
    - "codebook": mean (e_id - sg z)^2.
    - "entropy": sample_weight * mean(H(q)) - batch_weight * H(mean(q)) in nats, q = softmax(<z, e_k> / temperature).
      The mean is over the vectors of this rank, and the second entropy has the epsilon of LFQ.

    The released code allocates several N x K matrices, 17 GB each for 64 images at 2^18 codes. Here vectors are
    processed in chunks, whose probabilities are recomputed in the backward pass.
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
            vectors = to_rows(self.maybe_normalize(latent.float(), dim=1))
            codebook = self.codebook()
            ids = most_similar(vectors, codebook, check=not self.training)
            codes = selected = self.embed(ids)
            entropy = {}
            if self.computes_all_losses:
                expected, entropy["entropy"] = self.soft_assign(vectors, codebook)
                codes = selected + (expected - expected.detach())
            losses = {
                "commitment": F.mse_loss(vectors, selected.detach()) + F.mse_loss(codes, vectors),
                "codebook": F.mse_loss(selected, vectors.detach()),
                **entropy,
            }
            return Quantized(from_rows(codes, latent), by_image(ids, latent), losses)

    def soft_assign(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expected codes p sg(E), float32[N, C], and the entropy term, a scalar.

        Args:
            vectors: float32[N, C].
            codebook: float32[K, C].
        """
        expected, sample_entropy, mean_q = [], vectors.new_zeros(()), vectors.new_zeros(len(codebook))
        for chunk in vectors.split(max(1, LOGITS_PER_CHUNK // len(codebook))):
            part = checkpoint(self.soft_assign_chunk, chunk, codebook, use_reentrant=False, preserve_rng_state=False)
            expected.append(part[0])
            sample_entropy, mean_q = sample_entropy + part[1] / len(vectors), mean_q + part[2] / len(vectors)
        entropy = self.sample_weight * sample_entropy - self.batch_weight * shannon_entropy(mean_q)
        return torch.cat(expected), entropy

    def soft_assign_chunk(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return expected codes float32[n, C], the sum of the entropies, and the sum of q, float32[K], of n vectors."""
        logits = vectors @ codebook.T
        # Only the gradient of the expected codes is used, so without gradients they are not computed.
        expected = logits.softmax(1) @ codebook.detach() if torch.is_grad_enabled() else torch.zeros_like(vectors)
        log_q = (logits / self.temperature).log_softmax(1)
        q = log_q.exp()
        return expected, -(q * log_q).sum(), q.sum(0)


@torch.no_grad()
def most_similar(vectors: Tensor, codes: Tensor, *, check: bool = True) -> Tensor:
    """Return the id of the largest inner product of each vector, int64[N]; the lowest id on ties.

    A nearest-neighbor search with one extra dimension, which makes all codes equally long (Bachrach et al. 2014).
    Products that differ by less than the float32 rounding of the largest |e|^2 may be ranked in either order.

    Args:
        vectors: float32[N, C].
        codes: float32[K, C].
    """
    squares = codes.square().sum(1)
    lift = (squares.max() - squares).sqrt()
    return nearest(F.pad(vectors, (0, 1)), torch.cat([codes, lift.unsqueeze(1)], dim=1), check=check)
