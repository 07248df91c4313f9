"""TOML tables -> frozen dataclasses, strictly, and back.

A section of a preset is a frozen, keyword-only dataclass defined above the code it configures. Types are exact: a key
the dataclass lacks, a string where a number belongs, or a value outside its `Literal` is a ConfigError that names the
key and, for a mistyped one, its nearest neighbor. A field whose class has subclasses with a `kind` is a tagged choice:
the table's `kind` picks the subclass, and `class_for` the class that such a config configures.

A field made by `resumable` does not change what a run computes, but for the rounding of sums: `to_request` leaves it
out, so that a run may be resumed with another value of it. A field that is added later is made by `added`.
"""

import contextlib
import copy
import dataclasses
import difflib
import json
import math
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from vqpipe.errors import ConfigError
from vqpipe.files import nearest_path

T = TypeVar("T")
RESUMABLE, ADDED = "resumable", "added"
"""Keys of a field's metadata."""
MORE_KINDS = "A kind that is not part of vqpipe needs --import FILE.py, or in Python the import of its module"
"""The hint of an unknown kind, beside the known ones."""
TYPO = 0.75
"""Similarity from which on an unknown kind is a known one with a typing error: `lcc` and `lc` have 0.8."""
LIST_HINT = 'A list is [1, 2] or ["a", "b"]; in a shell, with single quotes around it'
"""Ends the message of a value that is no list: a shell removes double quotes that are not in single ones."""
PLAIN_NAMES: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_toml(path: Path, hint: str = "Check the path") -> dict[str, Any]:
    """The tables of a TOML file; `hint` ends the message of an absent one, unless its folder has a similar name.

    Raises:
        ConfigError: the file is absent or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", nearest_path(path, hint)) from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and tables nested as deep
        raise ConfigError(f"{path} is not TOML: {error}") from None


def from_table(
    cls: type[T], table: Mapping[str, Any], where: str = "", *, hint: str = "", reads: Sequence[str] | None = None
) -> T:
    """Build the dataclass `cls` from a table; `where` is the dotted place, for messages.

    `hint` ends the message of missing keys. For unknown keys, settings of the sections `reads` are proposed; None: all.

    Raises:
        ConfigError: an unknown key, missing keys (all of them in one message), or a value of the wrong type.
    """
    if lacking := missing(cls, table, where, partial(known_settings, cls, table, where, reads)):
        are, them = ("is", "it") if len(lacking) == 1 else ("are", "them")
        choices = [f"{key} is one of {', '.join(kinds)}" for key, kinds in lacking.items() if kinds]
        remedies = [f"Add {them} to the preset, or --set {next(iter(lacking))}=VALUE", *choices, hint]
        raise ConfigError(f"{', '.join(lacking)} {are} not set", "; ".join(filter(None, remedies)))
    chosen = choose_kind(cls, table, where)
    hints = hints_of(chosen)  # type: ignore[arg-type]
    fields = {field.name for field in dataclasses.fields(chosen) if field.init}  # type: ignore[arg-type]
    return chosen(
        **{key: convert(hints[key], value, dotted(where, key)) for key, value in table.items() if key in fields}
    )


def missing(
    cls: type, table: Mapping[str, Any], where: str, proposals: Callable[[], list[str]]
) -> dict[str, list[str]]:
    """The required keys that a table of the dataclass `cls` and the tables within it lack, by dotted name.

    The value of a `kind` are its choices, that of other keys is empty. Until a `kind` is set, the keys that only its
    class requires are not known. `proposals` lists the settings that may be proposed for an unknown key.

    Raises:
        ConfigError: an unknown key or kind.
    """
    lacking: dict[str, list[str]] = {}
    kinds = kinds_of(cls)
    undecided = bool(kinds) and table.get("kind", getattr(cls, "kind", None)) is None
    if undecided:
        lacking[dotted(where, "kind")] = sorted(kinds)
    chosen = cls if undecided else choose_kind(cls, table, where)
    fields = {field.name: field for field in dataclasses.fields(chosen) if field.init}
    for key in table:
        if key not in fields and key != "kind" and not undecided:
            unknown = dotted(where, key)
            raise ConfigError(f"unknown key {unknown}", nearest_setting(unknown, proposals(), key, fields))
    for name, field in fields.items():
        inner = table.get(name, {} if is_required(field) else None)
        section = section_of(chosen, name)
        if section is not object and isinstance(inner, Mapping):
            lacking |= missing(section, inner, dotted(where, name), proposals)
        elif is_required(field) and name not in table:
            lacking[dotted(where, name)] = []
    return lacking


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is field.default_factory is dataclasses.MISSING


def to_table(config: Any) -> dict[str, Any]:
    """A dataclass as a plain table, defaults written out, a tagged choice with its `kind`. Fit for JSON."""
    table: dict[str, Any] = {}
    if isinstance(getattr(config, "kind", None), str):
        table["kind"] = config.kind
    for field in dataclasses.fields(config):
        table[field.name] = plain(getattr(config, field.name))
    return table


def plain(value: Any) -> Any:
    """The value of a field as `to_table` has it."""
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def resumable(*, default: Any) -> Any:
    """A dataclass field whose value may differ when a run is resumed."""
    return dataclasses.field(default=default, metadata={RESUMABLE: True})


def added(default: Any) -> Any:
    """A dataclass field that earlier versions lacked; with its default, a run computes what it computed before.

    With its default, `to_request` leaves it out, so that what was begun or published without it is the same request
    still. Never change that default: write the new one into the presets.
    """
    return dataclasses.field(default=default, metadata={ADDED: True})


def to_request(config: Any) -> dict[str, Any]:
    """What two runs must have in common to be the same run: `to_table` without the resumable fields, and without the
    fields made by `added` that have their default.

    All other defaults are written out: a default that changes makes another request. So does a new field, unless it is
    made by `added`. Were every default left out, a changed default would go unnoticed.
    """
    table = to_table(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(RESUMABLE) or (field.metadata.get(ADDED) and value == field.default):
            del table[field.name]
        elif dataclasses.is_dataclass(value):
            table[field.name] = to_request(value)
    return table


def class_for(base: type[T], config: Any) -> type[T]:
    """The subclass of `base` whose `config_class` is the type of `config`. Defining a subclass registers it.

    Raises:
        ConfigError: there is none.
    """
    for candidate in all_subclasses(base):
        if getattr(candidate, "config_class", None) is type(config):
            return candidate
    raise ConfigError(f"no {base.__name__.lower()} is built from a {type(config).__name__}")


def merge(cls: type, base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A copy of `base`, a table of the dataclass `cls`, with `changes` merged into it table by table.

    Changing a `kind` drops the keys of `base` that the new kind lacks.

    Raises:
        ConfigError: an unknown kind, or a table in the place of a value.
    """
    merged = copy.deepcopy(dict(base))
    if "kind" in changes and changes["kind"] != base.get("kind") and dataclasses.is_dataclass(cls):
        known = {field.name for field in dataclasses.fields(choose_kind(cls, changes, where))}
        merged = {key: value for key, value in merged.items() if key in known}
    if "kind" in changes:
        merged["kind"] = changes["kind"]
    for key, value in changes.items():
        if not isinstance(value, Mapping):
            merged[key] = value
            continue
        before = merged.get(key, {})
        section = section_of(choose_kind(cls, merged, where), key) if dataclasses.is_dataclass(cls) else object
        if not isinstance(before, Mapping):
            if section is not object:
                raise no_table(section, before, dotted(where, key))
            raise ConfigError(f"{dotted(where, key)} is a value, not a section")
        merged[key] = merge(section, before, value, dotted(where, key))
    return merged


