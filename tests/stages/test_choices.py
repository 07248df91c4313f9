"""The choices of options are written in the commands, which import the library only when they run."""

from collections.abc import Callable
from typing import Any, Literal, get_args, get_type_hints

import pytest
from rich.markup import render

from stages import bench, recipe
from stages.cli import COMMANDS, load
from stages.detokenize import detokenize
from stages.eval_generation import eval_generation
from stages.extract_features import extract_features
from stages.kmeans import kmeans
from stages.list_settings import settings
from stages.tokenize_images import tokenize
from stages.train import train
from vqpipe.codebooks import features
from vqpipe.codebooks import kmeans as clustering
from vqpipe.data import decoding, images, made_images, tokens
from vqpipe.evaluation import generation
from vqpipe.reports import benchmark
from vqpipe.training import tokenizer_run


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        (train, "publish", tokenizer_run.Publish),
        (tokenize, "crops", tokens.Crops),
        (tokenize, "color", decoding.Color),
        (tokenize, "key_prefix", images.KeyPrefix),
        (detokenize, "form", made_images.Form),
        (kmeans, "init", clustering.Init),
        (kmeans, "select", clustering.Select),
        (eval_generation, "protocol", generation.ProtocolName),
        (settings, "command", Literal[tuple(recipe.SECTIONS)]),
    ],
)
def test_an_option_has_the_choices_of_the_library(command: Callable[..., Any], option: str, choices: Any) -> None:
    hint = get_type_hints(command)[option]
    of_option = {value for each in (hint, *get_args(hint)) for value in get_args(each) if isinstance(value, str)}
    assert of_option == set(get_args(choices))


def test_help_names_what_can_be_measured_and_every_encoder() -> None:
    assert ",".join(benchmark.SUBJECTS) == bench.WHAT
    encoder = get_type_hints(extract_features, include_extras=True)["encoder"].__metadata__[0]
    assert encoder.metavar == "|".join(kind.usage for kind in features.ENCODERS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_in_brackets_is_lost_from_a_help_text(command: str) -> None:
    """rich takes [word] in a help text for markup, and leaves it out."""
    loaded = load(command)
    for text in [loaded.help, *[getattr(option, "help", None) for option in loaded.params]]:
        assert render(text or "").plain == (text or "")
