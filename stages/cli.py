"""`vqpipe`: the stages, in the order in which their artifacts flow.

Each command is a plain typed function in a file of its own, which imports what is heavy in its body, so that
`vqpipe --help` needs neither torch nor a second. This file maps what they raise to exit codes:
0 done, 1 an error we explain, 2 wrong usage, 129 the terminal was closed, 130 interrupted, 143 after SIGTERM.
"""

import atexit
import io
import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import metadata
from typing import Annotated, Any

import typer

from stages import console
from stages.bench import bench
from stages.compare import compare
from stages.demo import demo
from stages.detokenize import detokenize
from stages.eval_generation import eval_generation
from stages.evaluate import evaluate
from stages.extract_features import extract_features
from stages.generate import generate
from stages.import_checkpoint import import_checkpoint
from stages.inspect_artifact import inspect
from stages.kmeans import kmeans
from stages.list_presets import presets
from stages.prepare_data import prepare_data
from stages.reconstruct import reconstruct
from stages.tokenize_images import tokenize
from stages.train import train
from stages.train_classifier import train_classifier
from stages.train_generator import train_generator
from vqpipe.errors import VqpipeError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    if asked:
        print(metadata.version("vqpipe"))
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False) -> None:
    """Image tokenizers with very large codebooks: images in, discrete tokens out, and back.

    Every command reads finished directories and publishes one. Run a command again to resume it.
    """


app.command("demo")(demo)
app.command("prepare-data")(prepare_data)
app.command("extract-features")(extract_features)
app.command("kmeans")(kmeans)
app.command("train")(train)
app.command("import-checkpoint")(import_checkpoint)
app.command("tokenize")(tokenize)
app.command("detokenize")(detokenize)
app.command("eval")(evaluate)
app.command("reconstruct")(reconstruct)
app.command("train-generator")(train_generator)
app.command("generate")(generate)
app.command("eval-generation")(eval_generation)
app.command("train-classifier")(train_classifier)
app.command("compare")(compare)
app.command("inspect")(inspect)
app.command("presets")(presets)
app.command("bench")(bench)


def script() -> None:
    """The console script: `main`, and then the end, without taking the process apart.

    Python frees torch, Arrow and faiss module by module, which takes seconds before the prompt is back; the kernel does
    it at once. What is registered for the end is done; where a thread still works, the end is the usual one.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    at_work = [each for each in threading.enumerate() if not each.daemon and each is not threading.current_thread()]
    if isinstance(code, int) and not at_work:
        for number in console.SIGNALS:
            signal.signal(number, console.leave_at_once)
        with suppress(OSError):  # a closed pipe or a full disk: sys.exit says so
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def main() -> None:
    """The command line, in a process that goes on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path with an umlaut in a terminal that knows ASCII
    for number in console.SIGNALS:
        signal.signal(number, console.leave_at_once)
    try:
        app()
    except VqpipeError as error:
        fail(str(error))
    except BrokenPipeError:
        console.abandon_stdout()  # nobody reads on: nothing more to say
        sys.exit(1)
    except OSError as error:
        check = "its permissions" if isinstance(error, PermissionError) else "the path and the free space"
        fail(f"{error.filename or 'a file'}: {error.strerror or error}. Check {check}.")
    except RuntimeError as error:
        if "gloo" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
            fail(
                "another rank has ended or hangs; its own error, if it left one, stands above or in "
                "OUT.partial/status.json. Run the same command again."
            )
        if type(error).__name__ == "InductorError":
            reason = next(filter(None, map(str.strip, str(error).splitlines())), "no reason given")
            fail(
                f"torch.compile failed: {reason[:200]}. Delete what it keeps (TORCHINDUCTOR_CACHE_DIR, else "
                "torchinductor_USER in the folder for temporary files) and run again, or set train.compile=false."
            )
        if not str(error).startswith("DataLoader worker"):
            raise
        fail("a process that decodes images was killed. Use fewer (num_workers), or a machine with more memory.")
    except console.Interrupted as signalled:
        print(console.INTERRUPTED, file=sys.stderr)
        sys.exit(signalled.code)


def fail(message: str) -> None:
    rank = os.environ.get("RANK")
    print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # the error was that of stdout itself
        console.abandon_stdout()
    sys.exit(1)
