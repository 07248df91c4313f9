"""Callbacks of the training loop: the log, the progress bar, samples, and the page of a run.

A callback overrides the hooks it needs. Every rank calls every hook; files are written on rank 0 only.
More callbacks are in loggers.py, validation.py and throughput.py.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.data.batches import OrderedBatches
from vqpipe.data.images import ImageSet
from vqpipe.data.skipped import Skipped
from vqpipe.data.transforms import to_float, to_uint8
from vqpipe.files import atomic_write, disk_errors, read_rows
from vqpipe.metrics.distortion import mean_squared_error, psnr_of
from vqpipe.metrics.usage import CodeUsage
from vqpipe.models import Autoencoder
from vqpipe.progress import Progress, Throttle
from vqpipe.provenance import command, now
from vqpipe.reports import page
from vqpipe.reports.pictures import ImagePair, reconstruction_grid, to_png
from vqpipe.reports.training import NUMBERS, TrainingRun, in_words, newest_number, training_page
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.config import TrainConfig
from vqpipe.training.running_metrics import Row
from vqpipe.words import counted, first_names, percent

GRID_IMAGES = 8
"""Images in a reconstruction grid."""


class Callback:
    """Base class: every hook does nothing. `network` is the weight average, which is what will be published."""

    def on_start(self, state: TrainState) -> None:
        """The run starts, or resumes from a checkpoint."""

    def on_log(self, row: Row) -> None:
        """A row of the log: of training every `log_every` steps and at the end, or what `on_validate` returned.

        A callback may add numbers to `row` for those after it.
        """

    def on_partial_row(self, row: Row) -> None:
        """Numbers of the first steps, before the first row of the log: for display, they are not logged."""

    def on_sample(self, step: int, network: Any) -> Mapping[str, bytes]:
        """Every `sample_every` steps and at the end. Returns images by name, as PNG files, for `on_images`."""
        return {}

    def on_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """What `on_sample` of all callbacks returned."""

    def on_preview(self, step: int, network: Any) -> None:
        """Now and then between two samples, by wall-clock time: refresh the pictures of `report_fields`. Since time
        decides, nothing that is published or logged may depend on it."""

    def on_validate(self, step: int, network: Any) -> Row:
        """Every `validate_every` steps (0: with each sample) and at the end. Returns numbers by name for `on_log`."""
        return {}

    def on_skipped_step(self, step: int, keys: Sequence[str]) -> None:
        """The gradient of a network was not finite in `step`, and it did not move; `keys` are this rank's images."""

    def on_step_end(self, state: TrainState) -> None:
        """After a step with its rows and samples, before its checkpoint."""

    def on_end(self) -> None:
        """The run ends, also by an error."""

    def report_fields(self) -> Mapping[str, Any]:
        """Fields of `vqpipe.reports.training.TrainingRun` for the page of the run."""
        return {}


