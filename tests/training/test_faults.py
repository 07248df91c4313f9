"""Training under faults: a full disk, a signal during a save, a rank that dies."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from vqpipe.artifacts import open_artifact
from vqpipe.artifacts import states as disk
from vqpipe.errors import ArtifactError
from vqpipe.quantizers import LcConfig
from vqpipe.training.checkpoint import TrainState, checkpoints

SETTINGS = [
    *("data.image_size=16", "model.quantizer.kind=ema", "model.quantizer.codebook_size=40", "model.base_channels=8"),
    *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4", "train.save_every=3"),
    *("train.warmup_steps=2", "train.global_batch_size=4", "train.whiten_images=16", "objective.disc_start=4"),
    *("train.sample_every=100", "train.log_every=2", "train.steps=8", "train.precision=fp32"),
]
TRAIN = ["train", "--preset", "smoke", "--images", "pictures", *(f"--set={setting}" for setting in SETTINGS)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SLOW_SAVES = """
import sys, time
from pathlib import Path
from vqpipe.artifacts import states

save_file = states.save_file

def slowly(tensors, file):
    save_file(tensors, file)
    if not Path("saving").exists():
        Path("saving").touch()
        time.sleep(2)

states.save_file = slowly
from stages.cli import main
main()
"""
"""The console script; writing the first file of the first checkpoint creates the file `saving` and takes 2 s more."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_folder: Callable[..., Path]) -> Path:
    """A folder of drawn pictures."""
    return draw_folder(tmp_path_factory.mktemp("faults") / "pictures", 20)


@pytest.fixture
def folder(tmp_path: Path, pictures: Path) -> Path:
    """A working directory with the pictures in it."""
    (tmp_path / "pictures").symlink_to(pictures)
    return tmp_path


@pytest.fixture(scope="module")
def straight(pictures: Path) -> dict[str, dict[str, object]]:
    """The files of an undisturbed run."""
    done = vqpipe(pictures.parent, "straight")
    assert done.returncode == 0, done.stderr
    return open_artifact(pictures.parent / "straight").manifest.files


def vqpipe(folder: Path, out: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages", *TRAIN, "--out", out, *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def same_weights(folder: Path, out: str, straight: dict[str, dict[str, object]]) -> bool:
    files = open_artifact(folder / out).manifest.files
    return all(files[name] == straight[name] for name in ("model.safetensors", "discriminator.safetensors"))


# A full disk.


def full_after(calls: int, error: Exception, original: Callable[..., object]) -> Callable[..., object]:
    """`original`, which raises `error` in its `calls`-th call."""
    count = iter(range(1, 1000))

    def failing(*args: object) -> object:
        if next(count) == calls:
            raise error
        return original(*args)

    return failing


FULL = OSError(errno.ENOSPC, "No space left on device")
UNWRITTEN = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
MOMENTS = [
    *[("save_file", calls, UNWRITTEN) for calls in (1, 2, 6)],  # the shared tensor, then the first and the last part
    *[pytest.param("save_file", calls, UNWRITTEN, marks=pytest.mark.slow) for calls in (3, 4, 5)],
    pytest.param("flush_to_disk", 1, FULL, marks=pytest.mark.slow),
    ("flush_to_disk", 4, FULL),
    ("write_json", 1, FULL),
    ("hash_file", 3, OSError(errno.EIO, "Input/output error")),
]


@pytest.mark.parametrize(("name", "calls", "error"), MOMENTS)
def test_failed_save_leaves_the_earlier_checkpoints_as_they_were(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_state: Callable[..., TrainState],
    name: str,
    calls: int,
    error: Exception,
) -> None:
    monkeypatch.setattr(disk, "SHARED_BYTES", 1024)
    codebook = LcConfig(codebook_size=512, feature_dim=16, code_dim=4, codebook_init="uniform")
    state = make_state(codebook)
    for state.step in (3, 6):
        state.save(tmp_path)
    state.step = 9
    state.networks["model"].quantizer.codes.add_(1)  # so that another shared tensor is written
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(disk, name, full_after(calls, error, getattr(disk, name)))
        with pytest.raises(ArtifactError, match=r"cannot save step 9 in .* MB are needed, .* MB are free") as failure:
            state.save(tmp_path)
    assert "\n" not in str(failure.value)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before
    other = make_state(codebook)
    assert other.resume(tmp_path)
    assert (other.step, other.damaged) == (6, [])
    state.save(tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path).paths()] == ["step-00000006", "step-00000009"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_full_disk_is_a_one_line_error_and_the_run_resumes_once_there_is_room(
    folder: Path, small_disk: Path, straight: dict[str, dict[str, object]]
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_000_000))
    stopped = vqpipe(folder, str(small_disk / "out"))
    assert stopped.returncode == 1
    lines = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "cannot save step" in lines[0]
    assert "no space left on device" in lines[0].lower()
    assert "MB are needed" in lines[0]
    assert "Traceback" not in stopped.stderr
    kept = checkpoints(small_disk / "out.partial").paths()
    assert all(disk.damage(each) is None for each in kept)
    assert not list((small_disk / "out.partial" / "checkpoints").glob(".*"))
    filler.unlink()
    done = vqpipe(folder, str(small_disk / "out"))
    assert done.returncode == 0, done.stderr
    assert same_weights(small_disk, "out", straight)


