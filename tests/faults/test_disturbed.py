"""Stages that are killed at random moments, or run out of disk space, end with the files of an undisturbed run.

Random kills: every round starts a stage in a new folder and kills its process group at a random moment, then runs the
same command, which may be killed too, until it ends by itself. Stages are forks of one process that has imported all
modules and computed nothing; the last round is a new process, which may die during its imports.

Full disk: a stage writes to a disk (a tmpfs, which needs root) that is smaller than its files, and ends with one line;
then the disk grows, and the same command ends.

VQPIPE_KILLER_ROUNDS is the number of rounds per stage, 20 by default.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vqpipe.artifacts import Artifact, open_artifact

Remaining = Callable[[Callable[[int, int], bool]], list[int]]
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = int(os.environ.get("VQPIPE_KILLER_ROUNDS", "20"))
AGAIN = 0.5
"""Probability that a resumed run is killed too."""
PROGRAM = """
import gc, importlib, json, os, pkgutil, sys, traceback
from stages import cli
from vqpipe.data import tokens
from vqpipe.generation import generate

tokens.IMAGES_PER_SHARD = generate.IMAGES_PER_SHARD = 6
os.fsync = lambda handle: None

def serve():
    import vqpipe
    for module in pkgutil.walk_packages(vqpipe.__path__, "vqpipe."):
        if not module.name.startswith("vqpipe.benchmarks"):
            importlib.import_module(module.name)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.chdir(order["folder"])
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
                os.dup2(handle, stream)
            sys.argv = ["vqpipe", *order["words"]]
            code = 70
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

if sys.argv[1:]:
    cli.main()
else:
    serve()
"""
"""The console script; without arguments a server that forks one for each line of its stdin and exits with `os._exit`.
In both, shards are small and nothing is flushed: a process that dies loses nothing that it wrote. (test_disk.py checks
the order of flushes, which matters for power loss.)"""

TINY = [
    *("data.image_size=16", "model.quantizer.codebook_size=40", "model.base_channels=8", "model.z_channels=8"),
    *("model.quantizer.feature_dim=16", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4"),
    *("train.steps=12", "train.warmup_steps=2", "train.global_batch_size=4", "train.save_every=3"),
    *("train.whiten_images=16", "train.sample_every=12", "train.log_every=2", "objective.disc_start=4"),
    *("features.image_size=32", "features.patch_size=4", "features.components=16", "features.images_per_shard=6"),
    *("kmeans.k=40", "eval.image_size=16", "data.num_workers=1", "eval.batch_size=4"),
]
LEARNING = [
    *("train.warmup_steps=1", "examples.held_out=6", "train.validate_every=6", "train.sample_every=12"),
    *("train.save_every=3", "train.log_every=2"),
]
LLAMAGEN = ["generator.layers=1", "generator.head_layers=1", "generator.width=16", "generator.heads=2"]
VIT = ["classifier.width=16", "classifier.depth=1", "classifier.num_heads=2", "classifier.drop_path=0.0"]


def with_preset(name: str, settings: list[str]) -> list[str]:
    return ["--preset", name, *(f"--set={setting}" for setting in settings)]


STAGES: dict[str, list[str]] = {
    "prepare-data": ["folder", "--source={pictures}", "--shard-size=6", "--num-workers=1"],
    "extract-features": ["--images={prepare-data}", "--num-workers=1", *with_preset("smoke", TINY)],
    "kmeans": ["--features={extract-features}", *with_preset("smoke", TINY)],
    "train": ["--images={prepare-data}", "--codebook={kmeans}", *with_preset("smoke", TINY)],
    "tokenize": ["--images={prepare-data}", "--tokenizer={train}", "--flip", "--num-workers=1", "--batch-size=4"],
    "detokenize": ["--tokens={tokenize}", "--tokenizer={train}", "--batch-size=4"],
    "train-generator": [
        *("--tokens={tokenize}", "--tokenizer={train}", "--steps=12", "--global-batch-size=4"),
        *with_preset("llamagen-tiny", LLAMAGEN + LEARNING),
    ],
    "generate": ["--generator={train-generator}", "--num-images=30", "--batch-size=3"],
    "train-classifier": [
        *("--tokens={tokenize}", "--tokenizer={train}", "--steps=12", "--global-batch-size=4"),
        *with_preset("vit-tiny", VIT + LEARNING),
    ],
    "eval": ["--images={prepare-data}", "--tokenizer={train}", "--num-workers=1", *with_preset("smoke", TINY)],
}
"""Stage -> its arguments; {name} is the path of another stage's artifact. Each comes after the stages it reads."""
PAGE = os.sysconf("SC_PAGE_SIZE")
TIMES = ("images_per_second", "seconds_per_step", "data_wait", "tflops")
"""Keys of a training log that are measured times."""


