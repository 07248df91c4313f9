"""Processes that are killed, signalled, stopped or orphaned, alone and as ranks.

Tests of real processes, which take seconds to import, are slow tests.
"""

import datetime
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from stages import cli, signals, tokenize_images
from vqpipe import distributed
from vqpipe.artifacts import Draft, open_artifact, start
from vqpipe.data import batches
from vqpipe.data.batches import Shuffle, through_workers
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.files import digest_json
from vqpipe.quantizers import QuantizerConfig, VqConfig
from vqpipe.tokenizer import Tokenizer
from vqpipe.tokenizer_files import write_tokenizer
from vqpipe.training import loop
from vqpipe.training.config import TrainConfig

Fork = Callable[[Callable[[], None]], int]
Files = dict[str, dict[str, object]]
InChild = Callable[[Callable[[], None]], int]
Remaining = Callable[[Callable[[int, int], bool]], list[int]]
Vqpipe = Callable[..., Any]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
SETTINGS = [
    *("data.image_size=16", "model.quantizer.kind=ema", "model.quantizer.codebook_size=40", "model.base_channels=8"),
    *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4", "train.save_every=3"),
    *("train.warmup_steps=2", "train.global_batch_size=4", "train.whiten_images=16", "objective.disc_start=4"),
    *("train.sample_every=100", "train.log_every=2", "train.steps=12", "train.precision=fp32"),
]
TRAIN = ["train", "--preset", "smoke", "--images", "pictures", "--device", "cpu", "--out", "out"]
TRAIN += [f"--set={setting}" for setting in SETTINGS]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_folder: Callable[..., Path]) -> Path:
    """A folder of 20 drawn pictures."""
    return draw_folder(tmp_path_factory.mktemp("death") / "pictures", 20)


@pytest.fixture
def folder(tmp_path: Path, pictures: Path) -> Path:
    """A working directory with the pictures in it, and nothing else."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pictures").symlink_to(pictures)
    return tmp_path / "work"


# Tokens.


@pytest.mark.parametrize(
    ("operation", "image_size", "kept"),
    [
        ("torn *tokens-00001.parquet", None, "tokens-00000.parquet"),
        (f"rename *{digest_json('tokens-00001.parquet')}.json", None, "tokens-00000.parquet"),
        ("torn *tokens-20x20-00001.parquet", "native", "tokens-20x20-00000.parquet"),
    ],
)
def test_killed_token_shard_is_written_again_and_earlier_shards_are_kept(
    operation: str,
    image_size: str | None,
    kept: str,
    folder: Path,
    small_tokenizer: Callable[[QuantizerConfig], Tokenizer],
    crash: ModuleType,
    in_child: InChild,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("vqpipe.data.tokens.IMAGES_PER_SHARD", 7)
    monkeypatch.setattr("vqpipe.data.sizes.IMAGES_PER_SHARD", 7)
    begun = start(folder / "tokenizer", "tokenizer", {}, {})
    assert isinstance(begun, Draft)
    with begun:
        small = small_tokenizer(VqConfig(codebook_size=16, code_dim=4))
        write_tokenizer(begun, small.autoencoder, small.image_size)
        begun.publish({})

    def run(out: str) -> None:
        tokenize_images.tokenize(
            ["pictures"], Path("tokenizer"), Path(out), image_size=image_size, num_workers=0, device="cpu"
        )

    run("whole")
    assert in_child(lambda: (crash.arm(1, folder, operation), run("out"))[1]) == -signal.SIGKILL
    assert not (folder / "out").exists()
    first = (folder / "out.partial" / kept).stat()
    run("out")
    assert open_artifact("out").digest == open_artifact("whole").digest
    assert (folder / "out" / kept).stat().st_mtime_ns == first.st_mtime_ns  # not written again
    assert sorted(path.name for path in folder.iterdir()) == ["out", "pictures", "tokenizer", "whole"]


# Signals.


@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_sigterm_during_imports_leaves_nothing(seconds: float, folder: Path) -> None:
    command = [sys.executable, "-m", "stages", *TRAIN]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.terminate()
    _, errors = process.communicate(timeout=250)
    assert process.returncode in (143, -signal.SIGTERM), errors  # which a shell calls 143 too
    assert "Traceback" not in errors
    assert [path.name for path in folder.iterdir()] == ["pictures"]


SWALLOWING = """
import os, signal, time