def override(
    cls: type, table: Mapping[str, Any], assignments: Iterable[str], reads: Sequence[str] | None = None
) -> dict[str, Any]:
    """A copy of `table`, which describes a `cls`, with each `section.key=value` merged into it; values are read as
    TOML, otherwise as strings. For an unknown section, settings of the sections `reads` are proposed; None: all.

    Raises:
        ConfigError: an assignment without "=", or into an unknown section.
    """
    sections = [field.name for field in dataclasses.fields(cls)]
    assigned = [split_assignment(text) for text in assignments]
    assigned.sort(key=lambda item: (item[0][-1] != "kind", len(item[0])))  # a kind decides which other keys exist
    result = copy.deepcopy(dict(table))
    for path, value in assigned:
        if len(path) < 2 and path[0] in sections:
            raise ConfigError(f"--set {path[0]} is a section", f"Write --set {path[0]}.NAME=VALUE")
        if path[0] not in sections or len(path) < 2:
            name, known = ".".join(path), known_settings(cls, table, reads=reads)
            raise ConfigError(f"--set {name}: no such section", nearest_setting(name, known, path[0], sections))
        for key in reversed(path):
            value = {key: value}
        result = merge(cls, result, value)
    return result


def section_of(cls: type, key: str) -> type:
    """The dataclass of the field `key` of `cls`; `object` if it is a value."""
    hint = hints_of(cls).get(key)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else object


@cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """The types of the fields of a dataclass."""
    return typing.get_type_hints(cls)


def difference(before: Any, after: Any, where: str = "") -> str:
    """The first key at which two tables differ, with both values: `train.steps was 100, now 200`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = {*before, *after}
        for key in sorted(names - {"schema"}, key=lambda name: (name != "kind", name)):
            if before.get(key) != after.get(key):
                return difference(before.get(key), after.get(key), dotted(where, key))
    return f"{where} was {shortened(before)}, now {shortened(after)}"


def shortened(value: Any) -> str:
    """A value as JSON, without its middle if it is long; None is not set."""
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-4:]


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """The hint of a mistyped name: its nearest neighbor of at least that similarity (0..1), or all there are."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}"


def known_settings(cls: type, table: Any, where: str = "", reads: Sequence[str] | None = None) -> list[str]:
    """The dotted names of the settings of a `cls` with the kinds of `table`; with `reads`, those of these sections."""
    table = table if isinstance(table, Mapping) else {}
    chosen = kinds_of(cls).get(str(table.get("kind")), cls)
    names: list[str] = []
    for field in dataclasses.fields(chosen):
        section, name = section_of(chosen, field.name), dotted(where, field.name)
        if reads is None or field.name in reads:
            names += [name] if section is object else known_settings(section, table.get(field.name), name)
    return names


def nearest_setting(unknown: str, settings: Iterable[str], part: str, names: Iterable[str]) -> str:
    """The hint of an unknown setting: one of `settings` whose key has all words of its key, if possible in the same
    section, with the fewest words; else `nearest_name` of the `part` that is none of `names`."""
    section, _, key = unknown.rpartition(".")
    fits = [name for name in settings if {*key.split("_")} <= {*name.rpartition(".")[2].split("_")}]
    if not fits:
        return nearest_name(part, names)
    return f"Did you mean {min(fits, key=lambda name: (name.rpartition('.')[0] != section, name.count('_')))}?"


def choose_kind(cls: type[T], table: Mapping[str, Any], where: str) -> type[T]:
    """`cls` itself, or the subclass that the table's `kind` names; an unknown or absent kind is a ConfigError."""
    kinds = kinds_of(cls)
    if not kinds:
        return cls
    kind = table.get("kind", getattr(cls, "kind", None))
    if kind is None:
        raise ConfigError(f"{dotted(where, 'kind')} is not set", f"It is one of {', '.join(sorted(kinds))}")
    if not isinstance(kind, str) or kind not in kinds:
        nearest = nearest_name(str(kind), kinds, TYPO)
        hint = f"{nearest} {MORE_KINDS}" if nearest.endswith("?") else f"{MORE_KINDS}. {nearest}"
        raise ConfigError(f"{dotted(where, 'kind')} = {kind!r} is unknown", hint)
    return kinds[kind]


def kinds_of(cls: type) -> dict[str, Any]:
    """kind -> class, of `cls` and its subclasses that have one."""
    candidates: list[Any] = [cls, *all_subclasses(cls)]
    return {sub.kind: sub for sub in candidates if isinstance(getattr(sub, "kind", None), str)}


