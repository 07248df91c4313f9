"""Classifiers of token maps: a ViT, and a linear probe. How much of what an image shows is left in its tokens?

VQGAN-LC (Zhu et al. 2024, Figure 1b) trains a ViT-B, pre-trained with MAE (He et al. 2022), on all token maps and gives
its top-1 accuracy. Neither the paper nor its code says how tokens enter the ViT, what of it is frozen, or for how long
it is trained, so the published number cannot be met exactly. What is here is a recipe of ours, RECIPE by name:

- A position's codes, those of its groups side by side, standardised channel by channel over the codebook, go through
  one linear layer to the ViT's width; it stands where the ViT cuts an image into patches. Or ids are embedded by a
  learned table (`embedding = "table"`).
- Position embeddings are learned; MAE's are resampled to the grid. Mean pooling, a LayerNorm, a linear layer, as MAE is
  fine-tuned. All weights are trained, in one rate: there is no decay of it by layer.
- Cross-entropy with label smoothing, drop path, and each image or its mirror image by chance. There is no mixup, CutMix
  or random crop: a blend of two ids is no id, and tokens are of one crop.

Shapes: B images, N ids an image, G groups (ids per position), P = N / G positions over all grids, K codes of C
channels, D the ViT's width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import resumable
from vqpipe.errors import ConfigError, DataError, WeightsError
from vqpipe.generation.base import Space

RECIPE = "vqpipe-classify-1"
UNUSED = ("patch_embed.", "norm.", "fc_norm.", "head.", "mask_token", "decoder_")
"""What of a pretrained ViT has no place here: its patches, what reconstructed pixels, and the norm and the head that
fine-tuning begins afresh."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Section [classifier]; `kind` chooses the network."""

    kind: ClassVar[str]

    embedding: Literal["codes", "table"] = "codes"
    """How an id becomes a vector: by the tokenizer's own code (projected, where it projects), or by a learned one."""
    table_dim: int = 32
    """Channels of a learned vector."""
    label_smoothing: float = 0.1
    """Probability that is spread over all classes, 0..1."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.table_dim < 1:
            raise ConfigError("classifier.label_smoothing should be in [0, 1), classifier.table_dim at least 1")


@dataclass(frozen=True, kw_only=True)
class VitConfig(ClassifierConfig):
    """A vision transformer (Dosovitskiy et al. 2021) as timm has it; the defaults are ViT-B's sizes."""

    kind = "vit"

    width: int = 768
    """D."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads."""
    drop_path: float = 0.1
    """Probability that a block is skipped for an image, in the last block; it rises linearly to there."""
    weights: Path | None = resumable(None)
    """A checkpoint of MAE, as its authors or timm publish it, to start from; none: random weights. The file counts by
    its content."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.depth, self.num_heads) < 1 or self.width % self.num_heads:
            raise ConfigError(
                f"classifier.width = {self.width} does not divide by classifier.num_heads = {self.num_heads}"
            )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"classifier.drop_path = {self.drop_path} should be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(ClassifierConfig):
    """One linear layer on the mean of the codes: what of a class can be read off without learning to look."""

    kind = "linear"

    pool: int = 1
    """Means are taken in `pool` x `pool` equal parts of the grid; 1: over all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool < 1:
            raise ConfigError(f"classifier.pool = {self.pool} should be at least 1")
        if self.embedding != "codes":
            raise ConfigError("a linear probe reads the tokenizer's own codes", "Set classifier.embedding = codes")


class Classifier(nn.Module, ABC):
    """int64[B, N] -> logits float[B, num_classes].

    `load_codebook` comes before the first use where ids are embedded by the tokenizer's codes; the codes are a part of
    the state, so a classifier that is read from disk has them.

    Raises:
        ConfigError: images without classes.
    """

    config_class: ClassVar[type[ClassifierConfig]]
    entrances: ClassVar[tuple[str, ...]] = ("predict",)
    """Methods beside `forward` that others call: weights that are split among ranks are gathered for them too."""

    def __init__(self, config: ClassifierConfig, space: Space) -> None:
        super().__init__()
        if space.num_classes is None:
            raise ConfigError("a classifier needs classes", "Set examples.conditional = true, and give labelled images")
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
        """The codes of every position, float[B, P, G * C] -> logits float[B, num_classes]."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The repeated blocks: units of recomputing and of sharding."""

    @property
    def needs_codebook(self) -> bool:
        """Whether `load_codebook` has to be called before training."""
        return self.config.embedding == "codes"

    def load_codebook(self, codebook: Tensor) -> None:
        """Take the tokenizer's codes, float[K, C] or [G, K, C], standardised channel by channel.

        Raises:
            ConfigError: ids have a learned table here, or the codes have another shape.
        """
        if not self.needs_codebook:
            raise ConfigError("this classifier learns its own table of codes", "Set classifier.embedding = codes")
        table = codebook.detach().float().reshape(-1, *codebook.shape[-2:])
        if table.shape != self.codes.shape:
            raise ConfigError(f"a codebook of shape {list(table.shape)}, {list(self.codes.shape)} is needed")
        spread, mean = torch.std_mean(table, dim=1, keepdim=True)
        self.codes.data.copy_((table - mean) / spread.clamp(min=1e-6))

    def embed(self, ids: Tensor) -> Tensor:
        """int64[B, N] -> float[B, P, G * C], the codes of a position side by side."""
        grouped = ids.view(len(ids), self.positions, self.space.num_groups)
        pairs = zip(grouped.unbind(-1), self.codes.unbind(0), strict=True)
        return torch.cat([F.embedding(part, table) for part, table in pairs], dim=-1)

    def logits(self, ids: Tensor) -> Tensor:
        """int64[B, N] -> float[B, num_classes].

        Raises:
            DataError: the ids are of another number an image.
        """
        if ids.ndim != 2 or ids.shape[1] != self.space.num_tokens:
            raise DataError(f"ids of shape {list(ids.shape)}, [images, {self.space.num_tokens}] is expected")
        return self.classify(self.embed(ids))

    def predict(self, ids: Tensor) -> Tensor:
        """`logits`, for others to call."""
        return self.logits(ids)

    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scalars by name: "total", the smoothed cross-entropy; "train/top1", the share of right answers."""
        logits = self.logits(examples).float()
        total = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {"total": total, "train/top1": (logits.argmax(1) == labels).float().mean().detach()}

    def forward(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, as one call for DistributedDataParallel."""
        return self.loss(examples, labels)


