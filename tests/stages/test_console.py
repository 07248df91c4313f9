"""How a command ends when it is asked to stop."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages import console


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)],
    ids=lambda value: str(value),
)
def test_the_first_signal_lets_the_step_end_and_the_second_does_not(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with console.StopAtStepEnd() as signals:
        assert not signals.asked()
        signal.raise_signal(number)
        assert signals.asked()
        with pytest.raises(console.Interrupted) as ended:
            signal.raise_signal(number)
        assert ended.value.code == code
        with pytest.raises(console.Interrupted) as left:
            signals.leave()
        assert left.value.code == code
    assert signal.getsignal(number) == before


def test_the_folder_to_publish_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert console.with_a_name(Path(".")) == tmp_path.resolve()
    assert console.with_a_name(Path("..")) == tmp_path.resolve().parent
    assert console.with_a_name(Path("out/")) == Path("out")


PROGRAM = """
import atexit, sys, threading, time
from stages import cli

class Large:
    def __del__(self):
        print("taken apart")

def work():
    threading.main_thread().join()
    print("worked", flush=True)

def main():
    global large
    large = Large()
    atexit.register(print, "at exit")
    if {works}:
        threading.Thread(target=work).start()
    print("said")
    sys.exit({code})

cli.main = main
cli.script()
"""


@pytest.mark.parametrize(
    ("code", "works", "expected", "said"),
    [
        ("None", False, 0, ["said", "at exit"]),
        ("3", False, 3, ["said", "at exit"]),
        ("3", True, 3, ["said", "worked", "at exit", "taken apart"]),
        ("'a line'", False, 1, ["said", "at exit", "taken apart"]),
    ],
)
def test_the_process_ends_at_once_but_for_what_is_registered_and_for_threads(
    code: str, works: bool, expected: int, said: list[str]
) -> None:
    program = PROGRAM.format(works=works, code=code)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.split("\n")[:-1]) == (expected, said), ended.stderr
