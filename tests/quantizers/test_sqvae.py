import math

import pytest
import torch

from vqpipe.quantizers import SqvaeConfig, StochasticQuantizer, build_quantizer, sqvae
from vqpipe.quantizers.base import to_rows

LATENT = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
ROWS = LATENT.permute(0, 2, 3, 1).reshape(-1, 4)


def make(**settings: float) -> StochasticQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(SqvaeConfig(codebook_size=30, code_dim=4, **settings))
    assert isinstance(quantizer, StochasticQuantizer)
    return quantizer


def test_losses_are_the_two_parts_of_the_evidence_bound() -> None:
    quantizer = make(start_variance=0.5)
    variance = 1 + math.exp(math.log(0.5))
    p = (-torch.cdist(ROWS, quantizer.codes).square() / (2 * variance)).softmax(1)
    _, ids, losses = quantizer.eval()(LATENT)
    torch.testing.assert_close(losses["entropy"], (p * p.log()).sum(1).mean())
    error = (ROWS - quantizer.codes[ids.flatten()]).square().sum(1)
    torch.testing.assert_close(losses["commitment"], error.mean() / (2 * variance))
    assert torch.equal(ids.flatten(), torch.cdist(ROWS, quantizer.codes).argmin(1))


def test_samples_sharpen_to_codes_drawn_from_the_posterior_as_the_temperature_falls() -> None:
    quantizer = make(temperature_decay=1.0, start_variance=1e-6).train()
    quantizer.steps.fill_(12)  # temperature 6e-6
    torch.manual_seed(1)
    drawn = torch.stack([quantizer.sample(ROWS[:1].expand(400, 4), quantizer.raw_codebook())[0] for _ in range(5)])
    distance, code = torch.cdist(drawn.flatten(0, 1), quantizer.codes).min(1)
    assert distance.max() < 1e-3
    share = torch.bincount(code, minlength=30) / len(code)
    expected = (-torch.cdist(ROWS[:1], quantizer.codes).square() / 2).softmax(1)[0]
    assert (share - expected).abs().max() < 0.03


def test_chunks_change_no_loss_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> tuple[torch.Tensor, ...]:
        quantizer = make()
        loss = sum(quantizer.eval()(LATENT).losses.values())
        return loss, *torch.autograd.grad(loss, [quantizer.codes, quantizer.log_variance])

    whole = results()
    monkeypatch.setattr(sqvae, "LOGITS_PER_CHUNK", 30 * 5)
    torch.testing.assert_close(results(), whole)


def test_commitment_in_training_is_that_of_the_samples() -> None:
    quantizer = make().train()
    codes, _, losses = quantizer(LATENT)
    variance = 1 + quantizer.log_variance.exp()
    torch.testing.assert_close(losses["commitment"], (LATENT - codes).square().sum(1).mean() / (2 * variance))


def test_temperature_falls_with_each_update() -> None:
    quantizer = make(temperature_decay=1.0, start_variance=1e-6).train()
    for _ in range(12):
        quantizer.update(LATENT, torch.zeros(2, 9, dtype=torch.int64))
    assert torch.cdist(to_rows(quantizer(LATENT).codes), quantizer.codes).amin(1).max() < 1e-3


def test_gradient_of_the_decoder_reaches_the_sampled_codes() -> None:
    quantizer = make(temperature_decay=1.0, start_variance=1e-6).train()
    quantizer.steps.fill_(12)  # temperature 6e-6: a sample is one code
    codes, weight = quantizer(LATENT).codes, torch.randn_like(LATENT)
    (gradient,) = torch.autograd.grad((codes * weight).sum(), quantizer.codes)
    sampled = torch.cdist(to_rows(codes), quantizer.codes).argmin(1)
    expected = torch.zeros(30, 4).index_add(0, sampled, to_rows(weight))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
