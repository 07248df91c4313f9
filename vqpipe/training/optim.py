"""Optimizer, learning-rate schedule and weight average of a training run."""

import copy
import math
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from vqpipe import distributed
from vqpipe.training.config import TrainConfig
from vqpipe.training.networks import local_shard, whole


def make_optimizer(
    config: TrainConfig,
    parameters: Sequence[Tensor],
    other_parameters: Sequence[Tensor] = (),
    other_rate: float = 1.0,
) -> Optimizer:
    """Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) over the parameters that train.

    Weight decay is for matrices and convolutions alone, not for biases and the scales of norms, as in LlamaGen.
    VQGAN-LC's released loop uses Adam with betas (0.5, 0.9) and eps 1e-7, and parses a weight decay it never applies.

    Args:
        other_parameters: parameters with a learning rate of their own, such as a quantizer's.
        other_rate: that rate, in units of the first's.
    """
    groups = [
        {"params": chosen, "rate": rate, "weight_decay": decay}
        for group, rate in ((parameters, 1.0), (other_parameters, other_rate))
        for decay, decays in ((config.weight_decay, True), (0.0, False))
        if (chosen := [each for each in group if each.requires_grad and (each.ndim >= 2) == decays])
    ]
    kind = AdamW if config.optimizer == "adamw" else Adam
    return kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def finite_step(optimizer: Optimizer, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Clip the gradients and step; where they are not finite on some rank, skip the step.

    The fused optimizers decide on the device, as they do for a gradient scaler. Returns two scalars on the device: the
    norm of the gradients before clipping, and whether the step was skipped, a bool.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    norm = whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf")))
    skipped = distributed.all_reduce_sum((~torch.isfinite(norm)).float()) > 0
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # as torch.amp sets it
    optimizer.step()
    return norm, skipped


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (0-based): linear warm-up from 0, then `schedule`.

    A linear or cosine schedule reaches `min_learning_rate` at `steps`, which is one after the last step.
    Warm-up and cosine are those of VQGAN-LC's code (util/lr_sched.py), with steps instead of fractions of an epoch.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = max(1, config.steps - config.warmup_steps)
    share = min(1.0, (step - config.warmup_steps) / span)
    drop = config.learning_rate - config.min_learning_rate
    if config.schedule == "linear":
        return config.min_learning_rate + drop * (1 - share)
    return config.min_learning_rate + drop * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group to `value` times the group's own rate."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["rate"]


COPY_ALWAYS = 2**20
"""Elements up to which a buffer is copied in every step."""

Network = TypeVar("Network", bound=nn.Module)


class WeightEma(Generic[Network]):
    """Exponential moving average of a network's weights.

    Buffers (running statistics, codebooks) are copied, not averaged. With `decay` 0 the average is the network itself.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.source = network
        self.network = copy.deepcopy(network).requires_grad_(False) if decay > 0 else network
        self.copied: dict[int, int] = {}  # number of a buffer -> its version when it was last copied

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the source. Early steps use the decay (1 + step) / (10 + step) where it is smaller."""
        if self.decay == 0:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, sources = ([local_shard(each) for each in net.parameters()] for net in (self.network, self.source))
        torch._foreach_lerp_(averages, sources, 1 - decay)
        pairs = zip(self.network.buffers(), self.source.buffers(), strict=True)
        for number, (average, buffer) in enumerate(pairs):
            # A frozen codebook of 300 MB is copied once, not every step. Small buffers are always copied: batch norm
            # changes its running statistics without changing their version.
            if buffer.numel() <= COPY_ALWAYS or self.copied.get(number) != buffer._version:
                average.copy_(buffer)
                self.copied[number] = buffer._version