try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
except BaseException:
    pass
"""
IMPORTING = """
import signal, time
from stages import signals

signal.signal(signal.SIGTERM, signals.interrupt)
import swallowing

for _ in range(300):
    time.sleep(0.1)  # a signal just before a sleep is handled after it
"""


def test_signal_in_an_import_that_catches_everything_is_not_lost(folder: Path) -> None:
    (folder / "swallowing.py").write_text(SWALLOWING, encoding="utf-8")
    (folder / "importing.py").write_text(IMPORTING, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "importing.py"], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("stages.signals.Interrupted: 15")


MARKED = """
import sys, time
from pathlib import Path
import safetensors.torch
from vqpipe.training import loop

seed_step, serialize_file = loop.seed_step, safetensors.torch.serialize_file

def marked_seed_step(seed, step):
    seed_step(seed, step)
    if step == 4:
        Path("../step").touch()
        time.sleep(1)

def slow_serialize_file(tensors, file, *args, **options):
    serialize_file(tensors, file, *args, **options)
    if "step-00000006" in str(file) and not Path("../save").exists():
        Path("../save").touch()
        time.sleep(30)

loop.seed_step = marked_seed_step
if "slow-save" in sys.argv:
    safetensors.torch.serialize_file = slow_serialize_file
    sys.argv.remove("slow-save")
from stages.cli import main
main()
"""
"""The console script. Its fifth step creates the file `step` and takes a second; with the word slow-save its second
save creates the file `save` and takes half a minute."""


@pytest.fixture(scope="module")
def straight(pictures: Path, vqpipe: Vqpipe, quick_training: Callable[[pytest.MonkeyPatch], None]) -> Files:
    """The files of an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        quick_training(patch)
        done = vqpipe(pictures.parent, *TRAIN)
    assert done.returncode == 0, done.stderr
    return open_artifact(pictures.parent / "out").manifest.files


@pytest.fixture
def resumes(folder: Path, straight: Files, vqpipe: Vqpipe) -> Callable[[int], None]:
    """`resumes(step)`: the same command resumes at `step`, and ends with the weights of the undisturbed run."""

    def resumes(step: int) -> None:
        done = vqpipe(folder, *TRAIN)
        assert done.returncode == 0, done.stderr
        assert f"resuming at step {step}" in done.stderr
        files = open_artifact(folder / "out").manifest.files
        assert files.keys() == straight.keys()
        for name in ("model.safetensors", "discriminator.safetensors", "pictures/step-00000012.png"):
            assert files[name] == straight[name], name

    return resumes


@pytest.mark.usefixtures("fast_training")
@pytest.mark.parametrize(
    ("number", "code", "times"),
    [
        pytest.param(number, code, times, id=f"{number.name}-{times}", marks=[] if fast else [pytest.mark.slow])
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143))
        for times in (1, 2)
        for fast in ((number, times) == (signal.SIGTERM, 1),)
    ],
)
def test_first_signal_stops_after_the_step_and_the_second_at_once(
    number: signal.Signals,
    code: int,
    times: int,
    folder: Path,
    vqpipe: Vqpipe,
    resumes: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        seeded = loop.seed_step

        def seed_step(seed: int, step: int) -> None:
            seeded(seed, step)
            for _ in range(times if step == 4 else 0):
                signal.raise_signal(number)

        patch.setattr(loop, "seed_step", seed_step)
        done = vqpipe(folder, *TRAIN)
    assert done.returncode == code
    assert "interrupted; the same command again resumes" in done.stderr
    with pytest.raises(ArtifactError, match="is not finished"):
        open_artifact(folder / "out")
    resumes({1: 5, 2: 3}[times])


def started(
    folder: Path, mark: str, *words: str, command: Sequence[str] = (), **options: Any
) -> "subprocess.Popen[str]":
    """A run in a process group of its own, once it created the file `mark`; `command`: how to start it."""
    command = command or [sys.executable, "-c", MARKED, *TRAIN, *words]
    options = {"stderr": subprocess.PIPE, "process_group": 0} | options
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **options)
    while process.poll() is None and not (folder.parent / mark).exists():
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_sigkill_during_a_slow_save_after_sigterm_keeps_the_checkpoint_before(
    folder: Path, resumes: Callable[[int], None]
) -> None:
    process = started(folder, "save", "slow-save")
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)  # it is still saving
    process.kill()
    assert "SIGTERM: stopping" in process.communicate(timeout=250)[1]
    assert process.returncode == -signal.SIGKILL
    names = {path.name for path in (folder / "out.partial" / "checkpoints").iterdir()}
    assert "step-00000003" in names
    assert "step-00000006" not in names
    assert len(names) > 1  # the torn one
    resumes(3)


