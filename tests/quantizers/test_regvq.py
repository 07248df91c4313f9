import math

import pytest
import torch

from vqpipe.quantizers import RegularizedQuantizer, RegVqConfig, build_quantizer

LATENT = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
ROWS = LATENT.permute(0, 2, 3, 1).reshape(-1, 4)


def make(**settings: float) -> RegularizedQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(RegVqConfig(codebook_size=30, code_dim=4, **settings))
    assert isinstance(quantizer, RegularizedQuantizer)
    torch.nn.init.normal_(quantizer.codes)
    return quantizer


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_prior_is_the_divergence_of_the_mean_prediction_from_uniform(temperature: float) -> None:
    quantizer = make(temperature=temperature)
    mean = (-torch.cdist(ROWS, quantizer.codes).square() / temperature).softmax(1).mean(0)
    expected = math.log(30) + (mean * mean.log()).sum()
    torch.testing.assert_close(quantizer(LATENT).losses["prior"], expected)
    quantizer.codes.data.zero_()  # all codes alike: a uniform prediction
    torch.testing.assert_close(quantizer(LATENT).losses["prior"], torch.zeros(()), rtol=0, atol=1e-5)


def test_sampled_ids_follow_the_prediction() -> None:
    quantizer = make(mask_ratio=1.0).train()
    torch.manual_seed(1)
    ids = quantizer(LATENT[:1, :, :1, :1].expand(1, 4, 60, 100)).ids.flatten()
    p = (-torch.cdist(ROWS[:1], quantizer.codes).square()).softmax(1)[0]
    assert (torch.bincount(ids, minlength=30) / len(ids) - p).abs().max() < 0.03


def test_a_share_of_the_ids_is_sampled_in_training_and_none_in_evaluation() -> None:
    quantizer = make(mask_ratio=0.4, temperature=1e6)  # a uniform prediction: a sampled id is right 1 in 30 times
    nearest = torch.cdist(ROWS, quantizer.codes).argmin(1)
    torch.manual_seed(1)
    changed = (quantizer.train()(LATENT).ids.flatten() != nearest).float().mean()
    assert abs(changed - 0.4 * 29 / 30) < 0.1
    assert torch.equal(quantizer.eval()(LATENT).ids.flatten(), nearest)
    assert torch.equal(make(mask_ratio=0.0).train()(LATENT).ids.flatten(), nearest)
