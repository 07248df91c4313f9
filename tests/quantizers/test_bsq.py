import itertools

import pytest
import torch
import torch.nn.functional as F

from vqpipe.quantizers import BsqConfig, build_quantizer

LATENT = torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(1))


def rows(latent: torch.Tensor) -> torch.Tensor:
    return latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])


def test_codes_of_bsq_are_corners_of_the_unit_sphere() -> None:
    quantized = build_quantizer(BsqConfig(code_dim=8)).eval()(LATENT)
    assert torch.equal(quantized.codes, torch.where(LATENT > 0, 1.0, -1.0) * 8**-0.5)
    torch.testing.assert_close(quantized.codes.norm(dim=1), torch.ones(2, 3, 2))


def test_channel_i_of_a_group_is_bit_i_of_its_id() -> None:
    quantizer = build_quantizer(BsqConfig(code_dim=8, bits_per_id=4))
    latent = -torch.ones(1, 8, 1, 1)
    latent[0, [0, 2, 7]] = 1.0
    assert quantizer.codebook_size == 16
    assert quantizer.layout(1, 1).num_groups == 2
    assert quantizer(latent).ids.tolist() == [[0b0101, 0b1000]]


@pytest.mark.parametrize("config", [BsqConfig(code_dim=8, entropy_bits=4), BsqConfig(code_dim=8, entropy_bits=8)])
def test_entropy_is_that_of_the_softmax_over_all_corners(config: BsqConfig) -> None:
    vectors = F.normalize(rows(LATENT), dim=1)
    expected_sample, expected_batch = torch.zeros(()), torch.zeros(())
    for part in vectors.split(config.entropy_bits, dim=1):
        corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=config.entropy_bits))) * 8**-0.5
        p = (2 * part @ corners.T).softmax(1)
        expected_sample -= (p * p.log()).sum(1).mean()
        expected_batch -= (p.mean(0) * p.mean(0).log()).sum()
    entropy = build_quantizer(config)(LATENT).losses["entropy"]
    torch.testing.assert_close(entropy, expected_sample - expected_batch, rtol=0, atol=1e-5)


def test_wetok_sharpens_with_its_temperature() -> None:
    wetok = BsqConfig(
        code_dim=8, bits_per_id=4, normalize=False, commitment=True, entropy_temperature=0.01, entropy_bits=4
    )
    losses = build_quantizer(wetok)(LATENT).losses
    torch.testing.assert_close(losses["commitment"], F.mse_loss(LATENT, LATENT.sign()))
    sign_bits = (rows(LATENT) > 0).float()
    share = torch.zeros(2, 16)
    for group, bits in enumerate(sign_bits.split(4, dim=1)):
        share[group] = torch.bincount((bits * torch.tensor([1.0, 2, 4, 8])).sum(1).long(), minlength=16) / 12
    batch = -torch.xlogy(share, share).sum()
    # nearly one-hot: no entropy of a vector, and the batch entropy is that of the ids, summed over the groups
    torch.testing.assert_close(losses["entropy"], -batch, rtol=0, atol=0.15)