class CallbackList(Callback):
    """Several callbacks as one; each hook calls theirs in order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def on_start(self, state: TrainState) -> None:
        self.state = state
        for callback in self.callbacks:
            callback.on_start(state)

    def on_log(self, row: Row) -> None:
        for callback in self.callbacks:
            callback.on_log(row)

    def on_sample(self, step: int, network: Any) -> Mapping[str, bytes]:
        images = {name: png for each in self.callbacks for name, png in each.on_sample(step, network).items()}
        if images:
            self.on_images(step, images)
        return images

    def on_partial_row(self, row: Row) -> None:
        for callback in self.callbacks:
            callback.on_partial_row(row)

    def on_images(self, step: int, images: Mapping[str, bytes]) -> None:
        for callback in self.callbacks:
            callback.on_images(step, images)

    def on_preview(self, step: int, network: Any) -> None:
        for callback in self.callbacks:
            callback.on_preview(step, network)

    def on_validate(self, step: int, network: Any) -> Row:
        row = {name: value for each in self.callbacks for name, value in each.on_validate(step, network).items()}
        if row:
            self.on_log({"step": step, "images_seen": self.state.images_seen, **row})
        return row

    def on_skipped_step(self, step: int, keys: Sequence[str]) -> None:
        for callback in self.callbacks:
            callback.on_skipped_step(step, keys)

    def on_step_end(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.on_step_end(state)

    def on_end(self) -> None:
        for callback in self.callbacks:
            callback.on_end()


class MetricsLog(Callback):
    """`metrics.jsonl`: the log, one JSON object per line. A resumed run first drops the rows it will write again.

    `rows` is the content of the file, on rank 0; elsewhere it is empty.

    Raises:
        ArtifactError: the file cannot be written (disk full or read-only), raised on every rank.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def on_start(self, state: TrainState) -> None:
        distributed.on_main(lambda: self.truncate(state.step))

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`."""
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        with disk_errors(self.path), atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def on_log(self, row: Row) -> None:
        """Append the row and flush it: rows are on disk before the checkpoint that follows them."""
        distributed.on_main(lambda: self.append(dict(row)))

    def append(self, row: Row) -> None:
        """Write one row."""
        self.rows.append(row)
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def latest(self, name: str, step: int | None = None) -> float | None:
        """The newest finite number logged under `name`, or None; with `step` of that step alone."""
        return newest_number([row for row in self.rows if step in (None, row["step"])], name)


class ProgressCallback(Callback):
    """Displays the run: steps done, the main numbers beside them, and a table of the newest numbers."""

    def __init__(self, progress: Progress, config: TrainConfig) -> None:
        self.progress, self.config = progress, config
        self.row: Row = {}
        self.text = ""

    def on_start(self, state: TrainState) -> None:
        self.progress.start("train", self.config.steps, "steps", state.step)
        if state.step:
            self.progress.message(f"resuming at step {state.step:,}")
        for problem in state.damaged:
            self.progress.message(f"skipped a damaged checkpoint: {problem}")

    def on_log(self, row: Row) -> None:
        """Numbers stay in the table until newer ones replace them; those of a validation carry their step."""
        if "learning_rate" in row:
            self.text = summary(row) + self.short_window(row["step"])
        else:
            row = {name: value for name, value in row.items() if name.startswith("valid/")} | {
                "valid/step": row["step"]
            }
        self.row = self.row | row
        self.progress.note(self.text, details(self.row))

    def on_partial_row(self, row: Row) -> None:
        self.on_log(row)

    def short_window(self, step: int) -> str:
        """How few steps a row is about, where it is fewer than usual: they use fewer codes."""
        steps = step % self.config.log_every
        return f" (of {counted(steps, 'steps')})" if steps else ""

    def on_skipped_step(self, step: int, keys: Sequence[str]) -> None:
        self.progress.message(f"step {step:,}: a gradient is not finite, no update (images {first_names(keys)})")

    def on_step_end(self, state: TrainState) -> None:
        self.progress.advance()


def summary(row: Row) -> str:
    """The main numbers of a row, in one line."""
    formats = {"psnr": "PSNR {:.2f} dB".format, "utilization": lambda share: f"codes in use {percent(share)}"}
    formats = formats if "psnr" in row else {"loss/total": "loss {:.4g}".format}
    formats |= {"images_per_second": "{:.3g} images/s".format}
    parts = [text(row[name]) for name, text in formats.items() if name in row]
    if row.get("nonfinite_steps"):
        parts.append(f"{row['nonfinite_steps']:,} skipped steps")
    return ", ".join(parts)


def details(row: Row) -> list[tuple[str, str]]:
    """Every known number of a row: (label, text), a label for each group of `reports.training.NUMBERS`."""
    lines: dict[str, list[str]] = {"loss": []}
    labelled = {column.key for column in NUMBERS} - {"loss/total"}
    losses = (name for name in row if name.startswith("loss/") and name not in labelled)
    for name in sorted(losses, key=lambda name: (name != "loss/total", name)):
        lines["loss"].append(f"{name.removeprefix('loss/').replace('_', ' ')} {row[name]:.4g}")
    for column in NUMBERS:
        if column.key in row and column.group != "loss":
            lines.setdefault(column.group, []).append(f"{column.short_label} {column.text_with_unit(row[column.key])}")
    return [(group, "   ".join(numbers)) for group, numbers in lines.items() if numbers]


class SkippedImages(Callback):
    """Ends a run in which too many images cannot be used: more than a share of `max_skipped` of the whole set, each
    counted once over all ranks and epochs. So a run on a set with fewer of them never ends.

    The ranks share what they found with each row of the log.
    """

    def __init__(self, draft: Draft, images: ImageSet, max_skipped: float, progress: Progress) -> None:
        self.draft, self.images, self.max_skipped, self.progress = draft, images, max_skipped, progress

    def on_start(self, state: TrainState) -> None:
        self.state = state
        self.check()

    def on_log(self, row: Row) -> None:
        self.state.share_skipped()
        if self.found().exceeds(self.max_skipped):
            self.state.stop = True

    def found(self) -> Skipped:
        """The images that all ranks have found."""
        return Skipped(self.images, len(self.images), self.state.skipped)

    def check(self) -> None:
        """Raise a DataError if too many images cannot be used."""
        self.found().check(self.max_skipped, self.draft)

    def publish(self) -> dict[str, Any]:
        """Write the list into the tokenizer. Returns its facts, empty where every image can be used."""
        found = self.found()
        found.publish(self.draft, self.progress)
        return {"skipped": found.counts()} if len(found) else {}


class ReconstructionGrid(Callback):
    """Originals and reconstructions of the same few images, spread over a set: `pictures/step-*.png` in the draft.

    Args:
        held_out: the images are not trained on. Then `Validation` counts codes, else they are counted on these images.
    """

    def __init__(
        self, draft: Draft, images: ImageSet, image_size: int, device: torch.device, *, held_out: bool
    ) -> None:
        self.draft, self.device, self.held_out = draft, device, held_out
        starts = range(0, len(images), max(1, len(images) // GRID_IMAGES))[:GRID_IMAGES]
        spans = [range(start, start + 1) for start in starts]
        batches = list(OrderedBatches(images, image_size=image_size, batch_size=1, spans=spans))
        self.originals = torch.cat([batch.images for batch in batches]) if batches else None
        self.names = [key for batch in batches for key in batch.keys]
        self.fields: dict[str, Any] = {}

    def on_sample(self, step: int, network: Autoencoder) -> Mapping[str, bytes]:
        if self.originals is None or not distributed.is_main():
            return {}
        grid = self.draw(step, network, self.originals)
        write_picture(self.draft, step, grid)
        return {"reconstructions": grid}

    def on_preview(self, step: int, network: Autoencoder) -> None:
        if self.originals is not None and distributed.is_main():
            self.draw(step, network, self.originals)

    def draw(self, step: int, network: Autoencoder, originals: Tensor) -> bytes:
        """Set the fields of the page. Returns the grid as a PNG file."""
        reconstructions, counts = self.reconstruct(network, originals)
        psnr = psnr_of(mean_squared_error(originals, reconstructions), peak=255.0).tolist()
        pairs = zip(self.names, originals, reconstructions, psnr, strict=True)
        self.fields = {
            "shown": [ImagePair(name, to_png(a), to_png(b), db if db < math.inf else None) for name, a, b, db in pairs],
            "shown_note": f"{'Held-out' if self.held_out else 'Training'} images, reconstructed at step {step:,}.",
        }
        if not self.held_out:
            note = f"On the {counted(len(self.names), 'images')} above alone, at step {step:,}: more with --validation."
            self.fields |= {"counts": counts, "counts_note": note}
        return reconstruction_grid(originals, reconstructions)

    @torch.no_grad()
    def reconstruct(self, network: Autoencoder, originals: Tensor) -> tuple[Tensor, Tensor]:
        """uint8[N, 3, S, S], and how often each code was chosen for it, int64[G, K]; both on the CPU."""
        network.eval()
        images, _, quantized = network(to_float(originals.to(self.device)))
        usage = CodeUsage(network.quantizer.codebook_size, network.quantizer.num_groups)
        usage.update(quantized.ids)
        return to_uint8(images).cpu(), usage.counts

    def report_fields(self) -> Mapping[str, Any]:
        return self.fields


class SampleSheet(Callback):
    """Samples of a generator: `pictures/step-*.png` in the draft.

    Args:
        draw: network -> a PNG file; with the same seeds and classes each time, so that sheets can be compared.
        all_ranks: every rank draws, as a network whose weights are sharded requires.
    """

    def __init__(self, draft: Draft, draw: Callable[[nn.Module], bytes], *, all_ranks: bool = False) -> None:
        self.draft, self.draw, self.all_ranks = draft, draw, all_ranks
        self.fields: dict[str, Any] = {}

    def on_sample(self, step: int, network: nn.Module) -> Mapping[str, bytes]:
        self.on_preview(step, network)
        if not distributed.is_main():
            return {}
        write_picture(self.draft, step, self.fields["samples"])
        return {"samples": self.fields["samples"]}

    def on_preview(self, step: int, network: nn.Module) -> None:
        if self.all_ranks or distributed.is_main():
            note = "The same seeds and classes each time."
            self.fields = {"samples": self.draw(network), "samples_step": step, "samples_note": note}

    def report_fields(self) -> Mapping[str, Any]:
        return self.fields


def write_picture(draft: Draft, step: int, png: bytes) -> None:
    draft.write_bytes(f"pictures/step-{step:08d}.png", png)


class HeldOutMetrics(Callback):
    """Measures held-out examples.

    Args:
        measure: network -> numbers by name, logged as `valid/<name>`; every rank calls it.
    """

    def __init__(self, measure: Callable[[nn.Module], Mapping[str, float]], progress: Progress) -> None:
        self.measure, self.progress = measure, progress

    def on_validate(self, step: int, network: nn.Module) -> Row:
        row = {f"valid/{name.rpartition('/')[2]}": value for name, value in self.measure(network).items()}
        self.progress.message(f"step {step:,}: {', '.join(in_words(*number) for number in row.items())}")
        return row


class RunReport(Callback):
    """`report.html` of a run, in its draft: written at the start, with the first row of the log, with pictures and
    validations, and with further rows as often as takes little time. Until the last step the page reloads itself.

    Args:
        description: one line on what is trained.
        settings: the sections of its preset.
        sources: callbacks that contribute `report_fields`.
    """

    def __init__(
        self,
        draft: Draft,
        metrics: MetricsLog,
        *,
        description: str,
        settings: Mapping[str, Any],
        sources: Sequence[Callback],
        progress: Progress,
    ) -> None:
        self.draft, self.metrics, self.description = draft, metrics, description
        self.settings, self.sources, self.progress = settings, sources, progress
        self.throttle = Throttle(first=0.0, every=5.0, share=0.05)
        self.outdated = self.urgent = False
        self.partial: list[Row] = []

    def on_start(self, state: TrainState) -> None:
        self.has_rows = bool(self.metrics.rows)
        self.write(state.step)
        self.progress.message(f"to watch the run, open {self.draft.path / 'report.html'}")

    def on_log(self, row: Row) -> None:
        self.outdated, self.partial = True, []
        self.urgent, self.has_rows = self.urgent or not self.has_rows, True

    def on_partial_row(self, row: Row) -> None:
        self.outdated, self.partial = True, [row]

    def on_preview(self, step: int, network: Any) -> None:
        self.urgent = True

    def on_sample(self, step: int, network: Any) -> Mapping[str, bytes]:
        self.urgent = True
        return {}

    def on_validate(self, step: int, network: Any) -> Row:
        self.urgent = True
        return {}

    def on_step_end(self, state: TrainState) -> None:
        if self.urgent or (self.outdated and self.throttle.due()):
            self.write(state.step)
        self.outdated = self.urgent = False

    def write(self, step: int) -> None:
        """Write the page as of `step`."""
        if distributed.is_main():
            with self.throttle.timed():
                self.render(step)

    def render(self, step: int) -> None:
        """Write the file."""
        name, steps = self.draft.out.name, self.settings["train"]["steps"]
        run = TrainingRun(
            name=name,
            description=self.description,
            step=step,
            steps=steps,
            rows=[*self.metrics.rows, *self.partial],
            settings=self.settings,
            lineage={"kind": self.draft.requested["kind"], "name": name, "content": "", "inputs": self.draft.lineage},
            command=shlex.join(["vqpipe", *command()[1:]]),
            written=now().replace("T", " ").replace("+00:00", " UTC"),
            **{name: value for source in self.sources for name, value in source.report_fields().items()},
        )
        self.draft.write_text("report.html", page.render(training_page(run)))
