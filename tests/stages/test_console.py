"""Signals, and the paths of artifacts."""

import shlex
import signal
import sys
from pathlib import Path

import pytest
import typer

from stages import signals
from stages.console import known_loggers
from vqpipe.files import with_final_name


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)],
    ids=lambda value: str(value),
)
def test_first_signal_requests_a_stop_and_the_second_interrupts(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with signals.StopAfterStep() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        with pytest.raises(signals.Interrupted) as ended:
            signal.raise_signal(number)
        assert ended.value.code == code
        with pytest.raises(signals.Interrupted) as left:
            stop.exit()
        assert left.value.code == code
    assert signal.getsignal(number) == before


def test_an_interrupted_command_is_printed_to_paste_unless_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--images", "my photos", "--set", "train.freeze=['encoder']", "--out", "lc"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vqpipe", *words])
    said, command = signals.interrupted().split("\nnext: ")
    assert said == signals.INTERRUPTED
    assert shlex.split(command) == ["vqpipe", *words]
    monkeypatch.setattr(sys, "argv", ["vqpipe", "reconstruct", *map(str, range(1000))])
    assert signals.interrupted() == signals.INTERRUPTED


def test_dot_and_dot_dot_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_final_name(Path(".")) == tmp_path.resolve()
    assert with_final_name(Path("..")) == tmp_path.resolve().parent
    assert with_final_name(Path("out/")) == Path("out")


def test_unknown_logger_is_wrong_usage() -> None:
    assert known_loggers(["tensorboard", "wandb"]) == ["tensorboard", "wandb"]
    with pytest.raises(typer.BadParameter, match="'tensorbord' is not one of tensorboard, wandb"):
        known_loggers(["tensorbord"])
