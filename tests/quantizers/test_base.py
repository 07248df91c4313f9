import pytest
import torch

from vqpipe.errors import ConfigError, DataError
from vqpipe.quantizers import QuantizerConfig, TokenLayout, build_quantizer
from vqpipe.quantizers.base import straight_through, to_rows


def test_layout_orders_grids_then_rows_then_groups() -> None:
    layout = TokenLayout(((1, 1), (2, 3)), num_groups=2)
    ids = torch.arange(2 * layout.num_tokens).view(2, -1)
    coarse, fine = layout.split(ids)
    assert layout.num_tokens == 14
    assert coarse[0].tolist() == [[[0, 1]]]
    assert fine[0].tolist() == [[[2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13]]]
    assert torch.equal(layout.join([coarse, fine]), ids)


def test_layout_round_trips_through_json_and_rejects_wrong_ids() -> None:
    layout = TokenLayout(((1, 1), (2, 3)), num_groups=2)
    assert TokenLayout.from_table(layout.to_table()) == layout
    with pytest.raises(DataError, match="13"):
        layout.split(torch.zeros(1, 13, dtype=torch.int64))


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
