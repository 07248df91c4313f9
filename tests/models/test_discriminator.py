import pytest
import torch

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
