"""The training loop of a tokenizer: one readable function and its two steps.

Plain torch.distributed: started by torchrun it runs on every rank over DistributedDataParallel, else on one process.
What a run sees and draws is a function of (seed, step, position), never of the moment it was cut and resumed.
Letters: B images of this rank's share of a global batch; G groups; K codes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqpipe import distributed
from vqpipe.data.batches import Batch
from vqpipe.data.transforms import to_float
from vqpipe.errors import ConfigError, NumericError
from vqpipe.losses.objective import Objective
from vqpipe.metrics.usage import CodeUsage, usage_of
from vqpipe.models.autoencoder import Autoencoder, Reconstruction
from vqpipe.training.history import Row
from vqpipe.training.optimizers import WeightEma, learning_rate, make_optimizer, set_learning_rate
from vqpipe.training.state import TrainState, seed_step


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section [train]: how long, how fast, in which precision."""

    steps: int = 100_000
    """Optimizer steps; one step is one global batch."""
    global_batch_size: int = 256
    """Images a step, over all ranks."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """For both networks."""
    learning_rate: float = 5e-4
    """Peak, for both networks."""
    quantizer_rate: float = 1.0
    """Learning rate of the quantizer's own weights, in units of the others'. 1 as in the papers; 10 lets the projector
    of a frozen codebook keep up with latents that are young and move fast."""
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
    """Largest gradient norm of the tokenizer and of the discriminator; 0: no clipping."""
    weight_ema: float = 0.0
    """Decay of the weight average that is published; 0: the weights themselves are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: convolutions under autocast; quantizing and losses stay in float32."""
    matched_start: bool = False
    """Whiten the latent on real images and scale the codebook to it before the first step (see `match_start`)."""
    matched_start_images: int = 128
    """How many images the matched start looks at."""
    log_every: int = 50
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    look_every: int = 500
    """Steps between two reconstruction grids."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.global_batch_size < 1:
            raise ConfigError("train.steps and train.global_batch_size should be at least 1")
        if min(self.log_every, self.save_every, self.look_every) < 1:
            raise ConfigError("train.log_every, train.save_every and train.look_every should be at least 1")
        if self.warmup_steps > self.steps:
            raise ConfigError(f"train.warmup_steps = {self.warmup_steps} is more than train.steps = {self.steps}")


class Stream(Protocol):
    """Endless training batches of this rank, from any position of the run."""

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        """Batches from global position `images_seen` on."""


@dataclass
class Window:
    """Sums since the last row of the log; tensors stay on the device, so that no step waits for them."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    usage: CodeUsage | None = None
    squared_error: Tensor | None = None
    steps: int = 0
    images: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def add(self, terms: dict[str, Tensor], reconstruction: Reconstruction, images: Tensor, model: Autoencoder) -> None:
        """Take in one step."""
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, torch.zeros((), device=value.device)) + value.detach()
        quantizer = model.quantizer
        if self.usage is None:
            self.usage = CodeUsage(quantizer.codebook_size, quantizer.num_groups, images.device)
        self.usage.update(reconstruction.quantized.ids)
        error = (reconstruction.images.detach().float().clamp(-1, 1) - images).square().mean()
        self.squared_error = error if self.squared_error is None else self.squared_error + error
        self.steps += 1
        self.images += len(images) * distributed.world_size()

    def row(self, state: TrainState, rate: float) -> Row:
        """One row of metrics.jsonl, over all ranks. `psnr` is that of the window's mean squared error, in dB."""
        seconds = time.perf_counter() - self.began
        scale = self.steps * distributed.world_size()
        names = sorted(self.terms)
        sums = distributed.all_reduce_sum(torch.stack([self.terms[name].float() for name in names]))
        assert self.usage is not None
        assert self.squared_error is not None
        error = distributed.all_reduce_sum(self.squared_error.clone()) / scale
        counts = self.usage.merged()
        return {
            "step": state.step,
            "images_seen": state.images_seen,
            **{f"loss/{name}": value / scale for name, value in zip(names, sums.tolist(), strict=True)},
            "psnr": -10 * torch.log10(error / 4).item(),
            "utilization": usage_of(counts)["utilization"],
            "window_tokens": int(counts[0].sum()),
            "learning_rate": rate,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
        }


