"""The training step of a tokenizer: the autoencoder, then its discriminator on the same reconstruction.

Nothing in a step waits for the GPU, except with a quantizer whose `update` moves the codebook: whether the step was
skipped is read first.
Shapes: B images of this rank's share of a global batch.
"""

from collections.abc import Collection, Iterator

import torch
import torch._functorch.config
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.batches import Batch
from vqpipe.data.transforms import to_float
from vqpipe.device import autocast
from vqpipe.errors import ConfigError
from vqpipe.losses.objective import Objective
from vqpipe.metrics.usage import CodeUsage, as_rows, from_rows, usage_of
from vqpipe.models.autoencoder import Autoencoder, Reconstruction
from vqpipe.models.dcae import Residual
from vqpipe.models.discriminator import PatchDiscriminator
from vqpipe.models.vitamin import ConvBlock, TransformerBlock
from vqpipe.models.vqgan import Attention, ResidualBlock
from vqpipe.quantizers import Quantized, Quantizer
from vqpipe.training.config import TokenizerTrainConfig, TrainConfig
from vqpipe.training.networks import batch_norms, checkpoint_activations, micro_batches, replicate
from vqpipe.training.optim import finite_step, make_optimizer
from vqpipe.training.running_metrics import Row, RunningMetrics, StepOutput
from vqpipe.training.task import Task, mean_over_parts

BLOCKS = (ResidualBlock, Attention, Residual, ConvBlock, TransformerBlock)
"""The units of activation checkpointing."""
COUNTS = "counts"
"""Name of the code counts in the metrics of a checkpoint."""


class TokenizerTask(Task[Batch, Reconstruction]):
    """An autoencoder with its quantizer, trained against a discriminator if the objective has an adversarial term.

    Otherwise the discriminator is neither trained nor saved.
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
        frozen = frozen_parts(config, self.model)
        for part in frozen:
            part.requires_grad_(False)
        self.frozen_norms = nn.ModuleList(batch_norms(*frozen))  # in training mode their running statistics would move
        self.moves_codebook = "codebook" not in config.freeze and self.model.quantizer.has_update
        if config.sync_batch_norm and distributed.world_size() > 1:
            if device.type != "cuda":
                raise ConfigError("train.sync_batch_norm needs GPUs", "Set it to false")
            nn.SyncBatchNorm.convert_sync_batchnorm(self.discriminator)  # in place, since it is not a batch norm itself
        if config.activation_checkpointing:
            for block in blocks(self.model):
                checkpoint_activations(block)
        if config.compile:
            self.compile()
        quantizer = list(self.model.quantizer.parameters())
        others = [each for name, each in self.model.named_parameters() if not name.startswith("quantizer.")]
        self.optimizers["optimizer"] = make_optimizer(config, others, quantizer, config.quantizer_rate)
        if self.adversarial:
            parameters = list(self.discriminator.parameters())
            self.optimizers["discriminator_optimizer"] = make_optimizer(config, parameters)

    def compile(self) -> None:
        """Compile the networks of a step, each as one graph."""
        torch._functorch.config.donated_buffer = False  # the adaptive weight uses the decoder's graph twice
        parts = [self.model.encoder, self.model.decoder, self.discriminator]
        for part in parts if self.objective.perceptual is None else [*parts, self.objective.perceptual]:
            part.compile(fullgraph=True, dynamic=False)

    def connect(self) -> None:
        """Share gradients among ranks.

        DDP's `static_graph` is not possible with the adaptive weight (an extra `autograd.grad`), with the R1 penalty
        (it bypasses DDP), or with gradient accumulation in the first step.
        """
        static = not self.adversarial and self.config.accumulate == 1
        self.ddp_model = replicate(self.model, self.device, static=static)
        self.ddp_discriminator = replicate(self.discriminator, self.device) if self.adversarial else self.discriminator

    def step(self, batch: Batch, step: int) -> StepOutput[Reconstruction]:
        """One step of the autoencoder, and from `disc_start` on one of the discriminator."""
        images = on_device(batch, self.device)
        reconstruction, values, skipped = self.autoencoder_step(images, step)
        nonfinite = skipped
        if self.objective.adversarial_at(step):
            more, not_moved = self.discriminator_step(images, reconstruction, step)
            values, nonfinite = values | more, skipped | not_moved
        return StepOutput(values, skipped, nonfinite, reconstruction)

    def after_step(self, output: StepOutput[Reconstruction]) -> None:
        """Update a codebook that is not trained by gradient."""
        if self.moves_codebook and not output.skipped:
            self.model.quantizer.update(output.result.latent, output.result.quantized.ids)

    def running_metrics(self) -> "TokenizerMetrics":
        return TokenizerMetrics(self.model.quantizer, self.device)

    def autoencoder_step(self, images: Tensor, step: int) -> tuple[Reconstruction, dict[str, Tensor], Tensor]:
        """Step the autoencoder, with the discriminator frozen. Returns the detached reconstruction, scalars to log, and
        whether the step was skipped, a bool on the device."""
        optimizer = self.optimizers["optimizer"]
        self.model.train()
        self.frozen_norms.eval()
        self.discriminator.train().requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        adversarial = self.objective.adversarial_at(step)
        parts, reconstructions, logged = images.chunk(self.config.accumulate), [], []
        for part in micro_batches(self.ddp_model, parts):
            with autocast(self.device, self.config.precision):
                reconstruction: Reconstruction = self.ddp_model(part)
                logits = self.discriminator(reconstruction.images) if adversarial else None
            total, terms = self.objective.autoencoder_loss(
                part,
                reconstruction.images,
                reconstruction.quantized.losses,
                fake_logits=logits,
                last_layer=self.model.last_layer,
                step=step,
            )
            (total / len(parts)).backward()
            reconstructions.append(detached(reconstruction))
            error = (reconstructions[-1].images.float().clamp(-1, 1) - part).square().mean()
            logged.append({f"loss/{name}": term for name, term in terms.items()} | {"squared_error": error})
        norm, skipped = finite_step(optimizer, self.config)
        return concatenated(reconstructions), mean_over_parts(logged) | {"gradient_norm": norm}, skipped

    def discriminator_step(
        self, images: Tensor, reconstruction: Reconstruction, step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Step the discriminator, on the reconstruction of the autoencoder step. Returns scalars to log, and whether
        the step was skipped, a bool on the device."""
        optimizer = self.optimizers["discriminator_optimizer"]
        self.discriminator.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        both, logged = (each.chunk(self.config.accumulate) for each in (images, reconstruction.images)), []
        parts = list(zip(*both, strict=True))
        for real, fake in micro_batches(self.ddp_discriminator, parts):
            with autocast(self.device, self.config.precision):
                real_logits, fake_logits = self.ddp_discriminator(real), self.ddp_discriminator(fake)
            loss, terms = self.objective.discriminator_loss(
                real_logits, fake_logits, step=step, images=real, discriminator=self.discriminator.forward
            )
            (loss / len(parts)).backward()
            logged.append({f"loss/{name}": term for name, term in terms.items()})
        norm, skipped = finite_step(optimizer, self.config)
        values = mean_over_parts(logged)
        self.objective.update(values["loss/real_logit"], values["loss/fake_logit"], skipped=skipped)
        return values | {"discriminator_gradient_norm": norm}, skipped


