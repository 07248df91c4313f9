import pytest
import torch
import torch.nn.functional as F

from vqpipe.quantizers import SimVqConfig, SimVqQuantizer, build_quantizer

LATENT = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def make(codebook_size: int = 30, code_dim: int = 4) -> SimVqQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(SimVqConfig(codebook_size=codebook_size, code_dim=code_dim))
    assert isinstance(quantizer, SimVqQuantizer)
    return quantizer


def test_losses_and_gradient_equal_those_of_projecting_every_code() -> None:
    quantizer = make()
    (linear,) = quantizer.projector
    _, ids, losses = quantizer(LATENT)
    ours = torch.autograd.grad(losses["commitment"] + losses["codebook"], [linear.weight, linear.bias])
    codes = linear(quantizer.codes)
    rows = LATENT.permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(torch.cdist(rows, codes).argmin(1), ids.flatten())
    codebook = F.mse_loss(codes[ids.flatten()], rows)
    torch.testing.assert_close(losses["codebook"], codebook)
    torch.testing.assert_close(losses["commitment"], codebook)
    torch.testing.assert_close(ours, torch.autograd.grad(codebook, [linear.weight, linear.bias]))


def test_step_changes_every_projected_code_and_no_stored_code() -> None:
    quantizer = make()
    stored, codes = quantizer.codes.clone(), quantizer.codebook().detach()
    quantizer(LATENT[:, :, :1, :1]).losses["codebook"].backward()  # two vectors
    torch.optim.SGD(quantizer.parameters(), 0.1).step()
    assert torch.equal(quantizer.codes, stored)
    assert (quantizer.codebook() != codes).any(1).all()
    assert {name for name, _ in quantizer.named_parameters()} == {"projector.0.weight", "projector.0.bias"}


def test_codes_are_initialized_with_unit_mean_square_length() -> None:
    codes = make(codebook_size=2000, code_dim=64).codes
    assert codes.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert codes.square().sum(1).mean().item() == pytest.approx(1, rel=0.02)
