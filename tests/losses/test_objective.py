import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.errors import ConfigError
from vqpipe.losses import Objective, ObjectiveConfig, adaptive_weight

LOSSES = {"commitment": torch.tensor(0.5), "codebook": torch.tensor(0.25)}


def config(**weights: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**({"l1": 1.0, "perceptual": "none"} | weights))  # type: ignore[arg-type]


def pair() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5, requires_grad=True)


def autoencoder_loss(
    objective: Objective,
    images: Tensor,
    reconstruction: Tensor,
    losses: dict[str, Tensor],
    fake_logits: Tensor | None = None,
    *,
    layer: Tensor | None = None,
    step: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with a last layer that nothing depends on, so that computing an adaptive weight for it fails."""
    layer = torch.ones((), requires_grad=True) if layer is None else layer
    return objective.autoencoder_loss(
        images, reconstruction, losses, fake_logits=fake_logits, last_layer=layer, step=step
    )


def discriminator_loss(objective: Objective, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss without R1."""
    return objective.discriminator_loss(real, fake, step=0, images=torch.empty(0), discriminator=nn.Identity())


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    objective = Objective(config(l1=2.0, l2=3.0, charbonnier=5.0, commitment=0.1, codebook=0.033), LOSSES)
    images, reconstruction = pair()
    total, terms = autoencoder_loss(objective, images, reconstruction, LOSSES)
    charbonnier = (0.25 + 1e-6) ** 0.5
    assert terms.keys() == {"l1", "l2", "charbonnier", "commitment", "codebook", "total"}
    assert terms["charbonnier"].item() == pytest.approx(charbonnier)
    expected = 2 * 0.5 + 3 * 0.25 + 5 * charbonnier + 0.1 * 0.5 + 0.033 * 0.25
    assert total.item() == pytest.approx(expected)
    assert terms["total"].item() == total.item()
    assert not any(term.requires_grad for term in terms.values())
    assert total.requires_grad


@pytest.mark.parametrize(("difference", "expected"), [(0.5, math.log(0.25)), (0.0, math.log(1e-10))])
def test_log_of_the_squared_error_is_finite_for_equal_images(difference: float, expected: float) -> None:
    images = torch.zeros(1, 3, 2, 2)
    total, terms = autoencoder_loss(Objective(config(l1=0.0, log_l2=7.0)), images, images + difference, {})
    assert terms["log_l2"].item() == pytest.approx(expected)
    assert total.item() == pytest.approx(7 * expected)


@pytest.mark.parametrize("adaptive", [True, False])
def test_adversarial_term(adaptive: bool) -> None:
    objective = Objective(config(adversarial=0.1, adaptive_weight=adaptive, commitment=1.0), ["commitment"])
    images, reconstruction = pair()
    layer = torch.tensor(2.0, requires_grad=True)
    reconstruction = reconstruction.detach() * layer
    logits = 3 * reconstruction.mean()
    ratio = adaptive_weight(reconstruction.abs().mean(), -logits, layer).item() if adaptive else 1.0
    total, terms = autoencoder_loss(
        objective, images, reconstruction, {"commitment": LOSSES["commitment"]}, logits, layer=layer
    )
    assert terms["adversarial"].item() == pytest.approx(-3.0)
    assert terms["adversarial_weight"].item() == pytest.approx(0.1 * ratio)
    assert total.item() == pytest.approx(1.0 + 0.5 - 0.1 * ratio * 3.0)


def test_discriminator_starts_at_its_step_and_only_with_a_weight() -> None:
    late, never = Objective(config(adversarial=0.1, disc_start=10)), Objective(config())
    assert [late.adversarial_at(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert not never.adversarial_at(10**6)
    loss, terms = discriminator_loss(late, torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5]))
    assert loss.item() == terms["discriminator"].item() == 0.5
    assert (terms["real_logit"].item(), terms["fake_logit"].item()) == (1.25, -1.25)


def networks() -> tuple[nn.Module, nn.Conv2d, nn.Module]:
    """A small decoder without its last layer, its last layer, and a discriminator with BatchNorm."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4))
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU()), nn.Conv2d(6, 3, 3, padding=1), critic


def test_adaptive_weight_gives_the_gradient_of_the_formula() -> None:
    """Compare with the direct computation, which differentiates each loss twice: for the weight, and for the sum."""
    body, last, critic = networks()
    critic.requires_grad_(False)
    objective = Objective(config(l1=0.7, l2=1.3, adversarial=0.4, codebook=0.5), ["codebook"])
    images = torch.rand(2, 3, 16, 16)
    gradients, totals = [], []
    for direct in (True, False):
        features = body(images)
        reconstruction, learned = last(features), features.square().mean()
        logits = critic(reconstruction)
        if direct:
            pixels = 0.7 * (images - reconstruction).abs().mean() + 1.3 * (images - reconstruction).square().mean()
            weight = 0.4 * adaptive_weight(pixels, -logits.mean(), last.weight)
            total = pixels + 0.5 * learned - weight * logits.mean()
        else:
            total, terms = autoencoder_loss(
                objective, images, reconstruction, {"codebook": learned}, logits, layer=last.weight
            )
            torch.testing.assert_close(terms["adversarial_weight"], weight)
        parameters = [*body.parameters(), *last.parameters()]
        gradients.append(torch.autograd.grad(total, parameters))
        totals.append(total.detach())
    torch.testing.assert_close(totals[0], totals[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert weight > 0


def test_discriminator_graph_is_differentiated_once() -> None:
    body, last, critic = networks()
    critic.requires_grad_(False)
    backward_passes = []
    reconstruction = last(body(torch.rand(2, 3, 16, 16)))
    logits = critic(reconstruction)
    logits.register_hook(lambda gradient: backward_passes.append(1))
    total, _ = autoencoder_loss(
        Objective(config(adversarial=0.4)), torch.rand(2, 3, 16, 16), reconstruction, {}, logits, layer=last.weight
    )
    total.backward()
    assert len(backward_passes) == 1


@pytest.mark.parametrize(
    ("name", "generator", "discriminator"),
    [
        ("hinge", lambda fake: -fake.mean(), lambda real, fake: hinge(real, fake)),
        (
            "non_saturating",
            lambda fake: -fake.sigmoid().log().mean(),
            lambda real, fake: -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2,
        ),
        (
            "non_saturating_hinge",
            lambda fake: -fake.mean((1, 2, 3)).sigmoid().log().mean(),
            lambda real, fake: hinge(real, fake),
        ),
    ],
)
def test_gan_losses(name: str, generator: Callable, discriminator: Callable) -> None:
    objective = Objective(config(adversarial=1.0, adaptive_weight=False, gan_loss=name))
    fake = torch.tensor([[0.7, -1.2], [0.3, 2.0]]).view(2, 1, 1, 2)
    real = torch.tensor([[1.7, 0.2], [-0.3, 0.0]]).view(2, 1, 1, 2)
    _, terms = autoencoder_loss(objective, *pair(), {}, fake)
    torch.testing.assert_close(terms["adversarial"], generator(fake))
    torch.testing.assert_close(discriminator_loss(objective, real, fake)[0], discriminator(real, fake))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2


def test_large_logits_stay_finite() -> None:
    objective = Objective(config(adversarial=1.0, adaptive_weight=False, gan_loss="non_saturating"))
    logits = torch.tensor([[-500.0], [500.0]])
    assert discriminator_loss(objective, logits, logits)[0].item() == 250
    assert autoencoder_loss(objective, *pair(), {}, logits)[1]["adversarial"].item() == 250


def test_adversarial_weight_warms_up_linearly() -> None:
    settings = {"adversarial": 0.4, "adaptive_weight": False, "disc_start": 10, "adversarial_warmup": 4}
    objective, logits = Objective(config(**settings)), torch.tensor([2.0])
    weights = []
    for step in (10, 11, 13, 14, 1000):
        total, terms = autoencoder_loss(objective, *pair(), {}, logits, step=step)
        weights.append(terms["adversarial_weight"].item())
        assert total.item() == pytest.approx(0.5 - 2 * weights[-1])
    assert weights == pytest.approx([0.0, 0.1, 0.3, 0.4, 0.4])


def test_adaptive_weight_is_not_computed_at_weight_zero() -> None:
    objective = Objective(config(adversarial=0.4, adversarial_warmup=4))
    _, terms = autoencoder_loss(objective, *pair(), {}, torch.tensor([2.0]), step=0)
    assert terms["adversarial_weight"].item() == 0
    with pytest.raises(RuntimeError, match=r"not have been used in the graph|not require grad"):
        autoencoder_loss(objective, *pair(), {}, torch.tensor([2.0]), step=1)


def test_r1_is_multiplied_by_its_interval() -> None:
    """The gradient of a linear discriminator is its weight w, so the penalty is gamma/2 |w|^2."""
    objective = Objective(config(adversarial=1.0, disc_start=3, r1=10.0, r1_every=4))
    critic = nn.Linear(12, 1, bias=False)
    images = torch.rand(5, 3, 2, 2)
    network = nn.Sequential(nn.Flatten(), critic)
    penalty = 0.5 * critic.weight.detach().square().sum()
    logits = torch.zeros(5, 1)
    for step in (3, 4, 5, 7, 8):
        loss, terms = objective.discriminator_loss(logits, logits, step=step, images=images, discriminator=network)
        due = step in (4, 8)
        assert ("r1" in terms) == due
        torch.testing.assert_close(loss.detach(), 1.0 + due * 10.0 * 4 * penalty)
        if due:
            (gradient,) = torch.autograd.grad(loss, critic.weight)
            torch.testing.assert_close(gradient, 40.0 * critic.weight.detach())
    assert not objective.r1_at(0)  # before the discriminator starts


def test_lecam_penalty_and_averages() -> None:
    objective = Objective(config(adversarial=1.0, lecam=2.0, lecam_decay=0.75))
    real, fake = torch.tensor([[3.0], [-1.0]]), torch.tensor([[1.0], [-3.0]])
    plain = hinge(real, fake)
    for real_mean, fake_mean in ((0.0, 0.0), (0.25, -0.25), (0.4375, -0.4375)):
        torch.testing.assert_close(objective.logit_means, torch.tensor([real_mean, fake_mean]))
        loss, terms = discriminator_loss(objective, real, fake)
        above = [max(0.0, value - fake_mean) ** 2 for value in (3.0, -1.0)]
        below = [max(0.0, real_mean - value) ** 2 for value in (1.0, -3.0)]
        penalty = sum(above) / 2 + sum(below) / 2
        assert terms["lecam"].item() == pytest.approx(penalty)
        assert loss.item() == pytest.approx(plain.item() + 2 * penalty)
        objective.update(terms["real_logit"], terms["fake_logit"])  # 1 and -1


def test_lecam_of_micro_batches_averages_to_that_of_the_batch() -> None:
    objective = Objective(config(adversarial=1.0, lecam=0.3))
    objective.update(torch.tensor(0.8), torch.tensor(-0.2))
    real, fake = torch.randn(8, 1, 3, 3), torch.randn(8, 1, 3, 3)
    batch_loss, _ = discriminator_loss(objective, real, fake)
    pairs = zip(real.split(2), fake.split(2), strict=True)
    parts = [discriminator_loss(objective, *each)[0] for each in pairs]
    torch.testing.assert_close(torch.stack(parts).mean(), batch_loss)


def test_state_dict_has_the_averages_of_lecam_only() -> None:
    assert Objective(config(adversarial=1.0, r1=1.0)).state_dict() == {}
    objective = Objective(config(adversarial=1.0, lecam=0.3))
    objective.update(torch.tensor(0.8), torch.tensor(-0.2))
    other = Objective(config(adversarial=1.0, lecam=0.3))
    other.load_state_dict(objective.state_dict())
    assert list(objective.state_dict()) == ["logit_means"]
    torch.testing.assert_close(other.logit_means, torch.tensor([0.8e-3, -0.2e-3]))


def test_update_without_lecam_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce_sum", None)
    objective = Objective(config(adversarial=1.0))
    objective.update(torch.tensor(0.8), torch.tensor(-0.2))
    assert objective.state_dict() == {}


def test_skipped_step_does_not_change_the_averages() -> None:
    objective = Objective(config(adversarial=1.0, lecam=0.3, lecam_decay=0.5))
    objective.update(torch.tensor(1.0), torch.tensor(-2.0), skipped=torch.tensor(False))
    objective.update(torch.tensor(float("nan")), torch.tensor(5.0), skipped=torch.tensor(True))
    assert objective.logit_means.tolist() == [0.5, -1.0]


def test_logits_are_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean logits are 1 and -1 on this rank, 3 and 0 on the other."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda means: means.add_(torch.tensor([3.0, 0.0])))
    objective = Objective(config(adversarial=1.0, lecam=0.3, lecam_decay=0.5))
    objective.update(torch.tensor(1.0), torch.tensor(-1.0))
    torch.testing.assert_close(objective.logit_means, torch.tensor([1.0, -0.25]))


def test_quantizer_loss_without_a_weight_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'codebook'.*objective\.codebook"):
        Objective(config(commitment=0.1), ("commitment", "codebook"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("comitment", "Did you mean commitment?"),
        ("surprise", "Known: codebook, commitment, decorrelation, entropy, prior, rate."),
        (
            "l1",
            "Known: codebook, commitment, decorrelation, entropy, prior, rate.",
        ),  # a weight of the objective, but not of a quantizer loss
    ],
)
def test_unknown_quantizer_loss_is_an_error_with_the_known_names(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failure:
        Objective(config(), (name,))
    assert str(failure.value) == f"the quantizer has the unknown loss {name!r}. {hint}"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"l1": 0.0}, "the objective has no reconstruction term"),
        ({"l2": -1.0}, r"objective\.l2 = -1\.0\. It must be at least 0"),
        ({"lpips": 1.0}, "does not fit objective.perceptual = 'none'"),
        ({"perceptual": "vgg"}, "does not fit objective.perceptual = 'vgg'"),
        ({"charbonnier_eps": 0.0}, "charbonnier_eps"),
        ({"adversarial_warmup": -1}, "adversarial_warmup"),
        ({"adversarial": 1.0, "r1": -1.0}, r"objective\.r1 = -1\.0\. It must be at least 0"),
        ({"r1": 10.0}, "objective.r1 needs a discriminator, and objective.adversarial is 0"),
        ({"lecam": 0.05}, "objective.lecam needs a discriminator, and objective.adversarial is 0"),
        ({"adversarial": 1.0, "r1": 1.0, "r1_every": 0}, "r1_every"),
        ({"adversarial": 1.0, "lecam": 1.0, "lecam_decay": 1.0}, "lecam_decay"),
    ],
)
def test_invalid_weights_are_rejected(weights: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**weights)


def test_losses_of_bf16_images_are_float32() -> None:
    images, _ = pair()
    _, terms = autoencoder_loss(Objective(config()), images, torch.full_like(images, 0.3, dtype=torch.bfloat16), {})
    assert terms["l1"].dtype == torch.float32
