from contextlib import nullcontext

import pytest
import torch

from vqpipe.errors import DataError
from vqpipe.quantizers import TokenLayout
from vqpipe.quantizers.layout import check_negative, keep_groups


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


@pytest.mark.parametrize(
    ("ids", "fine"),
    [
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]], True),
        ([[1, 2, -1, 4, 5, -1], [1, 2, 3, 4, 5, 6]], True),  # as nested masking leaves out groups, image by image
        ([[1, -1, -1, 4, -1, -1]], True),
        ([[-1, -1, -1, -1, -1, -1]], False),
        ([[1, -1, 3, 4, -1, 6]], False),
        ([[1, 2, -1, 4, 5, 6]], False),
        ([[1, 2, -2, 4, 5, -2]], False),
        ([[-1, 2, 3, -1, 5, 6]], False),
    ],
)
def test_negative_ids_are_those_of_groups_left_out_at_the_end(ids: list[list[int]], fine: bool) -> None:
    layout = TokenLayout(((1, 2),), num_groups=3)
    with nullcontext() if fine else pytest.raises(DataError, match="not those of whole groups left out"):
        check_negative(torch.tensor(ids), layout)


@pytest.mark.parametrize(
    ("ids", "fine"), [([[3, -1, -1]], True), ([[-1, 1, 1]], False), ([[3, 1, -1]], False), ([[3, 1, 1]], True)]
)
def test_negative_ids_may_be_the_last_scales(ids: list[list[int]], fine: bool) -> None:
    with nullcontext() if fine else pytest.raises(DataError, match="not those of whole groups left out"):
        check_negative(torch.tensor(ids), TokenLayout(((1, 1), (1, 2))))


def test_keep_groups_masks_the_last_groups() -> None:
    layout = TokenLayout(((1, 2),), num_groups=3)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert keep_groups(ids, layout, 2).tolist() == [[1, 2, -1, 4, 5, -1]]
