"""LlamaGen with the head over groups: released sizes, kept keys and values against the whole sequence, learning."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.generation import GeneratorConfig, LlamaGen, LlamaGenConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.llamagen import SIZES
from vqpipe.generation.sampling import draw_ids, for_each_run, guided, uniforms, with_null
from vqpipe.quantizers import TokenLayout

CODES, CLASSES = 13, 3
RELEASED = {
    # size: (parameters of the released model, those of its adaLN layers)
    "b": (139_170_816, 21_233_664),
    "l": (398_577_664, 37_748_736),
    "xl": (866_728_960, 58_982_400),
    "xxl": (1_548_343_296, 84_934_656),
}


def space(height: int = 2, width: int = 3, groups: int = 4, **options: Any) -> Space:
    sizes = {"codebook_size": CODES, "latent_dim": 4 * groups, "code_dim": 4, "num_classes": CLASSES, **options}
    return Space(layout=TokenLayout(((height, width),), groups), **sizes)


def made(where: Space, **options: Any) -> LlamaGen:
    """A small network whose logits are far apart, so that rounding moves no id."""
    torch.manual_seed(0)
    model = build_generator(LlamaGenConfig(**{"layers": 2, "heads": 2, "width": 16, **options}), where)
    assert isinstance(model, LlamaGen)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.load_codebook(torch.randn(where.num_groups, where.codebook_size, where.code_dim))
    return model


def seeded(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + first + number) for number in range(count)]


@torch.no_grad()
def recomputed(model: LlamaGen, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
    """What `sample` should give, the whole sequence being run for every id."""
    groups = model.space.num_groups
    count = model.space.num_tokens
    chances = uniforms(draws, count, labels.device)
    runs = with_null(model.known(labels), model.num_classes or 0, sampling)
    ids = torch.empty(len(runs), 0, dtype=torch.long)
    for number in range(count):
        position, group = divmod(number, groups)
        trunk = model.trunk(runs, ids[:, : position * groups])[:, -1]
        logits = model.ar_head.logits(trunk, ids[:, position * groups :])[:, group]
        logits = guided(logits, sampling, position, count // groups)
        drawn = draw_ids(logits, chances[:, number], sampling)
        ids = torch.cat([ids, for_each_run(drawn, sampling).unsqueeze(1)], dim=1)
    return ids[: len(labels)]


@pytest.mark.parametrize("size", ["b", "xxl", *(pytest.param(size, marks=pytest.mark.slow) for size in ("l", "xl"))])
def test_released_sizes(size: str) -> None:
    released, dead = RELEASED[size]
    layers, heads, width = SIZES[size]
    where = space(24, 24, 4, codebook_size=8192, latent_dim=32, code_dim=8, num_classes=1000)
    with torch.device("meta"):
        model = build_generator(LlamaGenConfig(layers=layers, heads=heads, width=width), where)
    positions = (24 * 24 - 5) * width  # of the head's learned positions, which are five
    assert sum(weight.numel() for weight in model.parameters()) == released - dead - positions


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"groups": 3}, {"num_classes": None}])
@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(temperature=0.0), SamplingConfig(temperature=1.3, top_k=0.7, top_p=0.9)],
    ids=["greedy", "drawn"],
)
def test_kept_keys_and_values_give_the_ids_of_the_whole_sequence(
    options: dict[str, Any], sampling: SamplingConfig
) -> None:
    model, labels = made(space(**options), dropout=0.5), torch.tensor([0, 2, 1])
    ids = model.train().sample(labels, sampling, seeded(3))
    assert model.training
    assert ids.shape == (3, model.space.num_tokens)
    assert torch.equal(ids, recomputed(model.eval(), labels, sampling, seeded(3)))
    assert 0 <= int(ids.min()) <= int(ids.max()) < CODES
    assert len(ids.unique()) > 3


def test_guided_sampling_and_the_same_image_in_any_batch() -> None:
    model, labels = made(space()), torch.tensor([0, 2, 1])
    sampling = SamplingConfig(cfg_scale=3.0, cfg_schedule="cosine")
    ids = model.sample(labels, sampling, seeded(3))
    assert torch.equal(ids, recomputed(model.eval(), labels, sampling, seeded(3)))
    assert torch.equal(ids[1:2], model.sample(labels[1:2], sampling, seeded(1, first=1)))
    assert not torch.equal(ids, model.sample(labels, SamplingConfig(), seeded(3)))


def test_the_loss_is_that_of_all_ids_and_reaches_every_weight() -> None:
    for groups in (1, 4):
        model = made(space(groups=groups), class_dropout=0.0, dropout=0.0)
        ids, labels = torch.randint(CODES, (4, model.space.num_tokens)), torch.tensor([0, 1, 2, 0])
        losses = model(ids, labels)
        trunk = model.trunk(labels, ids[:, :-groups]).flatten(0, 1)
        logits = model.ar_head.logits(trunk, ids.view(-1, groups)[:, :-1])
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        torch.testing.assert_close(losses["total"], plain)
        losses["total"].backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_position_is_told_of_from_those_before_it() -> None:
    model = made(space()).eval()
    labels, ids = torch.tensor([1]), torch.randint(CODES, (1, 24))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % CODES  # of the third position
    moved = (model.trunk(labels, ids) - model.trunk(labels, changed)).abs().amax(2) > 1e-6
    assert moved[0].tolist() == [False] * 3 + [True] * 4
    relabelled = (model.trunk(labels, ids) - model.trunk(labels + 1, ids)).abs().amax(2) > 1e-6
    assert relabelled.all()


def test_codes_are_joined_by_position() -> None:
    model = made(space(groups=2)).eval()
    codes = model.img_projector.codes
    ids = torch.tensor([[3, 4, 5, 6]])
    joined = torch.stack([torch.cat([codes[0, 3], codes[1, 4]]), torch.cat([codes[0, 5], codes[1, 6]])])
    torch.testing.assert_close(model.img_projector(ids)[0], model.img_projector.layers(joined))


def test_what_cannot_be_is_refused() -> None:
    config = LlamaGenConfig(layers=1, heads=1, width=8)
    with pytest.raises(ConfigError, match="multiple of 4 channels"):
        LlamaGenConfig(width=12, heads=2)
    with pytest.raises(ConfigError, match="reads one grid"):
        LlamaGen(config, Space(**{**vars(space()), "layout": TokenLayout(((1, 1), (2, 3)))}))
    model = LlamaGen(config, space())
    with pytest.raises(WeightsError, match="Load its codebook first"):
        model.sample(torch.tensor([0]), SamplingConfig(), seeded(1))
    with pytest.raises(ConfigError, match="does not fit"):
        model.load_codebook(torch.zeros(CODES, 4))


def test_config_comes_back_from_its_table() -> None:
    config = LlamaGenConfig(layers=2, dropout=0.0)
    assert to_table(config)["kind"] == "llamagen"
    assert from_table(GeneratorConfig, to_table(config)) == config


@pytest.mark.slow
def test_sequences_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    layers, heads, width = SIZES["tiny"]
    where = space(4, 4, 4, codebook_size=256, num_classes=64)
    model = LlamaGen(LlamaGenConfig(layers=layers, heads=heads, width=width, dropout=0.0), where)
    model.load_codebook(torch.randn(4, 256, 4))
    ids, labels = torch.randint(256, (64, 64)), torch.arange(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, (100 - step) / 30)
        optimizer.zero_grad()
        model(ids, labels)["total"].backward()
        optimizer.step()
    assert torch.equal(model.sample(labels, SamplingConfig(temperature=0.0), seeded(64)), ids)
