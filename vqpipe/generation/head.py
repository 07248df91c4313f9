"""The autoregressive head of MGVQ: the G ids of a position one after the other, given what the trunk says of it.

Jia et al. 2025, "MGVQ: Could VQ-VAE Beat VAE?"; sizes and order are those of the released `ar_head.py`.
Shapes: M positions, G groups, K codes of a group, D channels.

What is unusual:
- A sequence is one position: [what the trunk says, a learned start, the embedding of each id so far].
- One table of K embeddings and one output matrix serve all groups; only the learned positions tell them apart.
- Each block of the released head also holds an adaLN layer of 18 D^2 weights that nothing uses: left out.
- The released positions are as many as the trunk's, of which G + 1 are used: here there are G + 1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.generation.transformer import SwiGlu, rms_norm


class HeadAttention(nn.Module):
    """Causal attention within a position's G + 1 vectors, queries and keys normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = rms_norm(width // heads)
        self.k_norm = rms_norm(width // heads)

    def forward(self, vectors: Tensor) -> Tensor:
        """float[M, L, D] -> float[M, L, D]."""
        query, key, value = (
            layer(vectors).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class HeadBlock(nn.Module):
    """Attention, then the gated network, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = rms_norm(width)
        self.attention = HeadAttention(width, heads)
        self.ffn_norm = rms_norm(width)
        self.feed_forward = SwiGlu(width, 4 * width)

    def forward(self, vectors: Tensor) -> Tensor:
        """float[M, L, D] -> float[M, L, D]."""
        vectors = vectors + self.attention(self.attention_norm(vectors))
        return vectors + self.feed_forward(self.ffn_norm(vectors))


class GroupHead(nn.Module):
    """p(i_1, ..., i_G | trunk) as a product over groups, for any G; with G = 1 a deeper output layer."""

    def __init__(self, *, codebook_size: int, num_groups: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.num_groups = num_groups
        heads = math.gcd(num_groups, width)  # G of them, as released, wherever G divides the width
        self.pos_emb = nn.Parameter(torch.zeros(1, num_groups + 1, width))
        self.sos_emb_for_image = nn.Parameter(torch.zeros(1, 1, width))
        # The last group's embedding is never an input: with one group there is nothing to embed.
        self.tok_emb = nn.Embedding(codebook_size, width) if num_groups > 1 else None
        self.causal_space_blocks = nn.ModuleList(HeadBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size, bias=False)

    def forward(self, trunk: Tensor, ids: Tensor) -> Tensor:
        """What predicts each next id, before the output matrix.

        Args:
            trunk: float[M, D], what the trunk says of each position.
            ids: int64[M, n], the ids of the first n groups, 0 <= n < G.

        Returns:
            float[M, n + 1, D]: row g predicts group g's id. The row of `trunk` itself predicts nothing and is cut off.
        """
        start = self.sos_emb_for_image.expand(len(trunk), -1, -1)
        parts = [trunk.unsqueeze(1), start.to(trunk.dtype)]
        if self.tok_emb is not None and ids.shape[1]:
            parts.append(self.tok_emb(ids).to(trunk.dtype))
        vectors = torch.cat(parts, dim=1)
        vectors = vectors + self.pos_emb[:, : vectors.shape[1]]
        for block in self.causal_space_blocks:
            vectors = block(vectors)
        return self.ln_f(vectors[:, 1:])

    def logits(self, trunk: Tensor, ids: Tensor) -> Tensor:
        """float[M, D] and int64[M, n] -> logits float[M, n + 1, K] of groups 0 to n."""
        return self.head(self.forward(trunk, ids))

    def draw(self, trunk: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The ids of each position, int64[M, G], group by group.

        `choose(logits float[M, K], group)` gives int64[M].
        """
        ids = torch.empty(len(trunk), 0, dtype=torch.long, device=trunk.device)
        for group in range(self.num_groups):
            logits = self.head(self.forward(trunk, ids)[:, -1])
            ids = torch.cat([ids, choose(logits, group).unsqueeze(1)], dim=1)
        return ids
