"""The training loop of a tokenizer: one readable function and its two steps.

Plain torch.distributed: started by torchrun it runs on every rank over DistributedDataParallel, else on one process.
What a run sees and draws is a function of (seed, step, position), never of the moment it was cut and resumed.
Nothing in a step waits for the GPU: losses are summed there, and whether a step was skipped is read during the next.
Letters: B images of this rank's share of a global batch.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.batches import Batch
from vqpipe.data.transforms import to_float
from vqpipe.losses.objective import Objective
from vqpipe.models.autoencoder import Autoencoder, Reconstruction
from vqpipe.quantizers import Quantized, Quantizer
from vqpipe.training.bad_steps import BadSteps, RunningStatistics
from vqpipe.training.config import TrainConfig
from vqpipe.training.history import Row
from vqpipe.training.networks import make_ready, parallel, summed_later
from vqpipe.training.optimizers import WeightEma, finite_step, learning_rate, make_optimizer, set_learning_rate
from vqpipe.training.state import TrainState, seed_step
from vqpipe.training.window import Window

STOP_EVERY = 5
"""Steps after which ranks tell each other of a signal: each time all wait for their GPUs."""


class Stream(Protocol):
    """Endless training batches of this rank, from any position of the run."""

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        """Batches from global position `images_seen` on."""


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
    on_validate: Callable[[int, Autoencoder], None] = lambda step, network: None,
    on_bad: Callable[[int, list[str]], None] = lambda step, keys: None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train `model` to `config.steps` steps, resuming from the newest checkpoint in `run_dir`.

    `on_bad` hears of each step that was skipped, and which images this rank saw in it. Returns the state;
    `state.weight_ema.network` is the autoencoder to publish. Where `stop_asked()` is true on any rank after a step, a
    checkpoint is saved and the state returned early.

    Raises:
        NumericError: too many steps in a row without a finite gradient; no weight moved in them.
        ConfigError: the batch does not divide, or what is asked for needs GPUs.
    """
    config.share(distributed.world_size())
    discriminator = make_ready(config, model, discriminator, objective, device)
    state = TrainState(
        model=model,
        discriminator=discriminator,
        optimizer=make_optimizer(config, rest_of(model), list(model.quantizer.parameters())),
        discriminator_optimizer=make_optimizer(config, list(discriminator.parameters())),
        weight_ema=WeightEma(model, config.weight_ema),
        objective=objective,
        adversarial=objective.config.adversarial > 0,
    )
    state.resume(run_dir)
    on_start(state)
    network = parallel(model, config, device)
    critic = parallel(discriminator, config, device) if objective.config.adversarial > 0 else discriminator
    moves = "codebook" not in config.freeze and type(model.quantizer).update is not Quantizer.update
    window, bad_steps = Window(model.quantizer, device), BadSteps(state, config.max_bad_steps, on_bad)
    statistics, batches = RunningStatistics(model, discriminator), stream.from_sample(state.images_seen)
    while state.step < config.steps:
        waiting = time.perf_counter()
        batch, images = on_device(next(batches), device)
        window.waited += time.perf_counter() - waiting
        seed_step(seed, state.step)
        statistics.remember()
        rate = learning_rate(state.step, config)
        set_learning_rate(state.optimizer, rate)
        set_learning_rate(state.discriminator_optimizer, rate)
        reconstruction, values, bad = generator_step(state, network, objective, images, config)
        if objective.adversarial_at(state.step):
            values |= discriminator_step(state, critic, objective, images, reconstruction, config)
        statistics.restore(bad)
        if moves and not bad:
            model.quantizer.update(reconstruction.latent, reconstruction.quantized.ids)
        state.weight_ema.update(state.step)
        window.add(values, reconstruction.quantized.ids, len(images), bad)
        bad_steps.note(state.step, bad, batch.keys)
        state.step += 1
        state.images_seen += config.global_batch_size
        if state.step % config.log_every == 0 or state.step == config.steps:
            bad_steps.settle()
            place = {"step": state.step, "images_seen": state.images_seen, "learning_rate": rate}
            on_log(place | window.row() | {"bad_steps": state.bad_steps})
            window = Window(model.quantizer, device)
        if state.step % config.look_every == 0 or state.step == config.steps:
            on_look(state.step, state.weight_ema.network)
        if config.validate_every and (state.step % config.validate_every == 0 or state.step == config.steps):
            on_validate(state.step, state.weight_ema.network)
        on_step(state)
        if state.step % config.save_every == 0 and state.step < config.steps:
            bad_steps.settle()
            state.save(run_dir, keep_every=config.keep_every)
        if asked_to_stop(state.step, stop_asked, device):
            bad_steps.settle()
            state.save(run_dir, keep_every=config.keep_every)
            break
    return state


