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
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError, WeightsError
from vqpipe.generation.base import Generator, GeneratorConfig, SamplingConfig, Space
from vqpipe.generation.cross_entropy import chunked_cross_entropy
from vqpipe.generation.embedding import CodeEmbedding, LabelEmbedding
from vqpipe.generation.head import GroupHead
from vqpipe.generation.sampling import draw_ids, for_each_run, guided, uniforms, with_null
from vqpipe.generation.transformer import (
    INIT_STD,
    Size,
    empty_caches,
    init_weights,
    llama_block,
    rms_norm,
    rotary_2d,
)

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


class LlamaGen(Generator):
    """The trunk tells of each position from the class and the positions before; the head draws its G ids.

    Weights have the names of MGVQ's released model. Its training loss is not released: ours is the mean cross-entropy
    over positions and groups.
    """

    config_class = LlamaGenConfig
    trained_on = "tokens"
    config: LlamaGenConfig
    rotary: Tensor

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
        self.layers = nn.ModuleList(
            llama_block(config.width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = rms_norm(config.width)
        self.ar_head = GroupHead(
            codebook_size=space.codebook_size, num_groups=groups, width=config.width, layers=config.head_layers
        )
        self.register_buffer(
            "rotary", rotary_2d(space.height, space.width, config.width // config.heads), persistent=False
        )
        self.apply(init_weights)
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
        vectors, rotary = self.dropout(inputs), self.rotary[: inputs.shape[1]]
        for layer in self.layers:
            vectors = layer(vectors, rotary)
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
        labels = labels.to(self.rotary.device)
        if self.needs_codebook:
            raise WeightsError("the llamagen generator has no codes to read its ids with", "Load its codebook first")
        positions, groups = self.space.height * self.space.width, self.space.num_groups
        chances = uniforms(draws, positions * groups, labels.device).view(-1, positions, groups)
        drawn = []
        with self.evaluating():
            vector = self.cls_embedding(with_null(self.known(labels), self.num_classes or 0, sampling))
            caches = empty_caches(len(self.layers), vector, self.config.heads, positions)
            for position in range(positions):
                ids = self.ar_head.draw(
                    self.step(vector, caches, position),
                    lambda logits, group, at=position: for_each_run(  # type: ignore[misc]  # `at` is bound early
                        draw_ids(guided(logits, sampling, at, positions), chances[:, at, group], sampling), sampling
                    ),
                )
                drawn.append(ids[: len(labels)])
                vector = self.img_projector(ids)
        return torch.cat(drawn, dim=1)

    def step(self, vector: Tensor, caches: Sequence[Tensor], position: int) -> Tensor:
        """What the trunk says of `position`, float[B, D], from its input float[B, 1, D] and those cached before."""
        rotary = self.rotary[position : position + 1]
        for layer, cache in zip(self.layers, caches, strict=True):
            vector = layer(vector, rotary, cache, position)
        return self.norm(vector).squeeze(1)
