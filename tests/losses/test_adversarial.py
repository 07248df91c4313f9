import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from vqpipe.losses import adaptive_weight, r1_penalty


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


def make_discriminator() -> nn.Module:
    """A patch discriminator with BatchNorm and several logits per image."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 4, 1, 1, bias=False), nn.BatchNorm2d(8)]
    return nn.Sequential(*first, nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 1, 1))


def test_r1_matches_the_formula_and_finite_differences() -> None:
    """The value against torch.func in float64, the gradient against finite differences."""
    network, images = make_discriminator(), torch.rand(3, 3, 16, 16)
    wide = {name: value.double() for name, value in network.state_dict().items()}

    def penalty(state: dict[str, Tensor]) -> Tensor:
        def scores(x: Tensor) -> Tensor:
            logits = functional_call(network, {name: value.clone() for name, value in state.items()}, x)
            return logits.mean((1, 2, 3)).sum()

        return grad(scores)(images.double()).square().sum((1, 2, 3)).mean() / 2

    found = r1_penalty(network, images)
    torch.testing.assert_close(found.double(), penalty(wide), rtol=1e-4, atol=0)
    found.backward()
    for name, parameter in list(network.named_parameters())[::2]:
        if name == "5.bias":  # shifts all logits
            continue
        assert parameter.grad is not None
        step = 1e-6 * torch.randn(parameter.shape, dtype=torch.float64)
        change = penalty(wide | {name: wide[name] + step}) - penalty(wide | {name: wide[name] - step})
        expected = (parameter.grad.double() * step).sum() * 2
        torch.testing.assert_close(expected, change, rtol=1e-3, atol=1e-12)


def test_r1_is_float32_under_autocast_and_does_not_change_the_images() -> None:
    network, images = make_discriminator(), torch.rand(3, 3, 16, 16)
    expected = r1_penalty(network, images)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = r1_penalty(network, images)
    assert torch.equal(found, expected)
    assert not images.requires_grad
