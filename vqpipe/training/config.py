"""Section [train] of a preset: `TrainConfig`, and `TokenizerTrainConfig` with what only tokenizers have."""

from dataclasses import dataclass
from typing import Literal

from vqpipe.config import added, check_choices, check_range, resumable
from vqpipe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section [train]."""

    steps: int = 100_000
    """Optimizer steps; one step is one global batch."""
    global_batch_size: int = 256
    """Images per step, over all ranks."""
    accumulate: int = 1
    """Gradient accumulation: a rank's share of the batch is split into this many micro-batches to save memory. The
    step is the same except for terms that are not means over images: the adaptive weight, a discriminator's batch norm,
    entropies of a batch."""
    parallel: Literal["ddp", "fsdp"] = resumable(default="ddp")
    """On several ranks: replicate the weights (DistributedDataParallel), or shard them (FSDP2), for generators that are
    too large for one GPU. Checkpoints are the same, so a run may be resumed with the other."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """For all networks."""
    learning_rate: float = 5e-4
    """Peak, for all networks."""
    schedule: Literal["constant", "linear", "cosine"] = added("cosine")
    """Learning-rate schedule after the warm-up: constant, linear decay, or half a cosine."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of a linear or cosine schedule; a constant one does not use it."""
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
    """Decay of the weight average, which is published; 0: no average, the weights themselves are published."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: convolutions and matrix products under autocast; quantizing and losses stay in float32."""
    compile: bool = resumable(default=False)
    """torch.compile the networks: of a tokenizer the encoder, the decoder, the discriminator and LPIPS, each as one
    graph; of a generator its blocks."""
    activation_checkpointing: bool = resumable(default=False)
    """Keep no activations inside a residual or attention block, and compute them again in the backward pass."""
    max_nonfinite_steps: int = resumable(default=20)
    """Skipped steps in a row that end the run. A step whose gradient is not finite is skipped: no weight moves."""
    log_every: int = resumable(default=50)
    """Steps between two rows of metrics.jsonl."""
    save_every: int = resumable(default=1000)
    """Steps between two checkpoints; the last two are kept."""
    keep_every: int = resumable(default=0)
    """Steps between two checkpoints that are kept until the run is published; 0: none."""
    sample_every: int = resumable(default=500)
    """Steps between two samples: a tokenizer's reconstruction grid, or a generator's sample sheet."""
    validate_every: int = 0
    """Steps between two validations on held-out images, if there are any; 0: as `sample_every`."""
    validation_images: int = 256
    """Held-out images per validation."""

    def __post_init__(self) -> None:
        check_choices(self, "train")
        counts = ("steps", "global_batch_size", "accumulate", "max_nonfinite_steps", "log_every", "save_every")
        check_range(self, "train", "[1, inf)", *counts, "sample_every", "validation_images")
        check_range(self, "train", "[0, inf)", "keep_every", "validate_every", "warmup_steps")
        check_range(self, "train", "[0, inf)", "learning_rate", "min_learning_rate", "weight_decay", "clip_norm", "eps")
        check_range(self, "train", "[0, 1)", "betas", "weight_ema")
        if self.min_learning_rate > self.learning_rate and self.schedule != "constant":
            raise ConfigError(
                f"train.min_learning_rate = {self.min_learning_rate} is more than train.learning_rate ="
                f" {self.learning_rate}",
                "Lower it, or set train.schedule=constant, which does not use it",
            )
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"train.warmup_steps = {self.warmup_steps} is more than train.steps = {self.steps}",
                f"Set train.warmup_steps = {self.steps // 10}",
            )
        if self.keep_every % self.save_every:
            raise ConfigError(
                f"train.keep_every = {self.keep_every} is no multiple of train.save_every = {self.save_every}",
                "Only saved checkpoints can be kept",
            )

    def share(self, world_size: int) -> int:
        """Images of one of `world_size` ranks in a step.

        Raises:
            ConfigError: the global batch is not divisible by ranks and micro-batches.
        """
        share, rest = divmod(self.global_batch_size, world_size)
        if rest or share % self.accumulate:
            raise ConfigError(
                f"train.global_batch_size = {self.global_batch_size} is not divisible by {world_size} ranks"
                + (f" x {self.accumulate} parts" if self.accumulate > 1 else ""),
                "Change it, train.accumulate or the number of processes",
            )
        return share


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig(TrainConfig):
    """Section [train] of a tokenizer."""

    quantizer_rate: float = 1.0
    """Learning rate of the quantizer's own weights, relative to `learning_rate`. 1 as in the papers; with 10 the
    projector of a frozen codebook follows latents that still change fast."""
    freeze: tuple[Literal["encoder", "codebook"], ...] = ()
    """Parts that are not trained, in fine-tuning: the encoder with its quant_conv, the whole quantizer, or both."""
    sync_batch_norm: bool = False
    """Compute batch norm in the discriminator over the images of all ranks, on GPUs."""
    whiten_init: bool = False
    """Before the first step, whiten the latent on real images and scale the codebook to it
    (`Autoencoder.whiten_init`)."""
    whiten_images: int = 128
    """Images for `whiten_init`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "train", "[0, inf)", "quantizer_rate")
        check_range(self, "train", "[1, inf)", "whiten_images")
        if self.parallel != "ddp":
            raise ConfigError(
                f"train.parallel = {self.parallel!r} is for generators: a tokenizer's step uses parts of the network",
                "Leave it at ddp. Large tokenizers fit one GPU with train.activation_checkpointing=true",
            )
