import pytest
import torch
from torch import nn

from vqpipe.models import DiscriminatorConfig, PatchDiscriminator


@pytest.mark.parametrize(
    ("num_layers", "parameters", "patches"),
    [(2, 663_361, 62), (3, 2_765_633, 30)],
    ids=["VQGAN-LC", "taming, LlamaGen"],
)
def test_number_of_parameters_and_patches_is_as_published(num_layers: int, parameters: int, patches: int) -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(DiscriminatorConfig(num_layers=num_layers))
        assert sum(parameter.numel() for parameter in discriminator.parameters()) == parameters
        assert discriminator(torch.zeros(2, 3, 256, 256)).shape == (2, 1, patches, patches)


def test_weights_are_initialized_from_normal_distributions() -> None:
    torch.manual_seed(0)
    main = PatchDiscriminator().main
    assert main[5].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert main[6].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert main[6].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_layers_double_the_channels_up_to_eight_times() -> None:
    main = PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=5)).main
    assert [layer.out_channels for layer in main if isinstance(layer, nn.Conv2d)] == [4, 8, 16, 32, 32, 32, 1]
