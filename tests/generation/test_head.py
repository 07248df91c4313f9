"""The head over groups: who sees whom, for any number of groups."""

import pytest
import torch
from torch import Tensor

from vqpipe.generation.head import GroupHead

CODES, WIDTH, POSITIONS = 11, 12, 5


def made(groups: int) -> tuple[GroupHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = GroupHead(codebook_size=CODES, num_groups=groups, width=WIDTH)
    torch.nn.init.normal_(head.pos_emb)
    torch.nn.init.normal_(head.sos_emb_for_image)
    return head, torch.randn(POSITIONS, WIDTH), torch.randint(CODES, (POSITIONS, groups))


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 8])
@torch.no_grad()
def test_drawing_one_by_one_agrees_with_all_at_once(groups: int) -> None:
    head, trunk, _ = made(groups)
    seen: list[Tensor] = []

    def choose(logits: Tensor, group: int) -> Tensor:
        assert group == len(seen)
        seen.append(logits)
        return logits.argmax(1)

    ids = head.draw(trunk, choose)
    assert ids.shape == (POSITIONS, groups)
    together = head.logits(trunk, ids[:, :-1])
    torch.testing.assert_close(torch.stack(seen, dim=1), together)
    assert torch.equal(together.argmax(2), ids)


@torch.no_grad()
def test_a_group_sees_the_groups_before_it_and_its_own_position() -> None:
    head, trunk, ids = made(4)
    before = head.logits(trunk, ids[:, :-1])
    changed = ids.clone()
    changed[2, 1] = (changed[2, 1] + 1) % CODES
    moved = (head.logits(trunk, changed[:, :-1]) - before).abs().amax(2) > 1e-6
    want = torch.zeros(POSITIONS, 4, dtype=torch.bool)
    want[2, 2:] = True
    assert torch.equal(moved, want)
    other = trunk.clone()
    other[3] += 1
    moved = (head.logits(other, ids[:, :-1]) - before).abs().amax(2) > 1e-6
    assert torch.equal(moved.any(1), torch.arange(POSITIONS) == 3)
    assert moved[3].all()


@pytest.mark.parametrize("groups", [1, 4])
def test_every_weight_takes_part(groups: int) -> None:
    head, trunk, ids = made(groups)
    head.logits(trunk, ids[:, :-1]).square().sum().backward()
    for name, weight in head.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
