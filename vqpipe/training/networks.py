"""The networks of a run made ready for it: what learns, what is compiled, and how ranks share gradients."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vqpipe import distributed
from vqpipe.errors import ConfigError
from vqpipe.losses.objective import Objective
from vqpipe.models.autoencoder import Autoencoder
from vqpipe.models.dcae import Residual
from vqpipe.models.vqgan import Attention, ResidualBlock
from vqpipe.training.config import TrainConfig

BLOCKS = (ResidualBlock, Attention, Residual)
"""What gradient checkpointing forgets and computes again, as a whole."""


def make_ready(
    config: TrainConfig, model: Autoencoder, discriminator: nn.Module, objective: Objective, device: torch.device
) -> nn.Module:
    """Freeze, recompute and compile as `config` says, in place. Returns the discriminator, its batch norms replaced
    where they are to see all ranks' images.

    Raises:
        ConfigError: batch norm over ranks that have no GPU.
    """
    for part in frozen_parts(config, model):
        part.requires_grad_(False)
    if config.sync_batch_norm and distributed.world_size() > 1:
        if device.type != "cuda":
            raise ConfigError("train.sync_batch_norm needs GPUs", "Set it to false")
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    if config.recompute:
        for block in blocks(model):
            recompute(block)
    if config.compile:
        torch._functorch.config.donated_buffer = False  # the adaptive weight goes through the decoder's graph twice
        parts = [model.encoder, model.decoder, discriminator]
        for part in parts if objective.perceptual is None else [*parts, objective.perceptual]:
            part.compile(fullgraph=True, dynamic=False)
    return discriminator


def frozen_parts(config: TrainConfig, model: Autoencoder) -> list[nn.Module]:
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


def recompute(block: nn.Module) -> None:
    """Let the block forget its activations, and compute them again in the backward pass."""
    forward = block.forward

    def forgetting(x: Tensor) -> Tensor:
        return checkpoint(forward, x, use_reentrant=False) if torch.is_grad_enabled() else forward(x)

    block.forward = forgetting


def parallel(network: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """`network` over all ranks, or itself on one process, or where nothing of it learns.

    Buffers are not broadcast in each forward: a codebook of 300 MB is one, and `update` keeps it alike on all ranks.
    """
    if distributed.world_size() == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def summed_later(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around all parts of a batch but the last: ranks add up their gradients once a step."""
    return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: more than there are networks where it had to compile
    one again, for another shape."""
    statistics: Counter[str] = torch._dynamo.utils.counters["stats"]
    return int(statistics["unique_graphs"])
