"""What a pass over images has taken in so far, as values that can be written down and taken up again.

A state is a tree: tables and lists of numbers, text and None, and in between tensors, arrays, bytes and `Rows`. `pack`
puts it into text and tensors, for files that hold just these (safetensors), and `unpack` undoes it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

State = dict[str, Any]
TENSOR, BYTES, ROWS = "<tensor>", "<bytes>", "<rows>"
"""Keys of the tables that stand in the text for what lies beside it."""


@dataclass(frozen=True)
class Rows:
    """Tensors [n, D] that are one below the other: new ones come at the end, and those that are there stay as they are.
    So whoever writes a state again and again writes each only once. All may go at once."""

    parts: list[Tensor]


class Accumulator:
    """What takes in images batch by batch. One made with the same arguments goes on from the state of another, and
    ends with the same result to the last digit.

    `accumulates` names the attributes that images change: numbers, text, tensors, arrays, lists, tables by text, other
    accumulators and tables of these. What else there is (tuples, sets) needs a `state` or a `load` of its own.
    """

    accumulates: ClassVar[tuple[str, ...]] = ()

    def state(self) -> State:
        """The state, which shares its memory with this object: for writing it before the next batch."""
        return {name: put_down(getattr(self, name)) for name in self.accumulates}

    def load(self, state: Mapping[str, Any]) -> None:
        """Be what has that state."""
        for name in self.accumulates:
            setattr(self, name, taken_up(getattr(self, name), state[name]))


def put_down(value: Any) -> Any:
    """An attribute as it stands in a state."""
    if isinstance(value, Accumulator):
        return value.state()
    return {str(key): put_down(each) for key, each in value.items()} if isinstance(value, dict) else value


def taken_up(own: Any, value: Any) -> Any:
    """The attribute of which a state holds `value`; `own` is what a new object has in its place."""
    if isinstance(own, Accumulator):
        own.load(value)
        return own
    if isinstance(own, Tensor):
        return value.to(own.device)
    if isinstance(own, np.ndarray):
        return value.numpy()
    if isinstance(own, dict) and any(isinstance(each, Accumulator) for each in own.values()):
        return {key: taken_up(each, value[str(key)]) for key, each in own.items()}
    return value


def pack(state: State) -> tuple[str, dict[str, Tensor], dict[str, list[Tensor]]]:
    """A state as text, the tensors of it by name, and the parts of each of its `Rows` by name: the same names each
    time that the same things are packed."""
    tensors: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}

    def put_aside(value: Any) -> dict[str, str]:
        if isinstance(value, Rows):
            name = f"{len(rows)}"
            rows[name] = value.parts
            return {ROWS: name}
        name = f"{len(tensors)}"
        if isinstance(value, bytes):
            tensors[name] = torch.from_numpy(np.frombuffer(value, dtype=np.uint8).copy())
            return {BYTES: name}
        tensors[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return {TENSOR: name}

    return json.dumps(state, default=put_aside), tensors, rows


def unpack(text: str, tensors: Mapping[str, Tensor], rows: Mapping[str, list[Tensor]]) -> State:
    """Undoes `pack`. Arrays come back as tensors, tuples as lists, keys of tables as text."""

    def put_back(table: dict[str, Any]) -> Any:
        match table:
            case {"<tensor>": name}:
                return tensors[name]
            case {"<bytes>": name}:
                return tensors[name].numpy().tobytes()
            case {"<rows>": name}:
                return Rows(list(rows.get(name, [])))
        return table

    state: State = json.loads(text, object_hook=put_back)
    return state
