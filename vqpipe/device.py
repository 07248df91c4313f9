"""The machine that a job runs on: its devices, reduced precision of its networks, and free memory."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TypeVar

import torch
from torch import nn

from vqpipe.errors import ConfigError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
DEVICES = "Use auto, cpu, cuda, cuda:N or mps"
ROOT = Path("/")
"""Of the system files that are read."""


def pick_device(name: str) -> torch.device:
    """The device of `--device`: as `check_device`, but under torchrun a number would be that of every rank.

    Raises:
        ConfigError: a number, or mps, under torchrun; what `check_device` raises.
    """
    device = check_device(name)
    if name not in ("auto", "cpu", "cuda") and "LOCAL_RANK" in os.environ:
        raise ConfigError(
            f"--device {name} would put every rank of torchrun on the same device",
            "Use --device cuda: each rank takes the GPU of its LOCAL_RANK (choose GPUs by CUDA_VISIBLE_DEVICES)",
        )
    return device


def check_device(device: str | torch.device) -> torch.device:
    """The device of this name: auto, cpu, cuda, cuda:N or mps; also meta, which has no data.

    "auto" is a CUDA GPU if there is one, else the CPU. "auto" and "cuda" are the GPU of this rank, that of LOCAL_RANK
    under torchrun.

    Raises:
        ConfigError: unknown to torch; absent on this machine, or on it for fewer ranks than it has; xpu, xla, and
            others that vqpipe does not support.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", DEVICES) from None
    if found.type not in ("cpu", "cuda", "mps", "meta"):
        raise ConfigError(f"device {found} is not supported", DEVICES)
    if found.type in ("cpu", "meta"):
        return found
    there = present_devices()
    if not any(name.startswith(found.type) for name in there):
        kind = "CUDA device" if found.type == "cuda" else "MPS device (Apple GPU)"
        raise ConfigError(f"no {kind} on this machine, which has {' and '.join(there)}", f"Use auto or {there[-1]}")
    if str(found) == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if str(found) not in there:
            raise ConfigError(
                f"rank {found.index} of this machine has no GPU: there are {torch.cuda.device_count()}",
                f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}",
            )
    elif found.type == "cuda" and str(found) not in there:
        raise ConfigError(f"no device {found} on this machine: the last one is {there[-1]}", DEVICES)
    return found


def present_devices() -> list[str]:
    """The devices of this machine that torch can use: cpu, mps, cuda:0, cuda:1, ..."""
    mps = ["mps"] if torch.backends.mps.is_available() else []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *mps, *(f"cuda:{number}" for number in range(gpus))]


def check_precision(precision: str) -> None:
    """Raise a ConfigError unless this is "fp32" or "bf16"."""
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision = {precision!r} is not a choice", "Use fp32 or bf16")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Compute convolutions and matrix products in bfloat16 with "bf16"; with "fp32" nothing changes."""
    check_precision(precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def for_inference(network: ModuleT, device: torch.device | str) -> ModuleT:
    """`network` itself, moved to `device`, in evaluation mode and with frozen weights.

    On a CPU its kernels are stored channels last, the faster layout of oneDNN's convolutions, unless it has group
    norms: those of PyTorch lose digits in that layout where the mean is large (error 1e-3 at 10 standard deviations).
    """
    network.eval().requires_grad_(False).to(device)
    modules = list(network.modules())
    if torch.device(device).type == "cpu" and not any(isinstance(module, nn.GroupNorm) for module in modules):
        for module in modules:
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    return network


def reduced_precision(module: nn.Module, device: torch.device, precision: str) -> torch.autocast:
    """`autocast` for a forward pass of `module`.

    With "bf16" on CUDA, the weights of `module` are stored channels last from then on, the layout of cuDNN's bfloat16
    convolutions; inputs are converted by the first of them. Call it outside of `torch.inference_mode`.
    """
    if precision == "bf16" and device.type == "cuda":
        kernel = next((weight for weight in module.parameters() if weight.ndim == 4), None)
        if kernel is not None and not kernel.is_contiguous(memory_format=torch.channels_last):
            module.to(memory_format=torch.channels_last)
    return autocast(device, precision)


def bf16_is_faster(device: torch.device) -> bool:
    """Whether a network is faster in bf16 than in float32: on GPUs from compute capability 8.0 on, and on CPUs with the
    instructions of AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with suppress(OSError):
        return device.type == "cpu" and "avx512_bf16" in (ROOT / "proc/cpuinfo").read_text(encoding="utf-8")
    return False


def available_bytes() -> int:
    """Memory that can be allocated without swapping: `MemAvailable` of Linux, and no more than the memory limits of the
    process's control groups leave, such as a container's; elsewhere the whole memory."""
    try:
        lines = (ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *left_in_groups()]))


def left_in_groups() -> Iterator[int]:
    """What the memory limits of the process's control groups leave, of version 2 and 1 of Linux's interface.

    Files that were read and may be dropped from memory do not count as used.
    """
    with suppress(OSError):
        for line in (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                folder, limit, used, dropped = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                folder, dropped = "sys/fs/cgroup/memory", "total_inactive_file"
                limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            own = PurePath(group.lstrip("/"))
            # The limits of outer groups count too, and a container may not see the name of its own.
            for each in (own, *own.parents):
                with suppress(OSError, ValueError):  # no such group, no such controller, or the limit "max"
                    path = ROOT / folder / each
                    room = int((path / limit).read_text(encoding="ascii"))
                    statistics = dict(map(str.split, (path / "memory.stat").read_text(encoding="ascii").splitlines()))
                    in_use = int((path / used).read_text(encoding="ascii")) - int(statistics.get(dropped, 0))
                    yield room - max(0, in_use)
