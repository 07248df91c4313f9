"""Signal handling. Start-up: exit immediately. Running: raise Interrupted. Training: stop after the current step."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from vqpipe.errors import printable

HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
"""The terminal was closed; empty if SIGHUP is ignored (nohup)."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *HANGUP)
"""Signals that ask a command to stop; batch systems send SIGUSR1 before a job's time ends."""
INTERRUPTED = "interrupted; the same command again resumes from what is written"
SHOW_CURSOR = "\r\x1b[K\x1b[?25h"
"""Clears the line of a progress bar, which hides the cursor of the terminal, and shows the cursor again."""
RETRY_SECONDS = 0.05
"""Until a signal that arrived in an import is sent again."""
LONGEST_COMMAND = 500
"""Characters up to which the command is printed."""


class Interrupted(BaseException):
    """A signal asked this process to stop. `code` is the exit code: 130 for Ctrl-C, 129 for a closed terminal, else
    143."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + (number if number in (signal.SIGINT, signal.SIGHUP) else signal.SIGTERM)


class WaitingEnded(Interrupted):
    """The first signal, while a training run waits for a batch."""


def interrupted() -> str:
    """What an interrupted command prints: the command to paste, unless it is long, or a rank of torchrun."""
    command = shlex.join(["vqpipe", *sys.argv[1:]])
    pasted = len(sys.argv) > 1 and len(command) <= LONGEST_COMMAND and "RANK" not in os.environ
    return f"{INTERRUPTED}\nnext: {printable(command)}" if pasted else INTERRUPTED


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler while a command starts: nothing is written yet, and an import might catch an exception."""
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR if os.isatty(2) else "").encode())
        os.write(2, f"{interrupted()}\n".encode())
    os._exit(Interrupted(number).code)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler of a running command: raise Interrupted, so that `finally` blocks delete unfinished files.

    In an import, which might catch the exception, or abort if it runs C++, the signal is sent again a little later.
    """
    detach_closed_terminal(number)
    if not is_importing(frame):
        raise Interrupted(number)
    again = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where a signal arrived."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


def handle_signals() -> None:
    """Install `interrupt` where the command line installed `exit_at_once`; other callers keep their own handlers."""
    for number in SIGNALS:
        if signal.getsignal(number) is exit_at_once:
            signal.signal(number, interrupt)


class StopAfterStep:
    """Inside this context the first signal only sets `requested`, so that a training step can end and be saved.

    In the block `interruptible()` the first signal ends that block at once. A second signal interrupts, except SIGHUP:
    a closed terminal may send two. The exit of torchrun is treated as a signal too: if it is killed with SIGKILL, its
    ranks receive none.
    """

    def __init__(self) -> None:
        self.number = 0
        self.waiting = False
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopAfterStep":
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        detach_closed_terminal(number)
        if not self.number:
            self.number = number
            name = signal.Signals(number).name
            if self.waiting:
                announce(f"{name}: stopping, and saving what was trained")
                raise WaitingEnded(number)
            announce(f"{name}: stopping after this step, then saving a checkpoint; a second signal stops at once")
        elif number != signal.SIGHUP:
            interrupt(number, frame)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that waits for data, for minutes if a server has stalled: the first signal leaves it.

        One of several ranks stays in it, because the others may be in a step with it. torchrun kills its ranks 30
        seconds after a signal.
        """
        self.waiting = os.environ.get("WORLD_SIZE", "1") == "1"
        try:
            with suppress(WaitingEnded):
                yield
        finally:
            self.waiting = False

    def requested(self) -> bool:
        """Whether a signal was received, or torchrun has ended."""
        if not self.number and self.launcher is not None and os.getppid() != self.launcher:
            self.number = signal.SIGTERM
            announce("torchrun has ended: stopping after this step, then saving a checkpoint")
        return self.number != 0

    def exit(self) -> NoReturn:
        """Raise Interrupted for the signal received (SIGTERM if another rank received it)."""
        raise Interrupted(self.number or signal.SIGTERM)


def announce(text: str) -> None:
    """Print a line on stderr, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def detach_closed_terminal(number: int) -> None:
    """After SIGHUP, send output that the closed terminal cannot take to the null device."""
    if number != signal.SIGHUP:
        return
    for handle in (1, 2):
        try:
            os.write(handle, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def abandon_stdout() -> None:
    """Discard output that could not be written, so that Python does not try again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
