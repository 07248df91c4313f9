import torch
from torch import Tensor

from vqpipe.quantizers import VqConfig, build_quantizer


def test_commitment_trains_the_latent_and_codebook_the_codes() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(VqConfig(codebook_size=16, code_dim=3))
    latent = torch.randn(2, 3, 4, 4, requires_grad=True)
    _, ids, losses = quantizer(latent)
    used = torch.zeros(16, dtype=torch.bool).index_fill_(0, ids.unique(), True)

    (to_latent,) = torch.autograd.grad(losses["commitment"], latent, retain_graph=True)
    codes = quantizer.codes.detach()[ids].transpose(1, 2).reshape_as(latent)
    torch.testing.assert_close(to_latent, 2 * (latent - codes) / latent.numel())
    assert has_no_gradient(losses["commitment"], quantizer.codes)

    (to_codes,) = torch.autograd.grad(losses["codebook"], quantizer.codes, retain_graph=True)
    assert to_codes[used].any(1).all()
    assert not to_codes[~used].any()
    assert has_no_gradient(losses["codebook"], latent)
    torch.testing.assert_close(losses["codebook"], losses["commitment"])


def has_no_gradient(loss: Tensor, tensor: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)
    return gradient is None or not gradient.any()


def test_codes_are_initialized_within_one_over_k() -> None:
    codes = build_quantizer(VqConfig(codebook_size=500, code_dim=8)).codes
    assert 0.99 / 500 < codes.abs().max() <= 1 / 500


def test_cosine_metric_ignores_length() -> None:
    quantizer = build_quantizer(VqConfig(codebook_size=2, code_dim=2, metric="cosine"))
    quantizer.codes.data.copy_(torch.tensor([[1.0, 0.1], [0.0, 100.0]]))
    assert quantizer(torch.tensor([0.1, 9.0]).view(1, 2, 1, 1)).ids.item() == 1


def test_decorrelation_is_the_mean_square_off_the_diagonal_of_the_gram_matrix() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(VqConfig(codebook_size=20, code_dim=4, decorrelate=True))
    unit = torch.nn.functional.normalize(quantizer.codebook().detach(), dim=1)
    gram = unit.T @ unit
    expected = gram[~torch.eye(4, dtype=torch.bool)].square().mean()
    losses = quantizer(torch.randn(1, 4, 2, 2)).losses
    assert set(losses) == {"commitment", "codebook", "decorrelation"}
    torch.testing.assert_close(losses["decorrelation"], expected)
