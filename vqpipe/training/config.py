"""What a preset says about training; section [train].

`TrainConfig` is for whatever is trained; `TokenizerTrainConfig` adds what only tokenizers have.
"""

from dataclasses import dataclass
from typing import Literal

from vqpipe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section [train]: how long, how fast, in which precision."""

    steps: int = 100_000
    """Optimizer steps; one step is one global batch."""
    global_batch_size: int = 256
    """Images a step, over all ranks."""
    accumulate: int = 1
    """Parts that a rank's share of the batch passes the networks in, one after another, for less memory. The same step
    but for what is no mean over images: the adaptive weight, a discriminator's batch norm, entropies of a batch."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several ranks do with the weights: each holds all of them (DistributedDataParallel), or its share (FSDP2),
    for generators that are too large for one GPU. Checkpoints are the same, so a run may be resumed with the other."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """For all networks."""
    learning_rate: float = 5e-4
    """Peak, for all networks."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's two decay rates."""
    eps: float = 1e-7
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Of weights with two dimensions or more; decoupled with adamw."""
    clip_norm: float = 0.0
    """Largest gradient norm of each network; 0: no clipping."""
    weight_ema: float = 0.0
    """Decay of the weight average that is published; 0: the weights themselves are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: convolutions and matrix products under autocast; quantizing and losses stay in float32."""
    compile: bool = False
    """torch.compile the networks: of a tokenizer the encoder, the decoder, the discriminator and LPIPS, each as one
    graph; of a generator its blocks."""
    activation_checkpointing: bool = False
    """Gradient checkpointing: keep no activations inside a residual or attention block, compute them again in the
    backward pass."""
    max_nonfinite_steps: int = 20
    """Steps without a finite gradient, one after another, that end the run; each is skipped before a weight moves."""
    log_every: int = 50
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints; the last two are kept."""
    keep_every: int = 0
    """Steps between two checkpoints that are kept for good; 0: none is."""
    sample_every: int = 500
    """Steps between two looks at pictures: of a tokenizer, a reconstruction grid."""
    validate_every: int = 0
    """Steps between two looks at the held-out images; 0: none."""
    validation_images: int = 256
    """How many of them are looked at."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "accumulate", "max_nonfinite_steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} = {getattr(self, name)}", "It is at least 1")
        for name in ("keep_every", "validate_every", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} = {getattr(self, name)} is negative", "Use 0 for never")
        if self.sample_every < 1 or self.validation_images < 1:
            raise ConfigError("train.sample_every and train.validation_images should be at least 1")
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"train.warmup_steps = {self.warmup_steps} is more than train.steps = {self.steps}",
                f"For so short a run: --set train.warmup_steps={self.steps // 10}",
            )
        if self.keep_every % self.save_every:
            raise ConfigError(
                f"train.keep_every = {self.keep_every} is no multiple of train.save_every = {self.save_every}",
                "Only what is saved can be kept",
            )

    def share(self, world_size: int) -> int:
        """Images of one of `world_size` ranks in a step.

        Raises:
            ConfigError: the global batch does not divide by ranks and parts.
        """
        share, rest = divmod(self.global_batch_size, world_size)
        if rest or share % self.accumulate:
            raise ConfigError(
                f"train.global_batch_size = {self.global_batch_size} does not divide by {world_size} ranks"
                + (f" x {self.accumulate} parts" if self.accumulate > 1 else ""),
                "Change it, train.accumulate or the number of processes",
            )
        return share


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(TrainConfig):
    """Section [train] of a tokenizer."""

    quantizer_rate: float = 1.0
    """Learning rate of the quantizer's own weights, in units of the others'. 1 as in the papers; 10 lets the projector
    of a frozen codebook keep up with latents that are young and move fast."""
    freeze: tuple[Literal["encoder", "codebook"], ...] = ()
    """What does not learn, in fine-tuning: the encoder with its quant_conv, the whole quantizer, or both."""
    sync_batch_norm: bool = False
    """Batch norm of the discriminator over all ranks' images, on GPUs."""
    whiten_init: bool = False
    """Whiten the latent on real images and scale the codebook to it before the first step (see `whiten_init`)."""
    whiten_images: int = 128
    """How many images the matched start looks at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel != "ddp":
            raise ConfigError(
                f"train.parallel = {self.parallel!r} is for generators: a tokenizer's step goes through parts of it",
                "Leave it at ddp; tokenizers fit one GPU, with train.activation_checkpointing large ones too",
            )
        for part in self.freeze:
            if part not in ("encoder", "codebook"):
                raise ConfigError(f"train.freeze names {part!r}", "It may name encoder and codebook")
