"""The GPUs that a plan may be made for: memory, peak arithmetic and bandwidth, from their makers' data sheets."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqpipe.config import nearest_name
from vqpipe.device import available_bytes
from vqpipe.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device, in 10^12 operations and 10^9 bytes per second."""

    name: str
    memory: float
    """Bytes."""
    bf16: float
    """TFLOP/s of dense bfloat16 matrix products with float32 sums."""
    conv32: float
    """TFLOP/s of float32 convolutions: cuDNN computes them in TF32 by default."""
    fp32: float
    """TFLOP/s of float32 matrix products."""
    bandwidth: float
    """GB/s of its memory."""
    link: float
    """GB/s to other devices of a machine, in one direction."""
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


def gpu(name: str, mib: int, bf16: float, conv32: float, fp32: float, bandwidth: float, link: float) -> Device:
    return Device(name=name, memory=mib * MIB, bf16=bf16, conv32=conv32, fp32=fp32, bandwidth=bandwidth, link=link)


# fmt: off
GPUS = {
    device.name: device
    for device in (
        #   name             MiB   bf16   TF32   fp32  bandwidth  link
        gpu("h200",       143_771, 989.0, 494.0,  67.0,  4800,  450),  # "NVIDIA H200 Tensor Core GPU", SXM
        gpu("h100",        81_559, 989.0, 494.0,  67.0,  3350,  450),  # "NVIDIA H100 Tensor Core GPU", SXM
        gpu("a100-80",     81_920, 312.0, 156.0,  19.5,  2039,  300),  # "NVIDIA A100 Tensor Core GPU", 80 GB SXM
        gpu("a100-40",     40_960, 312.0, 156.0,  19.5,  1555,  300),  # the same, 40 GB SXM
        gpu("v100-32",     32_768,  15.7,  15.7,  15.7,   900,  150),  # "NVIDIA V100 Tensor Core GPU", SXM2
        gpu("l40s",        46_068, 362.0, 183.0,  91.6,   864,   32),  # "NVIDIA L40S"; 48 GB less 1/16 for ECC
        gpu("rtx4090",     24_564, 165.2,  82.6,  82.6,  1008,   32),  # "NVIDIA Ada GPU Architecture", appendix A
        gpu("rtx3060-12",  12_288,  25.5,  12.7,  12.7,   360,   32),  # see below
    )
}
# fmt: on
"""Peaks and bandwidths are those of NVIDIA's data sheets and white papers of these titles, without sparsity: half of
the number that a data sheet gives with it. Memory is the total that nvidia-smi reports. The V100 computes neither bf16
nor TF32. NVIDIA publishes no tensor peaks of the RTX 3060: they are two and one times its float32 peak, as for the
other GPUs of its architecture in "NVIDIA Ampere GA102 GPU Architecture". Links are NVLink's, or 16 lanes of PCIe 4."""
NAMES = (*GPUS, "cpu")
OTHER_CHIPS = {"laptop", "ti", "super"}
"""Words in a GPU's name with which it is another chip than that of the name without them."""


def device_named(name: str) -> Device:
    """The device of a name of NAMES; "cpu" is this machine's, measured for a moment.

    Raises:
        ConfigError: another name.
    """
    if name == "cpu":
        return measured_cpu()
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is unknown", nearest_name(name, NAMES))
    return GPUS[name]


def device_of(device: torch.device) -> Device:
    """The device that a run would use. A GPU that is not in the table counts as the one most like it in memory."""
    if device.type != "cuda":
        return measured_cpu()
    name, memory = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = set() if OTHER_CHIPS & set(words) else {*words, *map("".join, pairwise(words))}
    found = [each for key, each in GPUS.items() if key.partition("-")[0] in known]
    like = min(found or GPUS.values(), key=lambda each: abs(each.memory - memory))
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
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function(*inputs)
        times.append(time.perf_counter() - began)
        if sum(times) > 0.5:
            break
    return min(times)
