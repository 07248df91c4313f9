"""Checkpoints on disk: written whole or not at all, verified before they are used, out of the way in one rename.

    <run>/checkpoints/step-00012000/<part>.safetensors   one file for each part of the state
                                    state.json           counters, bytes and sha256 of the files; written last
    <run>/checkpoints/shared-<sha256>.safetensors        one large tensor that does not train, by its content: a frozen
                                                         codebook of 300 MB is stored once, not in every checkpoint and
                                                         not for every group of `multi_group` that looks at it

What is being written is called `.saving-*` and what is being deleted `.deleting-*`: neither is ever read, and both are
swept away when the run is next started. All of this is rank 0's work.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqpipe.errors import ArtifactError
from vqpipe.files import digest_json, flush_to_disk, hash_file, write_json

KEEP = 2
"""How many checkpoints stay on disk: the newest, and the one before in case the newest is damaged."""
SHARED_BYTES = 1 << 20
"""From this size on, a tensor that does not train has a file of its own."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""A state's tensors: part -> name -> tensor."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as read: its tensors, on the CPU, and its counters."""

    parts: Parts
    counters: dict[str, int]


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if folder.name.removeprefix("step-").isdigit()), key=step_of)


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def write(
    run_dir: Path, counters: dict[str, int], parts: Parts, untrained: Mapping[str, Collection[str]], keep_every: int
) -> None:
    """Write a checkpoint of `counters["step"]`, then delete all but the last two and every `keep_every`-th step.

    `untrained` names, part by part, the tensors that no optimizer moves. Peak use of the disk is three checkpoints.

    Raises:
        ArtifactError: the disk does not take it; the checkpoints before are as they were.
    """
    target = folder_of(run_dir, counters["step"])
    folder = target.parent
    temporary = folder / f".saving-{target.name}"
    large = {
        part: {name: digest(parts[part][name]) for name in names if parts[part][name].nbytes >= SHARED_BYTES}
        for part, names in untrained.items()
    }
    by_key = {key: parts[part][name] for part, names in large.items() for name, key in names.items()}
    own = {
        part: {name: tensor for name, tensor in tensors.items() if name not in large.get(part, {})}
        for part, tensors in parts.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flush_to_disk(run_dir)
        remove(temporary)
        temporary.mkdir()
        for key, tensor in by_key.items():
            store(tensor, shared_file(folder, key))
        files = {}
        for part, tensors in own.items():
            file = temporary / f"{part}.safetensors"
            save_file({name: on_cpu(tensor) for name, tensor in tensors.items()}, file)
            flush_to_disk(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        table = {**counters, "files": files, "shared": large}
        write_json(temporary / "state.json", table | {"sha256": digest_json(table)})
        remove(target)  # only ever a damaged one, which was passed over
        os.replace(temporary, target)
        flush_to_disk(folder)
        prune(run_dir, counters["step"], keep_every)
    except (OSError, SafetensorError) as error:
        sweep(run_dir)
        absent = [tensor for key, tensor in by_key.items() if not shared_file(folder, key).exists()]
        needed = sum(tensor.nbytes for tensors in own.values() for tensor in tensors.values())
        needed += sum(tensor.nbytes for tensor in absent)
        raise ArtifactError(
            f"cannot save step {counters['step']:,} in {folder}: {reason(error)} "
            f"({needed / 1e6:,.1f} MB are needed, {shutil.disk_usage(run_dir).free / 1e6:,.1f} MB are free)",
            "The checkpoints before are whole: make room and run the same command again",
        ) from None


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Sweep, then find the newest whole checkpoint, None where there is none, and what is wrong with each newer one.

    Raises:
        ArtifactError: there are checkpoints, and all of them are damaged.
    """
    sweep(run_dir)
    passed_over: list[str] = []
    for folder in reversed(checkpoints(run_dir)):
        problem = damage(folder)
        if problem is None:
            return folder, passed_over
        passed_over.append(f"{folder.name}: {problem}")
    if passed_over:
        raise ArtifactError(
            f"every checkpoint in {run_dir / 'checkpoints'} is damaged; {passed_over[0]}",
            "Restore that folder from a copy, or delete it to begin again at step 0",
        )
    return None, []


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: it holds what was written."""
    try:
        table = read_table(folder)
        for name, entry in table["files"].items():
            file = folder / name
            if file.stat().st_size != entry["bytes"] or hash_file(file) != entry["sha256"]:
                return f"{name} is not as written"
        for key in shared_of(table):
            file = shared_file(folder.parent, key)
            if digest(load_file(file)["tensor"]) != key:
                return f"{file.name} is not as written"
    except (OSError, SafetensorError) as error:
        return reason(error)
    except ValueError:
        return "state.json is not as written"
    return None


def read_table(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint; a ValueError where it is not what was written."""
    table = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.pop("sha256", "") != digest_json(table):
        raise ValueError(folder)
    return table


