import pytest
import torch

from vqpipe.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert hinge_discriminator_loss(real, fake).item() == 0.5 * (0.25 + 0.75)
    assert hinge_generator_loss(fake).item() == 1.25


@pytest.mark.parametrize(
    ("reconstruction", "adversarial", "weight"),
    [(3.0, 1.5, 3.0 / (1.5 + 1e-4)), (3.0, 0.0, 1e4), (0.0, 1.0, 0.0), (1.0, 2e-4, 1 / 3e-4)],
)
def test_adaptive_weight_is_the_clamped_ratio_of_gradients(
    reconstruction: float, adversarial: float, weight: float
) -> None:
    layer = torch.tensor([0.7, -0.1], requires_grad=True)
    direction = torch.tensor([0.6, 0.8])  # of length 1
    found = adaptive_weight(reconstruction * (layer @ direction), adversarial * layer[0], layer)
    assert found.item() == pytest.approx(weight, rel=1e-5)
    assert not found.requires_grad
    assert layer.grad is None