@pytest.mark.slow
def test_sigstop_and_sigcont_change_nothing_and_the_lock_stays_held(
    folder: Path, straight: Files, vqpipe: Vqpipe
) -> None:
    process = started(folder, "step", "--set=data.num_workers=1")
    os.killpg(process.pid, signal.SIGSTOP)
    second = vqpipe(folder, *TRAIN)
    assert second.returncode == 1
    assert f"out is being written by process {process.pid} on " in second.stderr
    time.sleep(3)
    os.killpg(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    files = open_artifact(folder / "out").manifest.files
    assert files["model.safetensors"] == straight["model.safetensors"]


@pytest.mark.slow
def test_closed_terminal_saves_a_checkpoint_and_exits_with_129(
    folder: Path, resumes: Callable[[int], None], remaining: Remaining
) -> None:
    """As from a shell: the kernel signals the session leader, which signals its process group."""
    terminal, end = os.openpty()
    reader = threading.Thread(target=drain, args=(terminal, folder.parent / "step"))
    reader.start()
    process = started(
        folder,
        "step",
        "--set=data.num_workers=1",
        stdin=end,
        stdout=end,
        stderr=end,
        process_group=None,
        start_new_session=True,
        preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_DFL), fcntl.ioctl(end, termios.TIOCSCTTY, 0)),
    )
    os.close(end)
    reader.join()
    os.close(terminal)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=250) == 129
    assert remaining(lambda _, group: group == process.pid) == []
    resumes(5)


def drain(terminal: int, until: Path) -> None:
    """Read a terminal until the file exists."""
    while not until.exists():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)


def test_second_sighup_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SIGNALS", {*signals.SIGNALS, signal.SIGHUP})  # also where nohup runs the tests
    with signals.StopAfterStep() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert stop.requested()
        with pytest.raises(signals.Interrupted) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    with pytest.raises(signals.Interrupted) as ended:
        stop.exit()
    assert ended.value.code == 129


def test_nohup_is_respected() -> None:
    program = "import signal; from stages import signals; print(signal.SIGHUP in signals.SIGNALS)"
    for before, expected in (("SIG_IGN", "False"), ("SIG_DFL", "True")):
        command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGHUP, signal.{before}); {program}"]
        assert subprocess.check_output(command, env=ENVIRONMENT, text=True, timeout=250).strip() == expected


# Several ranks.


def rank(number: int, ranks: int, port: int, folder: Path, action: Callable[[Draft], None]) -> Callable[[], None]:
    """One of several processes that write an artifact together, as torchrun starts them; its stderr goes to a file."""

    def app() -> None:
        with distributed.process_group(CPU):
            draft = start(folder / "out", "codebook", {}, {})
            assert isinstance(draft, Draft)
            with draft:
                with draft.write(f"{number}.bin") as path:
                    path.write_bytes(b"x")
                action(draft)

    def run() -> None:
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        cli.app = app  # type: ignore[assignment]
        sys.stdout = sys.stderr = (folder / f"{number}.txt").open("w", encoding="utf-8")
        try:
            cli.main()
        finally:
            sys.stderr.flush()

    return run


