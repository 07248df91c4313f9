"""TOML tables become dataclasses and return; overrides; errors name the key."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from stages.recipe import PipelineRecipe, load_tokenizer
from vqpipe import artifacts
from vqpipe.config import added, from_table, override, read_toml, resumable, to_request, to_table, to_toml
from vqpipe.errors import ArtifactError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Shape:
    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    kind: ClassVar[str] = "square"
    side: float


@dataclass(frozen=True, kw_only=True)
class Grid(Shape):
    kind: ClassVar[str] = "grid"
    sides: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-3
    mode: Literal["a", "b"] = "a"
    where: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    shape: Shape
    inner: Inner = field(default_factory=Inner)
    steps: int = 1
    flip: bool = False


def test_a_table_round_trips_through_its_dataclass() -> None:
    table = {"shape": {"kind": "grid", "sides": [4, 5]}, "inner": {"learning_rate": 1, "where": "x/y"}}
    config = from_table(Outer, table)
    assert config == Outer(shape=Grid(sides=(4, 5)), inner=Inner(learning_rate=1.0, where=Path("x/y")))
    written = to_table(config)
    assert written["shape"] == {"kind": "grid", "sides": [4, 5], "pair": [0.5, 0.9]}
    assert written["inner"]["mode"] == "a"
    assert from_table(Outer, written) == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"shape": {"kind": "square", "side": 1}, "stpes": 3}, "unknown key stpes. Did you mean steps?"),
        ({"shape": {"kind": "square", "side": 1}, "inner": {"learning_rte": 3}}, "Did you mean learning_rate?"),
        ({"shape": {"kind": "sqare", "side": 1}}, "shape.kind = 'sqare' is unknown. Did you mean square?"),
        ({"shape": {"kind": "square-root"}}, "is unknown. A kind that is not part of vqpipe needs --import FILE.py"),
        ({"shape": {"side": 1}}, "shape.kind is not set"),
        ({"shape": {"kind": "square"}}, "shape.side is not set"),
        ({"shape": {"kind": "square", "side": "1"}}, "shape.side = '1' should be a number"),
        ({"shape": {"kind": "square", "side": 1}, "steps": 2.0}, "steps = 2.0 should be a whole number"),
        ({"shape": {"kind": "square", "side": 1}, "steps": True}, "steps = True should be a whole number"),
        ({"shape": {"kind": "square", "side": 1}, "flip": 1}, "flip = 1 should be true or false"),
        ({"shape": {"kind": "square", "side": 1}, "inner": {"mode": "c"}}, "inner.mode = 'c' is not a choice"),
        ({"shape": {"kind": "grid", "pair": [1.0]}}, "shape.pair = [1.0] should be a list of 2"),
        ({"shape": {"kind": "grid", "sides": "[a, b]"}}, "sides = '[a, b]' should be a list. A list is [1, 2] or"),
        ({"shape": {"kind": "grid", "sides": [1, "2"]}}, "shape.sides[1] = '2' should be a whole number"),
        ({"shape": 3}, "shape = 3 should be a table"),
    ],
)
def test_an_invalid_table_is_an_error_that_names_the_key(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_table(Outer, table)
    assert message in str(caught.value)
    assert "?." not in str(caught.value)


def test_override_reads_values_as_toml_and_does_not_change_the_table() -> None:
    table = {"inner": {"learning_rate": 1e-3}, "shape": {"kind": "grid"}}
    changed = override(Outer, table, ["inner.learning_rate=5e-4", "inner.mode=b", "shape.sides=[3, 4]"])
    expected = {"inner": {"learning_rate": 5e-4, "mode": "b"}, "shape": {"kind": "grid", "sides": [3, 4]}}
    assert changed == expected
    assert table == {"inner": {"learning_rate": 1e-3}, "shape": {"kind": "grid"}}


def test_another_kind_drops_the_keys_that_it_lacks() -> None:
    table = {"quantizer": {"kind": "lc", "codebook_size": 7, "code_dim": 8, "projector": "mlp"}, "kind": "vqgan"}
    model = {"model": table, "objective": {}}
    changed = override(PipelineRecipe, model, ["model.quantizer.decay=0.9", "model.quantizer.kind=ema"])["model"][
        "quantizer"
    ]
    assert changed == {"kind": "ema", "codebook_size": 7, "code_dim": 8, "decay": 0.9}
    assert override(PipelineRecipe, model, ["model.quantizer.kind=lc"]) == model
    nested = override(PipelineRecipe, model, ["model.quantizer.group.kind=ema", "model.quantizer.kind=multi_group"])
    assert nested["model"]["quantizer"] == {"kind": "multi_group", "group": {"kind": "ema"}}


@pytest.mark.parametrize(
    "text", ["inner.learning_rate", "iner.x=1", "inner=1", "shape.kind=[1]", "shape.kind=round", "shape.side=1"]
)
def test_an_unusable_assignment_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        from_table(Outer, override(Outer, {}, [text]))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("data.batch_size=8", r"unknown key data\.batch_size\. Did you mean train\.global_batch_size\?"),
        ("batch_size=8", r"no such section\. Did you mean train\.global_batch_size\?"),
        ("model.codebook_size=8", r"Did you mean model\.quantizer\.codebook_size\?"),
        ("data.batch=8", r"Did you mean train\.global_batch_size\?"),
        ("train.warmup=8", r"Did you mean train\.warmup_steps\?"),
        ("model.quantizer=vq", r"= 'vq' should be a table\. Write --set model\.quantizer\.kind=vq"),
        ("model.quantizer=3", r"= 3 should be a table\. Write --set model\.quantizer\.NAME=VALUE"),
        ("train.step=8", r"Did you mean steps\?"),
        ("train.epochs_of_training=8", r"Known: accumulate"),
    ],
)
def test_a_setting_of_any_section_that_has_the_words_of_an_unknown_one_is_proposed(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_tokenizer("small", [text])


def test_a_kind_in_the_place_of_a_section_is_proposed_beside_other_settings_of_it_too() -> None:
    with pytest.raises(ConfigError, match=r"= 'vq' should be a table\. Write --set model\.quantizer\.kind=vq"):
        load_tokenizer("small", ["model.quantizer=vq", "model.quantizer.codebook_size=8"])


def test_a_valid_table_is_read_without_a_list_of_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqpipe.config.known_settings", lambda *given: pytest.fail("listed"))
    assert from_table(Outer, {"shape": {"kind": "square", "side": 1}}).steps == 1


def test_a_file_that_is_not_toml_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match=r"cannot read .* Check the path"):
        read_toml(tmp_path / "absent.toml")


def test_toml_round_trips() -> None:
    table = {
        "name": 'a "quoted" \\ text, \n and \u00e9',
        "values": {"rate": 5e-05, "whole": 1.0, "steps": 3, "flip": True, "sides": [1, [2, 3.5]], "none": []},
        "model": {"quantizer": {"kind": "lc", "group": {"k": 2}}, "kind": "vqgan"},
        "empty": {"inner": {"x": 1}},
    }
    assert tomllib.loads(to_toml(table)) == table


@dataclass(frozen=True, kw_only=True)
class Earlier:
    steps: int = 5
    workers: int = resumable(default=2)


@dataclass(frozen=True, kw_only=True)
class Later(Earlier):
    smoothing: float = added(0.0)


def test_request_has_every_setting_but_resumable_ones() -> None:
    assert to_request(Earlier(workers=3)) == {"steps": 5}
    assert to_request(Outer(shape=Grid(), steps=5)) == to_table(Outer(shape=Grid(), steps=5))


def test_draft_resumes_after_a_field_was_added_unless_it_is_set(tmp_path: Path) -> None:
    def begin(config: Earlier) -> None:
        draft = artifacts.start(tmp_path / "out", "codebook", to_request(config), {})
        assert isinstance(draft, artifacts.Draft)
        with draft:
            draft.write_json("part.json", {})

    begin(Earlier())
    begin(Later())
    with pytest.raises(ArtifactError, match=r"settings: smoothing was not set, now 0\.1"):
        begin(Later(smoothing=0.1))
