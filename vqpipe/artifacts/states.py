"""Saved states of a resumable job: training checkpoints, k-means, evaluation passes.

    <folder>/<prefix>-00012000/<part>.safetensors   the tensors of one part of the state
                               state.json           step, small values, size and sha256 of each file; written last
    <folder>/shared-<sha256>.safetensors            one large tensor that does not change between states, stored once
                                                    by its content: a frozen codebook, features of images already seen

A state is written in a temporary directory, flushed and renamed, so it is whole or absent. The newest `KEEP` are kept:
if the newest was damaged on disk, the one before it is used. `.saving-*` is being written and `.deleting-*` is being
deleted: neither is ever read, and the next `newest` removes both.

No random-number state is saved: every random choice of a job is a function of (seed, step or position).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqpipe.errors import ArtifactError
from vqpipe.files import atomic_write, digest_json, flush_to_disk, free_space, hash_file, reason, write_json

KEEP = 2
"""Number of states kept on disk: the newest, and the one before in case the newest gets damaged."""
SHARED_BYTES = 1 << 20
"""An unchanging tensor of at least this size gets a file of its own."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""The tensors of a state: part -> name -> tensor."""


@dataclass(frozen=True)
class State:
    """One state as read: its tensors, on the CPU, and its small JSON values."""

    step: int
    parts: Parts
    values: dict[str, Any] = field(default_factory=dict)


