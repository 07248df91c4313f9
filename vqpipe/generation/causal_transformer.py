"""The causal (decoder-only) transformer of gpt and llamagen: pre-norm blocks in the style of GPT-2 or of Llama.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Touvron et al. 2023, "LLaMA"; rotary
positions: Su et al. 2021, "RoFormer".
Shapes: B sequences of L vectors, D channels, A heads, P positions a cache has room for.

A block has two options: positions are rotary (`rotary` is given to `forward`) or already part of its input, and the
feed-forward network is GELU (GPT-2) or SwiGLU (Llama). Attribute names are those of LlamaGen's released weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.errors import ConfigError
from vqpipe.generation.base import GeneratorConfig

INIT_STD = 0.02
"""Standard deviation of initial weights, as GPT-2 and LlamaGen."""
NORM_EPS = 1e-5
ROPE_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class CausalTransformerConfig(GeneratorConfig):
    """Sizes of the transformer, and its regularisation."""

    layers: int
    """Blocks."""
    heads: int
    """A, attention heads; they divide the width."""
    width: int
    """D, channels."""
    dropout: float
    """Dropout of inputs and of both halves of every block, 0..1; in gpt also of attention weights."""
    label_smoothing: float = 0.0
    """Probability that is spread over the vocabulary in training, 0..1. VQGAN-LC's code has 0.1 as an option, off by
    default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "generator", "[1, inf)", "layers", "heads", "width")
        check_range(self, "generator", "[0, 1)", "dropout", "label_smoothing")
        if self.width % self.heads:
            raise ConfigError(f"generator.width = {self.width} is not divisible by generator.heads = {self.heads}")


class GeluMlp(nn.Module):
    """The two-layer network of GPT-2: Linear, GELU, Linear, with biases."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        """float[..., D] -> float[..., D]."""
        return self.dropout(self.w2(F.gelu(self.w1(vectors))))


class SwiGlu(nn.Module):
    """The gated two-layer network of Llama (Shazeer 2020), without biases."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        """float[..., D] -> float[..., D]."""
        return self.dropout(self.w2(F.silu(self.w1(vectors)) * self.w3(vectors)))


class CausalAttention(nn.Module):
    """Multi-head causal attention, with an optional rotation of queries and keys and an optional key-value cache."""

    def __init__(
        self, width: int, heads: int, *, bias: bool, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.wqkv = nn.Linear(width, 3 * width, bias=bias)
        self.wo = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, vectors: Tensor, rotary: Tensor | None = None, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """float[B, L, D] -> float[B, L, D].

        Args:
            rotary: float32[L, D / A / 2, 2], cosine and sine of the positions `start` to `start` + L.
            cache: float[2, B, A, P, D / A], keys and values of the positions before `start`; those of this position
                are written into it (L = 1).
        """
        query, key, value = self.wqkv(vectors).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        if cache is not None:
            end = start + vectors.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = key, value
            key, value = cache[0, :, :, :end].to(query.dtype), cache[1, :, :, :end].to(query.dtype)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=cache is None)
        return self.dropout(self.wo(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, width: int, *, attention: nn.Module, feed_forward: nn.Module, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = attention
        self.ffn_norm = norm(width)
        self.feed_forward = feed_forward

    def forward(self, vectors: Tensor, *context: Any) -> Tensor:
        """float[B, L, D] -> float[B, L, D]; `context`: further arguments of the attention."""
        vectors = vectors + self.attention(self.attention_norm(vectors), *context)
        return vectors + self.feed_forward(self.ffn_norm(vectors))


def gpt2_block(width: int, heads: int, dropout: float) -> Block:
    """GPT-2's block: LayerNorm, biases, GELU with 4 D hidden channels, dropout also of attention weights."""
    attention = CausalAttention(width, heads, bias=True, dropout=dropout, attention_dropout=dropout)
    return Block(width, attention=attention, feed_forward=GeluMlp(width, 4 * width, dropout), norm=nn.LayerNorm)


def llama_block(width: int, heads: int, dropout: float) -> Block:
    """Llama's block: RMSNorm, no biases, SwiGLU with 8/3 D hidden channels, rounded up to a multiple of 256."""
    hidden = -(-(8 * width // 3) // 256) * 256
    return Block(
        width,
        attention=CausalAttention(width, heads, bias=False, dropout=dropout),
        feed_forward=SwiGlu(width, hidden, dropout),
        norm=rms_norm,
    )


def rms_norm(width: int) -> nn.RMSNorm:
    """Llama's norm."""
    return nn.RMSNorm(width, eps=NORM_EPS)


def init_weights(module: nn.Module) -> None:
    """Draw matrices and embeddings from N(0, 0.02) and set biases to 0; for `Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def empty_caches(layers: int, like: Tensor, heads: int, positions: int) -> list[Tensor]:
    """Return a key-value cache for each layer, float[2, B, A, P, D / A], for inputs `like` float[B, 1, D].

    Its type is that of keys and values, which autocast decides: in another, each step would copy the whole cache.
    """
    kind, shape = like.device.type, (2, len(like), heads, positions, like.shape[-1] // heads)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
    return [like.new_zeros(shape, dtype=dtype) for _ in range(layers)]


def rotary_2d(height: int, width: int, head_dim: int) -> Tensor:
    """Return cosine and sine of each position's rotation, float32[1 + h w, head_dim / 2, 2]; zeros for the class token.

    Half of the channel pairs rotate with the row, half with the column, at frequencies 10000^(-2 i / (head_dim / 2)).
    """
    quarter = head_dim // 4
    frequencies = ROPE_BASE ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    rows = torch.outer(torch.arange(height).float(), frequencies).unsqueeze(1).expand(-1, width, -1)
    columns = torch.outer(torch.arange(width).float(), frequencies).unsqueeze(0).expand(height, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(rotary[:1]), rotary])


def apply_rotary(vectors: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighboring channel pairs: float[B, A, L, head_dim] by float32[L, head_dim / 2, 2]."""
    first, second = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotary.unbind(-1)
    pairs = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return pairs.flatten(-2).to(vectors.dtype)
