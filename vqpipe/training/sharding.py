"""Weights that are split among ranks (FSDP2), and whole tensors made of them and for them, so that checkpoints are the
same whatever the number of ranks.

torch.distributed.tensor takes seconds to import: only what shards imports it.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.training.checkpoints import Parts


def shard(network: nn.Module, blocks: Iterable[nn.Module], *, trains: bool = True) -> None:
    """Split the network's weights among all ranks, in place; each block's are gathered when it is its turn.

    Those that lie in no block are gathered for `forward`, and for the methods that the network names in `entrances`:
    elsewhere they would meet whole tensors as shares. Where the network trains they stay whole until its backward pass;
    where it does not, as an average, none would come.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in blocks:
        fully_shard(block)
    fully_shard(network, reshard_after_forward=None if trains else True)
    for name in getattr(network, "entrances", ()):
        register_fsdp_forward_method(network, name)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only its share."""
    return hasattr(tensor, "full_tensor")


def share_of(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in the same memory."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank. Every rank calls it."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def gathered(parts: Parts) -> Parts:
    """Parts whose tensors are whole: those that are sharded are on rank 0's CPU, and nowhere else.

    One tensor after another, so that no GPU has to hold more than one whole. Every rank calls it.
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


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as `own` is: where that is sharded, this rank's share of it."""
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def load_network(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, also where the network is sharded."""
    own = network.state_dict()
    network.load_state_dict({name: like(value, own[name]) for name, value in tensors.items()})
