"""Classifiers of token maps, a ViT and a linear probe. They measure the class information in an image's tokens.

VQGAN-LC (Zhu et al. 2024, Figure 1b) trains a ViT-B, pre-trained with MAE (He et al. 2022), on the token maps of its
tokenizers and reports top-1 accuracy. Neither the paper nor its code says how tokens enter the ViT, which weights are
frozen, or how long it is trained, so the published number cannot be reproduced exactly. Our recipe is named RECIPE:

- The codes of a position, concatenated over its groups and standardized per channel over the codebook, pass one linear
  layer that replaces the ViT's patch embedding. Or ids are embedded by a learned table (`embedding = "table"`).
- Position embeddings are learned; MAE's are resampled to the grid. Mean pooling, LayerNorm and a linear layer, as in
  MAE's fine-tuning. All weights are trained, with one learning rate: there is no layer-wise decay.
- Cross-entropy with label smoothing, drop path, and random flips. There is no mixup, CutMix or random crop: ids
  cannot be interpolated, and the tokens are of one crop.

Shapes: B images, N ids per image, G groups (ids per position), P = N / G positions over all grids, K codes of C
channels, D channels of the ViT.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import check_choices, check_range, class_for, resumable
from vqpipe.errors import ConfigError, DataError, WeightsError
from vqpipe.generation.base import Space
from vqpipe.weights import load_tensors

RECIPE = "vqpipe-classify-1"
UNUSED = ("patch_embed.", "norm.", "fc_norm.", "head.", "mask_token", "decoder_")
"""Tensors of a pretrained ViT that are not used: the patch embedding, the decoder, and the norm and head that
fine-tuning initializes anew."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Section [classifier]; `kind` chooses the network."""

    kind: ClassVar[str]

    embedding: Literal["codes", "table"] = "codes"
    """Embedding of ids: the tokenizer's codes (after its projector, if it has one), or a learned table."""
    table_dim: int = 32
    """Channels of the learned table."""
    label_smoothing: float = 0.1
    """Probability that is spread over all classes in training, 0..1."""

    def __post_init__(self) -> None:
        check_choices(self, "classifier")
        check_range(self, "classifier", "[0, 1)", "label_smoothing")
        check_range(self, "classifier", "[1, inf)", "table_dim")


