"""`llamagen`: LlamaGen's transformer over the positions of an image, with MGVQ's head over the ids of a position.

Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation"; Jia et al. 2025, "MGVQ".
Shapes: B images, P = h x w positions, G groups, N = P * G ids, K codes of a group, D channels, A heads.

What is unusual:
- No table of input embeddings: a position's G codes, as the tokenizer has them, are joined and go through a small
  network. MGVQ hands in the rows of its table as they are stored, not the unit vectors that its decoder sees.
- The positions turn in two dimensions: half of a head's channels with the row, half with the column.
- The class stands before the first position, and its turn is all zeros rather than none: its queries and keys vanish,
  so that whoever looks at it sees its values at weight exp(0). This is LlamaGen's; weights depend on it.
- The head of MGVQ takes the place of LlamaGen's output layer for any G, G = 1 too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.errors import ConfigError, WeightsError
from vqpipe.generation.base import Generator, GeneratorConfig, SamplingConfig, Space
from vqpipe.generation.cross_entropy import chunked_cross_entropy
from vqpipe.generation.head import NORM_EPS, GroupHead, SwiGlu
from vqpipe.generation.sampling import draw_ids, for_each_run, guided, uniforms, with_null

ROPE_BASE = 10_000.0
INIT_STD = 0.02


class Size(NamedTuple):
    """Layers, heads and channels."""

    layers: int
    heads: int
    width: int


SIZES = {
    #             layers heads width
    "tiny": Size(     2,    4,  128),
    "b":    Size(    12,   12,  768),
    "l":    Size(    24,   16, 1024),
    "xl":   Size(    36,   20, 1280),
    "xxl":  Size(    48,   24, 1536),
}  # fmt: skip
"""LlamaGen's, and one that learns on a CPU. With G = 4 groups of 8192 codes and 24 x 24 positions MGVQ's released
models have 139,170,816 / 398,577,664 / 866,728,960 / 1,548,343,296 parameters; without the adaLN layers and the
positions that they never use, ours have 117,498,624 / 360,244,224 / 807,015,680 / 1,462,531,584."""


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(GeneratorConfig):
    """The defaults are GPT-B with LlamaGen's training recipe."""

    kind: ClassVar[str] = "llamagen"

    layers: int = 12
    heads: int = 12
    width: int = 768
    """D, channels."""
    head_layers: int = 2
    """Blocks of the head over groups."""
    dropout: float = 0.1
    """Of inputs, and of both halves of every block of the trunk, 0..1."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the codebook, 0..1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, self.heads, self.width, self.head_layers) < 1:
            raise ConfigError("generator.layers, heads, width and head_layers should be at least 1")
        if self.width % (4 * self.heads):
            raise ConfigError(
                f"generator.width = {self.width} does not give {self.heads} heads a multiple of 4 channels",
                "Rows and columns turn pairs of channels of a head",
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.label_smoothing < 1:
            raise ConfigError("generator.dropout and label_smoothing should be in [0, 1)")


class CodeEmbedding(nn.Module):
    """Ids to channels by the tokenizer's own codes: joined, then Linear, GELU, Linear, LayerNorm."""

    codes: Tensor
    loaded: Tensor

    def __init__(self, groups: int, codebook_size: int, code_dim: int, joined: int, width: int) -> None:
        super().__init__()
        self.joined = joined
        """Ids whose codes make one input: a position's groups, or 1."""
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
        """Take the codes, float[K, D] or float[G, K, D]."""
        groups = codebook.unsqueeze(0) if codebook.ndim == 2 else codebook
        if groups.shape != self.codes.shape:
            raise ConfigError(
                f"a codebook of shape {list(codebook.shape)} does not fit a generator for {list(self.codes.shape)}",
                "Hand in the codebook of the tokenizer that made the tokens",
            )
        self.codes.copy_(groups)
        self.loaded.fill_(True)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """int64[B, n], the first of them id number `first` of its image -> float[B, n / joined, width]."""
        groups = torch.arange(first, first + ids.shape[1], device=ids.device) % len(self.codes)
        return self.layers(self.codes[groups, ids].unflatten(1, (-1, self.joined)).flatten(2))


