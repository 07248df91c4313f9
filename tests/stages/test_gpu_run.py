"""`make gpu`: its script, with a Python that only writes down what it is asked to run."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "stages" / "runs" / "gpu" / "run.sh"


def run(folder: Path, fails: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script where commands that contain `fails` fail. Returns how it ended, and the commands."""
    python, log = folder / "python", folder / "log"
    python.write_text(f'#!/bin/bash\necho "$*" >> {log}\n[[ "$*" != *"{fails}"* ]]\n', encoding="utf-8")
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "OUT": str(folder / "out"), "PATH": os.environ["PATH"]} | environment
    done = subprocess.run([SCRIPT], env=settings, capture_output=True, text=True, timeout=250)
    return done, [line for line in log.read_text(encoding="utf-8").splitlines() if not line.startswith("-m pip")]


@pytest.mark.parametrize(("fails", "reason"), [("import torch", "has no PyTorch"), ("cuda", "PyTorch finds none")])
def test_without_a_gpu_one_line_says_so(fails: str, reason: str, tmp_path: Path) -> None:
    done, _ = run(tmp_path, fails)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("no GPU: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("half", "tests", "bench"), [("both", True, True), ("tests", True, False), ("bench", False, True)]
)
def test_each_half_is_one_command(half: str, tests: bool, bench: bool, tmp_path: Path) -> None:
    done, commands = run(tmp_path, "nothing", HALF=half)
    assert done.returncode == 0, done.stderr
    assert any(command.startswith("-m pytest -m gpu ") for command in commands) == tests
    assert any(command.startswith("-m stages bench --gpu --rounds 3 ") for command in commands) == bench


@pytest.mark.parametrize("fails", ["pytest", "bench"])
def test_a_half_that_fails_does_not_keep_the_other_from_running(fails: str, tmp_path: Path) -> None:
    done, commands = run(tmp_path, fails, DRY="1")
    assert done.returncode == 1
    assert [command.split()[1] for command in commands] == ["pytest", "stages"]
    assert "--quick --rounds 1 " in commands[1]
