"""LlamaGen with MGVQ's head: released sizes, its loss and its attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.recipe import load_generator
from vqpipe.errors import ConfigError
from vqpipe.generation import LlamaGen, LlamaGenConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.llamagen import GroupHead
from vqpipe.quantizers import TokenLayout

CODES = 13
RELEASED = {
    # size: (parameters of the released model, those of its adaLN layers)
    "b": (139_170_816, 21_233_664),
    "l": (398_577_664, 37_748_736),
    "xl": (866_728_960, 58_982_400),
    "xxl": (1_548_343_296, 84_934_656),
}


def make(space: Space, **options: Any) -> LlamaGen:
    """A small network whose logits differ by much more than rounding."""
    torch.manual_seed(0)
    model = build_generator(LlamaGenConfig(**{"layers": 2, "heads": 2, "width": 16, **options}), space)
    assert isinstance(model, LlamaGen)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.load_codebook(torch.randn(space.num_groups, space.codebook_size, space.code_dim))
    return model


@pytest.mark.parametrize("size", ["b", "xxl", *(pytest.param(size, marks=pytest.mark.slow) for size in ("l", "xl"))])
def test_parameter_counts_are_the_released_ones_without_unused_weights(
    size: str, make_space: Callable[..., Space]
) -> None:
    released, unused = RELEASED[size]
    config = load_generator(f"llamagen-{size}").generator
    assert isinstance(config, LlamaGenConfig)
    space = make_space(24, 24, 4, codebook_size=8192, latent_dim=32, code_dim=8, num_classes=1000)
    with torch.device("meta"):
        model = build_generator(config, space)
    unused += (24 * 24 - 5) * config.width  # positions of the head beyond G + 1
    assert sum(weight.numel() for weight in model.parameters()) == released - unused


@pytest.mark.parametrize("groups", [1, 4])
def test_the_loss_is_the_mean_cross_entropy_of_all_ids(groups: int, make_space: Callable[..., Space]) -> None:
    model = make(make_space(2, 3, groups), class_dropout=0.0, dropout=0.0)
    ids, labels = torch.randint(CODES, (4, model.space.num_tokens)), torch.tensor([0, 1, 2, 0])
    trunk = model.trunk(labels, ids[:, :-groups]).flatten(0, 1)
    logits = model.ar_head.head(model.ar_head(trunk, ids.view(-1, groups)[:, :-1]))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(model(ids, labels)["total"], expected)


@torch.no_grad()
def test_a_position_is_predicted_from_the_class_and_the_positions_before_it(make_space: Callable[..., Space]) -> None:
    model = make(make_space(2, 3, 4)).eval()
    labels, ids = torch.tensor([1]), torch.randint(CODES, (1, 24))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % CODES  # an id of the third position
    differs = (model.trunk(labels, ids) - model.trunk(labels, changed)).abs().amax(2) > 1e-6
    assert differs[0].tolist() == [False] * 3 + [True] * 4
    differs = (model.trunk(labels, ids) - model.trunk(labels + 1, ids)).abs().amax(2) > 1e-6
    assert differs.all()


def test_the_codes_of_a_position_are_concatenated(make_space: Callable[..., Space]) -> None:
    model = make(make_space(2, 3, 2)).eval()
    codes = model.img_projector.codes
    ids = torch.tensor([[3, 4, 5, 6]])
    joined = torch.stack([torch.cat([codes[0, 3], codes[1, 4]]), torch.cat([codes[0, 5], codes[1, 6]])])
    torch.testing.assert_close(model.img_projector(ids)[0], model.img_projector.layers(joined))


def test_positions_rotate_with_their_row_and_column(make_space: Callable[..., Space]) -> None:
    rotary = make(make_space(2, 3)).rotary  # 8 channels a head: the frequencies 1 and 1/100
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02])  # row 1 and column 2, the last of the grid
    torch.testing.assert_close(rotary[-1], torch.stack([angles.cos(), angles.sin()], dim=-1))


@torch.no_grad()
def test_the_linear_head_is_one_layer_over_the_codebook(
    make_space: Callable[..., Space], rngs: Callable[..., Any]
) -> None:
    model = make(make_space(2, 3), head="linear", class_dropout=0.0).eval()
    weight = model.state_dict()["ar_head.head.weight"]
    assert [name for name in model.state_dict() if name.startswith("ar_head")] == ["ar_head.head.weight"]
    assert weight.shape == (CODES, 16)

    def logits(labels: Tensor, ids: Tensor) -> Tensor:
        vectors = torch.cat([model.embed_classes(labels), model.img_projector(ids[:, :-1])], dim=1)
        for layer in model.layers:
            vectors = layer(vectors, model.rotary[:6])
        return model.norm(vectors) @ weight.T

    labels, ids = torch.tensor([0, 4, 1]), torch.randint(CODES, (3, 6))
    expected = torch.nn.functional.cross_entropy(logits(labels, ids).flatten(0, 1), ids.flatten())
    torch.testing.assert_close(model(ids, labels)["total"], expected)
    greedy = model.sample(labels, SamplingConfig(temperature=0.0), rngs(1, 2, 3))
    assert torch.equal(logits(labels, greedy).argmax(2), greedy)
    assert len(greedy.unique()) > 2
    untrained = LlamaGen(model.config, model.space)
    assert not untrained.ar_head.head.weight.any()  # as LlamaGen


def test_invalid_settings_are_refused(make_space: Callable[..., Space]) -> None:
    with pytest.raises(ConfigError, match="multiple of 4 channels"):
        LlamaGenConfig(width=12, heads=2)
    space = Space(**{**vars(make_space()), "layout": TokenLayout(((1, 1), (2, 3)))})
    with pytest.raises(ConfigError, match="needs ids of one grid"):
        LlamaGen(LlamaGenConfig(layers=1, heads=1, width=8), space)
    with pytest.raises(ConfigError, match="predicts one id a position, this tokenizer has 4 groups"):
        LlamaGen(LlamaGenConfig(layers=1, heads=1, width=8, head="linear"), make_space(groups=4))


def make_head(groups: int) -> tuple[GroupHead, Tensor, Tensor]:
    """A head, the trunk's output at five positions and their ids."""
    torch.manual_seed(0)
    head = GroupHead(codebook_size=CODES, num_groups=groups, width=12)
    torch.nn.init.normal_(head.pos_emb)
    torch.nn.init.normal_(head.sos_emb_for_image)
    return head, torch.randn(5, 12), torch.randint(CODES, (5, groups))


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 8])
@torch.no_grad()
def test_the_head_predicts_group_by_group_as_all_at_once(groups: int) -> None:
    head, trunk, ids = make_head(groups)
    logits = [head.head(head(trunk, ids[:, :group]))[:, -1] for group in range(groups)]
    torch.testing.assert_close(torch.stack(logits, dim=1), head.head(head(trunk, ids[:, :-1])))


@torch.no_grad()
def test_a_group_depends_on_the_groups_before_it_and_its_own_position() -> None:
    head, trunk, ids = make_head(4)
    logits = head.head(head(trunk, ids[:, :-1]))
    changed = ids.clone()
    changed[2, 1] = (changed[2, 1] + 1) % CODES
    differs = (head.head(head(trunk, changed[:, :-1])) - logits).abs().amax(2) > 1e-6
    expected = torch.zeros(5, 4, dtype=torch.bool)
    expected[2, 2:] = True
    assert torch.equal(differs, expected)
    other = trunk.clone()
    other[3] += 1
    differs = (head.head(head(other, ids[:, :-1])) - logits).abs().amax(2) > 1e-6
    assert torch.equal(differs.any(1), torch.arange(5) == 3)
    assert differs[3].all()
