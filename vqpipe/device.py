"""The machine that a job runs on: reduced precision of its networks, and free memory."""

import os
from pathlib import Path

import torch
from torch import nn

MEMINFO = Path("/proc/meminfo")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Compute convolutions and matrix products in bfloat16 with "bf16"; with "fp32" nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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


def available_bytes() -> int:
    """Memory that can be allocated without swapping: `MemAvailable` of Linux; elsewhere the whole memory."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