class TokenizerMetrics(RunningMetrics[Reconstruction]):
    """The means, with PSNR and the use of codes over all tokens since the last row, on all ranks."""

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        self.quantizer = quantizer
        super().__init__(device)

    def reset(self) -> None:
        super().reset()
        self.usage = CodeUsage(self.quantizer.codebook_size, self.quantizer.num_groups, self.device)
        self.resumed: Tensor | None = None  # counts of a checkpoint, int64[n, 3]: group, id, how often

    def update(self, output: StepOutput[Reconstruction]) -> None:
        super().update(output)
        self.usage.update(torch.where(output.skipped, -1, output.result.quantized.ids), trusted=True)

    def compute(self) -> Row:
        """`psnr`, in dB, is that of the mean squared error since the last row; `utilization` and `perplexity` (of the
        first group) are over all tokens since then."""
        means = super().compute()
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
        """How often each code was chosen, over all ranks: int64[G, K], dense or sparse. Every rank calls it."""
        counts = self.usage.merged().counts
        if self.resumed is None:
            return counts
        before = from_rows(self.resumed, *counts.shape)
        return (counts + before).coalesce() if counts.is_sparse else counts + before.to_dense()

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        if state:
            counts = self.counts()
            state[COUNTS] = as_rows(counts if counts.is_sparse else counts.to_sparse()).cpu()
        return state

    def state_like(self, names: Collection[str]) -> dict[str, Tensor]:
        return super().state_like(names) | {COUNTS: torch.zeros(0, 3, dtype=torch.int64)}

    def load(self, state: dict[str, Tensor]) -> None:
        state = dict(state)
        self.resumed = state.pop(COUNTS).to(self.device)
        super().load(state)


def frozen_parts(config: TokenizerTrainConfig, model: Autoencoder) -> list[nn.Module]:
    """The modules that `config.freeze` names."""
    named: dict[str, list[nn.Module]] = {
        "encoder": [model.encoder, model.quant_conv],
        "codebook": [model.quantizer],
    }
    return [part for name in config.freeze for part in named[name]]


def blocks(model: Autoencoder) -> Iterator[nn.Module]:
    """The residual and attention blocks of the encoder and the decoder."""
    for network in (model.encoder, model.decoder):
        yield from (module for module in network.modules() if isinstance(module, BLOCKS))


def on_device(batch: Batch, device: torch.device) -> Tensor:
    """The images of a batch in [-1, 1] on the device; the copy to a GPU overlaps with its work."""
    if device.type != "cuda":
        return to_float(batch.images)
    copies = torch.cuda.Stream(device)
    with torch.cuda.stream(copies):
        images = batch.images.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(copies)
    images.record_stream(torch.cuda.current_stream(device))
    return to_float(images).contiguous(memory_format=torch.channels_last)


def detached(reconstruction: Reconstruction) -> Reconstruction:
    """The reconstruction without its graph and its losses."""
    quantized = Quantized(reconstruction.quantized.codes.detach(), reconstruction.quantized.ids, {})
    return Reconstruction(reconstruction.images.detach(), reconstruction.latent.detach(), quantized)


def concatenated(parts: list[Reconstruction]) -> Reconstruction:
    """The reconstructions of all parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    codes, ids = (torch.cat([getattr(part.quantized, name) for part in parts]) for name in ("codes", "ids"))
    images, latent = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "latent"))
    return Reconstruction(images, latent, Quantized(codes, ids, {}))
