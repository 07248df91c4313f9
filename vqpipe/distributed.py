"""Rank, world size and collectives over torch.distributed. In a single process each collective is the identity.

torchrun starts the processes; `connect` joins the group that it describes in the environment.
"""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from vqpipe.errors import ConfigError, VqpipeError

Result = TypeVar("Result")

DEVICES = "Use auto, cpu, cuda, cuda:N or mps"
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others before it raises an error."""


def rank() -> int:
    """The index of this process, 0-based."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the only one that publishes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every rank's float[n, D] in rank order, on every rank; n may differ between ranks."""
    if not dist.is_initialized():
        return rows
    counts = gather_objects(len(rows))
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
    dist.broadcast_object_list(box, src=0)
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
    shared: Result = broadcast_object(result)
    return shared


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def pick_device(name: str) -> torch.device:
    """`"auto"`, `"cpu"`, `"cuda"`, `"cuda:N"` or `"mps"` -> this rank's device. "auto" is a CUDA GPU if there is one.

    Under torchrun, "cuda" is the GPU of the number LOCAL_RANK.

    Raises:
        ConfigError: "cuda" without CUDA, or with fewer GPUs than this machine has ranks; a number under torchrun; what
            `check_device` raises.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        device = check_device(name)
        if "LOCAL_RANK" in os.environ:
            raise ConfigError(
                f"--device {name} would put every rank of torchrun on the same device",
                "Use --device cuda: each rank takes the GPU of its LOCAL_RANK (choose GPUs by CUDA_VISIBLE_DEVICES)",
            )
        return device
    check_device("cuda")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}",
        )
    return torch.device("cuda", local_rank)


def check_device(device: str | torch.device) -> torch.device:
    """The device of this name: cpu, cuda, cuda:N or mps; also meta, which has no data.

    Raises:
        ConfigError: unknown to torch; absent on this machine; xpu, xla, and others that vqpipe does not support.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", DEVICES) from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("no CUDA device on this machine", "Use --device cpu, or --device auto")
        if (found.index or 0) >= (count := torch.cuda.device_count()):
            raise ConfigError(f"no device {found} on this machine: the last one is cuda:{count - 1}", DEVICES)
    elif found.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("no MPS device (Apple GPU) on this machine, or not in this build of torch", DEVICES)
    elif found.type not in ("cpu", "meta"):
        raise ConfigError(f"device {found} is not supported", DEVICES)
    return found


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Make `device` the current GPU, and join the process group that torchrun describes in the environment, if any."""
    if device.type == "cuda" and (device.index or "WORLD_SIZE" in os.environ):
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    store, number, ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # torchrun keeps its store when it restarts ranks: without a prefix they would read the addresses of dead ones.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
