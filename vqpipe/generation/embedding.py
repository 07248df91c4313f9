"""Embedding of ids by the tokenizer's codes, the input of gpt and llamagen.

Shapes: B images, G groups, K codes of a group, D channels.
"""

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError


class CodeEmbedding(nn.Module):
    """Embeds ids by the tokenizer's own codes: concatenate, Linear, GELU, Linear, LayerNorm."""

    codes: Tensor
    loaded: Tensor

    def __init__(self, groups: int, codebook_size: int, code_dim: int, joined: int, width: int) -> None:
        super().__init__()
        self.joined = joined
        """Number of ids whose codes form one input: all groups of a position, or 1."""
        self.register_buffer("codes", torch.zeros(groups, codebook_size, code_dim))
        self.register_buffer("loaded", torch.zeros((), dtype=torch.bool))
        self.layers = nn.Sequential(
            nn.Linear(joined * code_dim, width // 2, bias=False),
            nn.GELU(),
            nn.Linear(width // 2, width, bias=False),
            nn.LayerNorm(width),
        )

    @torch.no_grad()
    def load(self, codebook: Tensor) -> None:
        """Load the tokenizer's codebook, float[K, C] or float[G, K, C].

        Raises:
            ConfigError: the codebook has another shape than this embedding was built for.
        """
        groups = codebook.unsqueeze(0) if codebook.ndim == 2 else codebook
        if groups.shape != self.codes.shape:
            raise ConfigError(
                f"a codebook of shape {list(codebook.shape)} does not fit a generator for {list(self.codes.shape)}",
                "Use the codebook of the tokenizer that made the tokens",
            )
        self.codes.copy_(groups)
        self.loaded.fill_(True)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """int64[B, n] ids, the first of which has index `first` in its image -> float[B, n / joined, D]."""
        groups = torch.arange(first, first + ids.shape[1], device=ids.device) % len(self.codes)
        return self.layers(self.codes[groups, ids].unflatten(1, (-1, self.joined)).flatten(2))
