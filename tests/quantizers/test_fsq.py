import numpy as np
import pytest
import torch

from vqpipe.quantizers import FsqConfig, build_quantizer

LEVELS = (8, 5, 4, 3)
LATENT = 2 * torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def paper(latent: np.ndarray, levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, C], ids [n] and derivatives of the codes [n, C] of float64[n, C], by appendix A.1 of the paper."""
    count = np.array(levels)
    radius = (count - 1) * (1 - 1e-3) / 2
    offset = np.where(count % 2 == 1, 0.0, 0.5)
    squashed = np.tanh(latent + np.tan(offset / radius))
    rounded = np.round(squashed * radius - offset).astype(int)
    ids = np.ravel_multi_index(tuple((rounded + count // 2).T), levels, order="F")
    return rounded / (count // 2), ids, (1 - squashed**2) * radius / (count // 2)


def test_codes_ids_and_gradient_match_the_paper() -> None:
    latent = LATENT.clone().requires_grad_()
    codes, ids, losses = build_quantizer(FsqConfig(levels=LEVELS))(latent)
    codes.sum().backward()
    want_codes, want_ids, want_slopes = paper(LATENT.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy(), LEVELS)
    assert latent.grad is not None
    np.testing.assert_allclose(codes.detach().permute(0, 2, 3, 1).reshape(-1, 4), want_codes, rtol=1e-6)
    np.testing.assert_array_equal(ids.flatten(), want_ids)
    np.testing.assert_allclose(latent.grad.permute(0, 2, 3, 1).reshape(-1, 4), want_slopes, rtol=1e-3, atol=1e-6)
    assert losses == {}


def test_lookup_of_all_ids_gives_the_whole_grid() -> None:
    quantizer = build_quantizer(FsqConfig(levels=LEVELS))
    codes = quantizer.lookup(torch.arange(480).unsqueeze(0), quantizer.layout(20, 24)).flatten(2)[0]
    digits = np.stack(np.unravel_index(np.arange(480), LEVELS, order="F"))
    half = np.array(LEVELS)[:, None] // 2
    np.testing.assert_allclose(codes, (digits - half) / half, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 255, 256])
def test_every_level_is_reached_and_none_exceeded(count: int) -> None:
    latent = torch.cat([torch.linspace(-9, 9, 20_001), torch.tensor([-1e9, 1e9])]).view(1, 1, 1, -1)
    codes, ids, _ = build_quantizer(FsqConfig(levels=(count,)))(latent)
    assert ids.unique().tolist() == list(range(count))
    assert codes.min() == -1
    assert codes.max() == (1 if count % 2 else 1 - 2 / count)
    if count > 2:
        assert build_quantizer(FsqConfig(levels=(count,)))(torch.zeros(1, 1, 1, 1)).codes.item() == 0


def test_codebook_of_a_quintillion_codes() -> None:
    quantizer = build_quantizer(FsqConfig(levels=(1000,) * 6))
    codes, ids, _ = quantizer(LATENT.repeat(1, 2, 1, 1)[:, :6])
    assert ids.max() > 2**50
    assert torch.equal(quantizer.lookup(ids, quantizer.layout(5, 5)), codes)


def test_ids_may_have_62_bits() -> None:
    assert FsqConfig(levels=(2,) * 62).codebook_size == 2**62


def test_sigmoid_bound_is_that_of_ifsq() -> None:
    quantizer = build_quantizer(FsqConfig(levels=(7, 5, 3), bound="sigmoid")).eval()
    latent = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    half = torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)
    expected = ((2 * torch.sigmoid(1.6 * latent) - 1) * half).round() / half
    assert torch.equal(quantizer(latent).codes, expected)
