"""Rank, world size and collectives over torch.distributed. In a single process each collective is the identity.

torchrun starts the processes; `process_group` joins the group that it describes in the environment. Ranks exchange
tensors while they take the same steps: one that is late by `COLLECTIVE_TIMEOUT` is an error. They exchange objects, and
meet at barriers, also after work that only some of them have (a download, the last shard), and wait `WORK_TIMEOUT`.
"""

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from vqpipe.errors import ConfigError, VqpipeError

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the tensors of the others before it raises an error."""
WORK_TIMEOUT = datetime.timedelta(days=7)
"""How long a rank waits for the objects of the others. A rank that has ended is noticed at once."""

_work: dist.ProcessGroup | None = None
"""The group of objects and barriers, of all ranks; None: the default group."""


def rank() -> int:
    """The index of this process, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the only one that publishes and prints."""
    return rank() == 0


def share_title(title: str) -> str:
    """The title of a phase of which each rank does a share, and counts that alone: `tokenize (rank 0 of 8)`."""
    return title if world_size() == 1 else f"{title} (rank {rank()} of {world_size()})"


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier(_work)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every rank's float[n, D] in rank order, on every rank; n may differ between ranks."""
    if not dist.is_initialized():
        return rows
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    lengths[rank()] = len(rows)
    counts = all_reduce_sum(lengths).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def any_rank(condition: bool, device: torch.device) -> bool:
    """Whether `condition` is true on any rank; the same on all of them."""
    if not dist.is_initialized():
        return condition
    return bool(all_reduce_sum(torch.tensor(int(condition), device=device)) > 0)


def broadcast(tensor: Tensor) -> Tensor:
    """Replace `tensor` by that of rank 0, in place, and return it."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` (JSON-like) on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_work)
    return box[0]


@contextmanager
def sharing_errors() -> Iterator[None]:
    """Raise a VqpipeError of any rank in this context on every rank, so that no rank waits for one that has ended.

    If several ranks fail, the error of the lowest of them is raised.
    """
    error: VqpipeError | None = None
    try:
        yield
    except VqpipeError as raised:
        error = raised
    for shared in filter(None, gather_objects(error)):
        raise shared


def on_main(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0; return its result (JSON-like), or raise its VqpipeError, on every rank."""
    result: Result | None = None
    with sharing_errors():
        if is_main():
            result = action()
    return broadcast_object(result)


def on_machine_first(action: Callable[[], object]) -> None:
    """Run `action`, which caches what it finds, on one rank of each machine, and then on the others. Every rank calls
    it; a VqpipeError of any rank is raised on every rank. Without `machine_share` it is run at once."""
    share = machine_share()
    if share is None:
        action()
        return
    for turn in (True, False):
        with sharing_errors():
            if (share.start == 0) == turn:
                action()


def machine_share() -> slice | None:
    """The share of work that this rank does for the ranks of its machine, as a slice of a list. Every rank calls it.

    None in a single process, and in one that did not join by `process_group`: there ranks may do different things, and
    may not wait long for each other.
    """
    if _work is None:
        return None
    hosts = gather_objects(socket.gethostname())  # not all launchers set LOCAL_WORLD_SIZE
    ranks = [number for number, host in enumerate(hosts) if host == hosts[rank()]]
    return slice(ranks.index(rank()), None, len(ranks))


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=_work)
    return box


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Make `device` the current GPU, and join the process group that torchrun describes in the environment, if any.

    Raises:
        ConfigError: the environment has a number of processes, and not what else torchrun sets.
    """
    global _work
    if device.type == "cuda" and (device.index or "WORLD_SIZE" in os.environ):
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is set in the environment, but not {' and '.join(missing)}",
            "Start with torchrun, or unset WORLD_SIZE",
        )
    store, number, ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # torchrun keeps its store when it restarts ranks: without a prefix they would read the addresses of dead ones.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)
    _work = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)  # type: ignore[assignment]  # each rank is a member
    try:
        yield
    finally:
        _work = None
        dist.destroy_process_group()