class Launcher:
    """Starts stages in process groups of their own, and kills the groups."""

    def __init__(self, folder: Path, remaining: Remaining) -> None:
        self.remaining = remaining
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.environment |= {"XDG_CACHE_HOME": str(folder / "cache")}
        self.command = [sys.executable, "-c", PROGRAM]
        began = time.monotonic()
        self.server = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.answer() == "ready"
        self.seconds_to_import = time.monotonic() - began

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(timeout=250)
        self.server.stdout.close()

    def answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def forked(self, words: list[str], folder: Path, seconds: float | None) -> int:
        """Run a stage in `folder`, killed after `seconds`; returns its exit code, or minus the signal that ended it."""
        assert self.server.stdin is not None
        log = folder.with_name(f"{folder.name}.log")
        self.server.stdin.write(json.dumps({"words": words, "folder": str(folder), "log": str(log)}) + "\n")
        group = int(self.answer())
        while not select.select([self.server.stdout], [], [], seconds)[0]:
            with suppress(ProcessLookupError):  # the process has not made its group yet
                os.killpg(group, signal.SIGKILL)
            seconds = 0.01
        code = int(self.answer())
        assert self.remaining(lambda _, its_group: its_group == group) == []
        return code

    def alone(self, words: list[str], folder: Path, seconds: float | None) -> int:
        """The same in a new process, which has to import first."""
        with folder.with_name(f"{folder.name}.log").open("a") as log:
            process = subprocess.Popen(
                [*self.command, *words], cwd=folder, env=self.environment, stdout=log, stderr=log, process_group=0
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait(timeout=250)
        assert self.remaining(lambda _, its_group: its_group == process.pid) == []
        return code


class Line:
    """Undisturbed runs of the stages on a few drawn pictures; each runs when its artifact is first needed."""

    def __init__(self, folder: Path, remaining: Remaining) -> None:
        self.folder, self.launcher = folder, Launcher(folder, remaining)
        self.seconds: dict[str, float] = {}
        random = np.random.default_rng(0)
        for number in range(30):
            small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            picture = folder / "pictures" / str(number % 3) / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            small.resize((32, 32), Image.Resampling.BICUBIC).save(picture)

    def words(self, stage: str) -> list[str]:
        """The command, after running the stages that it reads."""
        words = [stage]
        for word in STAGES[stage]:
            for name in re.findall(r"{([\w-]+)}", word):
                word = word.replace(f"{{{name}}}", str(self.made(name)))
            words.append(word)
        return [*words, "--device=cpu", "--out=out"]

    def made(self, name: str) -> Path:
        """The artifact of a stage, or the pictures."""
        if name == "pictures":
            return self.folder / name
        folder = self.folder / name
        if name not in self.seconds:
            words = self.words(name)
            folder.mkdir()
            began = time.monotonic()
            assert self.launcher.forked(words, folder, None) == 0, folder.with_name(f"{name}.log").read_text()
            self.seconds[name] = time.monotonic() - began
        return folder / "out"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, remaining: Remaining) -> Iterator[Line]:
    line = Line(tmp_path_factory.mktemp("killed"), remaining)
    yield line
    line.launcher.close()


