import math

import pytest
import torch

from vqpipe.quantizers import SqvaeConfig, StochasticQuantizer, build_quantizer, sqvae

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
