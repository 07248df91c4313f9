"""What watches a training run: its log, pictures and validations, its page, and the table on the terminal."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stages import console
from stages.live import Display

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.recipe import Recipe
    from stages.train import Given
    from vqpipe.artifacts import Draft
    from vqpipe.data.images import ImageSet
    from vqpipe.losses.objective import Objective
    from vqpipe.models import Autoencoder
    from vqpipe.reports.page import ReportPage
    from vqpipe.reports.pictures import ImagePair
    from vqpipe.training.config import TrainConfig
    from vqpipe.training.history import Row
    from vqpipe.training.loggers import Logger
    from vqpipe.training.state import TrainState
    from vqpipe.training.task import Stream, Task
    from vqpipe.training.throughput import Throughput
    from vqpipe.training.tokenizer_task import TokenizerTask
    from vqpipe.training.validation import Best, Validation

W = TypeVar("W", bound="Watcher")
LOOK_AT = 8
"""Images in a reconstruction grid."""


class Watcher(ABC):
    """The loop's listener for any task: `metrics.jsonl` in the draft, TensorBoard and wandb, the table. Rank 0 writes.

    What TensorBoard and wandb write lies beside the draft, in `<out>.logs/`: it keeps its place when the draft is
    renamed, and grows as it likes without becoming part of what is published. A subclass adds what it shows.
    """

    def __init__(self, draft: "Draft", *, settings: dict[str, Any], loggers: list[str], display: Display) -> None:
        self.draft, self.settings, self.names, self.display = draft, settings, loggers, display
        self.loggers: list[Logger] = []
        self.steps, self.batch_size = settings["train"]["steps"], settings["train"]["global_batch_size"]
        self.page_is_old = False

    def start(self, state: "TrainState") -> None:
        """The run begins, or goes on from a checkpoint."""
        from vqpipe import distributed
        from vqpipe.training.history import History
        from vqpipe.training.loggers import LOGGERS, Run

        self.step = state.step
        self.history = History(self.draft.path / "metrics.jsonl", state.step)
        self.display.resume(state.step)
        if state.step:
            console.say(f"resuming at step {state.step:,}")
        for line in state.passed_over:
            console.say(f"passed over: {line}")
        if not distributed.is_main():
            return
        run = Run(
            name=self.draft.out.name,
            folder=self.draft.out.with_name(f"{self.draft.out.name}.logs"),
            notes=self.draft.path,
            settings=self.settings,
            resumed_at=state.step,
            earlier=tuple(self.history.rows),
        )
        self.loggers = [LOGGERS[name](run) for name in self.names]
        if self.names:
            console.say(f"{' and '.join(self.names)}: {run.folder}")
        self.write_page()
        console.say(f"to watch the run, open {self.draft.path / 'report.html'} (written again as it goes)")

    def log(self, row: "Row") -> None:
        """A row of training numbers."""
        self.keep(row)

    @abstractmethod
    def look(self, step: int, network: Any) -> None:
        """Time for pictures."""

    @abstractmethod
    def validate(self, step: int, network: Any) -> None:
        """Time to look at held-out data."""

    def advance(self, state: "TrainState") -> None:
        """A step is done, saved where it was due."""
        self.step = state.step
        self.display.advance()
        if self.page_is_old:
            self.write_page()

    def bad(self, step: int, keys: list[str]) -> None:
        """A step was skipped."""
        some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        console.say(f"step {step:,} was skipped: its gradient is not finite (images {some})")

    def close(self) -> None:
        """The run ends, or is cut: what loggers still hold is written."""
        for logger in self.loggers:
            logger.close()

    def keep(self, row: "Row") -> None:
        """A row goes wherever rows go."""
        self.history.append(row)
        self.display.show(row)
        for logger in self.loggers:
            logger.log(row)

    @abstractmethod
    def page(self, known: dict[str, Any], footer: str) -> "ReportPage":
        """The run's page, from what any run knows (the fields of `reports.training.Run`) and what this one shows."""

    def write_page(self) -> None:
        """`report.html`, from what is known now."""
        from vqpipe import distributed
        from vqpipe.provenance import now, provenance
        from vqpipe.reports import page

        self.page_is_old = False
        if not distributed.is_main():
            return
        name = self.draft.out.name
        known: dict[str, Any] = {
            "name": name,
            "step": self.step,
            "steps": self.steps,
            "rows": self.history.rows,
            "settings": self.settings,
            "lineage": {"kind": self.draft.kind, "name": name, "content": "", "inputs": self.draft.lineage},
            "command": shlex.join(["vqpipe", *provenance(distributed.world_size())["command"][1:]]),
        }
        going_on = "Written again as the run goes on; load it again to see. " if self.step < self.steps else ""
        with self.draft.write("report.html") as path:
            path.write_text(page.render(self.page(known, f"{going_on}{now()}")), encoding="utf-8")


