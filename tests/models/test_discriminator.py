import pytest
import torch

from vqpipe.models import DiscriminatorConfig, PatchDiscriminator


def test_number_of_parameters_and_patches_is_as_published() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator()
        assert sum(tensor.numel() for tensor in discriminator.state_dict().values()) == 664_131
        assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 62, 62)
        assert discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 14, 14)


def test_three_layers_match_taming_and_llamagen() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(DiscriminatorConfig(num_layers=3))
        assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
        assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_weights_are_initialized_from_normal_distributions() -> None:
    torch.manual_seed(0)
    main = PatchDiscriminator().main
    assert main[5].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert main[6].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert main[6].weight.std().item() == pytest.approx(0.02, rel=0.2)
