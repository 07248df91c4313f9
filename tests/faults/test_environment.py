"""Other processes, clocks, terminals, locales and modules in the environment of a command."""

import errno
import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer

from stages import cli, console, options, signals
from vqpipe.artifacts import Artifact, Draft, lock, open_artifact, start
from vqpipe.artifacts.lock import Lock
from vqpipe.device import pick_device
from vqpipe.errors import ArtifactError, ConfigError
from vqpipe.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vqpipe", "stages")


def begin(out: Path) -> Draft:
    draft = start(out, "codebook", {}, {"images": "0" * 64})
    assert isinstance(draft, Draft)
    return draft


def make(out: Path) -> Artifact:
    with begin(out) as draft:
        with draft.write("a.bin") as path:
            path.write_bytes(b"a")
        return draft.publish({})


def found(pattern: str) -> dict[str, list[str]]:
    """Matches of a regular expression in the source code: file -> matches."""
    files = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
    matches = {name: re.findall(pattern, path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {name: match for name, match in matches.items() if match}


def test_directory_that_appeared_at_out_is_not_replaced(tmp_path: Path) -> None:
    with begin(tmp_path / "out") as draft:
        with draft.write("a.bin") as path:
            path.write_bytes(b"a")
        (tmp_path / "out").mkdir()  # a rename would succeed onto an empty folder
        with pytest.raises(ArtifactError, match=r"cannot publish .*out: it exists. The work is kept in .*out\.partial"):
            draft.publish({})
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out").rmdir()
    make_again = start(tmp_path / "out", "codebook", {}, {"images": "0" * 64})
    assert isinstance(make_again, Artifact)  # all but the last rename was done
    assert make_again.file("a.bin").read_bytes() == b"a"


def test_lock_of_a_dead_process_is_free(tmp_path: Path, in_child: Callable[..., int]) -> None:
    def die() -> None:
        begin(tmp_path / "out")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert (tmp_path / "out.partial" / ".lock").read_text(encoding="utf-8").startswith("process ")
    assert make(tmp_path / "out").names() == ["a.bin"]


def test_held_lock_names_its_owner_and_last_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    owner = Lock(tmp_path, tmp_path / "out")
    owner.acquire()
    os.utime(owner.file, (0, 0))
    deadline = time.monotonic() + 20
    while owner.file.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    who = rf"out is being written by process {os.getpid()} on \S+ since \S+, last alive 0:00:\d\d ago"
    with pytest.raises(ArtifactError, match=who):
        Lock(tmp_path, tmp_path / "out").acquire()
    owner.release()
    os.utime(owner.file, (0, 0))
    time.sleep(0.05)
    assert owner.file.stat().st_mtime == 0  # no heartbeat after the release
    other = Lock(tmp_path, tmp_path / "out")
    other.acquire()
    other.release()


def test_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ArtifactError, match=r"cannot be locked \(No locks available\)"):
        begin(tmp_path / "out")


def test_no_decision_depends_on_a_clock() -> None:
    """Modification times are only compared for equality, to detect a changed file; the age of a lock's heartbeat is
    only printed."""
    indexed = {f"vqpipe/data/{name}.py" for name in ("folders", "sources", "remote", "stored")}
    allowed = indexed | {"vqpipe/artifacts/lock.py"}
    clocks = found(r"st_mtime|getmtime|os\.utime|time\.time\b|time\.time_ns").keys()
    assert {name for name in clocks if "benchmarks" not in name} == allowed


def test_commands_never_prompt() -> None:
    assert (
        found(r"(?<![\w.])input\(|\.(?:prompt|confirm)\(|\b(?:prompt|confirmation_prompt)=|getpass|Prompt\.ask") == {}
    )


@pytest.fixture
def restored_signals() -> Iterator[None]:
    """Restores the signal handlers that `main` replaces."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_device() -> io.TextIOWrapper:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


@pytest.mark.parametrize("sink", [closed_pipe, full_device])
def test_closed_or_full_stdout_does_not_lose_the_artifact(
    sink: Callable[[], io.TextIOWrapper],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restored_signals: None,
) -> None:
    out = sink()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "app", lambda: console.finished(make(tmp_path / "out")))
    with pytest.raises(SystemExit) as end:
        cli.main()
    out.close()  # a second failure would show here, as it does when Python ends
    assert end.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (0 if sink is closed_pipe else 1)
    assert isinstance(start(tmp_path / "out", "codebook", {}, {"images": "0" * 64}), Artifact)


def test_ascii_terminal_gets_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_signals: None) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(cli, "app", lambda: console.finished(make(tmp_path / "é")))
    cli.main()
    streams[0].flush()
    assert streams[0].buffer.getvalue().decode("ascii").endswith("\\xe9\n")  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "app", lambda: open_artifact(tmp_path / "é" / "inside"))
    with pytest.raises(SystemExit):
        cli.main()
    streams[1].flush()
    assert "\\xe9" in streams[1].buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_every_text_file_is_utf_8() -> None:
    """Every call that opens a text file sets its encoding, whatever the locale; a draft's always are UTF-8."""
    inner = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"
    opened = r"(?<![\w.])open|(?<!Image)(?<!tarfile)(?<!archive)\.open|\.fdopen"
    calls = rf"(?:(?<!draft)\.(?:read|write)_text|{opened})\({inner}\)"
    binary = r"\"[rwax]\+?b\+?\"|os\.O_"
    loose = {
        name: [call for call in texts if not re.search(rf"encoding=|{binary}", call)]
        for name, texts in found(calls).items()
    }
    assert {name: texts for name, texts in loose.items() if texts} == {}


def test_absent_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no CUDA device on this machine, which has cpu\. Use auto or cpu"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"rank 1 of this machine has no GPU: there are 1. .*--nproc-per-node 1"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'. Use auto, cpu, cuda, cuda:N or mps"),
        ("xpu", "device xpu is not supported. Use auto, cpu"),
        ("cuda:2", "no device cuda:2 on this machine: the last one is cuda:1"),
        ("mps", "no MPS device"),
    ],
)
def test_absent_and_unsupported_devices_are_one_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for attempt in (pick_device, lambda device: Tokenizer.from_pretrained(tmp_path, device=device)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            attempt(name)


def test_devices_of_one_process_are_picked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    picked = {name: str(pick_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1", "mps")}
    assert picked == {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:1": "cuda:1", "mps": "mps"}
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(pick_device("cuda")) == "cuda:1"
    with pytest.raises(ConfigError, match=r"--device cuda:0 would put every rank .* LOCAL_RANK"):
        pick_device("cuda:0")


def test_from_pretrained_without_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(ConfigError, match=r"no CUDA device on this machine, which has cpu\. Use auto or cpu"):
            Tokenizer.from_pretrained(tmp_path, device=device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"which has cpu and mps\. Use auto or mps"):
        Tokenizer.from_pretrained(tmp_path, device="cuda")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "CUDA", "cuda:1,2", ""])
def test_device_option_has_a_fixed_form(name: str) -> None:
    assert options.known_device("cuda:1") == "cuda:1"
    with pytest.raises(typer.BadParameter, match="is not supported; use auto, cpu, cuda, cuda:N, mps"):
        options.known_device(name)


def test_modules_in_the_working_directory_are_not_imported_and_stdin_may_be_closed(tmp_path: Path) -> None:
    for name in ("random", "typer", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    command = f"exec {sys.executable} -m stages --version <&-"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_failing_compiler_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_signals: None
) -> None:
    from torch._inductor.exc import InductorError

    def torn() -> None:
        """As after a process that was killed while it wrote a kernel."""
        raise InductorError(ImportError("/tmp/torchinductor_me/av/kernel.so: file too short"), None)

    monkeypatch.setattr(cli, "app", torn)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "file too short" in errors
    assert "train.compile=false" in errors
