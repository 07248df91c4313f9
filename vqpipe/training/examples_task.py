"""The step of one network with a `loss`: generators and classifiers, on ids or latents with labels.

Shapes: B examples of this rank's share of a global batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.data.examples import ExampleBatch
from vqpipe.device import autocast
from vqpipe.errors import ConfigError
from vqpipe.training.config import TrainConfig
from vqpipe.training.networks import checkpoint_activations, micro_batches, replicate, shard
from vqpipe.training.optim import finite_step, make_optimizer
from vqpipe.training.running_metrics import StepOutput
from vqpipe.training.task import Task, mean_over_parts


class ExamplesTask(Task[ExampleBatch, None]):
    """One network, one optimizer.

    `network(examples, labels)` returns scalars by name, of which "total" is minimized; they are logged as
    `loss/<name>`, or unchanged if the name contains a slash (`train/accuracy`). Each is a mean over examples. Random
    numbers come from torch's global generators, which the loop seeds from (seed, step, rank).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__({"model": network})
        self.model = network

    def prepare(self, config: TrainConfig, device: torch.device, average: nn.Module) -> None:
        self.config, self.device = config, device
        blocks = blocks_of(self.model)
        if config.activation_checkpointing:
            if not blocks:
                raise ConfigError(
                    f"train.activation_checkpointing: {type(self.model).__name__} names no blocks", "Set it to false"
                )
            for block in blocks:
                checkpoint_activations(block)
        if config.compile:
            for part in blocks or [self.model]:
                part.compile(dynamic=False)
        self.sharded = config.parallel == "fsdp" and distributed.world_size() > 1
        if self.sharded:
            shard(self.model, blocks)
            if average is not self.model:
                shard(average, blocks_of(average), trains=False)
        self.optimizers["optimizer"] = make_optimizer(config, list(self.model.parameters()))

    def connect(self) -> None:
        static = self.config.accumulate == 1  # DDP's first step with a static graph cannot accumulate gradients
        self.network = self.model if self.sharded else replicate(self.model, self.device, static=static)

    def step(self, batch: ExampleBatch, step: int) -> StepOutput[None]:
        optimizer = self.optimizers["optimizer"]
        self.model.train()
        optimizer.zero_grad(set_to_none=True)
        examples, labels = (each.to(self.device, non_blocking=True) for each in (batch.examples, batch.labels))
        parts = list(zip(*(each.chunk(self.config.accumulate) for each in (examples, labels)), strict=True))
        logged: list[dict[str, Tensor]] = []
        for part in micro_batches(self.network, parts):
            with autocast(self.device, self.config.precision):
                losses: dict[str, Tensor] = self.network(*part)
            (losses["total"] / len(parts)).backward()
            logged.append({name if "/" in name else f"loss/{name}": each.detach() for name, each in losses.items()})
        norm, skipped = finite_step(optimizer, self.config)
        return StepOutput(mean_over_parts(logged) | {"gradient_norm": norm}, skipped, skipped, None)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """What `network.blocks()` returns, the units of activation checkpointing, compiling and sharding; empty for a
    network without that method."""
    blocks: Any = getattr(network, "blocks", list)
    return list(blocks())
