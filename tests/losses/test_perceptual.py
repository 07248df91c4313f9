from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqpipe.errors import WeightsError
from vqpipe.losses import Objective, ObjectiveConfig, Perceptual
from vqpipe.losses.perceptual import distance_name

FILE = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def backbone() -> dict[str, Tensor]:
    """Random weights of torchvision's AlexNet convolutions, by its names."""
    import torchvision

    torch.manual_seed(0)
    features = torchvision.models.alexnet().features
    return {f"features.{name}": tensor.detach() for name, tensor in features.named_parameters()}


@pytest.fixture(scope="module")
def perceptual(backbone: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Perceptual:
    file = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    save_file(backbone, file)
    return Perceptual("alex", str(file))


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_zero_for_equal_images_and_gradient_for_different_ones(perceptual: Perceptual) -> None:
    assert perceptual(images(0), images(0)).item() == 0
    other = images(1).requires_grad_()
    perceptual(images(0), other).backward()
    assert other.grad is not None
    assert other.grad.abs().sum() > 0


def test_lpips_matches_the_formula(perceptual: Perceptual, backbone: dict[str, Tensor]) -> None:
    """LPIPS by its paper: normalized features, squared differences, 1x1 heads, means."""
    import lpips

    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", weights_only=True, map_location="cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    total = torch.zeros(2)
    a, b = ((images(seed) - shift) / scale for seed in (0, 1))
    layers = [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]  # number, stride, padding
    for i, (number, stride, padding) in enumerate(layers):
        if number in (3, 6):
            a, b = (torch.nn.functional.max_pool2d(x, 3, 2) for x in (a, b))
        weight, bias = backbone[f"features.{number}.weight"], backbone[f"features.{number}.bias"]
        a, b = (torch.relu(torch.nn.functional.conv2d(x, weight, bias, stride, padding)) for x in (a, b))
        unit_a, unit_b = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
        distance = torch.nn.functional.conv2d((unit_a - unit_b).square(), heads[f"lin{i}.model.1.weight"])
        total = total + distance.mean((1, 2, 3))
    torch.testing.assert_close(perceptual(images(0), images(1)), total.mean(), rtol=1e-4, atol=1e-7)


def test_train_mode_enables_neither_gradients_nor_dropout(perceptual: Perceptual) -> None:
    perceptual.train()
    assert perceptual(images(0), images(1)) == perceptual(images(0), images(1))
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_target_has_no_gradient_and_saves_no_activations(perceptual: Perceptual) -> None:
    """Compare with LPIPS differentiated with respect to both images: the same gradient with half the saved memory."""
    target, reconstruction = images(0).requires_grad_(), images(1).requires_grad_()
    saved, gradients = [], []
    for loss in (perceptual, lambda *pair: perceptual.lpips(*pair).mean()):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: (to.append(x.nbytes), x)[1], lambda x: x):
            value = loss(target, reconstruction)
        (gradient,) = torch.autograd.grad(value, reconstruction, retain_graph=loss is not perceptual)
        gradients.append(gradient)
        saved.append(sum(sizes))
        if loss is perceptual:
            assert torch.autograd.grad(loss(target, reconstruction), target, allow_unused=True) == (None,)
        else:
            assert torch.autograd.grad(value, target)[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])
    assert saved[0] < 0.6 * saved[1]


def test_lpips_is_frozen_in_an_objective_and_not_in_its_state_dict(
    perceptual: Perceptual, backbone: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(backbone, tmp_path / "alexnet.safetensors")
    objective = Objective(
        ObjectiveConfig(
            lpips=1.0,
            perceptual="alex",
            lpips_weights=str(tmp_path / "alexnet.safetensors"),
            adversarial=1.0,
            lecam=1.0,
        )
    )
    parent = torch.nn.ModuleDict({"objective": objective}).train()
    assert not any(module.training for module in objective.modules() if isinstance(module, torch.nn.Dropout))
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    assert list(parent.state_dict()) == ["objective.logit_means"]
    before = objective.reconstruction_terms(images(0), images(1))["lpips"]
    parent.load_state_dict({"objective.logit_means": torch.tensor([1.0, 2.0])})
    assert torch.equal(objective.reconstruction_terms(images(0), images(1))["lpips"], before)
    assert torch.equal(before, perceptual(images(0), images(1)))
    with pytest.raises(RuntimeError, match="logit_means"):
        parent.load_state_dict({})


@pytest.mark.parametrize("folder", ["", "somewhere"])
def test_absent_backbone_is_reported_with_the_setting(tmp_path: Path, folder: str) -> None:
    with pytest.raises(WeightsError, match=f"{FILE}.*objective.lpips_weights"):
        Perceptual("alex", str(tmp_path / folder) if folder else "")


def test_wrong_backbone_file_is_rejected(tmp_path: Path, backbone: dict[str, Tensor]) -> None:
    wrong = {name: tensor[:1].clone() for name, tensor in backbone.items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(WeightsError, match=r"features\.0\.weight"):
        Perceptual("alex", str(tmp_path / "wrong.safetensors"))


def test_only_weights_in_torchvision_s_file_are_named_lpips(tmp_path: Path) -> None:
    published, other = tmp_path / "vgg16-397923af.pth", tmp_path / "mine.pth"
    published.touch()
    other.touch()
    assert distance_name("vgg", str(tmp_path)) == distance_name("vgg", str(published)) == "lpips_vgg"
    assert distance_name("vgg", str(other)) == "perceptual_vgg"
