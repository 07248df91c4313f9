"""What the commands show in a terminal: the text on the screen of an emulated one, after each event."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pyte
import pytest

from stages import cli, console, signals
from vqpipe.training.callbacks import details

SIZES = [(100, 30), (80, 24)]
BAR = "train ━"
PAGE = "to watch the run, open /home/somebody/experiments/codebooks/artifacts/lc.partial/report.html"
FIRST = {"step": 1, "loss/total": 0.51234, "loss/l1": 0.1, "psnr": 10.5, "learning_rate": 5e-4, "nonfinite_steps": 0}
LATER = {
    **FIRST,
    "loss/adversarial": 0.2411,
    "loss/adversarial_weight": 0.07215,
    "loss/discriminator": 0.9831,
    "loss/real_logit": -0.2064,
    "loss/fake_logit": -0.2411,
    "valid/step": 50,
    "valid/psnr": 21.987,
    "valid/ssim": 0.5,
    "utilization": 0.991,
    "perplexity": 812.34,
    "gradient_norm": 0.823,
    "discriminator_gradient_norm": 0.31,
    "images_per_second": 412.3,
    "seconds_per_step": 0.31,
    "data_wait": 0.031,
    "memory_gb": 41.23,
}


def screens(events: Sequence[Callable[[], object]], columns: int, rows: int) -> list[list[str]]:
    """The lines of a terminal, those that were scrolled off first, after each event in a process that runs in it."""
    go, done = os.pipe(), os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            enter_terminal()
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))
            for event in events:
                os.read(go[0], 1)
                event()
                for bar in console.OPEN:
                    bar.live.refresh()
                sys.stdout.closed or sys.stdout.flush()
                os.write(done[1], b".")
            os.read(go[0], 1)
        finally:
            os._exit(0)
    screen = emulated(terminal, columns, rows)
    stream = pyte.ByteStream(screen)
    seen = []
    for _ in events:
        os.write(go[1], b".")
        while terminal in (ready := select.select([terminal, done[0]], [], [], 60)[0]) or done[0] not in ready:
            assert ready, "the process hangs"
            stream.feed(os.read(terminal, 65_536))
        os.read(done[0], 1)
        seen.append(lines_of(screen))
    os.write(go[1], b".")
    os.waitpid(pid, 0)
    for number in (terminal, *go, *done):
        os.close(number)
    return seen


def screen_of(words: Sequence[str], start_process: Callable[..., Any], columns: int, rows: int) -> list[str]:
    """The lines of a terminal at the end of a command."""
    terminal, inner = pty.openpty()
    screen = emulated(terminal, columns, rows)
    stream = pyte.ByteStream(screen)
    process = start_process(run_in_terminal, os.ttyname(inner), words)
    while terminal in wait([terminal, process.sentinel]):
        stream.feed(os.read(terminal, 65_536))
    process.join()
    os.close(terminal)
    os.close(inner)
    lines = lines_of(screen)
    assert process.exitcode == 0, lines
    return lines


def run_in_terminal(terminal: str, words: Sequence[str]) -> None:
    """Run the console script in the terminal of this name, without what takes most of the time of a short run."""
    from vqpipe.reports import plots
    from vqpipe.training import tokenizer_run
    from vqpipe.training.throughput import FlopsPerImage

    plots.one_axes = lambda names: (MagicMock(), MagicMock())
    plots.to_svg = lambda figure, salt: "<svg></svg>"
    tokenizer_run.count_flops = lambda *arguments: FlopsPerImage(1e9, 1e8)
    os.setsid()
    handle = os.open(terminal, os.O_RDWR)
    for number in range(3):
        os.dup2(handle, number)
    enter_terminal()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))
    sys.argv = ["vqpipe", *words]
    cli.main()


def enter_terminal() -> None:
    """Set the environment of a process in a terminal."""
    for name in ("COLUMNS", "LINES", "RANK", "NO_COLOR"):
        os.environ.pop(name, None)
    os.environ |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(console.__file__).parents[1])}


def emulated(terminal: int, columns: int, rows: int) -> Any:
    """The screen of a terminal of this size."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return pyte.HistoryScreen(columns, rows, history=1000, ratio=1.0)


