import pytest
import torch
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.losses import Objective, ObjectiveConfig, adaptive_weight

LOSSES = {"commitment": torch.tensor(0.5), "codebook": torch.tensor(0.25)}


def config(**weights: float) -> ObjectiveConfig:
    return ObjectiveConfig(**({"l1": 1.0, "perceptual": "none"} | weights))  # type: ignore[arg-type]


def pair() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5, requires_grad=True)


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    objective = Objective(config(l1=2.0, l2=3.0, charbonnier=5.0, commitment=0.1, codebook=0.033), LOSSES)
    images, reconstruction = pair()
    total, terms = objective.generator_loss(images, reconstruction, LOSSES)
    charbonnier = (0.25 + 1e-6) ** 0.5
    assert terms.keys() == {"l1", "l2", "charbonnier", "commitment", "codebook", "total"}
    assert terms["charbonnier"].item() == pytest.approx(charbonnier)
    expected = 2 * 0.5 + 3 * 0.25 + 5 * charbonnier + 0.1 * 0.5 + 0.033 * 0.25
    assert total.item() == pytest.approx(expected)
    assert terms["total"].item() == total.item()
    assert not any(term.requires_grad for term in terms.values())
    assert total.requires_grad


@pytest.mark.parametrize("adaptive", [True, False])
def test_adversarial_term(adaptive: bool) -> None:
    objective = Objective(config(adversarial=0.1, adaptive_weight=adaptive, commitment=1.0), ["commitment"])
    images, reconstruction = pair()
    layer = torch.tensor(2.0, requires_grad=True)
    reconstruction = reconstruction.detach() * layer
    logits = 3 * reconstruction.mean()
    total, terms = objective.generator_loss(images, reconstruction, {"commitment": LOSSES["commitment"]}, logits, layer)
    ratio = adaptive_weight(reconstruction.abs().mean(), -logits, layer).item() if adaptive else 1.0
    assert terms["adversarial"].item() == pytest.approx(-3.0)
    assert terms["adversarial_weight"].item() == pytest.approx(0.1 * ratio)
    assert total.item() == pytest.approx(1.0 + 0.5 - 0.1 * ratio * 3.0)


def test_discriminator_starts_at_its_step_and_only_with_a_weight() -> None:
    late, never = Objective(config(adversarial=0.1, disc_start=10)), Objective(config())
    assert [late.adversarial_at(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert not never.adversarial_at(10**6)
    loss, terms = late.discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5]))
    assert loss.item() == terms["discriminator"].item() == 0.5
    assert (terms["real_logit"].item(), terms["fake_logit"].item()) == (1.25, -1.25)


def test_a_quantizer_term_without_a_weight_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'codebook'.*objective\.codebook"):
        Objective(config(commitment=0.1), ("commitment", "codebook"))
    with pytest.raises(ConfigError, match="'surprise'"):
        Objective(config(), ("surprise",))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"l1": 0.0}, "no objective compares images"),
        ({"l2": -1.0}, "objective.l2 = -1.0 is negative"),
        ({"lpips": 1.0}, "does not go with objective.perceptual = 'none'"),
        ({"perceptual": "vgg"}, "does not go with objective.perceptual = 'vgg'"),
        ({"charbonnier_eps": 0.0}, "charbonnier_eps"),
    ],
)
def test_weights_that_cannot_be_meant(weights: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**weights)


def test_bf16_images_are_compared_in_float32() -> None:
    images, _ = pair()
    _, terms = Objective(config()).generator_loss(images, torch.full_like(images, 0.3, dtype=torch.bfloat16), {})
    assert terms["l1"].dtype == torch.float32