@dataclass(frozen=True, kw_only=True)
class VitConfig(ClassifierConfig):
    """timm's vision transformer (Dosovitskiy et al. 2021); defaults: ViT-B."""

    kind = "vit"

    width: int = 768
    """D, channels."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads."""
    drop_path: float = 0.1
    """Probability that the last block is skipped for an image; it increases linearly from 0 in the first."""
    pretrained: bool = resumable(default=False)
    """Require `weights`: an experiment that fine-tunes pretrained weights is not trained without them by mistake."""
    weights: Path | None = resumable(default=None)
    """Pretrained weights of MAE, as published by its authors or by timm; None: random initialization. Two runs are the
    same if the content of the file is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "classifier", "[1, inf)", "width", "depth", "num_heads")
        check_range(self, "classifier", "[0, 1)", "drop_path")
        if self.width % self.num_heads:
            raise ConfigError(
                f"classifier.width = {self.width} is not divisible by classifier.num_heads = {self.num_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(ClassifierConfig):
    """One linear layer on the mean of an image's codes."""

    kind = "linear"

    pool: int = 1
    """Codes are averaged in `pool` x `pool` equal cells of the grid; 1: over the whole grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "classifier", "[1, inf)", "pool")
        if self.embedding != "codes":
            raise ConfigError("a linear probe needs the tokenizer's codes", "Set classifier.embedding = codes")


class Classifier(nn.Module, ABC):
    """int64[B, N] -> logits float[B, num_classes].

    If ids are embedded by the tokenizer's codes, call `load_codebook` before training. The codes are part of the state
    dict, so that a classifier loaded from disk has them.

    Raises:
        ConfigError: the images have no classes.
    """

    config_class: ClassVar[type[ClassifierConfig]]
    loss_in_words = "cross-entropy in nats per image"
    forward_methods: ClassVar[tuple[str, ...]] = ("logits",)
    """Methods besides `forward` that run the network: FSDP gathers sharded weights for them too."""

    def __init__(self, config: ClassifierConfig, space: Space) -> None:
        super().__init__()
        if space.num_classes is None:
            raise ConfigError("a classifier needs classes", "Use labeled images and examples.conditional = true")
        self.config, self.space, self.num_classes = config, space, space.num_classes
        if config.embedding == "codes":
            self.dim = space.code_dim
            self.register_buffer("codes", torch.zeros(space.num_groups, space.codebook_size, self.dim))
        else:
            self.dim = config.table_dim
            self.codes = nn.Parameter(torch.empty(space.num_groups, space.codebook_size, self.dim))
            nn.init.normal_(self.codes)
        self.positions = space.num_tokens // space.num_groups

    @abstractmethod
    def classify(self, embedded: Tensor) -> Tensor:
        """Embedded positions, float[B, P, G * C] -> logits float[B, num_classes]."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Return the repeated blocks: the units of activation checkpointing, compilation and sharding."""

    @property
    def needs_codebook(self) -> bool:
        """Whether `load_codebook` must be called before training."""
        return self.config.embedding == "codes"

    def load_codebook(self, codebook: Tensor) -> None:
        """Load the tokenizer's codes, float[K, C] or float[G, K, C], standardized per channel.

        Raises:
            ConfigError: this classifier learns its embeddings, or the codebook has another shape.
        """
        if not self.needs_codebook:
            raise ConfigError("this classifier learns its embeddings", "Set classifier.embedding = codes")
        codes = codebook.detach().float().reshape(-1, *codebook.shape[-2:])
        if codes.shape != self.codes.shape:
            raise ConfigError(
                f"a codebook of shape {list(codes.shape)} does not fit a classifier for {list(self.codes.shape)}",
                "Use the codebook of the tokenizer that made the tokens",
            )
        std, mean = torch.std_mean(codes, dim=1, keepdim=True)
        self.codes.data.copy_((codes - mean) / std.clamp(min=1e-6))

    def embed(self, ids: Tensor) -> Tensor:
        """int64[B, N] -> float[B, P, G * C], the codes of each position concatenated.

        Raises:
            DataError: another number of ids per image.
        """
        if ids.ndim != 2 or ids.shape[1] != self.space.num_tokens:
            raise DataError(f"ids of shape {list(ids.shape)}, expected [images, {self.space.num_tokens}]")
        grouped = ids.view(len(ids), self.positions, self.space.num_groups)
        pairs = zip(grouped.unbind(-1), self.codes.unbind(0), strict=True)
        return torch.cat([F.embedding(group_ids, codes) for group_ids, codes in pairs], dim=-1)

    def logits(self, ids: Tensor) -> Tensor:
        """int64[B, N] -> float[B, num_classes]."""
        return self.classify(self.embed(ids))

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return "total", the cross-entropy (smoothed in training), and "train/top1", the share of correct guesses."""
        logits = self.classify(self.embed(examples)).float()
        smoothing = self.config.label_smoothing if self.training else 0.0
        total = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return {"total": total, "train/top1": (logits.argmax(1) == labels).float().mean().detach()}

    def forward(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, as the call that DistributedDataParallel wraps."""
        return self.loss(examples, labels)