def together(folder: Path, fork: Fork, *actions: Callable[[Draft], None]) -> list[int]:
    """Run one rank for each action; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [fork(rank(n, len(actions), port, folder, action)) for n, action in enumerate(actions)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def failing(draft: Draft) -> None:
    raise DataError("the first error", "Do something about it")


def sharing(draft: Draft) -> None:
    distributed.all_reduce_sum(torch.ones(1))


def late(draft: Draft) -> None:
    """Waits until the first rank has given up."""
    while not (draft.out.parent / "0.txt").stat().st_size:
        time.sleep(0.02)
    sharing(draft)


@pytest.mark.parametrize("culprit", [0, 1])
def test_error_of_the_rank_that_failed_first_is_reported(culprit: int, tmp_path: Path, fork: Fork) -> None:
    actions = [sharing, sharing]
    actions[culprit] = failing
    assert together(tmp_path, fork, *actions) == [1, 1]
    errors = [(tmp_path / f"{number}.txt").read_text(encoding="utf-8") for number in range(2)]
    assert errors[culprit] == f"error: rank {culprit}: the first error. Do something about it.\n"
    assert errors[1 - culprit].startswith(f"error: rank {1 - culprit}: another rank has ended or hangs; its own error")
    status = json.loads((tmp_path / "out.partial" / "status.json").read_text(encoding="utf-8"))
    assert status == {"error": "the first error. Do something about it.", "cause": 65, "rank": culprit}


def test_hanging_rank_is_an_error_after_the_timeout(
    tmp_path: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "COLLECTIVE_TIMEOUT", datetime.timedelta(seconds=3))
    assert together(tmp_path, fork, sharing, late) == [1, 1]
    errors = (tmp_path / "0.txt").read_text(encoding="utf-8")
    assert errors.startswith("error: rank 0: another rank has ended or hangs; its own error")
    status = json.loads((tmp_path / "out.partial" / "status.json").read_text(encoding="utf-8"))
    assert (status["cause"], status["rank"]) == (75, 0)


def works_alone(draft: Draft) -> None:
    """The main rank works for longer than the others wait for tensors."""
    distributed.on_main(lambda: time.sleep(2))
    with distributed.sharing_errors():
        time.sleep(2 * distributed.rank())
    distributed.barrier()


def test_rank_without_work_waits_for_the_others(tmp_path: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "COLLECTIVE_TIMEOUT", datetime.timedelta(seconds=1.5))
    assert together(tmp_path, fork, works_alone, works_alone) == [0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 8, 100])
def test_every_rank_takes_the_same_number_of_steps(length: int, ranks: int) -> None:
    """A rank's images are its part of endless global batches, never a shard of its own."""
    streams = [Shuffle(length, seed=0, batch_size=6, rank=rank, world_size=ranks).batches(3) for rank in range(ranks)]
    (alone,) = [Shuffle(length, seed=0, batch_size=6, rank=0, world_size=1).batches(3)]
    for parts in islice(zip(*streams, strict=True), 3 * length):
        assert {len(part) for part in parts} == {6 // ranks}
        assert [place for part in parts for place in part] == next(alone)


def test_batch_size_that_does_not_divide_by_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not divisible by 4 ranks"):
        Shuffle(7, seed=0, batch_size=6, rank=0, world_size=4)
    with pytest.raises(ConfigError, match="is not divisible by 4 ranks"):
        TrainConfig(global_batch_size=6).share(4)


RAISING = """
import os
from vqpipe.errors import DataError
from vqpipe.training import loop

seeded = loop.seed_step

def seed_step(seed, step):
    seeded(seed, step)
    if step == 4 and os.environ["RANK"] == "1":
        raise DataError("the first error", "Do something about it")

loop.seed_step = seed_step
from stages.cli import main
main()
"""
"""The console script. The second rank fails in its fifth step."""


def launcher(folder: Path, program: str, *words: str) -> list[str]:
    (folder.parent / "program.py").write_text(program, encoding="utf-8")
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *options, str(folder.parent / "program.py"), *TRAIN, *words]