def generator_step(
    state: TrainState, network: nn.Module, objective: Objective, images: Tensor, config: TrainConfig
) -> tuple[Reconstruction, dict[str, Tensor], Tensor]:
    """One step of the autoencoder, with the discriminator frozen. Returns what it reconstructed, detached; scalars to
    log; and whether the step was skipped, a bool on the device."""
    state.model.train()
    state.discriminator.train().requires_grad_(False)
    state.optimizer.zero_grad(set_to_none=True)
    adversarial = objective.adversarial_at(state.step)
    parts, made, logged = images.chunk(config.accumulate), [], []
    for number, part in enumerate(parts, start=1):
        with summed_later(network, last=number == len(parts)):
            with autocast(images.device, config):
                reconstruction: Reconstruction = network(part)
                logits = state.discriminator(reconstruction.images) if adversarial else None
            total, terms = objective.generator_loss(
                part,
                reconstruction.images,
                reconstruction.quantized.losses,
                fake_logits=logits,
                last_layer=state.model.last_layer,
                step=state.step,
            )
            (total / len(parts)).backward()
        made.append(detached(reconstruction))
        error = (made[-1].images.float().clamp(-1, 1) - part).square().mean()
        logged.append({f"loss/{name}": term for name, term in terms.items()} | {"squared_error": error})
    norm, bad = finite_step(state.optimizer, config)
    return joined(made), mean(logged) | {"gradient_norm": norm}, bad


def discriminator_step(
    state: TrainState,
    critic: nn.Module,
    objective: Objective,
    images: Tensor,
    reconstruction: Reconstruction,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """One step of the discriminator on the reconstruction that the generator step made. Returns scalars to log."""
    state.discriminator.requires_grad_(True)
    state.discriminator_optimizer.zero_grad(set_to_none=True)
    parts, logged = images.chunk(config.accumulate), []
    for number, (real, fake) in enumerate(zip(parts, reconstruction.images.chunk(len(parts)), strict=True), start=1):
        with summed_later(critic, last=number == len(parts)):
            with autocast(images.device, config):
                real_logits, fake_logits = critic(real), critic(fake)
            loss, terms = objective.discriminator_loss(
                real_logits, fake_logits, step=state.step, images=real, discriminator=state.discriminator.forward
            )
            (loss / len(parts)).backward()
        logged.append({f"loss/{name}": term for name, term in terms.items()})
    norm, bad = finite_step(state.discriminator_optimizer, config)
    values = mean(logged)
    objective.update(values["loss/real_logit"], values["loss/fake_logit"], skipped=bad)
    return values | {"discriminator_gradient_norm": norm}


def asked_to_stop(step: int, stop_asked: Callable[[], bool], device: torch.device) -> bool:
    """Whether any rank was asked to stop: among several, looked at in every STOP_EVERY-th step."""
    if distributed.world_size() == 1:
        return stop_asked()
    return step % STOP_EVERY == 0 and distributed.any_rank(stop_asked(), device)


def on_device(batch: Batch, device: torch.device) -> tuple[Batch, Tensor]:
    """A batch and its images in [-1, 1] there; the copy overlaps with what a GPU still has to do."""
    if device.type != "cuda":
        return batch, to_float(batch.images)
    beside = torch.cuda.Stream(device)
    with torch.cuda.stream(beside):
        images = batch.images.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(beside)
    images.record_stream(torch.cuda.current_stream(device))
    return batch, to_float(images).contiguous(memory_format=torch.channels_last)


def detached(made: Reconstruction) -> Reconstruction:
    """The values alone."""
    quantized = made.quantized
    kept = Quantized(quantized.codes.detach(), quantized.ids, {})
    return Reconstruction(made.images.detach(), made.latent.detach(), kept)


def joined(parts: list[Reconstruction]) -> Reconstruction:
    """The parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    codes, ids = (torch.cat([getattr(part.quantized, name) for part in parts]) for name in ("codes", "ids"))
    images, latent = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "latent"))
    return Reconstruction(images, latent, Quantized(codes, ids, {}))


def mean(logged: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each scalar's mean over the parts of a batch."""
    return {name: torch.stack([part[name].float() for part in logged]).mean() for name in logged[0]}


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bf16 autocast where the preset asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def rest_of(model: Autoencoder) -> list[nn.Parameter]:
    """The autoencoder's parameters but for its quantizer's."""
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("quantizer.")]
