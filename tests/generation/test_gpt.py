"""GPT on ids: the paper's size, its vocabulary, and its loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stages.recipe import load_generator
from vqpipe.errors import ConfigError
from vqpipe.generation import Gpt, GptConfig, SamplingConfig, Space, build_generator

CODES, CLASSES = 13, 5


def make(space: Space, **options: Any) -> Gpt:
    """A small network whose logits differ by much more than rounding."""
    torch.manual_seed(0)
    model = build_generator(GptConfig(**{"layers": 2, "heads": 2, "width": 16, **options}), space)
    assert isinstance(model, Gpt)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    if model.needs_codebook:
        model.load_codebook(torch.randn(space.num_groups, CODES, space.code_dim))
    return model


def test_the_parameter_count_is_the_paper_s(make_space: Callable[..., Space]) -> None:
    config = load_generator("gpt-404m").generator
    assert isinstance(config, GptConfig)
    layers, width = config.layers, config.width
    with torch.device("meta"):
        space = make_space(16, 16, codebook_size=100_000, num_classes=1000)
        model = build_generator(config, space)
        with_null_class = build_generator(replace(config, class_dropout=0.1), space)
    matrix = 101_000 * width
    block = 12 * width**2 + 13 * width
    count = sum(weight.numel() for weight in model.parameters())
    assert count == 2 * matrix + 256 * width + layers * block + 2 * width == 509_421_568
    assert count - matrix == 405_997_568  # the paper's 404M
    assert sum(weight.numel() for weight in with_null_class.parameters()) == count + 2 * width


def test_class_tokens_are_never_sampled(make_space: Callable[..., Space], rngs: Callable[..., Any]) -> None:
    model = make(make_space(3, 3))
    with torch.no_grad():
        model.head.weight[CODES:] = 100 * model.head.weight[:1]
        model.norm.bias.copy_(model.head.weight[0])  # class tokens become more probable than any code
    hidden = model.eval().hidden(torch.tensor([1]), torch.empty(1, 0, dtype=torch.long))
    assert int(model.head(hidden)[0, 0].argmax()) >= CODES
    assert int(model.sample(torch.tensor([1]), SamplingConfig(temperature=0.0), rngs(1)).max()) < CODES


def test_class_tokens_follow_the_codes_in_the_vocabulary(make_space: Callable[..., Space]) -> None:
    unconditional = make(make_space(3, 3, num_classes=None)).eval()
    assert unconditional.tokens.num_embeddings == CODES + 1
    assert torch.equal(unconditional.embed_classes(torch.tensor([0]))[0, 0], unconditional.tokens.weight[CODES])
    model = make(make_space(3, 3)).eval()
    assert torch.equal(model.embed_classes(torch.tensor([2]))[0, 0], model.tokens.weight[CODES + 2])
    assert model.tokens.num_embeddings == CODES + CLASSES + 1  # the last is the null class


@torch.no_grad()
def test_an_id_is_predicted_from_the_ids_before_it(make_space: Callable[..., Space]) -> None:
    model = make(make_space(3, 3)).eval()
    labels, ids = torch.tensor([1]), torch.arange(9).unsqueeze(0) % CODES
    changed = ids.clone()
    changed[0, 4] = 11
    differs = (model.hidden(labels, ids[:, :-1]) - model.hidden(labels, changed[:, :-1])).abs().amax(2) > 1e-6
    assert differs[0].tolist() == [False] * 5 + [True] * 4


@pytest.mark.parametrize("options", [{}, {"embedding": "codebook"}, {"label_smoothing": 0.1}])
def test_the_loss_is_the_cross_entropy_over_the_vocabulary(
    options: dict[str, Any], make_space: Callable[..., Space]
) -> None:
    model = make(make_space(3, 3), class_dropout=0.0, **options)
    ids, labels = torch.randint(CODES, (4, 9)), torch.tensor([0, 1, 2, 0])
    logits = model.head(model.hidden(labels, ids[:, :-1])).flatten(0, 1)
    smoothing = model.config.label_smoothing
    expected = torch.nn.functional.cross_entropy(logits, ids.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(model(ids, labels)["total"], expected)


def test_corrupted_ids_are_random_ids(make_space: Callable[..., Space]) -> None:
    ids, space = torch.zeros(200, 9, dtype=torch.long), make_space(3, 3)
    assert set(make(space, keep=0.0).corrupt(ids).unique().tolist()) == set(range(CODES))
    changed = (make(space, keep=0.8).corrupt(ids) != ids).float().mean()
    assert float(changed) == pytest.approx(0.2 * (1 - 1 / CODES), abs=0.04)
    assert make(space).corrupt(ids) is ids


def test_ids_are_embedded_by_the_codes_of_their_group(make_space: Callable[..., Space]) -> None:
    model = make(make_space(3, 3, groups=2), embedding="codebook")
    assert model.code_embedding is not None
    codes, ids = model.code_embedding.codes, torch.tensor([[3, 4, 5]])  # ids 1, 2, 3: groups 1, 0, 1
    expected = model.code_embedding.layers(torch.stack([codes[1, 3], codes[0, 4], codes[1, 5]]))
    torch.testing.assert_close(model.embed(ids, first=1)[0], expected)


@pytest.mark.parametrize("wrong", [{"width": 10, "heads": 4}, {"layers": 0}, {"keep": 1.1}, {"dropout": 1.0}])
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GptConfig(**wrong)
