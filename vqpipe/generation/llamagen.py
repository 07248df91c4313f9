"""`llamagen`: LlamaGen's transformer over the positions of an image, with MGVQ's head over the ids of a position.

Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation"; Jia et al. 2025, "MGVQ:
Could VQ-VAE Beat VAE?".
Shapes: B images, P = h x w positions, M positions of a batch, G groups, N = P * G ids, K codes per group, D channels,
A heads.

What is unusual:
- There is no table of input embeddings: the G codes of a position are concatenated and pass a small network. MGVQ's
  input is the codebook as stored, not the unit vectors that its decoder receives.
- Rotary positions have two dimensions: half of a head's channels rotate with the row, half with the column.
- The class token precedes the first position. Its rotary factors are zeros, so that its queries and keys vanish, and
  every position attends to it with weight exp(0). This is LlamaGen's code; its weights depend on it.
- MGVQ's head replaces LlamaGen's output layer for any G, also for G = 1, unless `head = "linear"`.

With G = 4 groups of 8192 codes and 24 x 24 positions, MGVQ's released models (the presets llamagen-b, -l, -xl and -xxl)
have 139,170,816 / 398,577,664 / 866,728,960 / 1,548,343,296 parameters; ours, without the adaLN layers and positions
that these never use, 117,498,624 / 360,244,224 / 807,015,680 / 1,462,531,584.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import added, check_range
from vqpipe.errors import ConfigError
from vqpipe.generation.base import Generator, SamplingConfig, Space
from vqpipe.generation.causal_transformer import (
    INIT_STD,
    Block,
    CausalTransformerConfig,
    SwiGlu,
    empty_caches,
    init_weights,
    llama_block,
    rms_norm,
    rotary_2d,
)
from vqpipe.generation.cross_entropy import chunked_cross_entropy
from vqpipe.generation.embedding import CodeEmbedding
from vqpipe.generation.sampling import (
    append_null_classes,
    checked,
    guide_logits,
    repeat_for_guidance,
    sample_ids,
    uniform_noise,
)


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(CausalTransformerConfig):
    """Defaults: GPT-B with LlamaGen's training recipe."""

    kind: ClassVar[str] = "llamagen"

    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.1
    head: Literal["groups", "linear"] = added("groups")
    """Output: MGVQ's autoregressive head over the groups of a position, or LlamaGen's single linear layer over the
    codebook, for tokenizers with one group."""
    head_layers: int = 2
    """Blocks of the head over the groups; it has no dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "generator", "[1, inf)", "head_layers")
        if self.width % (4 * self.heads):
            raise ConfigError(
                f"generator.width = {self.width} does not give {self.heads} heads a multiple of 4 channels",
                "Rotary positions of rows and columns each need pairs of channels",
            )


class HeadAttention(nn.Module):
    """Causal attention over the G + 1 vectors of a position, with normalized queries and keys."""

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


def head_block(width: int, heads: int) -> Block:
    """A block of MGVQ's head: its own attention, and SwiGLU with 4 D hidden channels."""
    return Block(width, attention=HeadAttention(width, heads), feed_forward=SwiGlu(width, 4 * width), norm=rms_norm)