def read(folder: Path) -> Saved:
    """A whole checkpoint's state."""
    table = read_table(folder)
    shared = {key: load_file(shared_file(folder.parent, key))["tensor"] for key in set(shared_of(table))}
    parts = {Path(name).stem: load_file(folder / name) for name in table["files"]}
    for part, names in table["shared"].items():
        parts[part] |= {name: shared[key] for name, key in names.items()}
    return Saved(parts, {name: value for name, value in table.items() if name not in ("files", "shared")})


def sweep(run_dir: Path) -> None:
    """Delete what killed processes left half written or half deleted."""
    for leftover in (run_dir / "checkpoints").glob(".*-*"):
        if leftover.name.startswith((".saving-", ".deleting-")):
            remove(leftover)
    prune_shared(run_dir / "checkpoints")


def prune(run_dir: Path, step: int, keep_every: int) -> None:
    """Delete all but the last two checkpoints up to `step` and each whose step is a multiple of `keep_every` (0: none).

    A newer one than `step` was damaged and passed over: it would else stand in the way for good.
    """
    found = checkpoints(run_dir)
    past = [folder for folder in found if step_of(folder) <= step]
    kept = {*past[-KEEP:], *(folder for folder in past if keep_every and step_of(folder) % keep_every == 0)}
    for folder in found:
        if folder not in kept:
            remove(folder)
    prune_shared(run_dir / "checkpoints")


def prune_shared(folder: Path) -> None:
    """Delete the shared tensors that no checkpoint names."""
    try:
        tables = [read_table(state.parent) for state in folder.glob("step-*/state.json")]
    except ValueError:
        return  # what a damaged checkpoint names is not known, so nothing goes
    named = {shared_file(folder, key) for table in tables for key in shared_of(table)}
    for file in folder.glob("shared-*.safetensors"):
        if file not in named:
            file.unlink()


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one, so that at no moment a part of it stands under its name."""
    if not path.exists():
        return
    doomed = path if path.name.startswith(".") else path.with_name(f".deleting-{path.name}")
    if doomed != path:
        remove(doomed)
        os.replace(path, doomed)
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)  # what stays is swept at the next start
    else:
        doomed.unlink(missing_ok=True)


def store(tensor: Tensor, file: Path) -> None:
    """Write one shared tensor, where it is not yet there."""
    if file.exists():
        return
    temporary = file.with_name(f".saving-{file.name}")
    save_file({"tensor": on_cpu(tensor)}, temporary)
    flush_to_disk(temporary)
    os.replace(temporary, file)
    flush_to_disk(file.parent)


def shared_file(folder: Path, key: str) -> Path:
    return folder / f"shared-{key}.safetensors"


def shared_of(table: dict[str, Any]) -> Iterator[str]:
    """The digests of the shared tensors that a state.json names."""
    return (key for names in table["shared"].values() for key in names.values())


def digest(tensor: Tensor) -> str:
    """sha256 over a tensor's type, shape and bytes, hex."""
    tensor = on_cpu(tensor)
    result = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    result.update(tensor.flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}{f' ({Path(error.filename).name})' if error.filename else ''}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
