"""Networks prepared for training: activation checkpointing, and weights replicated (DDP) or sharded (FSDP2) over ranks.

Of sharded weights, checkpoints hold the whole tensors, so they are the same for any number of ranks.
torch.distributed.tensor takes seconds to import: only a run that shards imports it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vqpipe import distributed
from vqpipe.artifacts.states import Parts

T = TypeVar("T")
NO_BUFFER_BROADCAST: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
"""The argument of DistributedDataParallel that torch renamed."""


def checkpoint_activations(block: nn.Module) -> None:
    """Keep no activations inside the block, and compute them again in the backward pass (gradient checkpointing)."""
    forward = block.forward
    contexts: dict[str, Any] = {}
    if batch_norms(block):
        contexts["context_fn"] = lambda: (nullcontext(), paused_statistics(block))

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    block.forward = recomputing


def batch_norms(*networks: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms with running statistics, which a forward pass in training changes."""
    modules = (module for network in networks for module in network.modules())
    return [each for each in modules if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.track_running_stats]


@contextmanager
def paused_statistics(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics as they are: a second forward pass on the same images must not count twice."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in batch_norms(network)]
    for norm, _, _ in before:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process. More than the networks: one was compiled again for
    another shape."""
    statistics: Counter[str] = torch._dynamo.utils.counters["stats"]
    return int(statistics["unique_graphs"])


def replicate(network: nn.Module, device: torch.device, *, static: bool = False) -> nn.Module:
    """`network` under DistributedDataParallel; the network itself on one process, or where nothing of it trains.

    Buffers are not broadcast in each forward: a codebook is a buffer (up to 300 MB), and `Quantizer.update` already
    keeps it identical on all ranks.

    Args:
        static: every step uses the same parameters, in a single backward pass (DDP's `static_graph`).
    """
    if distributed.world_size() == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    align_gradients(network)
    return DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        **NO_BUFFER_BROADCAST,
        gradient_as_bucket_view=True,
        static_graph=static,
    )


def align_gradients(network: nn.Module) -> None:
    """Give gradients the strides of their weights.

    For sides of length 1 the stride is arbitrary, and convolutions in channels_last return gradients with other strides
    than the weight. DDP would then warn and copy.
    """
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.ndim == 4 and 1 in parameter.shape:
            parameter.register_hook(partial(with_strides, parameter.stride()))


def with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The gradient with these strides, if they differ only in size-1 dimensions; else the gradient as it is."""
    dimensions = zip(gradient.shape, gradient.stride(), strides, strict=True)
    return gradient if any(n > 1 and a != b for n, a, b in dimensions) else gradient.as_strided(gradient.shape, strides)


def micro_batches(network: nn.Module, parts: Sequence[T]) -> Iterator[T]:
    """The parts of a batch, one after another; ranks sum their gradients with the last part only.

    Not where weights are sharded: there each rank would have to keep full unsharded gradients until the last part.
    """
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        with nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync():
            yield part


def shard(network: nn.Module, blocks: Iterable[nn.Module], *, trains: bool = True) -> None:
    """Shard the network's weights over all ranks, in place; the weights of a block are gathered while it computes.

    Weights outside the blocks are gathered for `forward` and for the methods named in `forward_methods` of the network.
    Where the network trains they stay gathered until its backward pass; a weight average has no backward pass.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in blocks:
        fully_shard(block)
    fully_shard(network, reshard_after_forward=None if trains else True)
    for name in getattr(network, "forward_methods", ()):
        register_fsdp_forward_method(network, name)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only its shard."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """The part of the tensor that this rank holds, in the same memory."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank. Every rank calls it."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def gathered(parts: Parts) -> Parts:
    """Parts with whole tensors: those that are sharded are gathered on rank 0's CPU, and absent elsewhere.

    One tensor after another, so that no GPU holds more than one whole. Every rank calls it.
    """
    result: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if not is_sharded(tensor):
                result[part][name] = tensor
                continue
            full = whole(tensor)
            if distributed.is_main():
                result[part][name] = full.cpu()
    return result


def sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """This rank's shard of a whole tensor where `own` is sharded, else the tensor itself."""
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def load_whole(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, also where the network is sharded."""
    own = network.state_dict()
    network.load_state_dict({name: sharded_like(value, own[name]) for name, value in tensors.items()})
