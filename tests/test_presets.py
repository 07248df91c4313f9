import dataclasses
from pathlib import Path

import pytest
import torch

from stages.recipe import Recipe, load
from vqpipe import presets
from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError
from vqpipe.models import AutoencoderConfig, build_autoencoder

SIZES = {"vqgan-lc-f16-100k": (16, 100_000), "vqgan-lc-f8-100k": (8, 100_000), "vqgan-fc-f16-16k": (16, 16_384)}


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_parsed_and_built(name: str) -> None:
    recipe = load(name)
    with torch.device("meta"):
        model = build_autoencoder(recipe.model)
    if name in SIZES:
        assert (model.downsample_factor, model.quantizer.codebook_size) == SIZES[name]
    assert from_table(AutoencoderConfig, to_table(recipe.model)) == recipe.model
    missing = set(model.quantizer.loss_names) - {term for term, weight in recipe.objective.weights().items() if weight}
    assert not missing


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_it_is(name: str) -> None:
    head = dict(presets.heads())[name]
    assert {"what", "command", "expected"} <= set(head)
    if not name.startswith(("smoke", "demo", "small")):
        assert {"paper", "row", "protocol"} <= set(head)


def test_the_presets_of_the_papers_do_without_the_matched_start() -> None:
    ours = {"demo", "small", "smoke", "vqgan-lc-f16-100k-matched", "mgvq-lc-f16-g4"}
    assert {name for name in presets.names() if load(name).train.matched_start} == ours


def test_without_a_preset_every_section_has_its_defaults() -> None:
    recipe = load(None)
    for field in dataclasses.fields(Recipe):
        if field.name not in ("model", "objective"):
            assert getattr(recipe, field.name) == type(getattr(recipe, field.name))()


def test_set_wins_over_the_preset_and_unknown_names_are_told(tmp_path: Path) -> None:
    assert load("smoke", ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4
    switched = load("smoke", ["model.quantizer.kind=vq"]).model.quantizer
    assert (switched.kind, switched.codebook_size) == ("vq", 1000)
    with pytest.raises(ConfigError, match="Did you mean smoke"):
        load("smok")
    with pytest.raises(ConfigError, match=r"unknown key train\.stepps\. Did you mean steps"):
        load("smoke", ["train.stepps=3"])
    file = tmp_path / "mine.toml"
    file.write_text(presets.find("smoke").read_text())
    assert load(str(file)) == load("smoke")