class Attention(nn.Module):
    """Causal attention whose queries and keys are turned by their position."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vectors: Tensor, turns: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """float[B, L, D] -> float[B, L, D].

        Args:
            turns: float32[L, D / A / 2, 2], of the positions `start` to `start` + L.
            cache: float[2, B, A, P, D / A], keys and values so far, to which this position's are added (L = 1).
        """
        parts = self.wqkv(vectors).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = turned(parts[0], turns), turned(parts[1], turns), parts[2]
        if cache is not None:
            end = start + vectors.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = key, value
            key, value = cache[0, :, :, :end].to(query.dtype), cache[1, :, :, :end].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        return self.dropout(self.wo(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention, then the gated network, each behind its norm."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        hidden = -(-(8 * config.width // 3) // 256) * 256  # the next multiple of 256, as Llama
        self.feed_forward = SwiGlu(config.width, hidden, config.dropout)

    def forward(self, vectors: Tensor, turns: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """As `Attention.forward`."""
        vectors = vectors + self.attention(self.attention_norm(vectors), turns, cache, start)
        return vectors + self.feed_forward(self.ffn_norm(vectors))


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for the null class behind them."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes, width)

    def forward(self, labels: Tensor) -> Tensor:
        """int64[B] -> float[B, 1, D]."""
        return self.embedding_table(labels).unsqueeze(1)


class LlamaGen(Generator):
    """The trunk tells of each position from the class and the positions before; the head draws its G ids.

    Weights have the names of MGVQ's released model. Its training loss is not released: ours is the mean cross-entropy
    over positions and groups.
    """

    config_class = LlamaGenConfig
    trained_on = "tokens"
    config: LlamaGenConfig
    turns: Tensor

    def __init__(self, config: LlamaGenConfig, space: Space) -> None:
        super().__init__(config, space)
        if len(space.layout.grids) != 1:
            raise ConfigError(
                f"the llamagen generator reads one grid, not the {len(space.layout.grids)} of this tokenizer",
                "Choose generator.kind = gpt",
            )
        self.cls_embedding = LabelEmbedding((space.num_classes or 0) + 1, config.width)  # unconditional: null alone
        groups = space.num_groups
        self.img_projector = CodeEmbedding(groups, space.codebook_size, space.code_dim, groups, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.ar_head = GroupHead(
            codebook_size=space.codebook_size, num_groups=groups, width=config.width, layers=config.head_layers
        )
        self.register_buffer(
            "turns", turns_of(space.height, space.width, config.width // config.heads), persistent=False
        )
        self.apply(initialise)
        for learned in (self.ar_head.pos_emb, self.ar_head.sos_emb_for_image):
            nn.init.normal_(learned, std=INIT_STD)

    def blocks(self) -> Iterable[nn.Module]:
        return [*self.layers, *self.ar_head.causal_space_blocks]

    @property
    def needs_codebook(self) -> bool:
        return not bool(self.img_projector.loaded)

    def load_codebook(self, codebook: Tensor) -> None:
        self.img_projector.load(codebook)

    def trunk(self, labels: Tensor, ids: Tensor) -> Tensor:
        """What the trunk says of positions 0 to n: labels int64[B], ids int64[B, n G] -> float[B, n + 1, D]."""
        inputs = self.cls_embedding(self.known(labels))
        if ids.shape[1]:
            inputs = torch.cat([inputs, self.img_projector(ids).to(inputs.dtype)], dim=1)
        vectors, turns = self.dropout(inputs), self.turns[: inputs.shape[1]]
        for layer in self.layers:
            vectors = layer(vectors, turns)
        return self.norm(vectors)

    def known(self, labels: Tensor) -> Tensor:
        """The labels, or, where there are no classes, the null class for each."""
        return torch.zeros_like(labels) if self.num_classes is None else labels

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        groups = self.space.num_groups
        trunk = self.trunk(self.dropped(labels), examples[:, :-groups]).flatten(0, 1)
        targets = examples.reshape(-1, groups)
        hidden = self.ar_head(trunk, targets[:, :-1])
        total = chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.ar_head.head.weight,
            targets.flatten(),
            label_smoothing=self.config.label_smoothing,
        )
        return {"total": total}

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
        self.check_sampling(labels, sampling, draws)
        labels = labels.to(self.turns.device)
        if self.needs_codebook:
            raise WeightsError("the llamagen generator has no codes to read its ids with", "Load its codebook first")
        positions, groups = self.space.height * self.space.width, self.space.num_groups
        chances = uniforms(draws, positions * groups, labels.device).view(-1, positions, groups)
        drawn = []
        with self.evaluating():
            vector = self.cls_embedding(with_null(self.known(labels), self.num_classes or 0, sampling))
            cache = self.empty_cache(vector)
            for position in range(positions):
                ids = self.ar_head.draw(
                    self.step(vector, cache, position),
                    lambda logits, group, at=position: for_each_run(  # type: ignore[misc]  # `at` is bound early
                        draw_ids(guided(logits, sampling, at, positions), chances[:, at, group], sampling), sampling
                    ),
                )
                drawn.append(ids[: len(labels)])
                vector = self.img_projector(ids)
        return torch.cat(drawn, dim=1)

    def empty_cache(self, like: Tensor) -> list[Tensor]:
        """Room for the keys and values of all positions: float[2, B, A, P, D / A] for each layer."""
        heads = self.config.heads
        shape = (2, len(like), heads, self.space.height * self.space.width, self.config.width // heads)
        return [like.new_zeros(shape) for _ in self.layers]

    def step(self, vector: Tensor, cache: Sequence[Tensor], position: int) -> Tensor:
        """What the trunk says of `position`, float[B, D], from its input float[B, 1, D] and those cached before."""
        turns = self.turns[position : position + 1]
        for layer, its_cache in zip(self.layers, cache, strict=True):
            vector = layer(vector, turns, its_cache, position)
        return self.norm(vector).squeeze(1)


def turns_of(height: int, width: int, head_dim: int) -> Tensor:
    """Cosine and sine of each position's turn, float32[1 + h w, head_dim / 2, 2]; zeros for the class, which is first.

    Half of the pairs turn by the row, half by the column, at frequencies 10000^(-2 i / (head_dim / 2)) (RoPE, Su et al.
    2021).
    """
    quarter = head_dim // 4
    frequencies = ROPE_BASE ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    rows = torch.outer(torch.arange(height).float(), frequencies).unsqueeze(1).expand(-1, width, -1)
    columns = torch.outer(torch.arange(width).float(), frequencies).unsqueeze(0).expand(height, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    turns = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(turns[:1]), turns])


def turned(vectors: Tensor, turns: Tensor) -> Tensor:
    """float[B, A, L, head_dim], each pair of neighbouring channels turned by float32[L, head_dim / 2, 2]."""
    first, second = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.unbind(-1)
    pairs = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return pairs.flatten(-2).to(vectors.dtype)


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for matrices and tables, as LlamaGen."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
