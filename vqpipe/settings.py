"""The settings of a section, with types, defaults and docs: one list for `vqpipe settings` and the documentation.

Everything is read from the dataclasses: the doc of a setting is the text below its field.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from vqpipe import config

NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a section."""

    section: str
    """`train`, `model.quantizer`."""
    name: str
    kind: str = ""
    """The kind of the section that has this setting; empty: every kind has it."""
    type: str
    """`whole number`, `"random" or "center"`."""
    required: bool
    default: Any
    """As in JSON; None: not set."""
    resumable: bool = False
    """Whether a run may be resumed with another value."""
    doc: str
    """What it means, with its unit."""


def describe(cls: type, section: str = "", within: tuple[type, ...] = ()) -> list[Setting]:
    """The settings of the dataclass `cls` and of the sections in it.

    A section that has kinds begins with `kind` and the settings of every kind; those of one kind follow. `within` are
    the classes of the sections around this one: a section of the same class is not described again.
    """
    common = settings_of(cls, section, "", (*within, cls))
    kinds = config.kinds_of(cls)
    if not kinds:
        return common
    doc = "The other settings of the section depend on it."
    kind = Setting(section=section, name="kind", type=alternatives(sorted(kinds)), required=True, default=None, doc=doc)
    found = [kind, *common]
    for name, chosen in sorted(kinds.items()):
        own = settings_of(chosen, section, name, (*within, cls))
        found += [each for each in own if each not in common and replace(each, kind="") not in common]
    return found


def settings_of(cls: type, section: str, kind: str, within: tuple[type, ...]) -> list[Setting]:
    """The settings of one class, those of its sections last."""
    docs, hints = field_docs(cls), config.hints_of(cls)
    own: list[Setting] = []
    nested: list[Setting] = []
    for field in dataclasses.fields(cls):
        inner = config.section_of(cls, field.name)
        if inner is not object and inner not in within:
            nested += describe(inner, config.dotted(section, field.name), within)
        elif field.init:
            setting = Setting(
                section=section,
                name=field.name,
                kind=kind,
                type=type_in_words(hints[field.name]),
                required=config.is_required(field),
                default=default_of(field),
                resumable=bool(field.metadata.get(config.RESUMABLE)),
                doc=docs.get(field.name, ""),
            )
            own.append(setting)
    return own + nested


def field_docs(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, as one line; that of a base where a class repeats the field."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            docs |= own_field_docs(each)
    return docs


@cache
def own_field_docs(cls: type) -> dict[str, str]:
    """`field_docs` of the fields that the class itself declares. (Python parses the whole file for each class.)"""
    docs: dict[str, str] = {}
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    for statement, below in pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field as in JSON; None also for a required one."""
    if config.is_required(field):
        return None
    if field.default_factory is not dataclasses.MISSING:
        return config.plain(field.default_factory())
    return config.plain(field.default)


def type_in_words(hint: Any) -> str:
    """`list of number`, `"random" or "center"`, `whole number or text`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(each) for each in arguments if each is not type(None))
    if origin is typing.Literal:
        return alternatives(arguments)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f", {len(arguments)} of them"
        return f"list of {type_in_words(arguments[0])}{count}"
    return "section" if dataclasses.is_dataclass(hint) else NAMES[hint]


def alternatives(values: Iterable[Any]) -> str:
    """`"a", "b" or "c"`."""
    *others, last = map(config.toml_value, values)
    return f"{', '.join(others)} or {last}" if others else last
