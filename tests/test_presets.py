"""Every preset is parsed and built on the meta device; presets extend each other."""

import dataclasses
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_origin

import pytest
import torch

from stages.list_presets import presets as presets_command
from stages.recipe import ClassifierRecipe, GeneratorRecipe, PipelineRecipe, load, load_classifier, load_generator
from vqpipe import presets
from vqpipe.config import from_table, has_choices, hints_of, to_table
from vqpipe.errors import ConfigError
from vqpipe.generation.base import Space, build_generator
from vqpipe.generation.classifier import build_classifier
from vqpipe.models import AutoencoderConfig, build_autoencoder
from vqpipe.quantizers import TokenLayout
from vqpipe.training.config import TrainConfig

SIZES = {
    "bsq-f8-18bit": (8, 2**18),
    "gq-f8-16bit": (8, 2**16),
    "lfq-f16-18bit": (16, 2**18),
    "vqgan-fc-f16-16k": (16, 16_384),
    "vqgan-lc-f16-100k": (16, 100_000),
    "vqgan-lc-f8-100k": (8, 100_000),
}
PARAMETERS = {
    "gpt-404m": 101_000 * 1024 * 2 + 256 * 1024 + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024,
    "dit-xl-2": 674_890_048,
    "llamagen-xxl": 1_462_531_584,
}
"""Parameters of generators for 1,000 classes. GPT has two matrices of 100,000 codes and the classes; 256
positions; per block 12 matrices of width x width with biases and norms; the last norm."""


@pytest.fixture(autouse=True)
def _no_initial_weights(uninitialized: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Networks on the meta device have no data."""
    with uninitialized():
        yield


def space_of(name: str, num_classes: int | None) -> Space:
    """The tokens of VQGAN-LC at 256 px; for LlamaGen's those of MGVQ at 384 px."""
    groups, size, side = (4, 8192, 24) if name.startswith("llamagen") else (1, 100_000, 32 if "f8" in name else 16)
    layout = TokenLayout(((side, side),), groups)
    return Space(layout=layout, codebook_size=size, latent_dim=8 * groups, code_dim=8, num_classes=num_classes)


def is_lowered_by_one_setting(train: TrainConfig) -> bool:
    """Whether a lower learning rate is not refused for its minimum."""
    return train.schedule == "constant" or train.min_learning_rate < train.learning_rate


@pytest.mark.parametrize("name", presets.names("generator"))
def test_every_generator_preset_is_parsed_and_built(name: str) -> None:
    recipe = load_generator(name)
    space = space_of(name, (recipe.examples.num_classes or 10) if recipe.examples.conditional else None)
    with torch.device("meta"):
        generator = build_generator(recipe.generator, space)
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in generator.parameters()) == PARAMETERS[name]
    generator.check_sampling(torch.zeros(1, dtype=torch.int64), recipe.generate, [torch.Generator()])
    assert from_table(GeneratorRecipe, to_table(recipe)) == recipe
    assert is_lowered_by_one_setting(recipe.train)


@pytest.mark.parametrize(
    "recipe",
    [
        *map(load, ("vqgan-lc-f16-100k", "mgvq-f16-g4", "fsq-f16-64k", "open-magvit2-f16")),
        *map(load_generator, ("gpt-tiny", "llamagen-tiny", "dit-tiny", "ldm-tiny")),
        load_classifier("vit-tiny"),
    ],
)
def test_a_value_that_is_no_choice_is_refused_in_python_too(recipe: Any) -> None:
    sections = [recipe]
    while sections:
        section = sections.pop()
        for field in dataclasses.fields(section):
            hint = hints_of(type(section))[field.name]
            if dataclasses.is_dataclass(value := getattr(section, field.name)):
                sections.append(value)
            elif has_choices(hint):
                other = ["other"] if get_origin(hint) is tuple else "other"
                with pytest.raises(ConfigError, match=rf"\.{field.name}.* = 'other' is not a choice"):
                    dataclasses.replace(section, **{field.name: other})


