"""A pass over images that a killed run continues. Each rank takes a contiguous share of the images and saves its state
in a folder of its own:

    RUN/states/rank-0/images-00000064/     what rank 0 accumulated over the first 64 images of its share
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Draft, states
from vqpipe.config import difference
from vqpipe.data.batches import Batch, OrderedBatches
from vqpipe.data.images import ImageSet
from vqpipe.data.skipped import Skipped, merged
from vqpipe.errors import DataError
from vqpipe.metrics.resumable import Resumable, pack, unpack
from vqpipe.progress import Progress, Throttle
from vqpipe.provenance import versions
from vqpipe.words import counted

FORMAT = 5
"""Version of the saved states; others are not resumed."""
MAX_SHARE = 0.05
"""Saves are less frequent if they take more than this share of the time."""
LONGEST_PAUSE = 1800.0
"""Seconds between two saves, however long one takes: of an interrupted pass no more is lost."""


class ImagePass(Resumable):
    """What a pass over images has accumulated on this rank. Subclasses add what they measure."""

    all_skipped: Skipped
    """After the pass: the unreadable images of all ranks."""

    def __init__(self) -> None:
        self.skipped: dict[int, str] = {}
        """Position -> reason of each unreadable image of this rank."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.skipped = merged([self.skipped])

    def batches(
        self,
        title: str,
        images: ImageSet,
        stop: int,
        draft: Draft | None,
        *,
        save_seconds: float,
        max_skipped: float,
        image_size: int,
        batch_size: int,
        num_workers: int,
        transform: Callable[[Image.Image], Tensor],
        progress: Progress,
    ) -> Iterator[Batch]:
        """Yield this rank's batches of the images [0, stop) after the newest saved state, to which the pass is
        restored. A batch counts as done when the next one is asked for: only then is the state saved. Every rank calls
        it.

        Args:
            title: that of the progress display.
            draft: where states are saved; None: nowhere.
            save_seconds: interval between saves, up to LONGEST_PAUSE if saving takes long; 0: after each batch.
            max_skipped: largest share of unreadable images, 0..1.
            image_size, batch_size, num_workers, transform: see `OrderedBatches`.

        Raises:
            DataError: more unreadable images than `max_skipped`, as soon as this rank has found so many. The state is
                saved, so that a larger one continues from there. Or all images are unreadable.
        """
        first, last = rank_share(stop, batch_size)
        checkpoints = Checkpoints(self, range(first, last), draft, save_seconds)
        done = checkpoints.resume(progress)
        batches = OrderedBatches(
            images,
            spans=[range(done, last)],
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            transform=transform,
        )
        progress.start(distributed.share_title(title), last - first, done=done - first)
        own = Skipped(images, stop, self.skipped)
        if done < last:
            own.check(max_skipped, draft, so_far=True)
        for piece in batches.pieces():
            self.skipped |= piece.skipped
            if piece.batch is not None:
                yield piece.batch
            if checkpoints.throttle.due():
                checkpoints.save(piece.positions.stop)
            progress.advance(len(piece.positions))
            if own.exceeds(max_skipped) and piece.positions.stop < last:
                checkpoints.save(piece.positions.stop)
                own.check(max_skipped, draft, so_far=True)
        self.all_skipped = Skipped(images, stop, merged(distributed.gather_objects(self.skipped)))
        if self.all_skipped.exceeds(max_skipped) or (checkpoints.has_state and checkpoints.done != last):
            checkpoints.save(last)  # the latter so that a resume does not repeat the last images
        self.all_skipped.check(max_skipped, draft)
        if 0 < stop == len(self.all_skipped):
            raise DataError(f"none of the {stop:,} images of {images.name} can be read", "Check them")


class Checkpoints:
    """Saves and restores the state of a pass over images, each rank in a folder of its own.

    Args:
        share: the positions of this rank's images in the set.
        draft, seconds: see `ImagePass.batches`.
    """

    def __init__(self, run: ImagePass, share: range, draft: Draft | None, seconds: float) -> None:
        folder = None if draft is None else draft.path / "states" / f"rank-{distributed.rank()}"
        self.states = states.States(folder, "" if draft is None else draft.request, prefix="images")
        self.run, self.share, self.done = run, share, share.start
        """`done`: the images before it are in the newest state."""
        self.has_state = False
        part = MAX_SHARE if seconds else math.inf
        self.throttle = Throttle(first=seconds, every=seconds, share=part, longest_pause=LONGEST_PAUSE)

    def resume(self, progress: Progress) -> int:
        """Restore the newest usable state; return the position to continue from. Every rank calls it."""
        path, problems = self.states.newest()
        if path is not None:
            state = states.read(path)
            if state.values["made_by"] != self.made_by():
                reason = difference(state.values["made_by"], self.made_by())
                problems = [f"{path.name}: saved by another run ({reason})"]
                path = None
            else:
                self.run.load_state(unpack(state.values["content"], {**state.parts["once"], **state.parts["state"]}))
                self.done, self.has_state = self.share.start + state.step, True
        if path is None and problems:
            self.states.discard()
            problems = [f"{problems[0]}; no other state can be used, the pass starts from the beginning"]
        ranks = distributed.gather_objects((problems, self.done - self.share.start))
        for problem in dict.fromkeys(problem for found, _ in ranks for problem in found):
            progress.message(problem)
        if count := sum(count for _, count in ranks):
            progress.message(f"resuming after {counted(count, 'images')}")
        return self.done

    def save(self, done: int) -> None:
        """Write the state after the images up to `done`.

        Raises:
            ArtifactError: it cannot be written (disk full or read-only).
        """
        with self.throttle.timed():
            content, tensors, unchanging = pack(self.run.state())
            once = {name: tensors.pop(name) for name in unchanging}
            values = {"made_by": self.made_by(), "content": content}
            self.states.save(
                done - self.share.start, {"state": tensors, "once": once}, values, unchanging={"once": unchanging}
            )
        self.has_state, self.done = True, done

    def made_by(self) -> dict[str, Any]:
        """What must be equal for a state to be resumed, besides the request."""
        share = [self.share.start, self.share.stop]  # it depends on the batch size, which the request does not have
        run = {"format": FORMAT, "ranks": distributed.world_size(), "share": share}
        return {**run, **versions(("vqpipe", "torch"))}


def rank_share(num_images: int, batch_size: int) -> tuple[int, int]:
    """The images [first, stop) of this rank: contiguous, and whole batches of the set."""
    rank, ranks = distributed.rank(), distributed.world_size()
    num_batches = -(-num_images // batch_size)
    first, stop = (min(num_batches * r // ranks * batch_size, num_images) for r in (rank, rank + 1))
    return first, stop
