"""NVIDIA GPUs by name: peak arithmetic, memory and bandwidth, from their data sheets."""

import re
from dataclasses import dataclass
from itertools import pairwise

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU, in 10^12 operations and 10^9 bytes per second. What follows `bf16` is 0 where it is not known."""

    name: str
    """The words of its name, and its memory in GB where there are several sizes: "h100-pcie", "a100-80"."""
    bf16: float
    """TFLOP/s of dense bfloat16 matrix products with float32 sums."""
    memory: float = 0.0
    """Bytes."""
    conv32: float = 0.0
    """TFLOP/s of float32 convolutions: cuDNN computes them in TF32 by default."""
    fp32: float = 0.0
    """TFLOP/s of float32 matrix products."""
    bandwidth: float = 0.0
    """GB/s of its memory."""
    link: float = 0.0
    """GB/s to other devices of a machine, in one direction."""

    @property
    def words(self) -> set[str]:
        """Words in the name that CUDA has for it."""
        return {word for word in self.name.split("-") if not word.isdigit()}


# fmt: off
GPUS = (
    #   name           bf16   memory         TF32   fp32  bandwidth  link
    Gpu("h200",       989.0, 143_771 * MIB, 494.0,  67.0,  4800,  450),  # "NVIDIA H200 Tensor Core GPU", SXM
    Gpu("h100",       989.0,  81_559 * MIB, 494.0,  67.0,  3350,  450),  # "NVIDIA H100 Tensor Core GPU", SXM
    Gpu("a100-80",    312.0,  81_920 * MIB, 156.0,  19.5,  2039,  300),  # "NVIDIA A100 Tensor Core GPU", 80 GB SXM
    Gpu("a100-40",    312.0,  40_960 * MIB, 156.0,  19.5,  1555,  300),  # the same, 40 GB SXM
    Gpu("v100-32",     15.7,  32_768 * MIB,  15.7,  15.7,   900,  150),  # "NVIDIA V100 Tensor Core GPU", SXM2
    Gpu("l40s",       362.0,  46_068 * MIB, 183.0,  91.6,   864,   32),  # "NVIDIA L40S"; 48 GB less 1/16 for ECC
    Gpu("rtx4090",    165.2,  24_564 * MIB,  82.6,  82.6,  1008,   32),  # "NVIDIA Ada GPU Architecture", appendix A
    Gpu("rtx3060-12",  25.5,  12_288 * MIB,  12.7,  12.7,   360,   32),  # see below
    Gpu("b200",      2250.0),
    Gpu("gb200",     2500.0),
    Gpu("gh200",      989.0),
    Gpu("h100-pcie",  756.0),
    Gpu("h100-nvl",   835.0),
    Gpu("h200-nvl",   835.0),
    Gpu("l4",         121.0),
    Gpu("a40",        149.7),
    Gpu("a10",        125.0),
)
# fmt: on
"""Peaks and bandwidths are those of NVIDIA's data sheets and white papers, without sparsity: half of the number that a
data sheet gives with it. Memory is the total that nvidia-smi reports. The V100 computes neither bf16 nor TF32. NVIDIA
publishes no tensor peaks of the RTX 3060: they are two and one times its float32 peak, as for the other GPUs of its
architecture in "NVIDIA Ampere GA102 GPU Architecture". Links are NVLink's, or 16 lanes of PCIe 4."""
OTHER_DEVICES = {"laptop", "ti", "super", "mig"}
"""Words in a device's name with which it is another chip than that of the name without them, or a part of one."""


def gpus_named(device_name: str) -> list[Gpu]:
    """The GPU that CUDA calls `device_name`, with each size of its memory; empty for one that is not in GPUS."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if OTHER_DEVICES & set(words):
        return []
    found = {*words, *map("".join, pairwise(words))}
    matches = [gpu for gpu in GPUS if gpu.words <= found]
    return [gpu for gpu in matches if not any(gpu.words < other.words for other in matches)]
