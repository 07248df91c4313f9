"""The log of a run: whole lines, no row twice, and never less on disk than before."""

import json
import os
from pathlib import Path

import pytest

from vqpipe.training.history import History, read_history


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_history(path)]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path, 0)
    rows = [{"step": step, "psnr": 20.0 + step} for step in (5, 10)]
    for row in rows:
        history.append(row)
    assert read_history(path) == rows == history.rows
    assert path.read_text().count("\n") == 2
    assert read_history(tmp_path / "nothing") == []


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 5}, {"step": 10}, {"step": 10, "valid/psnr": 21.0}, {"step": 15}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "ps')  # killed while writing
    assert steps(path) == [5, 10, 10, 15]
    history = History(path, 12)
    assert steps(path) == [5, 10, 10]
    history.append({"step": 15})
    assert steps(path) == [5, 10, 10, 15]


def test_a_run_killed_while_it_drops_rows_has_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        History(path, 5)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'
