"""TOML tables -> frozen dataclasses, strictly, and back.

A section of a preset is a frozen, keyword-only dataclass defined above the code it configures. Types are exact: a key
the dataclass lacks, a string where a number belongs, or a value outside its `Literal` is a ConfigError that names the
key and, for a mistyped one, its nearest neighbour. A field whose class has subclasses with a `kind` is a tagged choice:
the table's `kind` picks the subclass.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vqpipe.errors import ConfigError

T = TypeVar("T")
PLAIN_NAMES: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file is absent or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "Name a preset (vqpipe presets lists them) or a TOML file"
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def from_table(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from a table; `where` is the dotted place, for messages.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    chosen = choose_kind(cls, table, where)
    hints = typing.get_type_hints(chosen)
    fields = {field.name: field for field in dataclasses.fields(chosen) if field.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "kind" and "kind" not in fields:
            continue
        if key not in fields:
            raise ConfigError(f"unknown key {dotted(where, key)}", nearest_name(key, fields))
        values[key] = convert(hints[key], value, dotted(where, key))
    missing = [name for name, field in fields.items() if name not in values and is_required(field)]
    if missing:
        key = dotted(where, missing[0])
        raise ConfigError(f"{key} is not set", f"Add it to the preset, or --set {key}=...")
    return chosen(**values)


def to_table(config: Any) -> dict[str, Any]:
    """A dataclass as a plain table, defaults written out, a tagged choice with its `kind`. Fit for JSON."""
    table: dict[str, Any] = {}
    if isinstance(getattr(config, "kind", None), str):
        table["kind"] = config.kind
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = to_table(value)
        elif isinstance(value, tuple):
            table[field.name] = list(value)
        else:
            table[field.name] = str(value) if isinstance(value, Path) else value
    return table


def override(table: dict[str, Any], assignments: Iterable[str], sections: Iterable[str]) -> dict[str, Any]:
    """A copy of `table` with each `section.key=value` set; the value is read as TOML, else as a string.

    Setting a `kind` to another one drops the sibling keys, which belonged to the old kind, save those that the
    same list of assignments sets and `codebook_size` and `code_dim`, which every quantizer has.

    Raises:
        ConfigError: an assignment without "=", or into an unknown section.
    """
    result = copy_table(table)
    assigned = [split_assignment(text) for text in assignments]
    assigned.sort(key=lambda item: item[0][-1] != "kind")  # the kind first: it decides which other keys exist
    for path, value in assigned:
        if path[0] not in set(sections) or len(path) < 2:
            raise ConfigError(f"--set {'.'.join(path)}: no such section", nearest_name(path[0], sections))
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {'.'.join(path)}: {part} is a value, not a section")
        if path[-1] == "kind" and node.get("kind") != value:
            for key in [key for key in node if key not in ("codebook_size", "code_dim")]:
                del node[key]
        node[path[-1]] = value
    return result


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The hint of a mistyped name: its nearest neighbour, or all there are."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}"


def choose_kind(cls: type[T], table: Mapping[str, Any], where: str) -> type[T]:
    """`cls` itself, or the subclass that the table's `kind` names; an unknown or absent kind is a ConfigError."""
    own = getattr(cls, "kind", None)
    kinds: dict[str, type[T]] = {}
    candidates: list[Any] = [cls, *all_subclasses(cls)]
    for sub in candidates:
        if isinstance(kind := getattr(sub, "kind", None), str):
            kinds[kind] = sub
    if not kinds:
        return cls
    kind = table.get("kind", own if isinstance(own, str) else None)
    if kind is None:
        raise ConfigError(f"{dotted(where, 'kind')} is not set", f"Choose one of {', '.join(sorted(kinds))}")
    if kind not in kinds:
        raise ConfigError(f"{dotted(where, 'kind')} = {kind!r} is unknown", nearest_name(str(kind), kinds))
    return kinds[kind]


def all_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
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
            raise wrong_type(where, value, "a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise wrong_type(where, value, f"a list of {len(arguments)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise wrong_type(where, value, "a table")
        return from_table(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(hint, type):
        raise TypeError(f"{where}: no rule for the annotation {hint!r}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong_type(where, value, PLAIN_NAMES.get(hint, hint.__name__))
    return value


def wrong_type(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where} = {value!r} should be {expected}")


def split_assignment(text: str) -> tuple[list[str], Any]:
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: no value", "Write --set section.key=value")
    try:
        return path.strip().split("."), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip().split("."), value.strip()


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def copy_table(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy_table(value) if isinstance(value, Mapping) else value for key, value in table.items()}