def test_presets_of_dit_and_sit_have_the_learning_rates_of_the_paper_and_of_its_code() -> None:
    for kind in ("dit", "sit"):
        paper, code = load_generator(f"{kind}-xl-2"), load_generator(f"{kind}-xl-2-code")
        assert (paper.train.learning_rate, paper.train.schedule) == (4.5e-4, "constant")
        assert (paper.generate.cfg_scale, paper.generate.cfg_channels) == (8.0, 3)
        assert code == dataclasses.replace(paper, train=dataclasses.replace(paper.train, learning_rate=1e-4))


@pytest.mark.parametrize(
    ("name", "images", "warmup_epochs"),
    [
        ("gpt-404m", 1_281_167, 5),
        ("gpt-unconditional", 60_000, 5),
        ("ldm-f16", 1_281_167, 0),
        ("ldm-ffhq-f16", 60_000, 0),
    ],
)
def test_gpt_and_ldm_train_for_the_100_epochs_of_the_paper(name: str, images: int, warmup_epochs: int) -> None:
    recipe = load_generator(name)
    train, epoch = recipe.train, images / recipe.train.global_batch_size
    assert train.steps == pytest.approx(100 * epoch, abs=100)  # an epoch without its last, smaller batch
    assert train.warmup_steps == pytest.approx(warmup_epochs * epoch, abs=5)
    assert recipe.generate.cfg_scale == (1.4 if name == "ldm-f16" else 1.0)
    if name.startswith("gpt"):
        assert train.schedule == "linear"
        assert not recipe.examples.conditional or recipe.generator.class_dropout == 0


def test_a_preset_of_the_paper_s_text_differs_from_that_of_its_code_in_search_and_loss_weights() -> None:
    code, paper = load("vqgan-lc-f16-100k"), load("vqgan-lc-f16-100k-paper")
    quantizer = dataclasses.replace(code.model.quantizer, metric="cosine")  # type: ignore[call-arg]
    objective = dataclasses.replace(code.objective, commitment=1.0, codebook=0.33)
    model = dataclasses.replace(code.model, quantizer=quantizer)
    assert paper == dataclasses.replace(code, model=model, objective=objective)


def test_the_mixture_of_mgvq_names_seven_sets_with_manifests() -> None:
    words = dict(presets.heads())["mgvq-f16-g4-mixture"]["command"].split()
    sets = [words[place + 1] for place, word in enumerate(words) if word == "--images"]
    manifests = {path.stem for path in (Path(__file__).parents[1] / "data_manifests").glob("*.toml")}
    assert len(set(sets)) == 7
    assert set(sets) <= manifests
    assert load("mgvq-f16-g4-mixture") == load("mgvq-f16-g4")


@pytest.mark.parametrize("name", presets.names("classifier"))
def test_every_classifier_preset_is_parsed_and_built(name: str) -> None:
    recipe = load_classifier(name)
    assert is_lowered_by_one_setting(recipe.train)
    with torch.device("meta"):
        build_classifier(recipe.classifier, space_of(name, recipe.examples.num_classes or 10))
    assert from_table(ClassifierRecipe, to_table(recipe)) == recipe


def test_a_preset_of_another_subject_is_an_error_that_names_its_section() -> None:
    with pytest.raises(ConfigError, match=r"gpt-tiny has a section \[generator\]: it is for vqpipe train-generator"):
        load("gpt-tiny")
    with pytest.raises(ConfigError, match=r"smoke has a section \[model\]: it is for vqpipe train\."):
        load_generator("smoke")
    with pytest.raises(ConfigError, match=r"it is for vqpipe train-generator"):
        load_classifier("gpt-tiny")


def test_every_preset_has_one_subject() -> None:
    subjects = [presets.names(section) for section in ("model", "generator", "classifier")]
    assert sorted(name for names in subjects for name in names) == presets.names()


@pytest.mark.parametrize("name", presets.names("model"))
def test_every_tokenizer_preset_is_parsed_and_built(name: str) -> None:
    recipe = load(name)
    with torch.device("meta"):
        model = build_autoencoder(recipe.model)
    if name in SIZES:
        assert (model.downsample_factor, model.quantizer.codebook_size) == SIZES[name]
    assert from_table(AutoencoderConfig, to_table(recipe.model)) == recipe.model
    assert is_lowered_by_one_setting(recipe.train)
    assert all(recipe.objective.weights(model.quantizer.loss_names).values())


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_has_a_head(name: str) -> None:
    head = dict(presets.heads())[name]
    assert {"what", "command", "expected"} <= set(head)
    if not name.startswith(("smoke", "demo", "small", "linear-probe")) and not name.endswith(("-tiny", "-small")):
        assert {"paper", "row", "protocol"} <= set(head)


