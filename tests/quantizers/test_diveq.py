import torch

from vqpipe.quantizers import DiveqConfig, DiveqQuantizer, build_quantizer

LATENT = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def make(**settings: float) -> DiveqQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(DiveqConfig(codebook_size=30, code_dim=4, **settings))
    assert isinstance(quantizer, DiveqQuantizer)
    torch.nn.init.normal_(quantizer.codes)
    return quantizer


def test_gradients_are_those_of_the_length_along_a_fixed_direction() -> None:
    quantizer = make(noise=0.0)
    weight = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    latent = LATENT.clone().requires_grad_()
    codes, ids, losses = quantizer(latent)
    ours = torch.autograd.grad((weight * codes).sum(), [latent, quantizer.codes])
    assert losses == {}

    again, table = LATENT.clone().requires_grad_(), quantizer.codes.detach().clone().requires_grad_()
    chosen = table[ids].transpose(1, 2).reshape_as(again)
    error = chosen - again
    length = error.square().sum(1, keepdim=True).sqrt()
    moved = again + length * (error / length).detach()
    torch.testing.assert_close(moved, codes)
    torch.testing.assert_close(ours, torch.autograd.grad((weight * moved).sum(), [again, table]))


def test_noise_turns_the_direction_in_training_and_never_the_value() -> None:
    quantizer = make(noise=0.5)
    torch.manual_seed(3)
    codes = quantizer.train()(LATENT).codes
    assert torch.equal(codes, quantizer.eval()(LATENT).codes)

    def gradient(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.autograd.grad(quantizer.train()(LATENT).codes.sum(), quantizer.codes)[0]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


def test_unused_codes_become_copies_of_used_ones_at_the_interval() -> None:
    quantizer = make(replace_every=3)
    before = quantizer.codes.detach().clone()
    ids = torch.tensor([[4, 4, 9]])
    for _ in range(2):
        quantizer.update(LATENT, ids)
        assert torch.equal(quantizer.codes, before)
    quantizer.update(LATENT, ids)
    used = before[[4, 9]]
    assert torch.equal(quantizer.codes[[4, 9]], used)
    assert (torch.cdist(quantizer.codes.detach(), used).amin(1) < 1e-6).all()
    assert not quantizer.hits.any()


def test_copies_are_drawn_in_proportion_to_use() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(DiveqConfig(codebook_size=1000, code_dim=4, replace_every=10, min_hit_rate=0.05))
    before = torch.nn.init.normal_(quantizer.codes).detach().clone()
    for step in range(10):
        quantizer.update(LATENT, torch.tensor([[4, 9 if step < 2 else 4]]))  # 4 in all steps, 9 in two
    copies_of_9 = (quantizer.codes - before[9]).norm(dim=1) < 1e-6
    assert abs(copies_of_9.float().mean() - 2 / 12) < 0.04


def test_a_resumed_run_replaces_at_the_same_step() -> None:
    whole, part = make(replace_every=3), make(replace_every=3)
    ids = torch.tensor([[1, 2]])
    for _ in range(2):
        part.update(LATENT, ids)
    resumed = make(replace_every=3)
    resumed.update(LATENT, ids)  # also a quantizer that was in use
    resumed.load_state_dict(part.state_dict())
    for quantizer, steps in ((whole, 3), (resumed, 1)):
        for _ in range(steps):
            torch.manual_seed(5)
            quantizer.update(LATENT, ids)
    assert torch.equal(whole.codes, resumed.codes)


def test_masked_steps_do_not_count() -> None:
    quantizer = make(replace_every=2)
    for ids in (torch.tensor([[1, 2]]), torch.tensor([[-1, -1]])):
        quantizer.update(LATENT, ids)
    assert (quantizer.steps, quantizer.hits.sum()) == (1, 2)


def test_copies_of_one_code_differ() -> None:
    quantizer = make(replace_every=1)
    with torch.no_grad():
        quantizer.codes.mul_(1e-4)  # float32 numbers of ordinary size plus the noise are rounded to themselves
    quantizer.update(LATENT, torch.tensor([[4]]))
    assert len(quantizer.codes.unique(dim=0)) == 30
