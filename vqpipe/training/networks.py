"""Networks made ready for a run: what is computed again, what is compiled, and how ranks share gradients."""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vqpipe import distributed

LEAVE_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
"""To DistributedDataParallel, in its newer and its older words."""


def recompute(block: nn.Module) -> None:
    """Let the block forget its activations, and compute them again in the backward pass (gradient checkpointing)."""
    forward = block.forward

    def forgetting(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = forgetting


def replicated(network: nn.Module, device: torch.device, *, static: bool = False) -> nn.Module:
    """`network` over all ranks, each with a whole copy, or itself on one process, or where nothing of it learns.

    Buffers are not broadcast in each forward: a codebook of 300 MB is one, and `update` keeps it alike on all ranks.
    `static` promises that every step goes back through the same parameters, once in one `backward`.
    """
    if distributed.world_size() == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    align_gradients(network)
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        **LEAVE_BUFFERS,
        gradient_as_bucket_view=True,
        static_graph=static,
    )


def align_gradients(network: nn.Module) -> None:
    """Give gradients the strides of their weights.

    Along a side of length 1, such as both of a 1x1 convolution's, a stride means nothing, and convolutions in
    channels_last choose another one than the weight has. DDP's buckets have the weight's: it would warn, and copy.
    """
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.ndim == 4 and 1 in parameter.shape:
            parameter.register_hook(partial(with_strides, parameter.stride()))


def with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The same gradient, unless it lies otherwise in memory also along sides that are longer than 1."""
    sides = zip(gradient.shape, gradient.stride(), strides, strict=True)
    return gradient if any(n > 1 and a != b for n, a, b in sides) else gradient.as_strided(gradient.shape, strides)


def summed_later(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around all parts of a batch but the last: ranks add up their gradients once a step.

    Not where weights are sharded: there a rank would have to keep the gradients of all of them until the last part.
    """
    return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: more than there are networks where it had to compile
    one again, for another shape."""
    statistics: Counter[str] = torch._dynamo.utils.counters["stats"]
    return int(statistics["unique_graphs"])
