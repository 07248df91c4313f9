"""What is promised when something goes wrong: a full disk, a signal in the middle of a save, a rank that dies."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from vqpipe.artifacts import open_artifact
from vqpipe.errors import ArtifactError
from vqpipe.models import DiscriminatorConfig, PatchDiscriminator, VqganConfig, build_autoencoder
from vqpipe.quantizers import LcConfig
from vqpipe.training import checkpoints as disk
from vqpipe.training.config import TrainConfig
from vqpipe.training.optimizers import WeightEma, make_optimizer
from vqpipe.training.state import TrainState, checkpoints

SETTINGS = [
    *("data.image_size=16", "model.quantizer.kind=ema", "model.quantizer.codebook_size=40", "model.base_channels=8"),
    *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4", "train.save_every=3"),
    *("train.warmup_steps=2", "train.global_batch_size=4", "train.matched_start_images=16", "objective.disc_start=4"),
    *("train.look_every=100", "train.log_every=2", "train.steps=8", "train.precision=fp32"),
]
TRAIN = ["train", "--preset", "smoke", "--images", "pictures", *(f"--set={setting}" for setting in SETTINGS)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SLOW_SAVES = """
import sys, time
from pathlib import Path
from vqpipe.training import checkpoints

written = checkpoints.save_file

def slowly(tensors, file):
    written(tensors, file)
    if not Path("saving").exists():
        Path("saving").touch()
        time.sleep(2)

checkpoints.save_file = slowly
from stages.cli import main
main()
"""
"""The console script, where the first file of the first checkpoint says that it is there, and takes two seconds."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn pictures."""
    folder = tmp_path_factory.mktemp("faults") / "pictures"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(20):
        small = draws.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((20, 20), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path, pictures: Path) -> Path:
    """A working directory with the pictures in it."""
    (tmp_path / "pictures").symlink_to(pictures)
    return tmp_path


@pytest.fixture(scope="module")
def straight(pictures: Path) -> dict[str, dict[str, object]]:
    """The files of a run that nothing happened to."""
    done = vqpipe(pictures.parent, "straight")
    assert done.returncode == 0, done.stderr
    return open_artifact(pictures.parent / "straight").manifest.files


def vqpipe(folder: Path, out: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages", *TRAIN, "--out", out, *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def same_weights(folder: Path, out: str, straight: dict[str, dict[str, object]]) -> bool:
    files = open_artifact(folder / out).manifest.files
    return all(files[name] == straight[name] for name in ("model.safetensors", "discriminator.safetensors"))


# A disk that is full.


def make(width: int = 8) -> TrainState:
    torch.manual_seed(0)
    codebook = LcConfig(codebook_size=512, feature_dim=16, code_dim=4, codebook_init="uniform")
    model = build_autoencoder(
        VqganConfig(
            base_channels=width,
            channel_multipliers=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            z_channels=8,
            quantizer=codebook,
        )
    )
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4))
    config = TrainConfig()
    optimizers = (make_optimizer(config, list(network.parameters())) for network in (model, discriminator))
    return TrainState(model, discriminator, *optimizers, weight_ema=WeightEma(model, 0.9))


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
    *[("save_file", calls, UNWRITTEN) for calls in range(1, 7)],  # the shared tensor, then the five parts
    ("flush_to_disk", 1, FULL),
    ("flush_to_disk", 4, FULL),
    ("write_json", 1, FULL),
    ("hash_file", 3, OSError(errno.EIO, "Input/output error")),
]


@pytest.mark.parametrize(("name", "calls", "error"), MOMENTS)
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, error: Exception
) -> None:
    monkeypatch.setattr(disk, "SHARED_BYTES", 1024)
    state = make()
    for state.step in (3, 6):
        state.save(tmp_path)
    state.step = 9
    state.model.quantizer.entries.add_(1)  # so that there is another shared tensor to write
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(disk, name, full_after(calls, error, getattr(disk, name)))
        with pytest.raises(ArtifactError, match=r"cannot save step 9 in .* MB are needed, .* MB are free") as failure:
            state.save(tmp_path)
    assert "\n" not in str(failure.value)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before
    other = make()
    assert other.resume(tmp_path)
    assert (other.step, other.passed_over) == (6, [])
    state.save(tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000006", "step-00000009"]


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
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room(
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
    kept = checkpoints(small_disk / "out.partial")
    assert all(disk.damage(each) is None for each in kept)
    assert not list((small_disk / "out.partial" / "checkpoints").glob(".*"))
    filler.unlink()
    done = vqpipe(folder, str(small_disk / "out"))
    assert done.returncode == 0, done.stderr
    assert same_weights(small_disk, "out", straight)


# Signals in the middle of a save.


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_during_a_save_loses_nothing(
    folder: Path, straight: dict[str, dict[str, object]], signals: int
) -> None:
    """One: the save ends, then the run. Two: the process leaves at once, and what was half written is never read."""
    command = [sys.executable, "-c", SLOW_SAVES, *TRAIN, "--out", "out"]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "saving").exists():
        time.sleep(0.01)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    kept = checkpoints(folder / "out.partial")
    assert bool(kept) == (signals == 1)
    assert all(disk.damage(each) is None for each in kept)
    done = vqpipe(folder, "out")
    assert done.returncode == 0, done.stderr
    assert ("resuming at step" in done.stderr) == (signals == 1)
    assert same_weights(folder, "out", straight)


# A rank that dies.


@pytest.mark.slow
def test_where_a_rank_is_killed_the_others_end_in_one_line(
    folder: Path, straight: dict[str, dict[str, object]]
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stages"]
    endless = ["--set", "train.steps=100000", "--set", "train.save_every=20"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, *TRAIN, *endless, "--out", "out"],
        cwd=folder,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not checkpoints(folder / "out.partial"):
        time.sleep(0.05)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors
    assert "rank 0: " in said[0]
    assert disk.newest(folder / "out.partial")[0] is not None


def rank_of(launcher: int, rank: int) -> int:
    """The process of `rank` that torchrun has started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("torchrun has not started that rank")
