"""The interface of every generator: a network that is trained on a tokenizer's ids or latents and samples new ones.

Shapes: B images, N ids per image, G groups (ids per position), K codes per group, C latent channels, h x w positions.

A generator is one file: a frozen `XConfig(GeneratorConfig)` with its `kind`, above `class X(Generator)` whose
`config_class` is XConfig. Defining the subclass registers it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import isabstract
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vqpipe.config import added, all_subclasses, check_choices, check_range, class_for
from vqpipe.errors import ConfigError, DataError, WeightsError
from vqpipe.quantizers import Quantizer, TokenLayout

Sampler = Literal["ddpm", "ddim", "euler", "heun", "sde"]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The space of examples and labels that a network is built for: images of one size, encoded by one tokenizer."""

    layout: TokenLayout
    """Order of an image's ids."""
    codebook_size: int
    """K, codes per group."""
    latent_dim: int
    """C, channels of the latent before quantization."""
    code_dim: int
    """Channels of the code of one id: those of the latent, or of one of its groups."""
    num_classes: int | None
    """Labels are in [0, num_classes); None: images have no labels."""

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ConfigError(
                f"num_classes = {self.num_classes} should be at least 1", "Use None for images without labels"
            )

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
        """h, rows of the latent and of the finest grid."""
        return self.layout.grids[-1][0]

    @property
    def width(self) -> int:
        """w, columns of the latent and of the finest grid."""
        return self.layout.grids[-1][1]

    @classmethod
    def of(cls, quantizer: Quantizer, height: int, width: int, num_classes: int | None) -> Space:
        """Return the space of `quantizer` for latents of `height` x `width` positions."""
        return cls(
            layout=quantizer.layout(height, width),
            codebook_size=quantizer.codebook_size,
            latent_dim=quantizer.latent_dim,
            code_dim=quantizer.token_dim,
            num_classes=num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Section [generate]: settings of sampling. Each field says which generators use it; the others ignore it."""

    temperature: float = 1.0
    """Tokens: divides the logits; 0: greedy."""
    top_k: int | float = 0
    """Tokens: sample only from the most probable ids: a number of them, or, as a float in (0, 1], a share of the
    codebook. 0: all."""
    top_p: float = 1.0
    """Tokens: sample only from the smallest set of most probable ids whose probabilities sum to at least this, in
    (0, 1] (nucleus sampling); applied after `top_k`."""
    cfg_scale: float = 1.0
    """All: scale s of classifier-free guidance, null + s (conditional - null); 1: no guidance, at half the cost.
    Applied to noise or velocity in diffusion, to logits in token models."""
    cfg_channels: int = added(0)
    """Latents: guidance acts on the first n channels only, the others keep the conditional prediction; 0: on all. The
    released DiT and SiT code of VQGAN-LC guides the first 3 of 8, which its guidance scale of 8 belongs to."""
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """All: how the scale changes over the tokens or steps: constant, or increasing from 1 at the start to `cfg_scale`
    at the end."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """All: the interval of sampling, as fractions of it, in which guidance is applied (Kynkaanniemi et al. 2024)."""
    steps: int = 250
    """Latents: network evaluations per image."""
    sampler: Sampler | None = None
    """Latents: the solver; None: the default of the generator."""
    eta: float | None = None
    """Latents, ddim only: share of fresh noise, 0 (deterministic) to 1; None: the default of the generator."""

    def __post_init__(self) -> None:
        check_choices(self, "generate")
        check_range(self, "generate", "[0, inf)", "temperature", "cfg_channels")
        check_range(self, "generate", "[0, 1]" if isinstance(self.top_k, float) else "[0, inf)", "top_k")
        check_range(self, "generate", "(0, 1]", "top_p")
        check_range(self, "generate", f"[0, {torch.finfo(torch.float32).max}]", "cfg_scale")
        check_range(self, "generate", "[0, 1]", "cfg_interval", "eta")
        check_range(self, "generate", "[1, inf)", "steps")
        if self.cfg_interval[0] >= self.cfg_interval[1]:
            raise ConfigError(f"generate.cfg_interval = {list(self.cfg_interval)} should be in ascending order")


SAMPLING_OF = {
    "tokens": ("temperature", "top_k", "top_p"),
    "latents": ("cfg_channels", "steps", "sampler", "eta"),
}
"""The settings of sampling that only generators trained on tokens, or only those trained on latents, use."""


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Section [generator]; `kind` chooses the generator."""

    kind: ClassVar[str]

    class_dropout: float = 0.1
    """Probability that training replaces a label by the null class, 0..1. Guidance needs a value above 0; without
    classes it has no effect."""

    def __post_init__(self) -> None:
        check_choices(self, "generator")
        check_range(self, "generator", "[0, 1]", "class_dropout")


class Generator(nn.Module, ABC):
    """Models the distribution of a tokenizer's ids or latents, with or without class labels."""

    config_class: ClassVar[type[GeneratorConfig]]
    trained_on: ClassVar[Literal["tokens", "latents"]]
    """The examples: input of `loss`, output of `sample`."""
    loss_in_words: str
    """What "total" of `loss` is, with its unit."""
    forward_methods: ClassVar[tuple[str, ...]] = ("sample",)
    """Methods besides `forward` that run the network: FSDP gathers sharded weights for them too."""

    def __init__(self, config: GeneratorConfig, space: Space) -> None:
        super().__init__()
        self.config = config
        self.space = space
        self.num_classes = space.num_classes
        """Labels are in [0, num_classes); None: unconditional. The null class of guidance is the label
        `num_classes`."""

    @abstractmethod
    def loss(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return named scalars: "total" is minimized, the others are logged.

        Randomness comes from torch's global generators, which the training loop seeds from (seed, step, rank). In
        evaluation mode no label is dropped, no id replaced and no target smoothed; diffusion still adds its noise, for
        which `LatentGenerator.loss` takes a generator per image.

        Args:
            examples: int64[B, N] ids ("tokens"), or float32[B, C, h, w] normalized latents ("latents").
            labels: int64[B] in [0, num_classes); ignored by unconditional generators.
        """

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        """Return new examples, int64[B, N] ids or float32[B, C, h, w] normalized latents, for labels int64[B].

        Image i uses only the random numbers of `rngs[i]`, a generator on the CPU: it does not depend on its batch or
        rank. Unconditional generators use only the number of labels.

        Raises:
            DataError: a label is out of range, or the numbers of labels and rngs differ.
            ConfigError: guidance of a generator that was trained without a null class.
            WeightsError: `load_codebook` was not called.
            NumericError: the probabilities of ids are not finite.
        """
        self.check_sampling(labels, sampling, rngs)
        if self.needs_codebook:
            raise WeightsError(
                f"the {self.config.kind} generator embeds ids by the tokenizer's codebook", "Call load_codebook first"
            )
        training = self.training
        self.eval()
        try:
            return self.sample_batch(self.class_ids(labels.to(next(self.parameters()).device)), sampling, rngs)
        finally:
            self.train(training)

    @abstractmethod
    def sample_batch(self, classes: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> Tensor:
        """As `sample`, in evaluation mode and with valid arguments; `classes` int64[B], zeros without classes."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Return the repeated blocks: the units of activation checkpointing, compilation and sharding."""

    def forward(self, examples: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, as the call that DistributedDataParallel wraps."""
        return self.loss(examples, labels)

    def load_codebook(self, codebook: Tensor) -> None:
        """Load the tokenizer's codes, float[K, C] or float[G, K, C / G], into a generator that embeds ids by them.

        Raises:
            ConfigError: this generator uses no codebook, or one of another shape.
        """
        raise ConfigError(f"the {self.config.kind} generator uses no codebook")

    @property
    def needs_codebook(self) -> bool:
        """Whether `load_codebook` must be called before training or sampling."""
        return False

    @property
    def has_null_class(self) -> bool:
        """Whether the null class is trained, so that guidance is possible."""
        return self.num_classes is not None and self.config.class_dropout > 0

    @property
    def num_class_embeddings(self) -> int:
        """The classes, and the null class where it is trained; 1 for an unconditional generator."""
        return 1 if self.num_classes is None else self.num_classes + self.has_null_class

    @property
    def null_class(self) -> int:
        """The label of the null class; 0 for an unconditional generator."""
        return self.num_classes or 0

    def class_ids(self, labels: Tensor) -> Tensor:
        """Return the labels; for an unconditional generator, zeros."""
        return torch.zeros_like(labels) if self.num_classes is None else labels

    def drop_labels(self, labels: Tensor) -> Tensor:
        """Replace labels by the null class with probability `class_dropout`, in training; zeros without classes."""
        if not (self.training and self.has_null_class):
            return self.class_ids(labels)
        drop = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
        return labels.masked_fill(drop, self.null_class)

    def check_sampling(self, labels: Tensor, sampling: SamplingConfig, rngs: Sequence[torch.Generator]) -> None:
        """Raise the errors of `sample` about its arguments."""
        if labels.ndim != 1 or len(labels) != len(rngs):
            raise DataError(f"labels of shape {list(labels.shape)} for {len(rngs)} images")
        if self.num_classes is not None and len(labels):
            lowest, highest = int(labels.min()), int(labels.max())
            if lowest < 0:
                raise DataError(f"label {lowest} is negative", "A generator with classes needs one per image")
            if highest >= self.num_classes:
                hint = f"This generator has the classes 0 to {self.num_classes - 1}"
                raise DataError(f"label {highest} is out of range", hint)
        if sampling.cfg_scale != 1 and not self.has_null_class:
            raise ConfigError(
                f"cfg_scale = {sampling.cfg_scale:g} needs a generator trained with class dropout",
                "Set generate.cfg_scale=1 (--cfg-scale 1 of vqpipe generate), or train with generator.class_dropout"
                " above 0 on labeled images",
            )


def build_generator(config: GeneratorConfig, space: Space) -> Generator:
    """Return the generator of `config` for the tokens or latents of `space`, with initial weights."""
    return class_for(Generator, config)(config, space)  # type: ignore[type-abstract]


def kinds_trained_on(examples: Literal["tokens", "latents"]) -> list[str]:
    """Return the kinds of generators that are trained on these examples."""
    classes = [cls for cls in all_subclasses(Generator) if not isabstract(cls)]
    return sorted(cls.config_class.kind for cls in classes if cls.trained_on == examples)


def check_used(
    sampling: SamplingConfig, default: SamplingConfig, config: GeneratorConfig, options: Mapping[str, str] | None = None
) -> None:
    """Check that the settings that were given, or that differ from `default`, are of the generator's kind.

    Args:
        options: setting -> the option that gave it, with any value; others are named `generate.KEY`.

    Raises:
        ConfigError: a setting is for generators that are trained on the other kind of examples.
    """
    trained_on = class_for(Generator, config).trained_on  # type: ignore[type-abstract]
    other, given = "latents" if trained_on == "tokens" else "tokens", options or {}
    for name in SAMPLING_OF[other]:
        if name in given or getattr(sampling, name) != getattr(default, name):
            what = f"{given.get(name, f'generate.{name}')} is for generators trained on {other}"
            raise ConfigError(what, f"Leave it out: this generator is of the kind {config.kind}")


def progress_at(step: int, steps: int) -> float:
    """Return the progress of sampling at `step` of `steps`: 0 in the first to 1 in the last."""
    return step / max(1, steps - 1)


def guidance_scale(sampling: SamplingConfig, progress: float) -> float:
    """Return the guidance scale at `progress`, 0 in the first step of sampling to 1 in the last."""
    low, high = sampling.cfg_interval
    if not low <= progress <= high:
        return 1.0
    if sampling.cfg_schedule == "linear":
        return 1 + (sampling.cfg_scale - 1) * progress
    if sampling.cfg_schedule == "cosine":
        rise = 0.5 - 0.5 * math.cos(math.pi * progress)
        return 1 + (sampling.cfg_scale - 1) * rise
    return sampling.cfg_scale
