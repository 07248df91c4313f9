"""GPT on ids: the paper's size, kept keys and values against the whole sequence, and learning by heart."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError, DataError, WeightsError
from vqpipe.generation import GeneratorConfig, Gpt, GptConfig, SamplingConfig, Space, build_generator
from vqpipe.generation.gpt import SIZES
from vqpipe.generation.sampling import draw_ids, for_each_run, guided, uniforms, with_null
from vqpipe.quantizers import TokenLayout

CODES, CLASSES = 13, 3


def space(side: int = 3, groups: int = 1, **options: Any) -> Space:
    sizes = {"codebook_size": CODES, "latent_dim": 4 * groups, "code_dim": 4, "num_classes": CLASSES, **options}
    return Space(layout=TokenLayout(((side, side),), groups), **sizes)


def made(where: Space, **options: Any) -> Gpt:
    """A small network whose logits are far apart, so that rounding moves no id."""
    torch.manual_seed(0)
    model = build_generator(GptConfig(**{"layers": 2, "heads": 2, "width": 16, **options}), where)
    assert isinstance(model, Gpt)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    if model.needs_codebook:
        model.load_codebook(torch.randn(where.num_groups, CODES, where.code_dim))
    return model


def seeded(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + first + number) for number in range(count)]


@torch.no_grad()
def recomputed(model: Gpt, labels: Tensor, sampling: SamplingConfig, draws: Sequence[torch.Generator]) -> Tensor:
    """What `sample` should give, the whole sequence being run for every id."""
    count = model.space.num_tokens
    chances = uniforms(draws, count, labels.device)
    runs = with_null(labels, CLASSES, sampling)
    ids = torch.empty(len(runs), 0, dtype=torch.long)
    for number in range(count):
        logits = guided(model.logits(model.hidden(runs, ids)[:, -1]), sampling, number, count)
        drawn = draw_ids(logits, chances[:, number], sampling)
        ids = torch.cat([ids, for_each_run(drawn, sampling).unsqueeze(1)], dim=1)
    return ids[: len(labels)]


def test_the_paper_s_size() -> None:
    layers, heads, width = SIZES["404m"]
    with torch.device("meta"):
        where = space(side=16, codebook_size=100_000, num_classes=1000)
        model = build_generator(GptConfig(layers=layers, heads=heads, width=width, class_dropout=0.0), where)
        guidable = build_generator(GptConfig(layers=layers, heads=heads, width=width), where)
    matrix = 101_000 * width
    block = 12 * width**2 + 13 * width
    count = sum(weight.numel() for weight in model.parameters())
    assert count == 2 * matrix + 256 * width + layers * block + 2 * width == 509_421_568
    assert count - matrix == 405_997_568  # the paper's 404M
    assert sum(weight.numel() for weight in guidable.parameters()) == count + 2 * width  # the null class


@pytest.mark.parametrize("options", [{}, {"embedding": "codebook"}, {"num_classes": None}, {"groups": 2}])
@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(temperature=0.0), SamplingConfig(temperature=1.3, top_k=0.7, top_p=0.9)],
    ids=["greedy", "drawn"],
)
def test_kept_keys_and_values_give_the_ids_of_the_whole_sequence(
    options: dict[str, Any], sampling: SamplingConfig
) -> None:
    sizes = {name: value for name, value in options.items() if name != "embedding"}
    model = made(space(**sizes), embedding=options.get("embedding", "learned"), dropout=0.5)
    labels = torch.tensor([0, 2, 1])
    ids = model.train().sample(labels, sampling, seeded(3))
    assert model.training
    assert ids.shape == (3, model.space.num_tokens)
    assert torch.equal(ids, recomputed(model.eval(), labels, sampling, seeded(3)))
    assert 0 <= int(ids.min()) <= int(ids.max()) < CODES
    assert len(ids.unique()) > 2


def test_guided_sampling_and_the_same_image_in_any_batch() -> None:
    model, labels = made(space()), torch.tensor([0, 2, 1])
    sampling = SamplingConfig(cfg_scale=3.0, cfg_schedule="linear")
    ids = model.sample(labels, sampling, seeded(3))
    assert torch.equal(ids, recomputed(model.eval(), labels, sampling, seeded(3)))
    assert torch.equal(ids[1:2], model.sample(labels[1:2], sampling, seeded(1, first=1)))
    assert not torch.equal(ids, model.sample(labels, SamplingConfig(), seeded(3)))


def test_class_entries_are_cut_off_where_they_are_most_probable() -> None:
    model = made(space())
    with torch.no_grad():
        model.head.weight[CODES:] = 100 * model.head.weight[:1]
        model.norm.bias.copy_(model.head.weight[0])  # what predicts points to entry 0, and more to the classes
    hidden = model.eval().hidden(torch.tensor([1]), torch.empty(1, 0, dtype=torch.long))
    assert int(model.head(hidden)[0, 0].argmax()) >= CODES
    assert int(model.sample(torch.tensor([1]), SamplingConfig(temperature=0.0), seeded(1)).max()) < CODES


def test_the_start_is_no_code() -> None:
    unlabelled = made(space(num_classes=None)).eval()
    assert unlabelled.tokens.num_embeddings == CODES + 1
    assert torch.equal(unlabelled.start(torch.tensor([5]))[0, 0], unlabelled.tokens.weight[CODES])
    labelled = made(space()).eval()
    assert torch.equal(labelled.start(torch.tensor([2]))[0, 0], labelled.tokens.weight[CODES + 2])
    assert labelled.tokens.num_embeddings == CODES + CLASSES + 1  # the last is the null class


@torch.no_grad()
def test_an_id_is_predicted_from_those_before_it() -> None:
    model = made(space()).eval()
    labels, ids = torch.tensor([1]), torch.arange(9).unsqueeze(0) % CODES
    changed = ids.clone()
    changed[0, 4] = 11
    moved = (model.hidden(labels, ids[:, :-1]) - model.hidden(labels, changed[:, :-1])).abs().amax(2) > 1e-6
    assert moved[0].tolist() == [False] * 5 + [True] * 4


def test_the_loss_is_that_of_all_ids_and_reaches_every_weight() -> None:
    for options in ({}, {"embedding": "codebook"}):
        model = made(space(), class_dropout=0.0, **options)
        ids, labels = torch.randint(CODES, (4, 9)), torch.tensor([0, 1, 2, 0])
        losses = model(ids, labels)
        logits = model.head(model.hidden(labels, ids[:, :-1]))
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        torch.testing.assert_close(losses["total"], plain)
        losses["total"].backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.abs().sum() > 0, name


def test_smoothing_is_over_the_vocabulary() -> None:
    model = made(space(), class_dropout=0.0, label_smoothing=0.1)
    ids, labels = torch.randint(CODES, (4, 9)), torch.tensor([0, 1, 2, 0])
    logits = model.head(model.hidden(labels, ids[:, :-1])).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, ids.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(model(ids, labels)["total"], plain)


def test_noise_is_of_codes_alone() -> None:
    ids = torch.zeros(200, 9, dtype=torch.long)
    model = made(space(), keep=0.0)
    assert set(model.noisy(ids).unique().tolist()) == set(range(CODES))
    changed = (made(space(), keep=0.8).noisy(ids) != ids).float().mean()
    assert float(changed) == pytest.approx(0.2 * (1 - 1 / CODES), abs=0.04)
    assert made(space()).noisy(ids) is ids


def test_dropped_labels_become_the_null_class() -> None:
    labels = torch.arange(3000) % CLASSES
    null = made(space(), class_dropout=0.25).dropped(labels) == CLASSES
    assert float(null.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert made(space(), class_dropout=0.0).dropped(labels) is labels
    assert made(space(num_classes=None)).dropped(labels) is labels


@pytest.mark.parametrize(
    ("options", "labels", "sampling", "error", "text"),
    [
        ({}, [0, 3], {}, DataError, "label 3 is out of range"),
        ({}, [0, -1], {}, DataError, "label -1 is negative"),
        ({}, [0], {}, DataError, r"labels of shape \[1\] for 2 images"),
        ({"class_dropout": 0.0}, [0, 1], {"cfg_scale": 2.0}, ConfigError, "trained with class dropout"),
        ({"num_classes": None}, [0, 1], {"cfg_scale": 2.0}, ConfigError, "trained with class dropout"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    options: dict[str, Any], labels: list[int], sampling: dict[str, Any], error: type[Exception], text: str
) -> None:
    sizes = {name: value for name, value in options.items() if name == "num_classes"}
    model = made(space(**sizes), class_dropout=options.get("class_dropout", 0.1))
    with pytest.raises(error, match=text):
        model.sample(torch.tensor(labels), SamplingConfig(**sampling), seeded(2))


def test_codes_are_asked_for_and_checked() -> None:
    torch.manual_seed(0)
    model = Gpt(GptConfig(layers=1, heads=1, width=8, embedding="codebook"), space(groups=2))
    assert model.needs_codebook
    with pytest.raises(WeightsError, match="Load its codebook first"):
        model.sample(torch.tensor([0]), SamplingConfig(), seeded(1))
    with pytest.raises(ConfigError, match=r"shape \[13, 5\] does not fit"):
        model.load_codebook(torch.zeros(CODES, 5))
    codes = torch.randn(2, CODES, 4)
    model.load_codebook(codes)
    assert not model.needs_codebook
    again = Gpt(model.config, model.space)
    again.load_state_dict(model.state_dict())
    assert not again.needs_codebook
    assert model.code_embedding is not None
    ids = torch.tensor([[3, 4, 5]])  # the second id of a position is of the second group
    direct = model.code_embedding.layers(torch.stack([codes[1, 3], codes[0, 4], codes[1, 5]]))
    torch.testing.assert_close(model.embedded(ids, first=1)[0], direct)
    with pytest.raises(ConfigError, match="takes no codebook"):
        made(space()).load_codebook(codes)


@pytest.mark.parametrize(
    "wrong",
    [{"width": 10, "heads": 4}, {"layers": 0}, {"keep": 1.1}, {"dropout": 1.0}, {"class_dropout": -0.1}],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GptConfig(**wrong)


def test_config_and_space_come_back_from_tables() -> None:
    config = GptConfig(layers=2, keep=0.8, embedding="codebook")
    assert to_table(config)["kind"] == "gpt"
    assert from_table(GeneratorConfig, to_table(config)) == config
    assert Space.from_table(space(groups=2).to_table()) == space(groups=2)


@pytest.mark.slow
def test_sequences_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    layers, heads, width = SIZES["tiny"]
    where = space(side=8, codebook_size=256, num_classes=64)
    model = Gpt(GptConfig(layers=layers, heads=heads, width=width), where)
    ids, labels = torch.randint(256, (64, 64)), torch.arange(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, (100 - step) / 30)
        optimizer.zero_grad()
        model(ids, labels)["total"].backward()
        optimizer.step()
    assert torch.equal(model.sample(labels, SamplingConfig(temperature=0.0), seeded(64)), ids)