class TokenizerWatcher(Watcher):
    """With pictures, validations and the run's page. Rank 0 writes; validating, all ranks measure.

    `pictures/` and `report.html` lie in the draft and are published with the tokenizer.
    """

    def __init__(
        self,
        draft: "Draft",
        *,
        tokenizer: dict[str, Any],
        pictures: "Pictures",
        validation: "Validation | None",
        best: "Best | None",
        throughput: "Throughput",
        **options: Any,
    ) -> None:
        super().__init__(draft, **options)
        self.tokenizer, self.pictures = tokenizer, pictures
        self.validation, self.best, self.throughput = validation, best, throughput
        self.shown: list[ImagePair] = []
        self.shown_note = self.counts_note = ""
        self.counts: Tensor | None = None

    def log(self, row: "Row") -> None:
        """A row of training numbers, the device's arithmetic added."""
        self.keep(row | self.throughput.of(row))

    def look(self, step: int, network: "Autoencoder") -> None:
        """A grid of originals and reconstructions, `pictures/step-*.png`."""
        from vqpipe import distributed
        from vqpipe.reports.pictures import reconstruction_grid

        originals = self.pictures.originals
        if originals is None or not distributed.is_main():
            return
        again, counts = self.pictures.reconstruct(network)
        grid = reconstruction_grid(originals, again, columns=len(originals))
        with self.draft.write(f"pictures/step-{step:08d}.png") as path:
            path.write_bytes(grid)
        for logger in self.loggers:
            logger.show(step, "reconstructions", grid)
        self.shown = self.pictures.show(again)
        which = "Held-out" if self.validation is not None else "Training"
        self.shown_note = f"{which} images, reconstructed at step {step:,}."
        if self.validation is None:
            self.counts = counts
            self.counts_note = f"On the {len(originals)} images above alone, at step {step:,}: more with --validation."
        self.page_is_old = True

    def validate(self, step: int, network: "Autoencoder") -> None:
        """Measure the held-out images, and keep the weights where they did best."""
        assert self.validation is not None
        assert self.best is not None
        measured = self.validation.measure(network)
        self.keep({"step": step, "images_seen": step * self.batch_size, **measured.row})
        best = self.best.offer(network, step, measured.row)
        self.counts = measured.counts
        self.counts_note = f"On {measured.row['valid/images']:,} held-out images, at step {step:,}."
        name = self.best.measure
        value = f"{measured.row[name]:.4g}" if name in measured.row else "infinite"
        console.say(f"step {step:,}: {name} {value}" + (", the best so far" if best else ""))
        if self.best.fallen(measured.row):
            console.say(
                f"that is far from the {self.best.value:.4g} of step {self.best.step:,}, whose weights are kept: look"
                f" at the curves in {self.draft.path / 'report.html'}; `--publish best` publishes them"
            )
        self.page_is_old = True

    def page(self, known: dict[str, Any], footer: str) -> "ReportPage":
        """Numbers, pictures, curves, codes in use."""
        from vqpipe.reports.training import TrainingRun, training_page

        run = TrainingRun(
            **known,
            tokenizer=self.tokenizer,
            shown=self.shown,
            shown_note=self.shown_note,
            counts=self.counts,
            counts_note=self.counts_note,
            best_step=None if self.best is None else self.best.step,
        )
        return training_page(run, footer)