def outcome(folder: Path) -> tuple[Any, ...]:
    """The result of a run: the files of its folder, its manifest, and contents, without measured times."""
    artifact = open_artifact(folder / "out")
    artifact.verify()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    manifest = artifact.manifest
    promised = manifest.request, manifest.kind, manifest.config, manifest.inputs, manifest.facts
    return files, promised, {name: contents(artifact, name) for name in artifact.names()}


def contents(artifact: Artifact, name: str) -> Any:
    """The hash of a file; of a training log the rows without times; of a run's page nothing, since it shows times."""
    if "metrics.jsonl" not in artifact.names() or name not in ("metrics.jsonl", "report.html"):
        return artifact.manifest.files[name]
    rows = [json.loads(row) for row in artifact.file("metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def kill_until_it_ends(
    run: Callable[[list[str], Path, float | None], int],
    words: list[str],
    folder: Path,
    longest: float,
    random: np.random.Generator,
) -> int:
    """Kill a stage at least once, and run it again until it ends by itself; returns the number of kills."""
    kills = 0
    while True:
        seconds = random.uniform(0, longest) if not kills or random.random() < AGAIN else None
        code = run(words, folder, seconds)
        if code == -signal.SIGKILL:
            kills += 1
        elif kills:
            assert code == 0, folder.with_name(f"{folder.name}.log").read_text(encoding="utf-8")
            return kills
        else:  # faster than expected
            longest /= 2
            shutil.rmtree(folder)
            folder.mkdir()


def killed(line: Line, stage: str, rounds: int, folder: Path) -> int:
    """Run `rounds` rounds of a stage; returns the number of kills."""
    words, launcher = line.words(stage), line.launcher
    expected = outcome(line.made(stage).parent)
    random = np.random.default_rng([rounds, list(STAGES).index(stage)])
    kills = []
    for number in range(rounds):
        own = folder / f"{number}"
        own.mkdir()
        run, longest = launcher.forked, line.seconds[stage]
        if number == rounds - 1:
            run, longest = launcher.alone, longest + launcher.seconds_to_import / 2
        kills.append(kill_until_it_ends(run, words, own, longest, random))
        assert outcome(own) == expected, f"round {number} of {rounds}, after {kills[-1]} kills"
        shutil.rmtree(own)
    print(f"{stage}: {rounds} rounds of {line.seconds[stage]:.2f} s, killed {sum(kills)} times, same files")
    return sum(kills)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stage_killed_at_random_moments_ends_with_the_same_files(stage: str, line: Line, tmp_path: Path) -> None:
    assert killed(line, stage, ROUNDS, tmp_path) >= ROUNDS


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """disk(size) mounts a tmpfs of `size` bytes, or resizes it."""
    place = tmp_path / "disk"
    place.mkdir()

    def of_size(size: int) -> Path:
        options = f"size={size}" + (",remount" if place.is_mount() else "")
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"mounting a disk needs root: {mounted.stderr.strip()}")
        return place

    yield of_size
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("stage", STAGES)
def test_stage_resumes_on_a_full_disk_that_grew_with_the_same_files(
    stage: str, share: float, line: Line, disk: Callable[[int], Path]
) -> None:
    words, made = line.words(stage), line.made(stage).parent
    needed = sum(-(-path.stat().st_size // PAGE) * PAGE for path in made.rglob("*") if path.is_file())
    folder = disk(max(PAGE, int(needed * share)))
    log = folder.with_name(f"{folder.name}.log")
    code = line.launcher.forked(words, folder, None)
    said = log.read_text(encoding="utf-8")
    assert code == 1, said
    assert "Traceback" not in said
    errors = [text for text in said.splitlines() if "error:" in text]
    assert len(errors) == 1, said
    assert re.search(r"cannot (write|save) .*\(.*[\d.]+ MB are free\)\. .* run the same command again", errors[0])
    disk(4 * needed + 2**20)
    assert line.launcher.forked(words, folder, None) == 0, log.read_text(encoding="utf-8")
    assert outcome(folder) == outcome(made)
