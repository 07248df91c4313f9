"""What a long pass over images has taken in, put into the draft now and then: a killed command goes on from there.

    OUT.partial/states/rank-0-00000012.safetensors          all that rank 0 has taken in; of these the last two
                       rank-0-rows-00000003.safetensors     what grows with the images, each row written once

Each rank writes its own share's files by itself; publishing deletes them. A state is as large as what it measures with:
32 MiB for a mean and a covariance of 2,048 features, 16 bytes for each code of a codebook, the kept pictures. Features
kept for KID and such come to the rows: as much disk as they take memory, and the time of a save is that of what is new.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from stages import console

if TYPE_CHECKING:
    from torch import Tensor

    from vqpipe.artifacts import Draft

FORMAT = 1
"""Of what a state holds; another number is not read."""
LONGER = 10
"""How much longer than asked a rank waits before it saves again, at the most, where saving takes its time."""
SHARE = 0.05
"""Of the time that saving may take."""


class Accumulates(Protocol):
    """As `vqpipe.metrics.state.Accumulator`."""

    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


class Saving:
    """Of one rank's share, the images [first, ...).

    Args:
        seconds: between two saves; 0: whenever `tick` is called.
    """

    def __init__(self, draft: "Draft", seconds: float, first: int) -> None:
        from vqpipe import distributed
        from vqpipe.artifacts.saved import Checkpoints

        self.seconds = self.pause = seconds
        self.first, self.series = first, f"rank-{distributed.rank()}"
        self.damaged: list[str] = []
        self.states = Checkpoints(draft.path / "states", draft.request, self.damaged.append)
        self.number = self.shards = 0
        """How many states, and files of rows, there are up to the newest one."""
        self.written: dict[str, int] = {}
        """How many parts of each growing thing are on disk."""
        self.done = first
        """Up to where images are in the newest state."""
        self.saved = time.monotonic()

    def resume(self, target: Accumulates) -> int:
        """Give `target` what the newest whole state holds; the place of the image to go on from. Every rank calls it.
        What was saved and cannot be used is said in a line, and so is from where it goes on."""
        from vqpipe.distributed import gather_objects

        found = gather_objects((self.take_up(target), self.done - self.first))
        for problem in dict.fromkeys(problem for problem, _ in found if problem is not None):
            console.say(problem)
        if earlier := sum(count for _, count in found):
            console.say(f"going on after {earlier:,} images")
        self.saved = time.monotonic()
        return self.done

    def take_up(self, target: Accumulates) -> str | None:
        """Load the newest state that can be used; what is wrong, in words."""
        from vqpipe.config import difference
        from vqpipe.metrics.state import unpack

        if not self.states.files(self.series):
            return None
        found, own = self.states.newest(self.series), self.made_by()
        if found is not None and found.state.get("made_by") != own:
            return self.anew(f"is of another run ({difference(found.state.get('made_by'), own)})")
        rows = None if found is None else self.rows(found.state["shards"])
        if found is None or rows is None:
            return self.anew("is damaged")
        target.load(unpack(found.state["content"], found.tensors, rows))
        self.number, self.shards, self.done = found.step, found.state["shards"], found.state["done"]
        self.written = {name: len(parts) for name, parts in rows.items()}
        return self.damaged[0] if self.damaged else None

    def anew(self, problem: str) -> str:
        """Delete what was saved; the reason, in words."""
        self.states.discard(self.series, f"{self.series}-rows")
        return f"what was saved of this pass {problem}: it begins anew"

    def rows(self, shards: int) -> "dict[str, list[Tensor]] | None":
        """What was written of each growing thing; None where a file is missing or damaged."""
        rows: dict[str, list[Tensor]] = {}
        files = {int(file.stem[-8:]): file for file in self.states.files(f"{self.series}-rows")}
        for number in range(shards):
            shard = self.states.read(files[number]) if number in files else None
            if shard is None:
                return None
            for name, part in shard.tensors.items():
                rows.setdefault(name, []).append(part)
        return rows

    def tick(self, target: Accumulates, done: int) -> None:
        """The images up to `done` are taken in: save that, where it is time."""
        if time.monotonic() - self.saved >= self.pause:
            self.save(target, done)

    def end(self, target: Accumulates, done: int) -> None:
        """All images are taken in: save that where something was saved before, so that the rest, too, can be killed."""
        if self.number and self.done != done:
            self.save(target, done)

    def save(self, target: Accumulates, done: int) -> None:
        """Write what is new of the rows, then the state that names them.

        Raises:
            ArtifactError: the disk does not take it.
        """
        import torch

        from vqpipe.artifacts.saved import Saved
        from vqpipe.metrics.state import pack

        began = time.monotonic()
        content, tensors, rows = pack(target.state())
        fresh = {name: parts[self.written.get(name, 0) :] for name, parts in rows.items()}
        fresh = {name: parts for name, parts in fresh.items() if parts}
        if fresh:
            shard = {name: torch.cat(parts) for name, parts in fresh.items()}
            self.states.save(f"{self.series}-rows", Saved(self.shards, shard), keep=None)
            self.shards += 1
            self.written |= {name: len(rows[name]) for name in fresh}
        self.number, self.done = self.number + 1, done
        state = {"made_by": self.made_by(), "done": done, "shards": self.shards, "content": content}
        self.states.save(self.series, Saved(self.number, tensors, state))
        self.saved = time.monotonic()
        self.pause = max(self.seconds, min((self.saved - began) / SHARE, self.seconds * LONGER))

    def made_by(self) -> dict[str, Any]:
        """What a state has to agree with, beside the request."""
        from importlib import metadata

        from vqpipe import distributed

        versions = {name: metadata.version(name) for name in ("vqpipe", "torch")}
        return {"format": FORMAT, "ranks": distributed.world_size(), "first image": self.first, **versions}
