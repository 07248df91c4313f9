"""Crash points: where a test lets the process die, so that every moment of a write can be tried.

`fault(name)` stands before and after each open, write, fsync and rename of what has to survive a crash. It does
nothing, at the cost of one look into the environment, unless VQPIPE_CRASH is set to

    name:n[:signal]    the process sends itself `signal` (SIGKILL unless said) when it passes the n-th such point;
                       the name "any" counts every point

A test sets n = 1, 2, ... until a run ends by itself: then every point was tried.
"""

import os
import signal
from collections import Counter

from vqpipe.errors import ConfigError

VARIABLE = "VQPIPE_CRASH"
ANY = "any"

passed: Counter[str] = Counter()
"""Points passed since the process began, by name, while VARIABLE was set."""


def fault(name: str) -> None:
    """Die here, if the environment asks for it."""
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        count(name, *parse(asked))


def count(name: str, wanted: str, number: int, kind: signal.Signals) -> None:
    """Note that the point `name` was passed, and send the signal where it is the one that was asked for."""
    passed[name] += 1
    seen = passed.total() if wanted == ANY else passed[wanted] if wanted == name else 0
    if seen == number:
        os.kill(os.getpid(), kind)


def parse(asked: str) -> tuple[str, int, signal.Signals]:
    """`name:n[:signal]`, the signal as a number or by its name.

    Raises:
        ConfigError: it is written otherwise.
    """
    name, _, rest = asked.partition(":")
    number, _, kind = rest.partition(":")
    try:
        chosen = signal.Signals(int(kind)) if kind.isdigit() else signal.Signals[kind or "SIGKILL"]
        return name, int(number), chosen
    except (ValueError, KeyError):
        raise ConfigError(f"{VARIABLE}={asked} is not name:n[:signal]", "Unset it") from None
