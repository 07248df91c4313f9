import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.quantizers import MultiScaleConfig, MultiScaleQuantizer, VqConfig, build_quantizer
from vqpipe.quantizers.multi_scale import phi_index

K, C = 30, 4
VAR = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def make(scales: tuple[int, ...] = (1, 2, 3, 5), **settings: object) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(MultiScaleConfig(codebook_size=K, code_dim=C, scales=scales, **settings))
    assert isinstance(quantizer, MultiScaleQuantizer)
    quantizer.standardize_codebook()
    for weights in (quantizer.phi_weights, quantizer.phi_biases):
        torch.nn.init.normal_(weights, std=0.2)
    return quantizer


def latent_of(height: int = 5, width: int = 5) -> Tensor:
    return torch.randn(2, C, height, width, generator=torch.Generator().manual_seed(1))


def averaging(size: int, to: int) -> Tensor:
    """The matrix float[to, size] of area averaging: cell i covers floor(i size / to) to ceil((i + 1) size / to)."""
    matrix = torch.zeros(to, size)
    for i in range(to):
        begin, end = i * size // to, -(-(i + 1) * size // to)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def bicubic(size: int, to: int) -> Tensor:
    """The matrix float[to, size] of bicubic interpolation: Keys' kernel with a = -0.75, replicated border."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = torch.zeros(to, size)
    for i in range(to):
        center = (i + 0.5) * size / to - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            matrix[i, min(max(j, 0), size - 1)] += kernel(center - j)
    return matrix


def resized(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.einsum("ih,jw,bchw->bcij", rows, columns, x)


def algorithm_1(quantizer: MultiScaleQuantizer, latent: Tensor, phis: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 1 of the paper: ids int64[B, N] and the partial sum after each scale."""
    height, width = latent.shape[2:]
    codes = quantizer.codebook()
    residual, ids, sums = latent, [], [torch.zeros_like(latent)]
    for (rows, columns), phi in zip(quantizer.layout(height, width).grids, phis, strict=True):
        pooled = resized(residual, averaging(height, rows), averaging(width, columns))
        distances = (pooled.unsqueeze(-1) - codes.T[None, :, None, None]).square().sum(1)
        nearest = distances.argmin(-1)
        ids.append(nearest.flatten(1))
        up = resized(codes[nearest].permute(0, 3, 1, 2), bicubic(rows, height), bicubic(columns, width))
        convolved = F.conv2d(up, quantizer.phi_weights[phi], quantizer.phi_biases[phi], padding=1)
        output = 0.5 * up + 0.5 * convolved
        residual = residual - output
        sums.append(sums[-1] + output)
    return torch.cat(ids, dim=1), sums[1:]


@pytest.mark.parametrize(("height", "width"), [(5, 5), (5, 10)])
@torch.no_grad()
def test_forward_and_losses_match_algorithm_1(height: int, width: int) -> None:
    quantizer, latent = make(), latent_of(height, width)
    ids, sums = algorithm_1(quantizer, latent, phis=[0, 1, 2, 3])
    quantized = quantizer(latent)
    assert torch.equal(quantized.ids, ids)
    torch.testing.assert_close(quantized.codes, sums[-1], rtol=0, atol=1e-5)
    errors = torch.stack([(latent - total).square().mean() for total in sums])
    for loss in quantized.losses.values():
        torch.testing.assert_close(loss, errors.mean())


@torch.no_grad()
def test_first_scales_decode_to_the_partial_sums() -> None:
    quantizer, latent = make(), latent_of()
    layout = quantizer.layout(5, 5)
    ids, sums = algorithm_1(quantizer, latent, phis=[0, 1, 2, 3])
    lengths = [1, 1 + 4, 1 + 4 + 9, 1 + 4 + 9 + 25]
    for kept, total in zip(lengths, sums, strict=True):
        prefix = ids.masked_fill(torch.arange(lengths[-1]) >= kept, -1)
        torch.testing.assert_close(quantizer.lookup(prefix, layout), total, rtol=0, atol=1e-5)
    mixed = torch.stack([ids[0], torch.full_like(ids[1], -1)])  # images are independent
    codes = quantizer.lookup(mixed, layout)
    assert not codes[1].any()
    torch.testing.assert_close(codes[0], sums[-1][0], rtol=0, atol=1e-5)


def test_grids_scale_with_the_latent() -> None:
    quantizer = build_quantizer(MultiScaleConfig())
    assert quantizer.layout(16, 16).grids == tuple((side, side) for side in VAR)
    assert quantizer.layout(16, 16).num_tokens == 680
    assert quantizer.layout(8, 8).grids == tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 8))
    assert quantizer.layout(32, 32).grids == tuple((2 * side, 2 * side) for side in VAR)
    assert quantizer.layout(16, 32).grids == tuple((side, 2 * side) for side in VAR)
    assert quantizer.layout(1, 1).grids == ((1, 1),)
    assert quantizer.layout(1, 3).grids == ((1, 1), (1, 2), (1, 3))


@pytest.mark.parametrize(
    ("num_scales", "num_phis", "phis"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # VAR at 256 and 512 pixels
        (14, 4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (4, 4, [0, 1, 2, 3]),
        (10, 1, [0] * 10),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (1, 4, [0]),
    ],
)
def test_scales_share_phis_as_released(num_scales: int, num_phis: int, phis: list[int]) -> None:
    assert [phi_index(scale, num_scales, num_phis) for scale in range(num_scales)] == phis


def test_commitment_trains_the_latent_and_codebook_the_weights() -> None:
    quantizer, latent = make(), latent_of().requires_grad_()
    weights = list(quantizer.parameters())
    losses = quantizer(latent).losses
    (gradient, *none) = torch.autograd.grad(losses["commitment"], [latent, *weights], allow_unused=True)
    assert gradient.any()
    assert none == [None] * 3
    none, *gradients = torch.autograd.grad(losses["codebook"], [latent, *weights], allow_unused=True)
    assert none is None
    assert all(gradient.any() for gradient in gradients)
    assert quantizer.phi_weights.grad is None
    quantizer(latent).codes.square().sum().backward()
    assert all(weight.grad is None for weight in weights)


@torch.no_grad()
def test_standardize_codebook_makes_phi_the_identity() -> None:
    quantizer = make(scales=(1,))
    quantizer.standardize_codebook()
    latent = latent_of()
    quantized = quantizer(latent)
    codes = quantizer.codebook()[quantized.ids].transpose(1, 2).view_as(latent)
    torch.testing.assert_close(quantized.codes, codes)


def test_one_scale_without_phi_equals_vq() -> None:
    quantizer, latent = make(scales=(1,), phi_ratio=0.0), latent_of()
    plain = build_quantizer(VqConfig(codebook_size=K, code_dim=C))
    plain.load_state_dict({"codes": quantizer.codes})
    expected, found = plain(latent), quantizer(latent)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.codes, expected.codes)
    torch.testing.assert_close(found.losses, expected.losses)
