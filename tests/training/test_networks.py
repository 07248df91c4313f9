"""Strides of gradients, as DDP sees them."""

import torch
from torch import Tensor, nn

from vqpipe.training.networks import align_gradients


def contiguous(gradient: Tensor) -> Tensor:
    """A gradient as from a kernel that computes a 1x1 convolution as a matrix product."""
    inner = gradient.shape[1]
    return gradient.clone().as_strided(gradient.shape, (inner, 1, 1, 1)) if gradient.shape[2] == 1 else gradient


def test_gradients_of_1x1_convolutions_have_the_strides_of_their_weights() -> None:
    gradients = []
    for align in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6))
        network.to(memory_format=torch.channels_last)
        weights = [layer.weight for layer in network if isinstance(layer, nn.Conv2d)]
        for weight in weights:
            weight.register_hook(contiguous)
        if align:
            align_gradients(network)
        network(torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().sum().backward()
        alike = [weight.grad is not None and weight.grad.stride() == weight.stride() for weight in weights]
        assert alike == [True, align, True]
        gradients.append([weight.grad for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