def train(
    config: TrainConfig,
    model: Autoencoder,
    discriminator: nn.Module,
    objective: Objective,
    stream: Stream,
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    on_start: Callable[[TrainState], None],
    on_log: Callable[[Row], None],
    on_look: Callable[[int, Autoencoder], None],
    on_step: Callable[[TrainState], None],
    stop_asked: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train `model` to `config.steps` steps, resuming from the newest checkpoint in `run_dir`.

    Returns the state; `state.weight_ema.network` is the autoencoder to publish. Where `stop_asked()` is true on any
    rank after a step, a checkpoint is saved and the state returned early.

    Raises:
        NumericError: a loss or gradient is NaN or infinite; the checkpoint before is intact.
    """
    state = TrainState(
        model=model,
        discriminator=discriminator,
        optimizer=make_optimizer(config, rest_of(model), list(model.quantizer.parameters())),
        discriminator_optimizer=make_optimizer(config, list(discriminator.parameters())),
        weight_ema=WeightEma(model, config.weight_ema),
    )
    state.resume(run_dir)
    on_start(state)
    network = parallel(model, device)
    critic = parallel(discriminator, device) if objective.config.adversarial > 0 else discriminator
    batches = stream.from_sample(state.images_seen)
    window = Window()
    while state.step < config.steps:
        waiting = time.perf_counter()
        images = to_float(next(batches).images.to(device, non_blocking=True))
        if device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        window.waited += time.perf_counter() - waiting
        seed_step(seed, state.step)
        rate = learning_rate(state.step, config)
        set_learning_rate(state.optimizer, rate)
        set_learning_rate(state.discriminator_optimizer, rate)
        reconstruction, terms = generator_step(state, network, objective, images, config)
        if objective.adversarial_at(state.step):
            terms |= discriminator_step(state, critic, objective, images, reconstruction, config)
        model.quantizer.update(reconstruction.latent.detach(), reconstruction.quantized.ids)
        state.weight_ema.update(state.step)
        state.step += 1
        state.images_seen += config.global_batch_size
        window.add(terms, reconstruction, images, model)
        if state.step % config.log_every == 0 or state.step == config.steps:
            on_log(window.row(state, rate))
            window = Window()
        if state.step % config.look_every == 0 or state.step == config.steps:
            on_look(state.step, state.weight_ema.network)
        if state.step % config.save_every == 0 and state.step < config.steps:
            state.save(run_dir)
        on_step(state)
        if distributed.any_rank(stop_asked(), device):
            state.save(run_dir)
            break
    return state


def generator_step(
    state: TrainState, network: nn.Module, objective: Objective, images: Tensor, config: TrainConfig
) -> tuple[Reconstruction, dict[str, Tensor]]:
    """One step of the autoencoder, with the discriminator frozen. Returns what it reconstructed and the loss terms."""
    state.model.train()
    state.discriminator.train().requires_grad_(False)
    adversarial = objective.adversarial_at(state.step)
    with autocast(images.device, config):
        reconstruction: Reconstruction = network(images)
        logits = state.discriminator(reconstruction.images) if adversarial else None
    total, terms = objective.generator_loss(
        images,
        reconstruction.images,
        reconstruction.quantized.losses,
        fake_logits=logits,
        last_layer=state.model.last_layer,
    )
    step_if_finite(total, state.optimizer, state.model, state.step, config)
    return reconstruction, terms


def discriminator_step(
    state: TrainState,
    critic: nn.Module,
    objective: Objective,
    images: Tensor,
    reconstruction: Reconstruction,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """One step of the discriminator on the reconstruction that the generator step made, detached."""
    state.discriminator.requires_grad_(True)
    with autocast(images.device, config):
        real = critic(images)
        fake = critic(reconstruction.images.detach())
    loss, terms = objective.discriminator_loss(real, fake)
    step_if_finite(loss, state.discriminator_optimizer, state.discriminator, state.step, config)
    return terms


def step_if_finite(
    loss: Tensor, optimizer: torch.optim.Optimizer, network: nn.Module, step: int, config: TrainConfig
) -> None:
    """Backward, clip, step; but no step on a gradient that is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf"))
    if not torch.isfinite(norm):
        raise NumericError(
            f"the gradient of step {step} is not finite (loss {loss.item():.4g})",
            "Lower train.learning_rate, set train.clip_norm, or use train.precision=fp32, and run again",
        )
    optimizer.step()


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bf16 autocast where the preset asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def rest_of(model: Autoencoder) -> list[nn.Parameter]:
    """The autoencoder's parameters but for its quantizer's."""
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("quantizer.")]


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` over all ranks, or itself on one process.

    Buffers are not broadcast in each forward: a codebook of 300 MB is one, and `update` keeps it alike on all ranks.
    """
    if distributed.world_size() == 1:
        return network
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)
