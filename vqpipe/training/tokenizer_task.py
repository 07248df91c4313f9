"""A tokenizer's step: the autoencoder, then its discriminator on the reconstruction that was made.

Nothing in a step waits for the GPU, but where a codebook moves by itself: then whether the step was skipped is read.
Letters: B images of this rank's share of a global batch.
"""

from collections.abc import Collection, Iterator

import torch
import torch._functorch.config
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.batches import Batch
from vqpipe.data.transforms import to_float
from vqpipe.errors import ConfigError
from vqpipe.losses.objective import Objective
from vqpipe.metrics.usage import CodeUsage, as_rows, from_rows, usage_of
from vqpipe.models.autoencoder import Autoencoder, Reconstruction
from vqpipe.models.dcae import Residual
from vqpipe.models.discriminator import PatchDiscriminator
from vqpipe.models.vqgan import Attention, ResidualBlock
from vqpipe.quantizers import Quantized, Quantizer
from vqpipe.training.config import TokenizerTrainConfig, TrainConfig
from vqpipe.training.history import Row
from vqpipe.training.networks import recompute, replicated, summed_later
from vqpipe.training.optimizers import finite_step, make_optimizer
from vqpipe.training.running_metrics import RunningMetrics, StepOutput
from vqpipe.training.task import Task, autocast, mean

BLOCKS = (ResidualBlock, Attention, Residual)
"""What gradient checkpointing forgets and computes again, as a whole."""
COUNTS = "counts"
"""How often each code was chosen, in a window that a checkpoint holds."""


class TokenizerTask(Task[Batch, Reconstruction]):
    """An autoencoder with its quantizer, trained against a discriminator where the objective has such a term.

    Where it has none, the discriminator takes no part, and nothing of it is saved.
    """

    def __init__(self, model: Autoencoder, discriminator: PatchDiscriminator, objective: Objective) -> None:
        self.adversarial = objective.config.adversarial > 0
        networks: dict[str, nn.Module] = {"model": model}
        super().__init__(
            networks | ({"discriminator": discriminator} if self.adversarial else {}), {"objective": objective}
        )
        self.model, self.discriminator, self.objective = model, discriminator, objective

    def prepare(self, config: TrainConfig, device: torch.device, average: nn.Module) -> None:
        assert isinstance(config, TokenizerTrainConfig)
        self.config, self.device = config, device
        for part in frozen_parts(config, self.model):
            part.requires_grad_(False)
        self.moves = "codebook" not in config.freeze and type(self.model.quantizer).update is not Quantizer.update
        if config.sync_batch_norm and distributed.world_size() > 1:
            if device.type != "cuda":
                raise ConfigError("train.sync_batch_norm needs GPUs", "Set it to false")
            nn.SyncBatchNorm.convert_sync_batchnorm(self.discriminator)  # in place: it is no batch norm itself
        if config.activation_checkpointing:
            for block in blocks(self.model):
                recompute(block)
        if config.compile:
            self.compile()
        quantizer = list(self.model.quantizer.parameters())
        self.optimizers["optimizer"] = make_optimizer(config, rest_of(self.model), quantizer, config.quantizer_rate)
        if self.adversarial:
            parameters = list(self.discriminator.parameters())
            self.optimizers["discriminator_optimizer"] = make_optimizer(config, parameters)

    def compile(self) -> None:
        """Compile what a step goes through, each as one graph."""
        torch._functorch.config.donated_buffer = False  # the adaptive weight goes through the decoder's graph twice
        parts = [self.model.encoder, self.model.decoder, self.discriminator]
        for part in parts if self.objective.perceptual is None else [*parts, self.objective.perceptual]:
            part.compile(fullgraph=True, dynamic=False)

    def connect(self) -> None:
        """Share gradients among ranks.

        The graph is static only without a discriminator: the adaptive weight goes back through the autoencoder before
        `backward` does, the discriminator's R1 penalty goes through it past DDP, and both may begin in the middle of a
        run. Nor can DDP's first step with a static graph put off summing gradients, as parts of a batch do.
        """
        static = not self.adversarial and self.config.accumulate == 1
        self.network = replicated(self.model, self.device, static=static)
        self.critic = replicated(self.discriminator, self.device) if self.adversarial else self.discriminator

    def step(self, batch: Batch, step: int) -> StepOutput[Reconstruction]:
        """One step of the autoencoder, and from `disc_start` on one of the discriminator."""
        images = on_device(batch, self.device)
        reconstruction, values, bad = self.generator_step(images, step)
        if self.objective.adversarial_at(step):
            values |= self.discriminator_step(images, reconstruction, step)
        return StepOutput(values, bad, reconstruction)

    def after_step(self, stepped: StepOutput[Reconstruction]) -> None:
        """Move a codebook that does not learn by gradient."""
        if self.moves and not stepped.bad:
            self.model.quantizer.update(stepped.made.latent, stepped.made.quantized.ids)

    def window(self) -> "TokenizerWindow":
        return TokenizerWindow(self.model.quantizer, self.device)

    def generator_step(self, images: Tensor, step: int) -> tuple[Reconstruction, dict[str, Tensor], Tensor]:
        """The autoencoder's, with the discriminator frozen. Returns what it reconstructed, detached; scalars to log;
        and whether the step was skipped, a bool on the device."""
        optimizer = self.optimizers["optimizer"]
        self.model.train()
        self.discriminator.train().requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        adversarial = self.objective.adversarial_at(step)
        parts, made, logged = images.chunk(self.config.accumulate), [], []
        for number, part in enumerate(parts, start=1):
            with summed_later(self.network, last=number == len(parts)):
                with autocast(self.device, self.config):
                    reconstruction: Reconstruction = self.network(part)
                    logits = self.discriminator(reconstruction.images) if adversarial else None
                total, terms = self.objective.generator_loss(
                    part,
                    reconstruction.images,
                    reconstruction.quantized.losses,
                    fake_logits=logits,
                    last_layer=self.model.last_layer,
                    step=step,
                )
                (total / len(parts)).backward()
            made.append(detached(reconstruction))
            error = (made[-1].images.float().clamp(-1, 1) - part).square().mean()
            logged.append({f"loss/{name}": term for name, term in terms.items()} | {"squared_error": error})
        norm, bad = finite_step(optimizer, self.config)
        return joined(made), mean(logged) | {"gradient_norm": norm}, bad

    def discriminator_step(self, images: Tensor, reconstruction: Reconstruction, step: int) -> dict[str, Tensor]:
        """The discriminator's, on the reconstruction that the generator step made. Returns scalars to log."""
        optimizer = self.optimizers["discriminator_optimizer"]
        self.discriminator.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        parts, logged = images.chunk(self.config.accumulate), []
        fakes = reconstruction.images.chunk(len(parts))
        for number, (real, fake) in enumerate(zip(parts, fakes, strict=True), start=1):
            with summed_later(self.critic, last=number == len(parts)):
                with autocast(self.device, self.config):
                    real_logits, fake_logits = self.critic(real), self.critic(fake)
                loss, terms = self.objective.discriminator_loss(
                    real_logits, fake_logits, step=step, images=real, discriminator=self.discriminator.forward
                )
                (loss / len(parts)).backward()
            logged.append({f"loss/{name}": term for name, term in terms.items()})
        norm, bad = finite_step(optimizer, self.config)
        values = mean(logged)
        self.objective.update(values["loss/real_logit"], values["loss/fake_logit"], skipped=bad)
        return values | {"discriminator_gradient_norm": norm}