def test_presets_of_the_papers_do_not_use_whiten_init() -> None:
    ours = {"demo", "small", "smoke", "vqgan-lc-f16-100k-matched", "mgvq-lc-f16-g4"}
    whitened = {name for name in presets.names("model") if load(name).train.whiten_init}
    assert {name for name in whitened if not name.endswith("-small")} == ours


def test_without_a_preset_every_section_has_its_defaults() -> None:
    recipe = load(None)
    for field in dataclasses.fields(PipelineRecipe):
        if field.name not in ("model", "objective"):
            assert getattr(recipe, field.name) == type(getattr(recipe, field.name))()


def test_set_overrides_the_preset_and_unknown_names_are_errors(tmp_path: Path) -> None:
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


def test_a_file_extends_packaged_presets_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "vqgan-lc-f8-100k"\n[train]\nsteps = 7\n')
    (tmp_path / "mine.toml").write_text(
        'extends = "base.toml"\ntrain.warmup_steps = 3\nmodel.quantizer = { kind = "vq", normalize = true }\n'
    )
    recipe, parent = load(str(tmp_path / "mine.toml"), ["train.log_every=2"]), load("vqgan-lc-f8-100k")
    assert (recipe.train.steps, recipe.train.warmup_steps, recipe.train.log_every) == (7, 3, 2)
    assert recipe.objective == parent.objective
    quantizer = to_table(recipe.model.quantizer)
    assert (quantizer["kind"], quantizer["codebook_size"], quantizer["normalize"]) == ("vq", 100_000, True)
    assert "projector" not in quantizer


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ('"mine.toml"', "extends itself through mine"),
        ('"other.toml"', "extends itself through mine"),
        ('"smok"', "no preset is called 'smok'. Did you mean smoke"),
        ('"absent.toml"', "cannot read"),
        ("3", "extends = 3 should be text"),
        ('"smoke"\ntrain = 3', "train = 3 should be a table"),
        ('"smoke"\ntrain.steps = {}', "train.steps is a value, not a section"),
        ('"smoke"\nmodel.quantizer.kind = "lcc"', "model.quantizer.kind = 'lcc' is unknown. Did you mean lc"),
    ],
)
def test_an_unusable_extends_is_an_error(extends: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f"extends = {extends}\n")
    (tmp_path / "other.toml").write_text('extends = "mine.toml"\n')
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "mine.toml"))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["mgvq-f8-g8", "gpt-404m", "vit-tiny"])
def test_presets_prints_one_preset_as_toml_without_extends(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    presets_command(name)
    printed = capsys.readouterr().out
    head = f"# Copied from the preset {name}, whose description is:\n#   what: {dict(presets.heads())[name]['what']}"
    assert printed.startswith(head)
    assert "extends" not in tomllib.loads(printed)
    (tmp_path / "copy.toml").write_text(printed)
    read = {"mgvq-f8-g8": load, "gpt-404m": load_generator, "vit-tiny": load_classifier}[name]
    assert read(str(tmp_path / "copy.toml")) == read(name)


def test_presets_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    presets_command()
    printed = capsys.readouterr().out
    assert all(name in printed for name in presets.names())


def test_the_list_of_presets_is_wrapped_small_ones_first_and_filtered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    presets_command()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "Small, for a CPU: vqpipe train"
    assert "Small, for a CPU: vqpipe train-generator" in lines
    assert 70 < max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "]
    assert sorted(listed) == presets.names()
    assert all(" ".join(head["what"].split()) in " ".join(printed.out.split()) for _, head in presets.heads())
    assert "vqpipe presets NAME" in printed.err
    presets_command(word="FSQ")
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:2] == "  " and line[2] != " "]
    assert [line.split()[0] for line in lines] == ["ifsq-small", "fsq-f16-64k", "ifsq-f16-83k"]
    monkeypatch.delenv("COLUMNS")
    presets_command()
    assert dict(presets.heads())["small"]["expected"] in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no preset has 'zzz'"):
        presets_command(word="zzz")
