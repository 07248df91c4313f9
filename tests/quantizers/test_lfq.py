import pytest
import torch
from torch import Tensor

from vqpipe.quantizers import LfqConfig, LookupFreeQuantizer, build_quantizer
from vqpipe.quantizers.base import to_rows
from vqpipe.quantizers.lfq import EPSILON


def make(**options) -> LookupFreeQuantizer:
    quantizer = build_quantizer(LfqConfig(**options))
    assert isinstance(quantizer, LookupFreeQuantizer)
    return quantizer


def latent_of(code_dim: int, side: int = 4, scale: float = 1.0) -> Tensor:
    """Dependent channels, so that joint and summed entropies differ."""
    noise = torch.randn(2, code_dim, side, side, generator=torch.Generator().manual_seed(1))
    return scale * (noise + noise.roll(1, dims=1))


def released_entropy(vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample and batch entropy as in Open-MAGVIT2, by a softmax over all codes."""
    dim = vectors.shape[1]
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=vectors.dtype)] * dim).view(-1, dim)
    log_p = (2 * vectors @ codes.T / temperature).log_softmax(1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(1).mean(), -(mean * (mean + EPSILON).log()).sum()


def test_channel_zero_is_the_lowest_bit() -> None:
    latent = torch.tensor([0.5, -0.1, 0.0, 2.0]).view(1, 4, 1, 1)
    codes, ids, losses = make(code_dim=4)(latent)
    assert codes.flatten().tolist() == [1, -1, -1, 1]
    assert ids.item() == 0b1001
    assert losses["commitment"].item() == pytest.approx((0.5**2 + 0.9**2 + 1 + 1) / 4)


@pytest.mark.parametrize("code_dim", [1, 18, 62])
def test_ids_are_one_to_one_with_codes(code_dim: int) -> None:
    quantizer = make(code_dim=code_dim)
    codes, ids, _ = quantizer(latent_of(code_dim))
    assert torch.equal(quantizer.lookup(ids, quantizer.layout(4, 4)), codes)
    assert quantizer(torch.ones(1, code_dim, 1, 1)).ids.item() == 2**code_dim - 1 == quantizer.codebook_size - 1


@pytest.mark.parametrize("certainty", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("code_dim", [1, 2, 7])
def test_entropy_and_its_gradient_match_the_softmax_over_all_codes(
    code_dim: int, temperature: float, certainty: float
) -> None:
    latent = latent_of(code_dim, scale=certainty * temperature).requires_grad_()
    options = {"entropy_temperature": temperature, "sample_weight": 0.7, "batch_weight": 1.3}
    entropy = make(code_dim=code_dim, **options)(latent).losses["entropy"]
    (gradient,) = torch.autograd.grad(entropy, latent)
    exact = latent.detach().double().requires_grad_()
    sample, batch = released_entropy(to_rows(exact), temperature)
    expected = 0.7 * sample - 1.3 * batch
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-7 / temperature)


def test_entropy_summed_over_groups_is_an_upper_bound() -> None:
    options = {"code_dim": 6, "entropy_temperature": 4.0, "sample_weight": 0.0}
    latent = latent_of(6)
    joint, summed = (-make(entropy_bits=bits, **options)(latent).losses["entropy"] for bits in (6, 4))
    vectors = to_rows(latent)
    by_group = [released_entropy(group, 4.0)[1] for group in (vectors[:, :4], vectors[:, 4:])]
    torch.testing.assert_close(summed, torch.stack(by_group).sum())
    assert summed > joint + 0.01


def test_eighteen_bits_at_full_size() -> None:
    quantizer = make()
    latent = torch.randn(8, 18, 48, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()  # N x K: 19 GB
    _, ids, losses = quantizer(1e6 * latent)  # so large that every distribution is one-hot
    shares = ids.flatten().bincount(minlength=2**18).float() / ids.numel()
    torch.testing.assert_close(losses["entropy"], (shares * (shares + EPSILON).log()).sum())
    quantizer(latent).losses["entropy"].backward()
    assert latent.grad is not None
    assert latent.grad.isfinite().all()
    assert latent.grad.any()
