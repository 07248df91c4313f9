from pathlib import Path

import pytest
import torch
from torch import nn

from vqpipe import device
from vqpipe.device import available_bytes, for_inference, reduced_precision


def test_bf16_reduces_products_and_fp32_changes_nothing() -> None:
    module, images = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with reduced_precision(module, images.device, "bf16"):
        assert module(images).dtype == torch.bfloat16
    with reduced_precision(module, images.device, "fp32"):
        assert module(images).dtype == torch.float32
    assert module.weight.dtype == torch.float32


def test_kernels_are_stored_channels_last_for_inference_on_a_cpu() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    images = torch.randn(2, 3, 16, 16)
    network[1].running_var.fill_(2.0)
    expected = network.eval()(images)
    network = for_inference(network.train(), "cpu")
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in (network[0], network[2]))
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    torch.testing.assert_close(network(images), expected)


def test_a_network_with_group_norms_keeps_its_layout() -> None:
    network = for_inference(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), "cpu")
    assert network[0].weight.is_contiguous()


def test_available_memory_is_plausible() -> None:
    assert 1e8 < available_bytes() < 1e14


MEGA = 2**20
UNLIMITED = 9223372036854771712
"""What version 1 of the interface has where no limit is set."""


def system(root: Path, groups: str, limits: dict[str, tuple[object, int, int]], *, version: int) -> None:
    """Files of a machine with 1000 MiB: `limits` has folder -> limit, MiB in use, and how many of these are files."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for path, text in (
        ("proc/meminfo", f"MemTotal: 2000000 kB\nMemAvailable: {1000 * 1024} kB\n"),
        ("proc/self/cgroup", groups),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for name, (limit, used, files) in limits.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used * MEGA}\n")
        (folder / "memory.stat").write_text(f"anon {used * MEGA}\n{names[2]} {files * MEGA}\n")


@pytest.mark.parametrize(
    ("version", "groups", "limits", "free"),
    [
        (2, "0::/\n", {}, 1000),  # no limits, no files
        (2, "0::/\n", {".": (500 * MEGA, 200, 50)}, 350),  # a container
        (2, "0::/\n", {".": (5000 * MEGA, 200, 50)}, 1000),  # more than the machine has
        (2, "0::/a/b\n", {"a": (700 * MEGA, 100, 0), "a/b": ("max", 100, 0)}, 600),  # the limit of an outer group
        (2, "0::/a\n", {"a": (100 * MEGA, 120, 0)}, 0),
        (1, "3:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", {"memory": (300 * MEGA, 100, 10)}, 210),  # its own name is hidden
        (1, "4:memory:/x\n", {"memory": (UNLIMITED, 100, 10), "memory/x": (400 * MEGA, 100, 0)}, 300),
    ],
)
def test_the_memory_limit_of_a_container_counts(
    version: int,
    groups: str,
    limits: dict[str, tuple[object, int, int]],
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system(tmp_path, groups, limits, version=version)
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert available_bytes() == free * MEGA
