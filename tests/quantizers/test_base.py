import pytest
import torch

from vqpipe.errors import ConfigError
from vqpipe.quantizers import QuantizerConfig, build_quantizer
from vqpipe.quantizers.base import straight_through, to_rows


def test_to_rows_is_in_the_order_b_h_w() -> None:
    latent = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    assert torch.equal(to_rows(latent)[5], latent[1, :, 0, 1])


def test_straight_through_has_the_exact_value_of_the_codes() -> None:
    latent, codes = torch.full((1,), 1e8, requires_grad=True), torch.tensor([1.25])
    out = straight_through(latent, codes)
    out.backward()
    assert out.item() == 1.25  # latent + (codes - latent) would give 0
    assert latent.grad == 1


def test_abstract_config_is_rejected() -> None:
    with pytest.raises(ConfigError, match="QuantizerConfig"):
        build_quantizer(QuantizerConfig())