FULL_DISK = f"""
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from vqpipe.errors import ArtifactError
from vqpipe.training import validation
from vqpipe.training.callbacks import MetricsLog

def unwritten(*_):
    raise SafetensorError({str(UNWRITTEN)!r})

rank, name, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
validation.save_weights = unwritten
path = folder / name
if rank == 0 and name == "metrics.jsonl":
    path.symlink_to("/dev/full")
try:
    if name == "metrics.jsonl":
        MetricsLog(path).on_log({{"step": 1}})
    else:
        best = validation.BestWeights(path, "valid/psnr", higher_is_better=True)
        best.keep_if_best(torch.nn.Linear(1, 1), 1, {{"valid/psnr": 20.0}})
except ArtifactError as error:
    print(error)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "best.safetensors"])
def test_full_disk_while_a_file_of_the_run_is_written_is_one_error_on_every_rank(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", FULL_DISK]
    both = [
        subprocess.Popen([*command, str(rank), name, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    lines = [process.communicate(timeout=300)[0].splitlines() for process in both]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    assert lines[0][0].startswith(f"cannot write {tmp_path / name}: ")
    assert "no space left on device" in lines[0][0].lower()
    assert "MB are free" in lines[0][0]


# Signals during a save.


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_signal_during_a_save_loses_nothing(folder: Path, straight: dict[str, dict[str, object]], signals: int) -> None:
    """One signal: the save ends, then the run. Two: the process exits at once, and half-written files are not read."""
    command = [sys.executable, "-c", SLOW_SAVES, *TRAIN, "--out", "out"]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "saving").exists():
        time.sleep(0.01)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    kept = checkpoints(folder / "out.partial").paths()
    assert bool(kept) == (signals == 1)
    assert all(disk.damage(each) is None for each in kept)
    done = vqpipe(folder, "out")
    assert done.returncode == 0, done.stderr
    assert ("resuming at step" in done.stderr) == (signals == 1)
    assert same_weights(folder, "out", straight)


# A rank that dies; two ranks on one machine and on two.

TWO = ["--nproc-per-node", "2"]
LONG = ["--set", "train.steps=40"]


def torchrun(folder: Path, options: list[str], out: str, *words: str) -> subprocess.Popen[str]:
    """A run under torchrun, started."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "stages", *TRAIN, *words, "--out", out]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def kill_rank_1(process: subprocess.Popen[str], run_dir: Path) -> None:
    """SIGKILL rank 1 as soon as there is a checkpoint."""
    while process.poll() is None and not checkpoints(run_dir).paths():
        time.sleep(0.05)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)


@pytest.fixture(scope="module")
def straight_two(pictures: Path) -> dict[str, dict[str, object]]:
    """The files of a longer, undisturbed run of two ranks."""
    process = torchrun(pictures.parent, ["--standalone", *TWO], "straight-two", *LONG)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return open_artifact(pictures.parent / "straight-two").manifest.files


@pytest.mark.slow
def test_killed_rank_ends_the_others_with_a_one_line_error(folder: Path) -> None:
    endless = ["--set", "train.steps=100000", "--set", "train.save_every=20"]
    process = torchrun(folder, ["--standalone", *TWO], "out", *endless)
    kill_rank_1(process, folder / "out.partial")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors
    assert "rank 0: " in said[0]
    assert checkpoints(folder / "out.partial").newest()[0] is not None


@pytest.mark.slow
def test_run_restarted_by_torchrun_gives_the_same_weights(
    folder: Path, straight_two: dict[str, dict[str, object]]
) -> None:
    process = torchrun(folder, ["--standalone", "--max-restarts", "2", *TWO], "out", *LONG)
    kill_rank_1(process, folder / "out.partial")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("resuming at step") == 1
    assert same_weights(folder, "out", straight_two)


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_two_ranks_on_one_node(
    folder: Path, straight_two: dict[str, dict[str, object]]
) -> None:
    """Two launchers with one rendezvous address, as on two machines with a shared disk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    nodes = [torchrun(folder, [*meeting, "--node-rank", str(rank)], "out", *LONG) for rank in (0, 1)]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors
    assert same_weights(folder, "out", straight_two)


def rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank that torchrun started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("torchrun has not started that rank")