def all_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    """The subclasses of a class, and theirs."""
    for sub in cls.__subclasses__():
        yield sub
        yield from all_subclasses(sub)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that says what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [argument for argument in arguments if argument is not type(None)]
        for option in options[:-1]:
            try:
                return convert(option, value, where)
            except ConfigError:
                continue
        return convert(options[-1], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r} is not a choice", f"Use one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong_type(where, value, "a list", LIST_HINT)
        if arguments[1:] == (Ellipsis,):
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise wrong_type(where, value, f"a list of {len(arguments)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(convert(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(pairs))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise no_table(typing.cast(type, hint), value, where)
        return from_table(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise wrong_type(where, value if isinstance(value, float) else "a number of many digits", "a finite number")
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(hint, type):
        raise TypeError(f"{where}: no rule for the annotation {hint!r}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong_type(where, value, PLAIN_NAMES.get(hint, hint.__name__))
    return value


def check_choices(config: Any, section: str = "") -> None:
    """Check the fields of a dataclass that have a `Literal` type; for `__post_init__`, as Python checks no types.

    Raises:
        ConfigError: one has none of these values.
    """
    for name, hint in hints_of(type(config)).items():  # type: ignore[arg-type]
        if has_choices(hint):
            convert(hint, getattr(config, name), dotted(section, name))


def check_range(config: Any, section: str, interval: str, *names: str) -> None:
    """Check that these fields of a dataclass, or each number of one that is a tuple, are in an interval, such as
    "[1, inf)" or "(0, 1]". None is not checked.

    Raises:
        ConfigError: one is not, or is NaN.
    """
    low, high = map(float, interval[1:-1].split(","))
    bounds = [f"{'at least' if interval[0] == '[' else 'above'} {low:g}"] * (low > -math.inf)
    bounds += [f"{'at most' if interval[-1] == ']' else 'below'} {high:g}"] * (high < math.inf)
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else [] if value is None else [value]:
            at_end = (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
            if not (low < number < high or at_end):
                raise ConfigError(f"{dotted(section, name)} = {plain(value)}", f"It must be {' and '.join(bounds)}")


@cache
def has_choices(hint: Any) -> bool:
    """Whether a type is a `Literal`, or is made of one."""
    return typing.get_origin(hint) is typing.Literal or any(map(has_choices, typing.get_args(hint)))


def wrong_type(where: str, value: Any, expected: str, hint: str = "") -> ConfigError:
    """The error of a value of another type than `expected`."""
    return ConfigError(f"{where} = {value!r} should be {expected}", hint)


def no_table(cls: type, value: Any, where: str) -> ConfigError:
    """The error of a value in the place of a section of the dataclass `cls`, with the setting that it may stand for."""
    setting = f"kind={value}" if str(value) in kinds_of(cls) else "NAME=VALUE"
    return wrong_type(where, value, "a table", f"Write --set {where}.{setting}")


def split_assignment(text: str) -> tuple[list[str], Any]:
    """The path and the value of `section.key=value`; a value that is not TOML is text."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: no value", "Write --set section.key=value")
    parsed: Any = value.strip()
    with contextlib.suppress(ValueError, RecursionError):
        parsed = tomllib.loads(f"value = {value}")["value"]
    return path.strip().split("."), parsed


def to_toml(table: Mapping[str, Any], where: str = "") -> str:
    """A table of numbers, texts, lists and tables as TOML, its sections after its values."""
    values = [f"{key} = {toml_value(value)}\n" for key, value in table.items() if not isinstance(value, Mapping)]
    heading = f"[{where}]\n" if where and values else ""
    sections = [to_toml(value, dotted(where, key)) for key, value in table.items() if isinstance(value, Mapping)]
    return "\n".join(filter(None, [heading + "".join(values), *sections]))


def toml_value(value: Any) -> str:
    """A number, text or list as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def dotted(where: str, key: str) -> str:
    """The dotted place of `key` in the table at `where`; "" is the place of the outermost table."""
    return f"{where}.{key}" if where else key


def flat(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a table and of the tables in it, by their dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, dotted(where, key))
        else:
            yield dotted(where, key), value