def lines_of(screen: Any) -> list[str]:
    """The lines that are not empty, first those that were scrolled off."""
    above = ["".join(line[column].data for column in range(screen.columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display] if line.strip()]


def joined(lines: Sequence[str]) -> str:
    """The text of lines that the terminal has wrapped."""
    return "".join(lines)


def table(lines: Sequence[str]) -> list[str]:
    """The lines below the only bar on the screen."""
    (bar,) = [number for number, line in enumerate(lines) if BAR in line]
    assert lines[bar].startswith(BAR)
    return list(lines[bar + 1 :])


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_messages_stay_above_one_bar_and_its_table(columns: int, rows: int) -> None:
    bar = console.ProgressBar()
    seen = screens(
        [
            lambda: bar.__enter__().start("train", 150, "steps"),
            lambda: bar.message(PAGE),
            lambda: (bar.note("", details(FIRST)), bar.advance()),
            lambda: (bar.message("step 50: validation PSNR 21.99 dB, the best so far"), bar.note("", details(LATER))),
            lambda: signals.announce("SIGTERM: stopping after this step, then saving a checkpoint"),
            lambda: (bar.advance(), console.say("saved")),
            lambda: (console.end_progress(), print("/path/of/the/artifact")),
        ],
        columns,
        rows,
    )
    assert [line.split()[:3] for line in seen[0]] == [["train", "━" * 24, "0/150"]]
    assert joined(seen[1][:-1]) == PAGE
    assert table(seen[1]) == []
    assert [line.split()[0] for line in table(seen[2])] == ["loss", "training", "gradients"]
    assert "1/150" in seen[2][-4]
    for number, newest in ((3, "the best so far"), (4, "then saving a checkpoint"), (5, "saved")):
        labels = [line[:14].strip() for line in table(seen[number]) if not line.startswith(" ")]
        assert labels == ["loss", "training", "validation", "codes", "discriminator", "gradients", "speed"]
        above = seen[number][: -len(table(seen[number])) - 1]
        assert joined(above).startswith(PAGE + "step 50: validation PSNR 21.99 dB, the best so far")
        assert joined(above).endswith(newest)
    numbers = " ".join(" ".join(table(seen[5])).split())
    assert "discriminator loss 0.9831 real -0.2064 fake -0.2411 adaptive weight 0.07215" in numbers
    for number in ("skipped steps 0", "memory 41.2 GB", "time per step 0.31 s"):
        assert any(number in line for line in table(seen[5]))  # not cut in two
    assert seen[6][-1] == "/path/of/the/artifact"
    assert seen[6][:-1] == seen[5]


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_a_phase_without_a_count_is_shown_while_it_lasts(columns: int, rows: int) -> None:
    bar = console.ProgressBar()
    during, after, closed = screens(
        [
            lambda: bar.__enter__().start("building the network", None, unit=""),
            lambda: (bar.message("a message"), bar.start("train", 150, "steps")),
            lambda: (bar.start("building the network", None, unit=""), bar.close()),
        ],
        columns,
        rows,
    )
    assert [line.split("━")[0].strip() for line in during] == ["building the network"]
    assert [line.split("━")[0].strip() for line in after] == ["a message", "train"]
    assert closed == after


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_long_titles_and_counts_take_one_line(columns: int, rows: int) -> None:
    bar = console.ProgressBar()

    def work() -> None:
        bar.__enter__().start("initial centers: coarse to fine", 123_456_789, "vectors")
        bar.advance(100_000_000)
        bar.note("iteration 10 of 300, inertia 46.6545, 3,456 codes moved")

    (seen,) = screens([work], columns, rows)
    assert len(seen) == 1
    assert seen[0].startswith("initial centers")


def test_last_line_of_a_resumed_phase_counts_what_this_run_did(capsys: pytest.CaptureFixture[str]) -> None:
    with console.ProgressBar() as bar:
        bar.start("tokenize", 30, done=20)
        bar.advance(10)
    assert capsys.readouterr().err == "tokenize: 10 images in 0:00\n"


def test_training_run_leaves_a_whole_screen(
    picture_folder: Path, tmp_path: Path, tiny_training: dict[str, Any], start_process: Callable[..., Any]
) -> None:
    """In a process of its own: one that is forked from this one could not compute gradients."""
    options = {**tiny_training, "steps": 8, "images": picture_folder, "validation": picture_folder}
    options["out"] = tmp_path / "lc"
    words = ["train", *(word for setting in options.pop("overrides") for word in ("--set", setting))]
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    seen = screen_of(words, start_process, 80, 24)
    end = next(number for number, line in enumerate(seen) if line.startswith("published: "))
    shown = table(seen[:end])
    labels = [line[:14].split()[0] for line in shown if line[:10].strip()]
    assert labels[:6] == ["loss", "training", "validation", "codes", "discriminator", "gradients"]
    assert joined(seen).count("to watch the run, open") == 1
    assert joined(seen).count("step 8: validation PSNR") == 1
    assert sum(line.rstrip() == str(options["out"]) for line in seen) == 0


def test_results_go_to_stdout_while_a_bar_is_open(tmp_path: Path) -> None:
    bar, out = console.ProgressBar(), tmp_path / "stdout"

    def work() -> None:
        with out.open("w") as sys.stdout:
            bar.__enter__().start("train", 150, "steps")
            print("/path/of/the/artifact")

    (seen,) = screens([work], 80, 24)
    assert out.read_text() == "/path/of/the/artifact\n"
    assert [line.split()[0] for line in seen] == ["train"]
