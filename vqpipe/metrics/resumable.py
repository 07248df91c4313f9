"""States that accumulate over batches: saved, restored, and merged over ranks; as JSON text and tensors."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vqpipe.distributed import all_reduce_sum, gather_objects

State = dict[str, Any]
TENSOR, BYTES, ROWS = "<tensor>", "<bytes>", "<rows>"
"""Keys of the JSON objects that refer to tensors."""


@dataclass(frozen=True)
class Rows:
    """Tensors [n, D] that never change once they are in the list, so that a saved state stores each of them once."""

    parts: list[Tensor]


class Resumable:
    """Accumulates over the batches of this rank's share of images.

    - `state()`, `load_state(state)`: save and restore. An object made with the same arguments continues from the state
      of another, to the same result in the last digit.
    - `merged()`: a copy with the state of all ranks together. Every rank calls it, in the same order.

    Subclasses name in `state_names` the attributes that change: numbers, text, tensors, arrays, other resumable
    objects, and lists and dicts (by text or number) of these. By default `merged` sums these attributes over ranks; a
    subclass whose state is no sum overrides it, or gathers in a method of its own.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def state(self) -> State:
        """The state. It shares memory with the object: save it before the next update."""
        return {name: to_state(getattr(self, name)) for name in self.state_names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        for name in self.state_names:
            setattr(self, name, from_state(getattr(self, name), state[name]))

    def merged(self) -> Self:
        """A copy with the sums over all ranks."""
        merged = copy.copy(self)
        for name in self.state_names:
            setattr(merged, name, summed(getattr(self, name)))
        return merged


def to_state(value: Any) -> Any:
    """An attribute as it is saved."""
    if isinstance(value, Resumable):
        return value.state()
    if isinstance(value, dict):
        return {str(key): to_state(each) for key, each in value.items()}
    return [to_state(each) for each in value] if isinstance(value, list) else value


def from_state(own: Any, value: Any) -> Any:
    """A saved attribute; `own` is its value in a new object."""
    if isinstance(own, Resumable):
        own.load_state(value)
        return own
    if isinstance(own, Tensor):
        return value.to(own.device)
    if isinstance(own, np.ndarray):
        return value.numpy()
    if isinstance(own, dict) and any(isinstance(each, Resumable) for each in own.values()):
        return {key: from_state(each, value[str(key)]) for key, each in own.items()}
    if isinstance(own, list) and any(isinstance(each, Resumable) for each in own):
        return [from_state(each, part) for each, part in zip(own, value, strict=True)]
    return value


def summed(value: Any) -> Any:
    """An attribute summed over all ranks: key by key in a dict, whose keys may differ between ranks. Lists are
    joined in rank order."""
    if isinstance(value, Resumable):
        return value.merged()
    if isinstance(value, Tensor):
        return all_reduce_sum(value.clone())
    if isinstance(value, dict) and any(isinstance(each, Resumable) for each in value.values()):
        return {key: summed(each) for key, each in value.items()}
    total: Any = {} if isinstance(value, dict) else [] if isinstance(value, list) else 0
    for part in gather_objects(value):
        if isinstance(part, dict):
            total |= {key: total.get(key, 0) + number for key, number in part.items()}
        else:
            total = total + part
    return total


def pack(state: State) -> tuple[str, dict[str, Tensor], list[str]]:
    """A state as JSON text and tensors by name, and the names of the tensors that do not change any more: `Rows` and
    bytes."""
    tensors: dict[str, Tensor] = {}
    unchanging: list[str] = []

    def add(tensor: Tensor, into: list[str] | None = None) -> str:
        name = str(len(tensors))
        tensors[name] = tensor
        if into is not None:
            into.append(name)
        return name

    def to_json(value: Any) -> dict[str, Any]:
        if isinstance(value, Rows):
            return {ROWS: [add(part, unchanging) for part in value.parts]}
        if isinstance(value, bytes):
            return {BYTES: add(torch.from_numpy(np.frombuffer(value, dtype=np.uint8).copy()), unchanging)}
        return {TENSOR: add(torch.from_numpy(value) if isinstance(value, np.ndarray) else value)}

    return json.dumps(state, default=to_json), tensors, unchanging


def unpack(text: str, tensors: Mapping[str, Tensor]) -> State:
    """Undo `pack`. Arrays come back as tensors, tuples as lists, keys of dicts as text."""

    def put_back(table: dict[str, Any]) -> Any:
        match table:
            case {"<tensor>": name}:
                return tensors[name]
            case {"<bytes>": name}:
                return tensors[name].numpy().tobytes()
            case {"<rows>": names}:
                return Rows([tensors[name] for name in names])
        return table

    state: State = json.loads(text, object_hook=put_back)
    return state
