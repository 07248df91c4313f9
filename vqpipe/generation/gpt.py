"""`gpt`: the GPT of VQGAN-LC, on one sequence of a class token and the ids of an image.

Zhu et al. 2024, "Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%"; Radford et al. 2019.
Shapes: B images, N ids per image, K codes, V entries of the vocabulary, D channels.

What is unusual:
- The vocabulary is the K codes, followed by the class tokens: class c is entry K + c, and the null class, if guidance
  is trained, K + num_classes. Without classes there is one start token, K; the released code starts from the code 0.
- In training, input ids are replaced by random ids with probability 1 - `keep`; the released code also samples class
  tokens there.
- Ids of any layout are one sequence: only the learned positions distinguish groups and scales.
- Sampling caches keys and values; the released code runs the whole sequence again for every id.

With 100,000 codes, 1000 classes and 256 ids the paper's model (the preset gpt-404m) has 509.4 million parameters, 103.4
million in each of the two vocabulary matrices; its "404M" counts one of them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.config import check_range
from vqpipe.generation.base import Generator, SamplingConfig, Space
from vqpipe.generation.causal_transformer import (
    INIT_STD,
    CausalTransformerConfig,
    empty_caches,
    gpt2_block,
    init_weights,
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
class GptConfig(CausalTransformerConfig):
    """Defaults: VQGAN-LC's GPT, plus a null class for guidance (the released model has none: class_dropout = 0)."""

    kind: ClassVar[str] = "gpt"

    layers: int = 24
    heads: int = 16
    width: int = 1024
    dropout: float = 0.0
    keep: float = 1.0
    """Probability that an input id is kept in training; the others become random ids, 0..1. VQGAN-LC: 0.8."""
    embedding: Literal["learned", "codebook"] = "learned"
    """Input embeddings: a learned table, as the released code, or the tokenizer's codes through a small network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "generator", "[0, 1]", "keep")


class Gpt(Generator):
    """Next-id prediction by GPT-2's blocks with learned positions.

    Weights are initialized from N(0, 0.02), the last layer of each half of a block with a standard deviation smaller by
    sqrt(2 layers), as GPT-2; the released code has 0.02 there too. Input and output matrices are not tied, and the
    output has no bias.
    """

    config_class = GptConfig
    trained_on = "tokens"
    loss_in_words = "cross-entropy in nats per id"
    config: GptConfig

    def __init__(self, config: GptConfig, space: Space) -> None:
        super().__init__(config, space)
        starts = self.num_class_embeddings
        learned = config.embedding == "learned"
        self.first_start = space.codebook_size if learned else 0
        """Row of `tokens` of the first class."""
        self.tokens = nn.Embedding(starts + self.first_start, config.width)
        groups = space.num_groups
        self.code_embedding = (
            None if learned else CodeEmbedding(groups, space.codebook_size, space.code_dim, 1, config.width)
        )
        self.positions = nn.Parameter(torch.zeros(space.num_tokens, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            gpt2_block(config.width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, space.codebook_size + starts, bias=False)
        for part in (self.tokens, self.layers, self.head):
            part.apply(init_weights)
        nn.init.normal_(self.positions, std=INIT_STD)
        for name, weight in self.layers.named_parameters():
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * config.layers))

    def blocks(self) -> Iterable[nn.Module]:
        return self.layers

    @property
    def needs_codebook(self) -> bool:
        return self.code_embedding is not None and not bool(self.code_embedding.loaded)

    def load_codebook(self, codebook: Tensor) -> None:
        if self.code_embedding is None:
            super().load_codebook(codebook)
        else:
            self.code_embedding.load(codebook)

    def embed_classes(self, classes: Tensor) -> Tensor:
        """The first input: int64[B] -> float[B, 1, D]."""
        return self.tokens(self.first_start + classes).unsqueeze(1)

    def embed(self, ids: Tensor, first: int = 0) -> Tensor:
        """int64[B, n] ids, the first of which has index `first` in its image -> float[B, n, D]."""
        return self.tokens(ids) if self.code_embedding is None else self.code_embedding(ids, first)

    def hidden(self, classes: Tensor, ids: Tensor) -> Tensor:
        """The hidden states that predict ids 0 to n: classes int64[B], ids int64[B, n] -> float[B, n + 1, D]."""
        start = self.embed_classes(classes)
        inputs = torch.cat([start, self.embed(ids).to(start.dtype)], dim=1) if ids.shape[1] else start
        vectors = self.dropout(inputs + self.positions[: inputs.shape[1]])
        for layer in self.layers:
            vectors = layer(vectors)
        return self.norm(vectors)

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., D] -> float[..., K]: logits of the codes, without the class tokens."""
        return self.head(hidden)[..., : self.space.codebook_size]

    def corrupt(self, ids: Tensor) -> Tensor:
        """Replace input ids by random ids with probability 1 - `keep`, in training."""
        if self.config.keep == 1 or not self.training:
            return ids
        random_ids = torch.randint_like(ids, self.space.codebook_size)
        return torch.where(torch.rand(ids.shape, device=ids.device) < self.config.keep, ids, random_ids)

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return "total", the mean cross-entropy of all ids over the vocabulary."""
        hidden = self.hidden(self.drop_labels(labels), self.corrupt(examples[:, :-1]))
        total = chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.head.weight,
            examples.flatten(),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        return {"total": total}

    def sample_batch(self, classes: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        count = self.space.num_tokens
        uniform = uniform_noise(rngs, count, classes.device)
        samples = []
        vector = self.embed_classes(append_null_classes(classes, self.null_class, sampling))
        caches = empty_caches(len(self.layers), vector, self.config.heads, count)
        for number in range(count):
            hidden = vector + self.positions[number]
            for layer, cache in zip(self.layers, caches, strict=True):
                hidden = layer(hidden, None, cache, number)
            logits = guide_logits(self.logits(self.norm(hidden)[:, -1]), sampling, number, count)
            ids = sample_ids(logits, uniform[:, number], sampling)
            samples.append(ids)
            vector = self.embed(repeat_for_guidance(ids, sampling).unsqueeze(1), number).to(vector.dtype)
        return checked(torch.stack(samples, dim=1))