class States:
    """The states of one job in `folder`. With None nothing is saved and nothing is found.

    One process writes: rank 0 of a job that all ranks share (`distributed.on_main`), or each rank in a folder of its
    own. Any process may read.

    Args:
        request: digest of the job's inputs and settings; states of another request are an error.
        prefix: the name of a state is `<prefix>-<step>`.
    """

    def __init__(self, folder: Path | None, request: str = "", *, prefix: str = "step") -> None:
        self.folder, self.request, self.prefix = folder, request, prefix

    def paths(self) -> list[Path]:
        """The states' folders, oldest first."""
        found = self.folder.glob(f"{self.prefix}-*") if self.folder else ()
        return sorted((path for path in found if path.name.removeprefix(f"{self.prefix}-").isdigit()), key=step_of)

    def path(self, step: int) -> Path:
        """The folder of the state of `step`."""
        assert self.folder is not None
        return self.folder / f"{self.prefix}-{step:08d}"

    def save(
        self,
        step: int,
        parts: Parts,
        values: Mapping[str, Any] | None = None,
        *,
        unchanging: Mapping[str, Collection[str]] | None = None,
        keep_every: int = 0,
    ) -> None:
        """Write the state of `step`, whole or not at all; then delete all but the last `KEEP` and each whose step is a
        multiple of `keep_every`.

        Args:
            unchanging: part -> names of tensors that are likely the same in the next state, to be stored once.

        Raises:
            ArtifactError: it cannot be written (disk full or read-only); the states before are as they were.
        """
        if self.folder is None:
            return
        folder, target = self.folder, self.path(step)
        temporary = folder / f".saving-{target.name}"
        shared = {
            part: {name: digest(parts[part][name]) for name in names if parts[part][name].nbytes >= SHARED_BYTES}
            for part, names in (unchanging or {}).items()
        }
        by_key = {key: parts[part][name] for part, names in shared.items() for name, key in names.items()}
        own = {
            part: {name: tensor for name, tensor in tensors.items() if name not in shared.get(part, {})}
            for part, tensors in parts.items()
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flush_to_disk(folder.parent)
            remove(temporary)
            temporary.mkdir()
            for key, tensor in by_key.items():
                file = shared_file(folder, key)
                if not file.exists():
                    with atomic_write(file) as unfinished:
                        save_file({"tensor": on_cpu(tensor)}, unfinished)
            files = {}
            for part, tensors in own.items():
                file = temporary / f"{part}.safetensors"
                save_file({name: on_cpu(tensor) for name, tensor in tensors.items()}, file)
                flush_to_disk(file)
                files[file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            table = {"step": step, "request": self.request, "values": dict(values or {}), "files": files}
            table["shared"] = shared
            write_json(temporary / "state.json", table | {"sha256": digest_json(table)})
            remove(target)  # exists only if it was damaged
            os.replace(temporary, target)
            flush_to_disk(folder)
            self.prune(step, keep_every)
        except (OSError, SafetensorError) as error:
            self.remove_leftovers()
            absent = [tensor for key, tensor in by_key.items() if not shared_file(folder, key).exists()]
            needed = sum(tensor.nbytes for tensors in own.values() for tensor in tensors.values())
            needed += sum(tensor.nbytes for tensor in absent)
            raise ArtifactError(
                f"cannot save step {step:,} in {folder}: {reason(error)} "
                f"({needed / 1e6:,.1f} MB are needed, {free_space(target)} are free)",
                "Earlier states are intact: free some space and run the same command again",
            ) from None

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole state, or None; and a line about each newer one that is damaged.

        Only the process that writes may call this: it deletes what killed processes left unfinished.

        Raises:
            ArtifactError: the state belongs to another request.
        """
        self.remove_leftovers()
        problems: list[str] = []
        for path in reversed(self.paths()):
            problem = damage(path)
            if problem is None:
                if read_table(path).get("request") != self.request:
                    raise ArtifactError(
                        f"{path} was saved by a run with other inputs or settings", "Name another folder, or delete it"
                    )
                return path, problems
            problems.append(f"{path.name}: {problem}")
        return None, problems

    def discard(self) -> None:
        """Delete every state, once the job is done."""
        for path in self.paths():
            remove(path)
        if self.folder is not None:
            prune_shared(self.folder)

    def remove_leftovers(self) -> None:
        """Delete what killed processes left half written or half deleted."""
        if self.folder is None:
            return
        for leftover in self.folder.glob(".*-*"):
            if leftover.name.startswith((".saving-", ".writing-", ".deleting-")):
                remove(leftover)
        prune_shared(self.folder)

    def prune(self, step: int, keep_every: int) -> None:
        """Delete all but the last `KEEP` states up to `step` and each whose step is a multiple of `keep_every`.

        A state newer than `step` is deleted too: it is damaged, since the job resumed before it.
        """
        found = self.paths()
        past = [path for path in found if step_of(path) <= step]
        kept = {*past[-KEEP:], *(path for path in past if keep_every and step_of(path) % keep_every == 0)}
        for path in found:
            if path not in kept:
                remove(path)
        assert self.folder is not None
        prune_shared(self.folder)


def step_of(path: Path) -> int:
    """The step of a state, by its folder's name."""
    return int(path.name.rpartition("-")[2])


def read(path: Path) -> State:
    """Read a whole state, as `newest` found it."""
    table = read_table(path)
    shared = {key: load_file(shared_file(path.parent, key))["tensor"] for key in set(shared_of(table))}
    parts = {Path(name).stem: load_file(path / name) for name in table["files"]}
    for part, names in table["shared"].items():
        parts[part] |= {name: shared[key] for name, key in names.items()}
    return State(table["step"], parts, table["values"])


def damage(path: Path) -> str | None:
    """What is wrong with a state, in a few words; None if it holds what was written."""
    try:
        table = read_table(path)
        for name, entry in table["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"] or hash_file(file) != entry["sha256"]:
                return f"{name} is damaged"
        for key in set(shared_of(table)):
            file = shared_file(path.parent, key)
            if digest(load_file(file)["tensor"]) != key:
                return f"{file.name} is damaged"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else 'a file'}: {reason(error)}"
    except SafetensorError as error:
        return reason(error)
    except (ValueError, KeyError):
        return "state.json is damaged"
    return None


def read_table(path: Path) -> dict[str, Any]:
    """`state.json` of a state. Raises ValueError if it is damaged."""
    table = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.pop("sha256", "") != digest_json(table):
        raise ValueError(path)
    return table


def prune_shared(folder: Path) -> None:
    """Delete the shared tensors that no state uses."""
    try:
        tables = [read_table(file.parent) for file in folder.glob("*/state.json") if file.parent.name[0] != "."]
    except (OSError, ValueError):
        return  # which tensors a damaged state uses is unknown, so none is deleted
    used = {shared_file(folder, key) for table in tables for key in shared_of(table)}
    for file in folder.glob("shared-*.safetensors"):
        if file not in used:
            file.unlink()


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists. It is renamed first, so that a partly deleted folder is never read."""
    if not path.exists():
        return
    renamed = path if path.name.startswith(".") else path.with_name(f".deleting-{path.name}")
    if renamed != path:
        remove(renamed)
        os.replace(path, renamed)
    if renamed.is_dir():
        shutil.rmtree(renamed, ignore_errors=True)  # the next start removes the rest
    else:
        renamed.unlink(missing_ok=True)


def shared_file(folder: Path, key: str) -> Path:
    """The path of the shared tensor with this digest."""
    return folder / f"shared-{key}.safetensors"


def shared_of(table: dict[str, Any]) -> Iterator[str]:
    """The digests of the shared tensors that a state.json lists."""
    return (key for names in table["shared"].values() for key in names.values())


def digest(tensor: Tensor) -> str:
    """sha256 over a tensor's type, shape and bytes, hex."""
    tensor = on_cpu(tensor)
    result = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    result.update(tensor.flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
