"""GPUs are found by the names that CUDA has for them."""

import pytest

from vqpipe.gpus import gpus_named


@pytest.mark.parametrize(
    ("device_name", "names"),
    [
        ("NVIDIA H200", ["h200"]),
        ("NVIDIA H200 NVL", ["h200-nvl"]),
        ("NVIDIA H100 80GB HBM3", ["h100"]),
        ("NVIDIA H100 PCIe", ["h100-pcie"]),
        ("NVIDIA GH200 480GB", ["gh200"]),
        ("NVIDIA A100-SXM4-80GB", ["a100-80", "a100-40"]),
        ("NVIDIA A100 80GB PCIe", ["a100-80", "a100-40"]),
        ("Tesla V100-SXM2-16GB", ["v100-32"]),
        ("NVIDIA L4", ["l4"]),
        ("NVIDIA L40S", ["l40s"]),
        ("NVIDIA A10", ["a10"]),
        ("NVIDIA GeForce RTX 4090", ["rtx4090"]),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", []),
        ("NVIDIA GeForce RTX 3060 Ti", []),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", []),
        ("NVIDIA RTX A1000", []),
        ("NVIDIA L40", []),
        ("NVIDIA A10G", []),
        ("Tesla T4", []),
    ],
)
def test_a_gpu_is_found_by_the_words_of_its_name(device_name: str, names: list[str]) -> None:
    assert [gpu.name for gpu in gpus_named(device_name)] == names
