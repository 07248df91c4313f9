"""What the commands share with people: option types, progress, one line at the end, and the session they run in.

Results go to stdout, everything else to stderr; ranks above 0 keep silent.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    import torch

    from vqpipe.artifacts import Artifact
    from vqpipe.data.stopwatch import Stopwatch

HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
"""The closing of the terminal, unless nohup has this process ignore it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *HANGUP)
"""What asks a command to stop."""
INTERRUPTED = "interrupted; run the same command again to go on"
PLAIN_SECONDS = 10.0
"""Off a terminal, progress is a plain line at most this often."""


def with_a_name(out: Path) -> Path:
    """`files.with_a_name`, for an option."""
    from vqpipe import files

    return files.with_a_name(out)


Out = Annotated[
    Path,
    typer.Option("--out", help="The artifact to publish; never overwritten.", metavar="DIR", callback=with_a_name),
]
Device = Annotated[str, typer.Option("--device", help="Where tensors live.", metavar="auto|cpu|cuda")]
Seed = Annotated[int, typer.Option("--seed", help="Every random choice is a function of it.", metavar="N")]
Preset = Annotated[str | None, typer.Option("--preset", help="See `vqpipe presets`.", metavar="NAME|FILE.toml")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting of the preset; may be repeated.", metavar="section.key=value"),
]
Images = Annotated[
    list[str],
    typer.Option(
        "--images",
        help="A dataset artifact, a folder, WebDataset tars (path, glob, {000..099}, URL), builtin:photos; repeatable.",
        metavar="WHERE",
    ),
]
TokenizerPath = Annotated[
    Path,
    typer.Option(
        "--tokenizer", help="A tokenizer; eval and reconstruct also take an SD-VAE, SDXL-VAE or TAEF2.", metavar="DIR"
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images at a time.", metavar="IMAGES", min=1)]
Limit = Annotated[int | None, typer.Option("--limit", help="Use only the first N.", metavar="N", min=1)]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Side of the centre crop.", metavar="PIXELS", min=1)
]
NumWorkers = Annotated[
    int,
    typer.Option(
        "--num-workers",
        help="Processes that decode images, per rank; 0: this one; -1: one per core.",
        metavar="N",
        min=-1,
    ),
]
Precision = Annotated[
    str | None, typer.Option("--precision", help="Of the network: fp32 unless said.", metavar="fp32|bf16")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", metavar="N", min=1)]
GlobalBatchSize = Annotated[
    int | None, typer.Option("--global-batch-size", help="Images a step, over all ranks.", metavar="N", min=1)
]
TrainPrecision = Annotated[
    str | None, typer.Option("--precision", help="Of convolutions and matrix products.", metavar="fp32|bf16")
]
Log = Annotated[
    list[str] | None,
    typer.Option("--log", help="Log there too, in OUT.logs; repeatable.", metavar="tensorboard|wandb"),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Pretrained weights; see above.", metavar="DIR")]
Extractor = Annotated[
    str | None,
    typer.Option(
        "--extractor",
        help="A Frechet distance over another network's mean feature, under its name.",
        metavar="open_clip:NAME/TAG|timm:NAME",
    ),
]
ExtractorWeights = Annotated[
    Path | None, typer.Option("--extractor-weights", help="Its weights; else from the cache.", metavar="FILE")
]
MaxSkipped = Annotated[
    float, typer.Option("--max-skipped", help="Share of unreadable images to accept.", metavar="0..1", min=0, max=1)
]


def say(text: str) -> None:
    """A line for people, on stderr, from rank 0 only. A stderr that takes nothing more stops no work."""
    if is_main():
        with suppress(OSError):
            stderr().print(text, highlight=False, markup=False, soft_wrap=True)


def show(renderable: Any) -> None:
    """A rich table or tree, on stderr, from rank 0 only."""
    if is_main():
        stderr().print(renderable)


def finished(artifact: "Artifact", again: bool = False) -> None:
    """The last line of a stage: what was published, and its path alone on stdout."""
    if not is_main():
        return
    facts = ", ".join(
        f"{key} {format_fact(value)}" for key, value in artifact.facts.items() if isinstance(value, int | float | str)
    )
    say(f"{'already published' if again else 'published'}: {artifact.kind}" + (f" ({facts})" if facts else ""))
    print(artifact.path, flush=True)


def format_fact(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


class Bar:
    """One running count. `note` is a short text beside it, such as a loss."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self.earlier = 0
        self.text = ""
        self.began = self.told = time.monotonic()
        self.progress: Progress | None = None
        self.task: Any = None

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, note=self.text)
        elif is_main() and time.monotonic() - self.told >= PLAIN_SECONDS:
            self.told = time.monotonic()
            say(self.line())

    def resume(self, count: int) -> None:
        """`count` were done by an earlier run: shown, and left out of the rate."""
        self.done = self.earlier = count
        if self.progress is not None:
            self.progress.reset(self.task, total=self.total, completed=count, note=self.text)

    def note(self, text: str) -> None:
        """Set the text beside the count."""
        self.text = text

    def line(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.earlier) / seconds
        of = f"/{self.total:,}" if self.total else ""
        left = f", {clock((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
        note = f"  {self.text}" if self.text else ""
        return f"{self.title}: {self.done:,}{of} {self.unit}, {rate:.3g}/s{left}{note}"


ADVICE = {
    "waiting for images": "Images come too slowly: more --num-workers, the extra `fast` (simplejpeg), or a faster disk",
    "encoding": "The network takes the time: a GPU, or more of them (torchrun), or --precision bf16",
    "writing": "Writing takes the time: another disk for --out",
}
"""What to try where most of the time goes into a part."""


def timing(stopwatch: "Stopwatch") -> None:
    """Images per second, and where the time of rank 0's main process went; nothing where nothing was left to do."""
    if not stopwatch.images:
        return
    shares = stopwatch.shares()
    parts = ", ".join(f"{name} {part:.0%}" for name, part in shares.items() if part >= 0.005)
    overlapped = sum(stopwatch.beside.values()) / stopwatch.seconds - shares.get("writing", 0.0)
    beside = f" (writing another {overlapped:.0%} beside it)" if overlapped >= 0.005 else ""
    rate = f"{stopwatch.images:,} images in {clock(stopwatch.seconds)}, {stopwatch.images / stopwatch.seconds:.3g}/s"
    say(f"{rate}: {parts}{beside}. {ADVICE.get(next(iter(shares)), '')}".rstrip(". ") + ".")


class RateColumn(ProgressColumn):
    """Things per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} {task.fields['unit']}/s" if task.speed else "")


@contextmanager
def progress(title: str, total: int | None, unit: str = "images") -> Iterator[Bar]:
    """A bar with rate and time left on a terminal, plain lines elsewhere, silence on ranks above 0."""
    bar = Bar(title, total, unit)
    if not (is_main() and stderr().is_terminal):
        yield bar
        if is_main() and bar.done:
            say(
                f"{title}: {bar.done:,} {unit} in {clock(time.monotonic() - bar.began)}"
                + (f"  {bar.text}" if bar.text else "")
            )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}" + (f"/{total:,}" if total else "")),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr()) as bar.progress:
        bar.task = bar.progress.add_task(title, total=total, unit=unit, note="")
        yield bar


class Interrupted(BaseException):
    """A signal asked this process to stop; `code` is the exit code that says so: 130 for Ctrl-C, 129 for a terminal
    that was closed, else 143, also for the SIGUSR1 by which batch systems tell of the end of a job's time."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + (number if number in (signal.SIGINT, signal.SIGHUP) else signal.SIGTERM)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """The signal handler while a command starts: nothing is written yet, and imports may catch what is raised."""
    with suppress(OSError):
        os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(Interrupted(number).code)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The signal handler of every command: leave through the finally blocks, so that no torn file stays behind."""
    leave_closed_terminal(number)
    raise Interrupted(number)


class StopAtStepEnd:
    """Inside this context the first signal only asks, so that a step can end and its state be saved.

    `asked` is then true, and `leave` raises Interrupted. A second signal interrupts at once, but for SIGHUP: a terminal
    that is closed may send two. A torchrun that was killed could send none, and leaves its ranks behind: that asks too.
    """

    def __init__(self) -> None:
        self.number = 0
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopAtStepEnd":
        self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        if not self.number:
            self.number = number
            say(f"{signal.Signals(number).name}: this step ends, then the state is saved")
        elif number != signal.SIGHUP:
            raise Interrupted(number)

    def asked(self) -> bool:
        """Whether a signal has come, or torchrun is no more."""
        if not self.number and self.launcher is not None and os.getppid() != self.launcher:
            self.number = signal.SIGTERM
            say("torchrun has ended: this step ends, then the state is saved")
        return self.number != 0

    def leave(self) -> NoReturn:
        """End the process as the signal wanted (as SIGTERM where another rank got it)."""
        raise Interrupted(self.number or signal.SIGTERM)


@contextmanager
def session(device: str, seed: int) -> Iterator["torch.device"]:
    """What every stage runs in: this rank's device, seeds, and torchrun's process group where there is one."""
    import torch

    from vqpipe import distributed

    for number in SIGNALS:
        if signal.getsignal(number) is leave_at_once:  # the command line's; other callers keep their own handlers
            signal.signal(number, interrupt)
    chosen = distributed.pick_device(device)
    torch.manual_seed(seed)
    with distributed.connect(chosen):
        yield chosen


def leave_closed_terminal(number: int) -> None:
    """After a SIGHUP, let what would go to a terminal that is no more go nowhere, instead of failing."""
    if number != signal.SIGHUP:
        return
    for handle in (1, 2):
        try:
            os.write(handle, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def abandon_stdout() -> None:
    """Throw away what could not be written, so that Python does not try it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def stderr() -> Console:
    return Console(file=sys.stderr)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
