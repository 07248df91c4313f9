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
from vqpipe.training.sharding import share_of, whole


def make_optimizer(
    config: TrainConfig,
    parameters: Sequence[Tensor],
    other_parameters: Sequence[Tensor] = (),
    other_rate: float = 1.0,
) -> Optimizer:
    """Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) over the parameters that train.

    Others, such as a quantizer's, may have a learning rate of their own, `other_rate` in units of the first's.

    Weight decay is for matrices and convolutions alone, not for biases and the scales of norms, as LlamaGen does.
    VQGAN-LC's released loop uses Adam with betas (0.5, 0.9) and eps 1e-7, and parses a weight decay it never applies.
    """
    groups = [
        {"params": chosen, "rate": rate, "weight_decay": decay}
        for group, rate in ((parameters, 1.0), (other_parameters, other_rate))
        for decay, wanted in ((config.weight_decay, True), (0.0, False))
        if (chosen := [each for each in group if each.requires_grad and (each.ndim >= 2) == wanted])
    ]
    kind = AdamW if config.optimizer == "adamw" else Adam
    return kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def finite_step(optimizer: Optimizer, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Clip the gradients and step; where they are not finite on some rank, nothing moves.

    The fused optimizers take the decision on the device, as they do for a gradient scaler. Returns the norm of the
    gradients before clipping, and whether the step was skipped, a bool; both scalars on the device.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    norm = whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf")))
    bad = distributed.all_reduce_sum((~torch.isfinite(norm)).float()) > 0
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # where torch.amp leaves it too
    optimizer.step()
    return norm, bad


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (0-based): linear warm-up from 0, then half a cosine down to `min_learning_rate`.

    As in VQGAN-LC's code (util/lr_sched.py), with steps in the place of fractions of an epoch.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    share = min(1.0, (step - config.warmup_steps) / span)
    drop = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + drop * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give every group of `optimizer` the learning rate `value` times its own rate."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["rate"]


SMALL = 2**20
"""Elements of a buffer that is copied in every step."""

Network = TypeVar("Network", bound=nn.Module)


class WeightEma(Generic[Network]):
    """Exponential moving average of a network's weights; its buffers are copied, since they already are averages.

    With `decay` 0 the average is the network itself, and nothing is stored.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.source = network
        self.network = copy.deepcopy(network).requires_grad_(False) if decay > 0 else network
        self.copied: dict[int, int] = {}  # a buffer's number -> its version when it was last copied

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the source. Early steps use the decay (1 + step) / (10 + step) where it is smaller."""
        if self.decay == 0:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, sources = ([share_of(each) for each in net.parameters()] for net in (self.network, self.source))
        torch._foreach_lerp_(averages, sources, 1 - decay)
        pairs = zip(self.network.buffers(), self.source.buffers(), strict=True)
        for number, (average, buffer) in enumerate(pairs):
            # A frozen codebook of 300 MB is copied once, not every step. Running statistics, which are small, are
            # always copied: batch norm changes them without a trace in their version.
            if buffer.numel() <= SMALL or self.copied.get(number) != buffer._version:
                average.copy_(buffer)
                self.copied[number] = buffer._version
