"""What a clustering or another long pass has reached, saved so that the same command goes on from there after any kill.

    <folder>/<series>-00000012.safetensors    tensors; their header holds the step, what was asked, the small numbers of
                                              the state, and a sha256 over all of it

A file is written under another name, flushed and renamed, so it is whole or absent. The newest two of a series are
kept: one that the disk has damaged since is passed over, with a note, in favour of the one before. There is no
random-number state to save: every random choice is a function of (seed, what is drawn, round).
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqpipe import distributed
from vqpipe.errors import ArtifactError
from vqpipe.files import flush_to_disk

CPU = torch.device("cpu")
KEEP = 2


@dataclass(frozen=True)
class Saved:
    """One saved state: its step in the series, its tensors (on the CPU), its small JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """States of one clustering or pass, in `folder`; None: nothing is kept, and nothing is found.

    `request` is a digest of what is worked on and how; `note` hears, in words, of a file that cannot be used.
    Where `shared`, all ranks work on one clustering: every rank makes each call, rank 0 alone touches the disk, and
    all get what it found. Otherwise each rank is by itself.
    """

    def __init__(
        self,
        folder: Path | None,
        request: str = "",
        note: Callable[[str], None] = lambda text: None,
        shared: bool = False,
    ) -> None:
        self.folder, self.request, self.note, self.shared = folder, request, note, shared

    def save(self, series: str, saved: Saved, keep: int | None = KEEP) -> None:
        """Write one state, whole or not at all, then delete all but the last `keep` of its series; None: delete none.

        Raises:
            ArtifactError: the disk does not take it.
        """
        if self.folder is None or (self.shared and not distributed.is_main()):
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}
        header = {"request": self.request, "step": str(saved.step), "state": json.dumps(saved.state)}
        header["sha256"] = digest(tensors, header)
        target = self.folder / f"{series}-{saved.step:08d}.safetensors"
        temporary = target.with_name(f".writing-{target.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, header)
            flush_to_disk(temporary)
            os.replace(temporary, target)
            flush_to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ArtifactError(f"cannot write {target}: {error}", "Free some space and run again") from None
        for old in self.files(series)[:-keep] if keep else ():
            old.unlink()

    def newest(self, series: str, device: torch.device = CPU) -> Saved | None:
        """The last whole state of a series, or None. Between ranks its tensors travel through `device`.

        Raises:
            ArtifactError: it was saved by a clustering of other features or settings.
        """
        if not self.shared:
            return self.find(series)
        saved = None
        with distributed.sharing_errors():
            if distributed.is_main():
                saved = self.find(series)
        return handed_round(saved, device)

    def find(self, series: str) -> Saved | None:
        if self.folder is None:
            return None
        for file in reversed(self.files(series)):
            saved = self.read(file)
            if saved is not None:
                return saved
        return None

    def read(self, file: Path) -> Saved | None:
        """The state in one file; None, with a note, where it is damaged."""
        try:
            with safe_open(file, framework="pt") as handle:
                header = dict(handle.metadata() or {})
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if header.pop("sha256", "") != digest(tensors, header):
                raise ValueError("its content is not what was written")
            step, state = int(header["step"]), json.loads(header["state"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self.note(f"{file.name} is damaged ({error}); the one before it is used, if there is one")
            return None
        if header["request"] != self.request:
            raise ArtifactError(
                f"{file} was saved by a clustering of other features or settings", "Name another folder, or delete it"
            )
        return Saved(step, tensors, state)

    def files(self, series: str) -> list[Path]:
        """The files of a series, oldest first."""
        return sorted(self.folder.glob(f"{series}-????????.safetensors")) if self.folder else []

    def discard(self, *names: str) -> None:
        """Delete the states of series that are no longer needed."""
        if self.shared and not distributed.is_main():
            return
        for series in names:
            for file in self.files(series):
                file.unlink()


def digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """sha256 over a header and contiguous CPU tensors: names, types, shapes, bytes."""
    result = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        result.update(tensor.numpy().data)
    return result.hexdigest()


def handed_round(saved: Saved | None, device: torch.device) -> Saved | None:
    """Rank 0's state on every rank."""
    outline = None
    if saved is not None:
        outline = saved.step, saved.state, [(name, list(t.shape), t.dtype) for name, t in saved.tensors.items()]
    outline = distributed.broadcast_object(outline)
    if outline is None or distributed.world_size() == 1:
        return saved
    step, state, shapes = outline
    tensors = {}
    for name, shape, dtype in shapes:
        here = saved.tensors[name] if saved is not None else torch.empty(shape, dtype=dtype)
        tensors[name] = distributed.broadcast(here.to(device)).cpu()
    return Saved(step, tensors, state)