class Pictures:
    """The same few images, spread over a set, for a run to reconstruct now and then."""

    def __init__(self, images: "ImageSet", image_size: int, device: "torch.device") -> None:
        import torch

        from vqpipe.data.batches import OrderedBatches

        self.device = device
        stride = max(1, len(images) // LOOK_AT)
        spans = [range(start, start + 1) for start in range(0, len(images), stride)[:LOOK_AT]]
        batches = list(OrderedBatches(images, image_size=image_size, batch_size=1, spans=spans))
        self.originals = torch.cat([batch.images for batch in batches]) if batches else None
        self.names = [key for batch in batches for key in batch.keys]

    def reconstruct(self, network: "Autoencoder") -> "tuple[Tensor, Tensor]":
        """uint8[N, 3, S, S], and how often each code was chosen for it, int64[G, K]; both on the CPU."""
        import torch

        from vqpipe.data.transforms import to_float, to_uint8
        from vqpipe.metrics.usage import CodeUsage

        assert self.originals is not None
        network.eval()
        with torch.no_grad():
            images, _, quantized = network(to_float(self.originals.to(self.device)))
        usage = CodeUsage(network.quantizer.codebook_size, network.quantizer.num_groups)
        usage.update(quantized.ids)
        return to_uint8(images).cpu(), usage.counts

    def show(self, again: "Tensor") -> "list[ImagePair]":
        """Each image and its reconstruction for the page."""
        from vqpipe.metrics.distortion import mean_squared_error, psnr_of
        from vqpipe.reports.pictures import ImagePair, to_png

        assert self.originals is not None
        psnr = psnr_of(mean_squared_error(self.originals, again), peak=255.0).tolist()
        pairs = zip(self.names, self.originals, again, psnr, strict=True)
        return [ImagePair(name, to_png(a), to_png(b), db if db < float("inf") else None) for name, a, b, db in pairs]


def train_watched(
    draft: "Draft",
    task: "Task[Any, Any]",
    config: "TrainConfig",
    stream: "Stream[Any]",
    *,
    seed: int,
    device: "torch.device",
    watcher: Callable[[Display], W],
) -> "tuple[TrainState, W]":
    """Train the task in `draft`, to the end; a signal saves the state and ends the process.

    Args:
        watcher: the table on the terminal -> what watches the run.
    """
    from stages.live import display
    from vqpipe.training import loop

    with console.StopAtStepEnd() as signals, display(config.steps) as shown:
        listener = watcher(shown)
        try:
            state = loop.train(
                task,
                config,
                stream,
                draft.path,
                seed=seed,
                device=device,
                listener=listener,
                stop_asked=signals.requested,
            )
        finally:
            listener.close()
        if state.step < config.steps:
            signals.exit()
    return state, listener


def watch(
    recipe: "Recipe",
    draft: "Draft",
    given: "Given",
    task: "TokenizerTask",
    device: "torch.device",
    display: Display,
    *,
    sections: Sequence[str],
    facts: dict[str, Any],
) -> TokenizerWatcher:
    """What logs, shows and validates the run of a tokenizer with these facts; `sections` of its preset are kept."""
    from vqpipe.config import to_table
    from vqpipe.training.throughput import throughput

    side = recipe.data.image_size
    validation, best = held_out_images(recipe, draft, given, task.objective, device)
    return TokenizerWatcher(
        draft,
        settings={name: to_table(getattr(recipe, name)) for name in sections},
        tokenizer=facts,
        pictures=Pictures(given.held_out or given.images, side, device),
        validation=validation,
        best=best,
        throughput=throughput(recipe.train, task.model, task.discriminator, task.objective, side, device),
        loggers=given.loggers,
        display=display,
    )


def held_out_images(
    recipe: "Recipe", draft: "Draft", given: "Given", objective: "Objective", device: "torch.device"
) -> "tuple[Validation | None, Best | None]":
    """What measures the held-out images and keeps the best weights; nothing where there are no such images."""
    from vqpipe import distributed
    from vqpipe.training.validation import Best, Validation

    config = recipe.train
    if given.held_out is None:
        return None, None
    perceptual = objective.perceptual
    name = f"lpips_{recipe.objective.perceptual}"
    validation = Validation(
        given.held_out,
        image_size=recipe.data.image_size,
        batch_size=config.share(distributed.world_size()) // config.accumulate,
        limit=config.validation_images,
        perceptual={} if perceptual is None else {name: perceptual.lpips},
        num_workers=recipe.data.num_workers,
        device=device,
    )
    file = draft.path / "best.safetensors"
    if perceptual is None:
        return validation, Best(file, "valid/psnr", higher=True)
    return validation, Best(file, f"valid/{name}", higher=False)