class TokenizerWindow(RunningMetrics[Reconstruction]):
    """The means, with PSNR and the use of codes over all tokens of the window on all ranks."""

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self.quantizer = quantizer
        super().__init__(device)

    def clear(self) -> None:
        super().clear()
        self.usage = CodeUsage(self.quantizer.codebook_size, self.quantizer.num_groups, self.device)
        self.earlier: Tensor | None = None  # counts that a checkpoint held, int64[n, 3]: group, id, how often

    def add(self, stepped: StepOutput[Reconstruction]) -> None:
        super().add(stepped)
        self.usage.update(torch.where(stepped.bad, -1, stepped.made.quantized.ids), trusted=True)

    def numbers(self) -> Row:
        """`psnr`, in dB, is that of the window's mean squared error; `utilization` and `perplexity` (of the first
        group) are those of all its tokens on all ranks."""
        means = super().numbers()
        error, counts = means.pop("squared_error"), self.counts()
        usage = usage_of(counts)
        perplexity = usage["perplexity_per_group"]
        return {
            **means,
            "psnr": -10 * torch.tensor(error / 4).log10().item(),
            "utilization": usage["utilization"],
            "perplexity": perplexity[0] if isinstance(perplexity, list) else perplexity,
            "window_tokens": int(counts[0].sum()),
        }

    def counts(self) -> Tensor:
        """int64[G, K] of all ranks together, dense or sparse. Every rank calls it."""
        counts = self.usage.merged()
        if self.earlier is None:
            return counts
        before = from_rows(self.earlier, *counts.shape)
        return (counts + before).coalesce() if counts.is_sparse else counts + before.to_dense()

    def tensors(self) -> dict[str, Tensor]:
        totals = super().tensors()
        if totals:
            counts = self.counts()
            totals[COUNTS] = as_rows(counts if counts.is_sparse else counts.to_sparse()).cpu()
        return totals

    def forms(self, names: Collection[str]) -> dict[str, Tensor]:
        return super().forms(names) | {COUNTS: torch.zeros(0, 3, dtype=torch.int64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        self.earlier = tensors.pop(COUNTS).to(self.device)
        super().load(tensors)


def frozen_parts(config: TokenizerTrainConfig, model: Autoencoder) -> list[nn.Module]:
    """What `config.freeze` names."""
    named: dict[str, list[nn.Module]] = {
        "encoder": [model.encoder, model.quant_conv],
        "codebook": [model.quantizer],
    }
    return [part for name in config.freeze for part in named[name]]


def blocks(model: Autoencoder) -> Iterator[nn.Module]:
    """The residual and attention blocks of both networks."""
    for network in (model.encoder, model.decoder):
        yield from (module for module in network.modules() if isinstance(module, BLOCKS))


def rest_of(model: Autoencoder) -> list[nn.Parameter]:
    """The autoencoder's parameters but for its quantizer's."""
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("quantizer.")]


def on_device(batch: Batch, device: torch.device) -> Tensor:
    """A batch's images in [-1, 1] there; the copy overlaps with what a GPU still has to do."""
    if device.type != "cuda":
        return to_float(batch.images)
    beside = torch.cuda.Stream(device)
    with torch.cuda.stream(beside):
        images = batch.images.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(beside)
    images.record_stream(torch.cuda.current_stream(device))
    return to_float(images).contiguous(memory_format=torch.channels_last)


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