class TokenViT(Classifier):
    """timm's VisionTransformer, with a linear layer on codes instead of the patch embedding."""

    config_class = VitConfig

    def __init__(self, config: VitConfig, space: Space) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__(config, space)
        self.embedding = nn.Linear(space.num_groups * self.dim, config.width)
        self.vit = VisionTransformer(
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            drop_path_rate=config.drop_path,
            num_classes=self.num_classes,
            global_pool="avg",
            embed_layer=partial(NoPatchEmbedding, self.positions),
        )
        if config.weights is not None and self.embedding.weight.device.type != "meta":
            self.load_pretrained(config.weights)

    def classify(self, embedded: Tensor) -> Tensor:
        return self.vit(self.embedding(embedded))

    def blocks(self) -> Iterable[nn.Module]:
        return self.vit.blocks

    def load_pretrained(self, file: Path) -> None:
        """Load the class token, position embeddings and blocks of a pretrained ViT; the tensors of UNUSED are skipped.

        Raises:
            WeightsError: the file is absent or damaged, a tensor is missing, unknown or of another size.
        """
        tensors = load_tensors(file)
        if isinstance(tensors, Mapping):
            tensors = tensors.get("model", tensors)
        if not isinstance(tensors, Mapping) or not isinstance(tensors.get("pos_embed"), Tensor):
            raise WeightsError(f"{file} is not a vision transformer", "Fetch mae_pretrain_vit_base.pth")
        kept = {name: value for name, value in self.vit.state_dict().items() if name.startswith(UNUSED)}
        loaded = {name: value for name, value in tensors.items() if not str(name).startswith(UNUSED)}
        loaded["pos_embed"] = self.resample_positions(loaded["pos_embed"], file)
        try:
            self.vit.load_state_dict(kept | loaded)
        except (RuntimeError, AttributeError) as error:  # the latter for names that are no text
            hint = "Set classifier.width, depth and num_heads to its sizes"
            raise WeightsError(f"{file} does not fit: {' '.join(str(error).split())[:160]}", hint) from None

    def resample_positions(self, pos_embed: Tensor, file: Path) -> Tensor:
        """Resample position embeddings of a square grid, [1, 1 + S^2, D], to ours; with several grids return ours."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        grids = self.space.layout.grids
        if len(grids) > 1:
            return self.vit.state_dict()["pos_embed"]
        positions = max(pos_embed.shape[1] - 1, 0) if pos_embed.ndim == 3 else 0
        side = math.isqrt(positions)
        if side == 0 or side * side != positions:
            raise WeightsError(f"{file}: the position embeddings {list(pos_embed.shape)} are not of a square grid")
        return resample_abs_pos_embed(pos_embed, new_size=list(grids[0]), old_size=[side, side])


class LinearProbe(Classifier):
    """A linear layer on the mean of an image's codes, over the grid or in each of its cells."""

    config_class = LinearProbeConfig

    def __init__(self, config: LinearProbeConfig, space: Space) -> None:
        super().__init__(config, space)
        self.pool = config.pool
        if self.pool > 1 and (len(space.layout.grids) > 1 or self.pool > min(space.layout.grids[0])):
            grids = ", ".join(f"{height} x {width}" for height, width in space.layout.grids)
            raise ConfigError(f"classifier.pool = {self.pool} does not fit the grid {grids}", "Set classifier.pool = 1")
        self.head = nn.Linear(space.num_groups * self.dim * self.pool**2, self.num_classes)

    def classify(self, embedded: Tensor) -> Tensor:
        if self.pool == 1:
            return self.head(embedded.mean(1))
        grid = embedded.transpose(1, 2).unflatten(2, self.space.layout.grids[0])
        return self.head(F.adaptive_avg_pool2d(grid, self.pool).flatten(1))

    def blocks(self) -> Iterable[nn.Module]:
        return ()


class NoPatchEmbedding(nn.Module):
    """The identity in place of timm's patch embedding, for inputs that are embedded already, float[B, P, D]."""

    def __init__(self, positions: int, **_: Any) -> None:
        super().__init__()
        self.num_patches = positions

    def forward(self, embedded: Tensor) -> Tensor:
        return embedded


def build_classifier(config: ClassifierConfig, space: Space) -> Classifier:
    """Return the classifier of `config` for the tokens of `space`, with initial weights."""
    return class_for(Classifier, config)(config, space)  # type: ignore[type-abstract]
