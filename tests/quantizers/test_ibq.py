from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqpipe.quantizers import IbqConfig, IndexBackpropagationQuantizer, Quantized, build_quantizer, ibq
from vqpipe.quantizers.base import to_rows

K, C = 50, 6
LATENT = torch.randn(3, C, 4, 4, generator=torch.Generator().manual_seed(1))
DECODER_GRADIENT = torch.randn(3, C, 4, 4, generator=torch.Generator().manual_seed(2))


def make(codebook_size: int = K, **options) -> IndexBackpropagationQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(IbqConfig(codebook_size=codebook_size, code_dim=C, **options))
    assert isinstance(quantizer, IndexBackpropagationQuantizer)
    return quantizer


def released(latent: Tensor, codes: Tensor, temperature: float) -> Quantized:
    """The released forward pass, with the N x K matrices."""
    vectors = to_rows(latent)
    logits = vectors @ codes.T
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), len(codes)).to(soft)
    through, plain = (hard - soft.detach() + soft) @ codes, hard @ codes
    q = (logits / temperature).softmax(1)
    mean = q.mean(0)
    losses = {
        "commitment": (through - vectors).square().mean() + (plain.detach() - vectors).square().mean(),
        "codebook": (plain - vectors.detach()).square().mean(),
        "entropy": torch.special.entr(q).sum(1).mean() + (mean * (mean + 1e-5).log()).sum(),
    }
    shape = latent.permute(0, 2, 3, 1).shape
    return Quantized(through.view(shape).permute(0, 3, 1, 2), hard.argmax(1).view(len(latent), -1), losses)


@pytest.mark.parametrize("term", ["codes", "commitment", "codebook", "entropy"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("logits_per_chunk", [1, 20 * K, 1000 * K])
def test_values_and_gradients_match_the_released_code(
    term: str, normalize: bool, logits_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ibq, "LOGITS_PER_CHUNK", logits_per_chunk)
    quantizer = make(normalize=normalize, entropy_temperature=0.1)
    latent = LATENT.clone().requires_grad_()
    exact_latent = LATENT.double().requires_grad_()
    exact_codes = quantizer.codes.detach().double().requires_grad_()
    maybe_normalize = F.normalize if normalize else lambda vectors, dim: vectors
    want = released(maybe_normalize(exact_latent, dim=1), maybe_normalize(exact_codes, dim=1), 0.1)
    got = quantizer(latent)

    assert torch.equal(got.ids, want.ids)
    ours, theirs = (
        (each.codes * DECODER_GRADIENT).sum() if term == "codes" else each.losses[term] for each in (got, want)
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(ours, [latent, quantizer.codes], materialize_grads=True)
    exact = torch.autograd.grad(theirs, [exact_latent, exact_codes], materialize_grads=True)
    for ours, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6 + 1e-5 * theirs.abs().max().item())


def test_gradient_of_the_decoder_reaches_every_code() -> None:
    quantizer = make()
    codes, ids, _ = quantizer(LATENT)
    assert torch.equal(codes, quantizer.codes[ids].transpose(1, 2).reshape_as(LATENT))
    (codes * DECODER_GRADIENT).sum().backward()
    assert quantizer.codes.grad is not None
    assert len(ids.unique()) < K
    assert quantizer.codes.grad.any(1).all()


def test_lowest_id_wins_ties() -> None:
    quantizer = make()
    quantizer.codes.data[K // 2 :] = quantizer.codes.data[: K // 2]
    latent = LATENT.repeat(20, 1, 1, 1) + 0.01 * torch.randn(60, C, 4, 4, generator=torch.Generator().manual_seed(3))
    want = (to_rows(latent).double() @ quantizer.codes[: K // 2].double().T).argmax(1)
    assert torch.equal(quantizer(latent).ids.flatten(), want)


def test_evaluation_and_training_give_the_same_ids() -> None:
    quantizer = make(codebook_size=5000)
    trained = quantizer.train()(LATENT)
    with torch.inference_mode():
        evaluated = quantizer.eval()(LATENT)
    assert torch.equal(evaluated.ids, trained.ids)
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(evaluated.losses[name], trained.losses[name].detach())


def test_autocast_does_not_change_the_recomputed_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        quantizer = make()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = quantizer(LATENT).losses
        sum(losses.values()).backward()
        gradients.append(quantizer.codes.grad)
    assert torch.equal(*gradients)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *[tensor.numel() for tensor in tensors]])
        return result


def test_no_n_by_k_matrix_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq, "LOGITS_PER_CHUNK", 16 * 4096)
    quantizer = make(codebook_size=4096)
    latent = torch.randn(4, C, 16, 16, requires_grad=True)
    with LargestTensor() as largest:
        codes, _, losses = quantizer(latent)
        (codes.sum() + sum(losses.values())).backward()
    assert largest.numel == 16 * 4096 < 1024 * 4096


def test_codes_are_initialized_from_the_normal_distribution() -> None:
    codes = make(codebook_size=4000).codes.detach()
    torch.testing.assert_close(codes.std(0), torch.ones(C), rtol=0, atol=0.05)
