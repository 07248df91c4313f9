"""The devices that a plan may be made for: GPUs of `gpus`, and this machine's CPU."""

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqpipe.config import nearest_name
from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError
from vqpipe.gpus import GPUS, Gpu, gpus_named


@dataclass(frozen=True)
class Device(Gpu):
    """A GPU, or a CPU by the same numbers, and what is assumed for it."""

    product_share: float = 0.5
    """Share of the peak that large products and convolutions reach; an assumption."""
    memory_share: float = 0.7
    """Share of the bandwidth that other operations reach; an assumption."""
    launch: float = 8e-6
    """Seconds that PyTorch takes to start an operation; they bound steps of many small ones. An assumption."""
    context: float = 0.8e9
    """Bytes of the CUDA context and of the workspaces of cuBLAS and cuDNN; an assumption."""
    margin: float = 0.06
    """Share of the tensors' memory that the allocator loses to rounding and fragmentation; an assumption."""

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


DEVICES = {gpu.name: Device(**vars(gpu)) for gpu in GPUS if gpu.memory}
"""The GPUs whose numbers are all known, by name."""
NAMES = (*DEVICES, "cpu")


def device_named(name: str) -> Device:
    """The device of a name of NAMES; "cpu" is this machine's, measured for a moment.

    Raises:
        ConfigError: another name.
    """
    if name == "cpu":
        return measured_cpu()
    if name not in DEVICES:
        sizes = [known for known in NAMES if known.startswith(f"{name}-")]
        raise ConfigError(
            f"--gpu {name} is unknown", f"Use {' or '.join(sizes)}" if sizes else nearest_name(name, NAMES)
        )
    return DEVICES[name]


def device_of(device: torch.device) -> Device:
    """The device that a run would use. A GPU that is not in the table counts as the one most like it in memory."""
    if device.type != "cuda":
        return measured_cpu()
    name, memory = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    found = [DEVICES[gpu.name] for gpu in gpus_named(name) if gpu.memory]
    like = min(found or DEVICES.values(), key=lambda each: abs(each.memory - memory))
    return Device(**{**vars(like), "name": like.name if found else f"{name} as {like.name}", "memory": memory})


def measured_cpu() -> Device:
    """This machine's CPU with PyTorch's threads. Its rates are measured once in a process."""
    return Device(
        name="cpu",
        memory=float(available_bytes()),
        **measured_rates(torch.get_num_threads()),
        link=1.0,
        product_share=0.8,
        memory_share=1.0,
        launch=0.0,
        context=150e6,  # pages of PyTorch's libraries and code that oneDNN compiles, in the first step: measured
        margin=0.0,  # gaps of the heap are traced
    )


@cache
def measured_rates(threads: int) -> dict[str, float]:
    """Rates of two products, a convolution and a copy: what such operations reach, so that shares of them are near 1.
    bf16 is measured on a smaller product, since many CPUs emulate it."""
    wide, narrow = torch.ones(768, 768), torch.ones(256, 256, dtype=torch.bfloat16)
    images, kernel, large = torch.ones(1, 64, 128, 128), torch.ones(64, 64, 3, 3), torch.ones(2**23)
    return {
        "bf16": 2 * 256**3 / seconds(torch.mm, narrow, narrow) / 1e12,
        "conv32": 2 * 64 * 64 * 9 * 128**2 / seconds(F.conv2d, images, kernel) / 1e12,
        "fp32": 2 * 768**3 / seconds(torch.mm, wide, wide) / 1e12,
        "bandwidth": 2 * 4 * len(large) / seconds(torch.neg, large) / 1e9,
    }


def seconds(function: Callable[..., Any], *inputs: Tensor) -> float:
    """Seconds of a call: the fastest of a few."""
    return min(timeit.repeat(partial(function, *inputs), number=1, repeat=5))
