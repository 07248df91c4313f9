"""The one interface of every generator: what is trained on a tokenizer's ids or latents, and draws new ones.

Shapes: B images, N ids an image, G groups (ids per position), K codes an id ranges over, C latent channels, h x w
positions.

A generator is one file: a frozen `XConfig(GeneratorConfig)` with its `kind`, above `class X(Generator)` whose
`config_class` is XConfig. Defining the subclass is all the registration there is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError, DataError
from vqpipe.quantizers import Quantizer, TokenLayout

Sampler = Literal["ddpm", "ddim", "euler", "heun", "sde"]


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a tokenizer makes of images of one size: the sizes a generator is built for."""

    layout: TokenLayout
    """The order of an image's ids."""
    codebook_size: int
    """K, codes one id ranges over."""
    latent_dim: int
    """C, channels of the latent before quantization."""
    code_dim: int
    """Channels of one code: those of the latent, or of one of its groups."""
    num_classes: int | None
    """Labels are in [0, num_classes); None: images have none."""

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ConfigError(f"num_classes = {self.num_classes} should be at least 1", "Without labels it is None")

    @property
    def num_tokens(self) -> int:
        """N, ids per image."""
        return self.layout.num_tokens

    @property
    def num_groups(self) -> int:
        """G, ids per position."""
        return self.layout.num_groups

    @property
    def height(self) -> int:
        """Rows of the latent, which are those of the finest grid."""
        return self.layout.grids[-1][0]

    @property
    def width(self) -> int:
        """Columns of the latent."""
        return self.layout.grids[-1][1]

    @classmethod
    def of(cls, quantizer: Quantizer, height: int, width: int, num_classes: int | None) -> Space:
        """The space of `quantizer` for latents of `height` x `width` positions."""
        return cls(
            layout=quantizer.layout(height, width),
            codebook_size=quantizer.codebook_size,
            latent_dim=quantizer.latent_dim,
            code_dim=quantizer.latent_dim // quantizer.channel_groups,
            num_classes=num_classes,
        )

    def to_table(self) -> dict[str, Any]:
        """The space as JSON can hold it."""
        return {
            "layout": self.layout.to_table(),
            "codebook_size": self.codebook_size,
            "latent_dim": self.latent_dim,
            "code_dim": self.code_dim,
            "num_classes": self.num_classes,
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Space:
        """Undoes `to_table`."""
        return cls(**{**table, "layout": TokenLayout.from_table(table["layout"])})


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Section [generate]: how samples are drawn. Of each field is said whom it concerns; others ignore it."""

    temperature: float = 1.0
    """Tokens: logits are divided by it; 0 takes the most probable id (greedy)."""
    top_k: int | float = 0
    """Tokens: only the most probable ids are drawn: a number of them, or, as a float in (0, 1], a share of the
    codebook. 0: all."""
    top_p: float = 1.0
    """Tokens: only the smallest set of most probable ids whose probabilities reach this sum, in (0, 1]; after
    `top_k`."""
    cfg_scale: float = 1.0
    """All: strength s of classifier-free guidance, null + s (conditional - null); 1: no guidance, and half the work.
    Diffusion acts on noise or velocity, tokens on logits."""
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """All: how the scale goes along the way, the tokens or the steps, from 1 at the start (linear and cosine) to
    `cfg_scale` at the end."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """All: the part of the way, as shares of it, on which there is guidance (Kynkaanniemi et al. 2024)."""
    steps: int = 250
    """Latents: evaluations of the network along the way."""
    sampler: Sampler | None = None
    """Latents: the solver; None: the one that the generator was published with."""
    eta: float | None = None
    """Latents, ddim alone: share of fresh noise, 0 (deterministic) to 1; None: as published."""

    def __post_init__(self) -> None:
        low, high = self.cfg_interval
        share = isinstance(self.top_k, float)
        checks = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (0 <= self.top_k <= 1 if share else self.top_k >= 0, "a count, or as a float a share in [0, 1]"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "cfg_scale": (self.cfg_scale >= 0, "at least 0"),
            "cfg_interval": (0 <= low < high <= 1, "two rising shares in [0, 1]"),
            "steps": (self.steps >= 1, "at least 1"),
            "eta": (self.eta is None or 0 <= self.eta <= 1, "in [0, 1]"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"generate.{name} = {getattr(self, name)} should be {wanted}")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Section [generator]; `kind` chooses the generator."""

    kind: ClassVar[str]

    class_dropout: float = 0.1
    """Probability that a label is replaced by the null class in training, 0..1. Guidance needs it above 0; without
    classes it does nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.class_dropout <= 1:
            raise ConfigError(f"generator.class_dropout = {self.class_dropout} should be in [0, 1]")


class Generator(nn.Module, ABC):
    """Learns the distribution of a tokenizer's ids or latents, given labels or not, and draws from it."""

    config_class: ClassVar[type[GeneratorConfig]]
    trained_on: ClassVar[Literal["tokens", "latents"]]
    """What `loss` takes and `sample` gives."""
    entrances: ClassVar[tuple[str, ...]] = ("sample",)
    """Methods beside `forward` that others call: weights that are split among ranks are gathered for them too."""

    def __init__(self, config: GeneratorConfig, space: Space) -> None:
        super().__init__()
        self.config = config
        self.space = space
        self.num_classes = space.num_classes
        """Labels are in [0, num_classes); None: unconditional. A null class is added inside, where guidance needs it:
        it is the label `num_classes`."""

    @abstractmethod
    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scalars by name, of which "total" is minimised; the others are for the log.

        Args:
            examples: int64[B, N] ids ("tokens"), or float32[B, C, h, w] normalised latents ("latents").
            labels: int64[B] in [0, num_classes); ignored where unconditional.

        Randomness is that of torch's global generators, which the loop seeds from (seed, step, rank).
        """

    @abstractmethod
    def sample(self, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
        """New examples, int64[B, N] ids or float32[B, C, h, w] normalised latents, for labels int64[B].

        Image i takes its randomness from `draws[i]`, a generator on the CPU, and from nothing else: it is a function
        of its seed, whatever the batch or the rank it is drawn in. Where unconditional, labels only say how many.

        Raises:
            DataError: a label is out of range, or labels and draws differ in number.
            ConfigError: guidance of a generator that knows no null class.
        """

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The repeated blocks: units of recomputing (gradient checkpointing) and of sharding (FSDP)."""

    def forward(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, as one call for DistributedDataParallel."""
        return self.loss(examples, labels)

    def load_codebook(self, codebook: Tensor) -> None:
        """Take the tokenizer's codes, float[K, D] or with groups [G, K, D], where ids are embedded by them.

        Raises:
            ConfigError: this generator takes none, or one of another shape.
        """
        raise ConfigError(f"the {self.config.kind} generator takes no codebook")

    @property
    def needs_codebook(self) -> bool:
        """Whether `load_codebook` has to be called before training."""
        return False

    @property
    def has_null(self) -> bool:
        """Whether the null class was trained, so that guidance means something."""
        return self.num_classes is not None and self.config.class_dropout > 0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the generator is in evaluation mode: no dropout."""
        before = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(before)

    def dropped(self, labels: Tensor) -> Tensor:
        """Labels of a training batch, some replaced by the null class."""
        if self.num_classes is None or self.config.class_dropout == 0:
            return labels
        drop = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
        return labels.masked_fill(drop, self.num_classes)

    def check_sampling(self, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> None:
        """What `sample` raises; every subclass calls it first."""
        if labels.ndim != 1 or len(labels) != len(draws):
            raise DataError(f"labels of shape {list(labels.shape)} for {len(draws)} images")
        if self.num_classes is not None and len(labels) and int(labels.min()) < 0:
            raise DataError(f"label {int(labels.min())} is negative", "A generator with classes needs one per image")
        if self.num_classes is not None and len(labels) and int(labels.max()) >= self.num_classes:
            hint = f"This generator knows the classes 0 to {self.num_classes - 1}"
            raise DataError(f"label {int(labels.max())} is out of range", hint)
        if sampling.cfg_scale != 1 and not self.has_null:
            raise ConfigError(
                f"cfg_scale = {sampling.cfg_scale:g} needs a generator trained with class dropout",
                "Take --cfg-scale 1, or train with generator.class_dropout above 0 on labelled images",
            )


def build_generator(config: GeneratorConfig, space: Space) -> Generator:
    """The generator that `config` describes for the tokens or latents of `space`, freshly initialised."""
    for generator in generator_classes():
        if getattr(generator, "config_class", None) is type(config):
            return generator(config, space)
    raise ConfigError(f"no generator is made from a {type(config).__name__}")


def generator_classes(base: type[Generator] = Generator) -> Iterator[type[Generator]]:
    """Every subclass of Generator defined so far, the abstract ones too."""
    for sub in base.__subclasses__():
        yield sub
        yield from generator_classes(sub)


def guidance_scale(sampling: SamplingConfig, progress: float) -> float:
    """Strength of guidance at `progress` of the way, 0 at the start of sampling to 1 at its end."""
    low, high = sampling.cfg_interval
    if not low <= progress <= high:
        return 1.0
    if sampling.cfg_schedule == "linear":
        return 1 + (sampling.cfg_scale - 1) * progress
    if sampling.cfg_schedule == "cosine":
        rise = 0.5 - 0.5 * math.cos(math.pi * progress)
        return 1 + (sampling.cfg_scale - 1) * rise
    return sampling.cfg_scale