class TokenViT(Classifier):
    """timm's VisionTransformer behind a linear layer from codes, in place of its patches."""

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
            embed_layer=partial(Embedded, self.positions),
        )
        if config.weights is not None and self.embedding.weight.device.type != "meta":
            self.start_from(config.weights)

    def classify(self, embedded: Tensor) -> Tensor:
        return self.vit(self.embedding(embedded))

    def blocks(self) -> Iterable[nn.Module]:
        return self.vit.blocks

    def start_from(self, file: Path) -> None:
        """Take the class token, the position embeddings and the blocks of a pretrained ViT; see UNUSED for the rest.

        Raises:
            WeightsError: the file is absent or damaged, a block is missing or of another size, or it holds what no ViT
                of MAE holds.
        """
        from vqpipe.weights import load_tensors

        tensors = load_tensors(file)
        tensors = tensors.get("model", tensors)
        if not isinstance(tensors, Mapping) or "pos_embed" not in tensors:
            raise WeightsError(f"{file} holds no vision transformer", "Fetch mae_pretrain_vit_base.pth")
        wanted = {name for name in self.vit.state_dict() if not name.startswith(UNUSED)}
        given = {name: value for name, value in tensors.items() if not name.startswith(UNUSED)}
        for name in sorted(wanted ^ set(given)):
            what = "lacks" if name in wanted else "has an unknown tensor"
            raise WeightsError(f"{file} {what} {name}", "Set classifier.width, depth and num_heads to its sizes")
        given["pos_embed"] = self.resampled(given["pos_embed"], file)
        own = self.vit.state_dict()
        for name, value in given.items():
            if value.shape != own[name].shape:
                raise WeightsError(
                    f"{file} has {name} as {list(value.shape)}, {list(own[name].shape)} is needed",
                    "Set classifier.width, depth and num_heads to its sizes",
                )
        self.vit.load_state_dict(given, strict=False)

    def resampled(self, pos_embed: Tensor, file: Path) -> Tensor:
        """Position embeddings of a square grid, [1, 1 + S * S, D], for ours; our own where grids are several."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        grids = self.space.layout.grids
        if len(grids) > 1:
            return self.vit.state_dict()["pos_embed"]
        side = round((pos_embed.shape[1] - 1) ** 0.5)
        if side * side + 1 != pos_embed.shape[1]:
            raise WeightsError(f"{file} has position embeddings of no square grid, {list(pos_embed.shape)}")
        return resample_abs_pos_embed(pos_embed, new_size=list(grids[0]), old_size=[side, side])


class LinearProbe(Classifier):
    """A linear layer on mean codes."""

    config_class = LinearProbeConfig

    def __init__(self, config: LinearProbeConfig, space: Space) -> None:
        super().__init__(config, space)
        self.pool = config.pool
        if self.pool > 1 and (len(space.layout.grids) > 1 or self.pool > min(space.layout.grids[0])):
            raise ConfigError(f"classifier.pool = {self.pool} does not fit the grids {space.layout.grids}")
        self.head = nn.Linear(space.num_groups * self.dim * self.pool**2, self.num_classes)

    def classify(self, embedded: Tensor) -> Tensor:
        if self.pool == 1:
            return self.head(embedded.mean(1))
        grid = embedded.transpose(1, 2).unflatten(2, self.space.layout.grids[0])
        return self.head(F.adaptive_avg_pool2d(grid, self.pool).flatten(1))

    def blocks(self) -> Iterable[nn.Module]:
        return ()


class Embedded(nn.Module):
    """Stands where timm's ViT cuts an image into patches: what comes is embedded already, float[B, P, D]."""

    def __init__(self, positions: int, **_: Any) -> None:
        super().__init__()
        self.num_patches = positions

    def forward(self, embedded: Tensor) -> Tensor:
        return embedded


def build_classifier(config: ClassifierConfig, space: Space) -> Classifier:
    """The classifier that `config` describes for the tokens of `space`, freshly initialised."""
    for classifier in classifier_classes():
        if getattr(classifier, "config_class", None) is type(config):
            return classifier(config, space)
    raise ConfigError(f"no classifier is made from a {type(config).__name__}")


def classifier_classes(base: type[Classifier] = Classifier) -> Iterator[type[Classifier]]:
    """Every subclass of Classifier defined so far."""
    for sub in base.__subclasses__():
        yield sub
        yield from classifier_classes(sub)
