import torch
from torch import nn

from vqpipe.device import available_bytes, reduced_precision


def test_bf16_reduces_products_and_fp32_changes_nothing() -> None:
    module, images = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with reduced_precision(module, images.device, "bf16"):
        assert module(images).dtype == torch.bfloat16
    with reduced_precision(module, images.device, "fp32"):
        assert module(images).dtype == torch.float32
    assert module.weight.dtype == torch.float32


def test_available_memory_is_plausible() -> None:
    assert 1e8 < available_bytes() < 1e14
