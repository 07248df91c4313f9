"""The chunked loss against torch's cross-entropy, and its memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqpipe.generation.cross_entropy import chunked_cross_entropy

M, D, V = 37, 6, 501


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a tensor created in the context."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            self.numel = max(self.numel, leaf.numel() if isinstance(leaf, Tensor) else 0)
        return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(M, D, generator=rng)).requires_grad_()
    weight = torch.randn(V, D, generator=rng).requires_grad_()
    return hidden, weight, torch.randint(0, V, (M,), generator=rng)


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.autograd.grad(3 * loss, (hidden, weight))  # the upstream gradient is passed on
    return first, second


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_logits", [1, 4 * V, 10 * V + 3, 100 * V])
def test_loss_and_gradients_equal_torch_s(chunk_logits: int, smoothing: float) -> None:
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=smoothing)
    ours = chunked_cross_entropy(hidden, weight, targets, label_smoothing=smoothing, chunk_logits=chunk_logits)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    pairs = zip(gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-7)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(1e4 * hidden.double() @ weight.double().T, targets)
    ours = chunked_cross_entropy(1e4 * hidden, weight, targets, chunk_logits=5 * V)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=0)


def test_no_tensor_has_the_logits_of_all_positions() -> None:
    hidden, weight, targets = inputs()
    with LargestTensor() as watched:
        gradients(chunked_cross_entropy(hidden, weight, targets, chunk_logits=4 * V), hidden, weight)
    assert watched.numel == max(4 * V, V * D)
    with LargestTensor() as watched:
        gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    assert watched.numel == M * V


def test_matrix_products_follow_autocast_and_the_softmax_does_not() -> None:
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = chunked_cross_entropy(hidden, weight, targets, chunk_logits=4 * V)
        plain = F.cross_entropy((hidden @ weight.T).float(), targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for actual, expected in zip(gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_no_gradient_is_allocated_without_grad_mode() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad(), LargestTensor() as watched:
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_logits=V)
    assert not loss.requires_grad
    assert watched.numel == V * D  # the matrix itself; no gradient of its size
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets), rtol=1e-6, atol=0)
