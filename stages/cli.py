"""`vqpipe`: the commands as a table, in pipeline order.

A command is a plain typed function in a file of its own, imported when it is run, so that `vqpipe --help` loads neither
torch nor any command. This file maps errors to exit codes:
0 done, 1 an error we explain, 2 wrong usage, 129 terminal closed, 130 interrupted, 143 after SIGTERM.
"""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from stages import plugins, signals
from vqpipe.errors import VqpipeError, printable
from vqpipe.words import first_names


class Command(NamedTuple):
    """Where a command is defined, and its line in `vqpipe --help`."""

    module: str
    function: str
    help: str

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        return getattr(import_module(f"stages.{self.module}"), self.function)


COMMANDS = {
    "demo": Command("demo", "demo", "Run every stage, small, on built-in photographs."),
    "prepare-data": Command("prepare_data", "prepare_data", "Pack a data set into WebDataset tars."),
    "extract-features": Command("extract_features", "extract_features", "Encode image patches as features."),
    "kmeans": Command("kmeans", "kmeans", "Cluster features into a codebook."),
    "train": Command("train", "train", "Train a tokenizer."),
    "import-checkpoint": Command("import_checkpoint", "import_checkpoint", "Convert released weights to a tokenizer."),
    "tokenize": Command("tokenize_images", "tokenize", "Encode images as tokens."),
    "detokenize": Command("detokenize", "detokenize", "Decode tokens to images."),
    "eval": Command("evaluate", "evaluate", "Measure a tokenizer's reconstructions."),
    "reconstruct": Command("reconstruct", "reconstruct", "Reconstruct image files of any size."),
    "train-generator": Command("train_generator", "train_generator", "Train a generator on tokens or latents."),
    "generate": Command("generate", "generate", "Sample new images from a generator."),
    "eval-generation": Command("eval_generation", "eval_generation", "Measure generated images."),
    "train-classifier": Command("train_classifier", "train_classifier", "Train a classifier of tokens."),
    "compare": Command("compare", "compare", "Compare reports side by side."),
    "inspect": Command("inspect_artifact", "inspect", "Print an artifact's facts, command and lineage."),
    "push": Command("push", "push", "Upload a tokenizer to the model hub."),
    "zoo": Command("list_zoo", "zoo", "List the published tokenizers, or print all about one."),
    "presets": Command("list_presets", "presets", "List the presets, or print one."),
    "settings": Command("list_settings", "settings", "List the settings of a command, with defaults and docs."),
    "plan": Command("plan", "plan", "Estimate memory, time and disk of a run."),
    "bench": Command("bench", "bench", "Measure the speed of this machine."),
}


class LazyGroup(TyperGroup):
    """Lists commands from the table, and imports the one that is run."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # of pydantic, which typer calls
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else command, rest


class OneCommand(TyperCommand):
    """A command whose error of unexpected words names the option that they follow: a shell replaces a pattern without
    quotation marks by the names of the files."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = ["", "", *args]
        ctx.allow_extra_args = True
        extra = super().parse_args(ctx, args)
        if extra:
            names, before = printable(first_names(extra)), words[words.index(extra[0]) - 2]
            metavars = {name: each.metavar for each in self.params if each.metavar for name in each.opts}  # no flags
            if before not in metavars:
                ctx.fail(f"Unexpected argument: {names}")
            where = metavars[before].startswith("WHERE")
            hint = "Quote a pattern or a name with spaces, or give the folder" if where else "Quote a value with spaces"
            ctx.fail(f"{before} takes one value, not also {names}. {hint}")
        return extra


Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="Import this Python module first, such as one with a quantizer of yours; repeatable.",
        metavar="MODULE|FILE.py",
        callback=plugins.import_named,
        is_eager=True,
        expose_value=False,
    ),
]

app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def load(name: str | None) -> Any:
    """Return the command of that name, ready to parse its options."""
    plugins.import_installed()
    command = parser_of(COMMANDS[name or ""].load(), name)
    command.params += parser_of(takes_import).params
    return command


def parser_of(function: Callable[..., Any], name: str | None = None) -> Any:
    """The parser of a function's options."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name, cls=OneCommand, context_settings={"help_option_names": ["-h", "--help"]})(function)
    return typer.main.get_command(single)


def takes_import(imports: Import = None) -> None:
    """Has the option that every command has."""


def show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("vqpipe"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
    imports: Import = None,
) -> None:
    """Image tokenizers with very large codebooks: images in, discrete tokens out, and back.

    Every command reads finished directories and publishes one. Run a command again to resume it.
    """


def placeholder() -> None:
    """Takes the place of a command until it is run."""


for name, command in COMMANDS.items():
    app.command(name, help=command.help)(placeholder)


class QuietLogger(logging.Logger):
    """A logger of another package, which logs errors only."""

    def isEnabledFor(self, level: int) -> bool:
        return super().isEnabledFor(level) and (level > logging.WARNING or self.name.partition(".")[0] == "vqpipe")


def silence_libraries() -> None:
    """Keep warnings and log lines of other packages off the user's screen; python -W and PYTHONWARNINGS show them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.setLoggerClass(QuietLogger)
        # For processes that decode or compile, and for libraries in C++.
        os.environ |= {
            "PYTHONWARNINGS": "ignore",
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }


def main() -> None:
    """Run the command line; errors become one line on stderr and an exit code."""
    silence_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path with an accent in an ASCII terminal
    for number in signals.SIGNALS:
        signal.signal(number, signals.exit_at_once)
    try:
        app()
    except VqpipeError as error:
        fail(str(error))
    except BrokenPipeError:
        signals.abandon_stdout()  # the reader of a pipe has ended
        sys.exit(1)
    except OSError as error:
        check = "its permissions" if isinstance(error, PermissionError) else "the path and the free space"
        fail(f"{error.filename or 'a file'}: {error.strerror or error}. Check {check}.")
    except RuntimeError as error:
        message = explain(error)
        if message is None:
            raise
        fail(message)
    except signals.Interrupted as interrupted:
        print(signals.interrupted(), file=sys.stderr)
        sys.exit(interrupted.code)


def explain(error: RuntimeError) -> str | None:
    """Return what a RuntimeError of torch means to the user, in one line; None for a bug."""
    if "gloo" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return (
            "another rank has ended or hangs; its own error, if it left one, is above or in "
            "OUT.partial/status.json. Run the same command again."
        )
    if type(error).__name__ == "InductorError":
        reason = next(filter(None, map(str.strip, str(error).splitlines())), "no reason given")
        return (
            f"torch.compile failed: {reason[:200]}. Delete its cache (TORCHINDUCTOR_CACHE_DIR, else "
            "torchinductor_USER in the folder for temporary files) and run again, or set train.compile=false."
        )
    if str(error).startswith("DataLoader worker"):
        return "a process that decodes images was killed. Use fewer (num_workers), or a machine with more memory."
    return None


def fail(message: str) -> None:
    """Print the error and exit with code 1."""
    rank = os.environ.get("RANK")
    print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # the error was that of stdout itself
        signals.abandon_stdout()
    sys.exit(1)