class GroupHead(nn.Module):
    """MGVQ's autoregressive head: p(i_1, ..., i_G | trunk) as a product over the groups of one position, for any G.

    Sizes and order are those of the released `ar_head.py`. What is unusual:
    - A sequence is one position: [output of the trunk, learned start, embedding of each id so far].
    - One table of K embeddings and one output matrix serve all groups; only the learned positions distinguish them.
    - Each block of the released head also has an adaLN layer of 18 D^2 weights that nothing uses; ours has none.
    - The released head has as many positions as the trunk and uses G + 1 of them; ours has G + 1.
    """

    def __init__(self, *, codebook_size: int, num_groups: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.num_groups = num_groups
        heads = math.gcd(num_groups, width)  # G heads, as released, if G divides the width
        self.pos_emb = nn.Parameter(torch.zeros(1, num_groups + 1, width))
        self.sos_emb_for_image = nn.Parameter(torch.zeros(1, 1, width))
        # The id of the last group is never an input: with one group there is nothing to embed.
        self.tok_emb = nn.Embedding(codebook_size, width) if num_groups > 1 else None
        self.causal_space_blocks = nn.ModuleList(head_block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size, bias=False)

    def forward(self, trunk: Tensor, ids: Tensor) -> Tensor:
        """Return the hidden states that predict the ids of groups 0 to n, float[M, n + 1, D].

        Args:
            trunk: float[M, D], output of the trunk at each position.
            ids: int64[M, n], ids of the first n groups, 0 <= n < G.
        """
        start = self.sos_emb_for_image.expand(len(trunk), -1, -1)
        parts = [trunk.unsqueeze(1), start.to(trunk.dtype)]
        if self.tok_emb is not None and ids.shape[1]:
            parts.append(self.tok_emb(ids).to(trunk.dtype))
        vectors = torch.cat(parts, dim=1)
        vectors = vectors + self.pos_emb[:, : vectors.shape[1]]
        for block in self.causal_space_blocks:
            vectors = block(vectors)
        return self.ln_f(vectors[:, 1:])  # the output at the trunk's own vector predicts nothing


class LinearHead(nn.Module):
    """LlamaGen's output layer: the logits of a position's one id are linear in the output of the trunk.

    It has the interface of `GroupHead` with one group, and starts at 0 as in LlamaGen's code.
    """

    def __init__(self, *, codebook_size: int, width: int) -> None:
        super().__init__()
        self.causal_space_blocks = nn.ModuleList()
        self.head = nn.Linear(width, codebook_size, bias=False)

    def forward(self, trunk: Tensor, ids: Tensor) -> Tensor:
        """float[M, D], int64[M, 0] -> float[M, 1, D]."""
        return trunk.unsqueeze(1)


class LlamaGen(Generator):
    """The trunk encodes the class and all previous positions; the head predicts the G ids of the next position.

    Weights have the names of MGVQ's released model. Its training loss is not released: ours is the mean cross-entropy
    over positions and groups.
    """

    config_class = LlamaGenConfig
    trained_on = "tokens"
    loss_in_words = "cross-entropy in nats per id"
    config: LlamaGenConfig
    rotary: Tensor

    def __init__(self, config: LlamaGenConfig, space: Space) -> None:
        super().__init__(config, space)
        if len(space.layout.grids) != 1:
            raise ConfigError(
                f"the llamagen generator needs ids of one grid, this tokenizer has {len(space.layout.grids)}",
                "Use generator.kind = gpt",
            )
        if config.head == "linear" and space.num_groups > 1:
            raise ConfigError(
                f"generator.head = 'linear' predicts one id a position, this tokenizer has {space.num_groups} groups",
                "Use generator.head = groups",
            )
        # The null class has an embedding even if it is not trained, as in the released model.
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(self.null_class + 1, config.width)})
        groups = space.num_groups
        self.img_projector = CodeEmbedding(groups, space.codebook_size, space.code_dim, groups, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            llama_block(config.width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = rms_norm(config.width)
        self.ar_head: GroupHead | LinearHead
        if config.head == "linear":
            self.ar_head = LinearHead(codebook_size=space.codebook_size, width=config.width)
        else:
            self.ar_head = GroupHead(
                codebook_size=space.codebook_size, num_groups=groups, width=config.width, layers=config.head_layers
            )
        self.register_buffer(
            "rotary", rotary_2d(space.height, space.width, config.width // config.heads), persistent=False
        )
        self.apply(init_weights)
        if isinstance(self.ar_head, GroupHead):
            for learned in (self.ar_head.pos_emb, self.ar_head.sos_emb_for_image):
                nn.init.normal_(learned, std=INIT_STD)
        else:
            nn.init.zeros_(self.ar_head.head.weight)

    def blocks(self) -> Iterable[nn.Module]:
        return [*self.layers, *self.ar_head.causal_space_blocks]

    @property
    def needs_codebook(self) -> bool:
        return not bool(self.img_projector.loaded)

    def load_codebook(self, codebook: Tensor) -> None:
        self.img_projector.load(codebook)

    def embed_classes(self, classes: Tensor) -> Tensor:
        """The first input: int64[B] -> float[B, 1, D]."""
        return self.cls_embedding["embedding_table"](classes).unsqueeze(1)

    def trunk(self, classes: Tensor, ids: Tensor) -> Tensor:
        """Outputs at positions 0 to n: classes int64[B], ids int64[B, n G] before position n -> float[B, n + 1, D]."""
        inputs = self.embed_classes(classes)
        if ids.shape[1]:
            inputs = torch.cat([inputs, self.img_projector(ids).to(inputs.dtype)], dim=1)
        vectors, rotary = self.dropout(inputs), self.rotary[: inputs.shape[1]]
        for layer in self.layers:
            vectors = layer(vectors, rotary)
        return self.norm(vectors)

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return "total", the mean cross-entropy of all ids over the codebook."""
        groups = self.space.num_groups
        trunk = self.trunk(self.drop_labels(labels), examples[:, :-groups]).flatten(0, 1)
        targets = examples.reshape(-1, groups)
        hidden = self.ar_head(trunk, targets[:, :-1])
        total = chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.ar_head.head.weight,
            targets.flatten(),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        return {"total": total}

    def sample_batch(self, classes: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        positions, groups = self.space.height * self.space.width, self.space.num_groups
        uniform = uniform_noise(rngs, positions * groups, classes.device).view(-1, positions, groups)
        samples = []
        vector = self.embed_classes(append_null_classes(classes, self.null_class, sampling))
        caches = empty_caches(len(self.layers), vector, self.config.heads, positions)
        for position in range(positions):
            for layer, cache in zip(self.layers, caches, strict=True):
                vector = layer(vector, self.rotary[position : position + 1], cache, position)
            trunk = self.norm(vector).squeeze(1)
            ids = torch.empty(len(trunk), 0, dtype=torch.long, device=trunk.device)
            for group in range(groups):
                logits = self.ar_head.head(self.ar_head(trunk, ids)[:, -1])
                logits = guide_logits(logits, sampling, position, positions)
                samples.append(sample_ids(logits, uniform[:, position, group], sampling))
                ids = torch.cat([ids, repeat_for_guidance(samples[-1], sampling).unsqueeze(1)], dim=1)
            vector = self.img_projector(ids)
        return checked(torch.stack(samples, dim=1))