def torchrun(folder: Path, program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = launcher(folder, program, *words)
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_error_of_one_rank_is_reported_under_torchrun(folder: Path, straight: Files) -> None:
    done = torchrun(folder, RAISING)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: rank 1: the first error. Do something about it."
    status = json.loads((folder / "out.partial" / "status.json").read_text(encoding="utf-8"))
    assert status == {"error": "the first error. Do something about it.", "cause": 65, "rank": 1}
    again = torchrun(folder, "from stages.cli import main\nmain()")
    assert again.returncode == 0, again.stderr
    assert "resuming at step 3" in again.stderr


@pytest.mark.slow
def test_ranks_save_a_checkpoint_and_exit_after_torchrun_is_killed(
    folder: Path, remaining: Remaining, vqpipe: Vqpipe
) -> None:
    with (folder.parent / "stderr").open("w") as errors:
        process = started(folder, "step", command=launcher(folder, MARKED), stderr=errors)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        process.kill()
        process.wait(timeout=250)
    assert len(ranks) == 2
    assert remaining(lambda number, _: str(number) in ranks) == []
    assert "torchrun has ended: stopping after this step" in (folder.parent / "stderr").read_text(encoding="utf-8")
    resumed = vqpipe(folder, *TRAIN)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 5" in resumed.stderr


@pytest.mark.slow
def test_two_ranks_train_on_an_odd_number_of_images(folder: Path, pictures: Path) -> None:
    for name, numbers in (("few", range(7)), ("held-out", range(7, 12))):
        (folder / name).mkdir()
        for number in numbers:
            (folder / name / f"{number}.png").symlink_to(pictures / f"{number:02d}.png")
    words = ["--images", "few", "--validation", "held-out", "--set=train.validate_every=4", "--global-batch-size=2"]
    done = torchrun(folder, "from stages.cli import main\nmain()", *words)
    assert done.returncode == 0, done.stderr
    assert open_artifact(folder / "out").facts["images_seen"] == 24


# Orphans.


class WritesPid(Dataset[str]):
    """Writes the id of the process that loads an item to the file of that name."""

    def __getitem__(self, work: str) -> str:
        Path(work).write_text(str(os.getpid()), encoding="utf-8")
        return work


def test_loader_processes_exit_with_their_parent(tmp_path: Path, in_child: InChild, remaining: Remaining) -> None:
    def die() -> None:
        results = through_workers(WritesPid(), [str(tmp_path / str(number)) for number in range(4)], 2)
        assert [next(results) for _ in range(4)]
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    found = {int(file.read_text(encoding="utf-8")) for file in tmp_path.iterdir() if file.name.isdecimal()}
    assert len(found) == 2
    assert remaining(lambda number, _: number in found) == []


def test_loader_processes_exit_if_their_parent_dies_as_they_start(
    tmp_path: Path, in_child: InChild, remaining: Remaining, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, file = batches.set_worker_signals, tmp_path / "worker"

    def orphaned(worker: int) -> None:
        file.write_text(str(os.getpid()), encoding="utf-8")
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
        init(worker)

    monkeypatch.setattr(batches, "set_worker_signals", orphaned)
    work = [str(tmp_path / "done")]
    assert in_child(lambda: list(through_workers(WritesPid(), work, 1)) and None) == -signal.SIGKILL
    worker = int(file.read_text(encoding="utf-8"))
    assert remaining(lambda number, _: number == worker) == []


@pytest.mark.slow
def test_loader_processes_of_a_killed_run_exit(
    folder: Path, resumes: Callable[[int], None], remaining: Remaining
) -> None:
    process = started(folder, "step", "--set=data.num_workers=2")
    process.kill()
    process.communicate(timeout=250)
    assert remaining(lambda _, group: group == process.pid) == []
    resumes(3)
