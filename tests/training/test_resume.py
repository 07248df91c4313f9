"""Resume is bit-exact: a checkpoint holds every tensor that a run depends on, and no other.

Run as a script, alone or under torchrun, this file is one run: `test_resume.py PICTURES FOLDER KIND STEPS [STOP_AT]`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import states as disk
from vqpipe.data.batches import Batch, TrainingStream
from vqpipe.data.images import open_images
from vqpipe.data.transforms import DataConfig
from vqpipe.errors import ArtifactError, NumericError
from vqpipe.files import digest_json, hash_file
from vqpipe.losses import Objective, ObjectiveConfig
from vqpipe.models import (
    AutoencoderConfig,
    DcaeConfig,
    DiscriminatorConfig,
    PatchDiscriminator,
    VqganConfig,
    build_autoencoder,
)
from vqpipe.quantizers import CvqConfig, EmaConfig, LcConfig, MultiGroupConfig, QuantizerConfig
from vqpipe.training.callbacks import Callback
from vqpipe.training.checkpoint import TrainState, checkpoints
from vqpipe.training.config import TokenizerTrainConfig
from vqpipe.training.loop import train
from vqpipe.training.running_metrics import Row
from vqpipe.training.tokenizer_task import TokenizerTask

STEPS, BATCH, PICTURES = 8, 4, 22
GROUP = CvqConfig(codebook_size=32, code_dim=4, normalize=True)


def vqgan(quantizer: QuantizerConfig) -> VqganConfig:
    return VqganConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        z_channels=8,
        quantizer=quantizer,
    )


MODELS: dict[str, AutoencoderConfig] = {
    "lc": vqgan(LcConfig(codebook_size=64, feature_dim=16, code_dim=4, codebook_init="uniform")),
    "ema": vqgan(EmaConfig(codebook_size=64, code_dim=4)),
    "multi_group": vqgan(MultiGroupConfig(num_groups=2, group=GROUP, masking="sample")),
}
BATCH_NORMS = DcaeConfig(
    quant_conv="full",
    widths=(8, 8, 8),
    encoder_depths=(0, 1, 1),
    decoder_depths=(0, 1, 1),
    attention_from=3,
    latent_channels=8,
    quantizer=EmaConfig(codebook_size=64, code_dim=4),
)
"""A tokenizer with batch norms, whose running statistics move in every step."""
SHARED_BYTES = 1024
"""Small enough for the codebooks here to be stored apart from the checkpoints, as large ones are."""


class Finished(NamedTuple):
    """A finished run."""

    state: TrainState
    row: Row
    """The last row of its log."""


class RecordedStream:
    """A stream that writes one line a batch to `log`: `[step, indices]`."""

    def __init__(self, stream: TrainingStream, log: Path) -> None:
        self.stream, self.log = stream, log

    def from_sample(self, images_seen: int) -> Iterator[Batch]:
        with self.log.open("a") as log:
            for number, batch in enumerate(self.stream.from_sample(images_seen)):
                log.write(json.dumps([images_seen // BATCH + number, batch.indices]) + "\n")
                log.flush()
                yield batch


def run(
    pictures: Path,
    folder: Path,
    kind: str = "lc",
    *,
    steps: int = STEPS,
    stop_at: int | None = None,
    copies: Path | None = None,
    save_every: int = 1000,
) -> Finished:
    """One run of a tiny tokenizer. With `copies`, each step K saves a checkpoint in the run folder `copies/cut-K`."""
    torch.manual_seed(7)
    model = build_autoencoder(BATCH_NORMS if kind == "dcae" else MODELS[kind])
    names = model.quantizer.loss_names
    weights = {"l1": 1.0, "adversarial": 0.1, **{name: {"commitment": 0.1, "codebook": 0.5}[name] for name in names}}
    stream = TrainingStream(
        open_images([str(pictures)]),
        DataConfig(image_size=16, flip=True, num_workers=0),
        seed=3,
        batch_size=BATCH,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(copies)
    state = train(
        TokenizerTask(
            model,
            PatchDiscriminator(DiscriminatorConfig(base_channels=4)),
            Objective(ObjectiveConfig(perceptual="none", disc_start=4, **weights), names),
        ),
        TokenizerTrainConfig(
            steps=steps,
            global_batch_size=BATCH,
            learning_rate=2e-3,
            warmup_steps=2,
            weight_ema=0.9,
            log_every=4,
            save_every=save_every,
            sample_every=1000,
        ),
        RecordedStream(stream, folder / f"seen-{distributed.rank()}.jsonl"),
        folder,
        seed=3,
        device=torch.device("cpu"),
        callbacks=[recorder],
        stop_requested=lambda: stop_at is not None and recorder.step >= stop_at,
    )
    return Finished(state, recorder.row)


class Recorder(Callback):
    """Keeps the last row of the log; saves a checkpoint of each step to `copies`."""

    def __init__(self, copies: Path | None) -> None:
        self.copies, self.step = copies, 0
        self.row: Row = {}

    def on_log(self, row: Row) -> None:
        self.row = row

    def on_step_end(self, state: TrainState) -> None:
        self.step = state.step
        if self.copies is not None:
            state.save(self.copies / f"cut-{state.step}")


TIMES = ("images_per_second", "seconds_per_step", "data_wait")


def run_tensors(finished: Finished) -> dict[str, Tensor]:
    """Every tensor of a run, with the buffers of its average, and the last row of its log without times."""
    state = finished.state
    parts = {**state.tensors(), "ema": state.weight_ema.network.state_dict()}
    row = {name: torch.tensor(value).float() for name, value in finished.row.items() if name not in TIMES}
    return {
        f"{part}/{name}": value for part, tensors in {**parts, "row": row}.items() for name, value in tensors.items()
    }


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names under which two states differ."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def seen(folder: Path, ranks: int) -> dict[int, list[int]]:
    """Step -> the images of its global batch, in rank order."""
    logs = [(folder / f"seen-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    steps: list[dict[int, list[int]]] = [dict(json.loads(line) for line in lines) for lines in logs]
    return {step: [image for each in steps for image in each[step]] for step in steps[0]}


@pytest.fixture(autouse=True)
def _small_tensors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SHARED_BYTES", SHARED_BYTES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_folder: Callable[..., Path]) -> Path:
    """Drawn pictures; the batch size does not divide their number."""
    return draw_folder(tmp_path_factory.mktemp("resume") / "pictures", PICTURES)


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [("lc", (1, 4, 7)), *(pytest.param(kind, range(1, STEPS), marks=pytest.mark.slow) for kind in (*MODELS, "dcae"))],
)
def test_resume_at_any_step_is_bit_exact(pictures: Path, tmp_path: Path, kind: str, cuts: Sequence[int]) -> None:
    straight = run_tensors(run(pictures, tmp_path / "straight", kind))
    assert differing(straight, run_tensors(run(pictures, tmp_path / "copied", kind, copies=tmp_path))) == []
    order = seen(tmp_path / "straight", 1)
    for cut in cuts:
        folder = tmp_path / f"cut-{cut}"
        finished = run(pictures, folder, kind)
        state = finished.state
        assert differing(straight, run_tensors(finished)) == [], f"cut at {cut}"
        assert seen(folder, 1) == {step: order[step] for step in range(cut, STEPS)}, f"cut at {cut}"
        assert (state.step, state.images_seen, state.nonfinite_steps) == (STEPS, STEPS * BATCH, 0)


# Every tensor of a checkpoint is needed.

CUT, END = 6, 8
Cut = Callable[[str], tuple[Path, dict[str, Tensor]]]
PUBLISHED = ("running_mean", "running_var", "num_batches_tracked")
"""Tensors that no step reads: the discriminator's statistics are published with its weights, for fine-tuning."""
STILL = 1e-7
"""Adam's eps: a smaller moment moves nothing. Here those of biases whose gradient is only rounding errors: a norm
follows that removes them, or the hinge loss is flat in them."""
LEAVES = {
    "lc": [
        "model/encoder.conv_in.weight",
        "model/quantizer.codes",
        "model/quantizer.shift",
        "model/quantizer.scale",
        "model/quantizer.projector.0.weight",
        "ema/decoder.conv_out.weight",
        "optimizer/0.step",
        "optimizer/0.exp_avg",
        "optimizer/0.exp_avg_sq",
        "discriminator/main.0.weight",
        "discriminator/main.3.running_mean",
        "discriminator/main.3.num_batches_tracked",
        "discriminator_optimizer/0.step",
        "discriminator_optimizer/0.exp_avg",
        "discriminator_optimizer/0.exp_avg_sq",
        "metrics/counts",
    ],
    "ema": ["model/quantizer.codes", "model/quantizer.counts", "model/quantizer.sums", "metrics/loss/l1"],
    "multi_group": ["model/quantizer.groups.1.codes", "model/quantizer.groups.1.frequencies"],
}
CASES = [(kind, leaf) for kind, leaves in LEAVES.items() for leaf in leaves]


@pytest.fixture(scope="module")
def cut(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """`cut(kind)`: a run folder with one checkpoint, and the tensors of the run resumed from it."""

    @cache
    def cut(kind: str) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp(kind)
        run(pictures, folder / "begun", kind, steps=END, stop_at=CUT)
        shutil.copytree(folder / "begun", folder / "resumed")
        return folder / "begun", run_tensors(run(pictures, folder / "resumed", kind, steps=END))

    return cut


def forge(run_dir: Path, leaf: str, change: object) -> None:
    """Change or drop one tensor of the only checkpoint, with new checksums, so that the checkpoint counts as whole."""
    (folder,) = checkpoints(run_dir).paths()
    table = disk.read_table(folder)
    part, _, name = leaf.partition("/")
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    key = table["shared"].get(part, {}).pop(name, None)
    value = tensors.pop(name, None) if key is None else load_file(disk.shared_file(folder.parent, key))["tensor"]
    assert value is not None
    if change == "perturb" and leaf == "metrics/counts":
        tensors[name] = value + torch.tensor([0, 0, 1])
    elif change == "perturb":
        far = 3.0 if part == "discriminator" else 0.1  # past the hinge loss's margin: before it, a bias has no gradient
        tensors[name] = value + 1 if not value.is_floating_point() or value.ndim == 0 else value * 1.5 + far
    elif change == "reshape":
        tensors[name] = torch.zeros(*value.shape, 2, dtype=value.dtype)
    elif change == "retype":
        tensors[name] = value.double()
    elif change == "add":
        tensors |= {name: value, "another": torch.zeros(1)}
    save_file(tensors, file)
    table["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    sign(folder, table)


def sign(folder: Path, table: dict[str, object]) -> None:
    (folder / "state.json").write_text(json.dumps({**table, "sha256": digest_json(table)}))


def changes_the_run(pictures: Path, folder: Path, cut: Cut, kind: str, leaf: str) -> bool:
    """Whether a changed tensor of the checkpoint changes the end of the run: another tensor of it, unless no step reads
    this one."""
    begun, expected = cut(kind)
    shutil.copytree(begun, folder)
    forge(folder, leaf, "perturb")
    moved = differing(expected, run_tensors(run(pictures, folder, kind, steps=END)))
    if leaf.startswith("ema/") or leaf.endswith(PUBLISHED):
        return moved == [leaf]
    return bool(set(moved) - {leaf})


@pytest.mark.parametrize(("kind", "leaf"), CASES)
def test_changing_a_tensor_of_a_checkpoint_changes_the_run(
    pictures: Path, tmp_path: Path, cut: Cut, kind: str, leaf: str
) -> None:
    assert changes_the_run(pictures, tmp_path / "run", cut, kind, leaf)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_no_tensor_of_a_checkpoint_is_unused(pictures: Path, tmp_path: Path, cut: Cut, kind: str) -> None:
    saved = disk.read(checkpoints(cut(kind)[0]).paths()[0]).parts
    dead = []
    for leaf in [f"{part}/{name}" for part, tensors in saved.items() for name in tensors]:
        part, _, name = leaf.partition("/")
        number, _, kept = name.partition(".")
        if kept in ("step", "exp_avg_sq") and saved[part][f"{number}.exp_avg"].abs().max() < STILL:
            continue
        folder = tmp_path / leaf.replace("/", "-")
        dead += [] if changes_the_run(pictures, folder, cut, kind, leaf) else [leaf]
        shutil.rmtree(folder)
    assert dead == []


FIRST = {leaf.partition("/")[0]: leaf for leaf in reversed(LEAVES["lc"])}
"""Part -> its first tensor."""
DAMAGES = [(leaf, "drop") for leaf in FIRST.values()]
DAMAGES += [(LEAVES["lc"][0], change) for change in ("reshape", "retype", "add")]


@pytest.mark.parametrize(("leaf", "change"), DAMAGES)
def test_missing_or_reshaped_tensor_is_refused(
    pictures: Path, tmp_path: Path, cut: Cut, leaf: str, change: str
) -> None:
    shutil.copytree(cut("lc")[0], tmp_path / "run")
    forge(tmp_path / "run", leaf, change)
    part, name = leaf.split("/")
    name = "another" if change == "add" else name
    with pytest.raises(ArtifactError, match=rf"is not a checkpoint of this run: {part} has .*{name}") as refusal:
        run(pictures, tmp_path / "run", steps=END)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "discriminator", "discriminator_optimizer"])
def test_checkpoint_without_a_part_is_refused(pictures: Path, tmp_path: Path, cut: Cut, part: str) -> None:
    shutil.copytree(cut("lc")[0], tmp_path / "run")
    (folder,) = checkpoints(tmp_path / "run").paths()
    table = disk.read_table(folder)
    del table["files"][f"{part}.safetensors"]
    table["shared"].pop(part, None)
    sign(folder, table)
    with pytest.raises(ArtifactError, match=f"it has no {part}"):
        run(pictures, tmp_path / "run", steps=END)


@pytest.mark.parametrize("counter", ["step", "images_seen", "nonfinite_steps"])
def test_every_counter_is_needed(pictures: Path, tmp_path: Path, cut: Cut, counter: str) -> None:
    begun, expected = cut("lc")
    for change in ("perturb", "drop"):
        shutil.copytree(begun, tmp_path / change)
        (folder,) = checkpoints(tmp_path / change).paths()
        table = disk.read_table(folder)
        counters = table if counter == "step" else table["values"]
        counters[counter] += 1
        if change == "drop":
            table["values"].pop(counter if counter != "step" else "images_seen")
        sign(folder, table)
    with pytest.raises(ArtifactError, match=r"state\.json has the counters"):
        run(pictures, tmp_path / "drop", steps=END)
    finished = run(pictures, tmp_path / "perturb", steps=END)
    state = finished.state
    if counter == "nonfinite_steps":
        assert state.nonfinite_steps == 1  # a count for the log alone
    else:
        assert "model/encoder.conv_in.weight" in differing(expected, run_tensors(finished))


def test_skipped_steps_in_a_row_are_counted_through_a_resume(
    pictures: Path, tmp_path: Path, cut: Cut, poison: Callable[[Iterable[int]], None]
) -> None:
    """A run that was interrupted after 19 skipped steps ends with the next one."""
    for in_a_row in (18, 19):
        shutil.copytree(cut("lc")[0], tmp_path / str(in_a_row))
        (folder,) = checkpoints(tmp_path / str(in_a_row)).paths()
        table = disk.read_table(folder)
        assert table["values"]["nonfinite_in_a_row"] == 0
        table["values"]["nonfinite_in_a_row"] = in_a_row
        sign(folder, table)
    poison([0])
    assert run(pictures, tmp_path / "18", steps=END).state.nonfinite_in_a_row == 0
    poison([0])
    with pytest.raises(NumericError, match="20 steps in a row"):
        run(pictures, tmp_path / "19", steps=END)


# Real kills of real processes.


def start(folder: Path, pictures: Path, kind: str, steps: int, *stop_at: int, ranks: int = 1) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [*torchrun, __file__, str(pictures), str(folder), kind, str(steps), *map(str, stop_at)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process and its children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=250)


def kill_at_random(folder: Path, pictures: Path, kind: str, steps: int, kills: int, seconds: float, ranks: int) -> int:
    """Start the run and SIGKILL it at a random moment up to `seconds` after its first batch, `kills` times; then let it
    end. Returns how many kills came before its end.
    """
    moments, log, struck = random.Random(kind), folder / "seen-0.jsonl", 0
    for _ in range(kills):
        process = start(folder, pictures, kind, steps, ranks=ranks)
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (log.stat().st_size if log.exists() else 0) == before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, seconds))
        if process.poll() is None:
            struck += 1
            kill(process)
        else:
            finish(process)
    finish(start(folder, pictures, kind, steps, ranks=ranks))
    return struck


def run_until_killed(pictures: Path, folder: Path) -> None:
    """A run that dies in its sixth step, after two checkpoints."""

    def die(recorder: Recorder, state: TrainState) -> None:
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.on_step_end = die  # type: ignore[method-assign]
    disk.SHARED_BYTES = SHARED_BYTES
    run(pictures, folder, save_every=2)


def test_resume_is_bit_exact_after_sigkill(pictures: Path, tmp_path: Path, start_process: Callable[..., Any]) -> None:
    process = start_process(run_until_killed, pictures, tmp_path / "killed")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    straight = run_tensors(run(pictures, tmp_path / "straight"))
    assert differing(straight, run_tensors(run(pictures, tmp_path / "killed"))) == []
    assert seen(tmp_path / "killed", 1) == seen(tmp_path / "straight", 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_resume_is_bit_exact_after_repeated_sigkill(pictures: Path, tmp_path: Path, kind: str, ranks: int) -> None:
    finish(start(tmp_path / "straight", pictures, kind, 60, ranks=ranks))
    struck = kill_at_random(tmp_path / "killed", pictures, kind, 60, kills=4, seconds=1.0, ranks=ranks)
    assert struck >= 2
    first, second = (load_file(tmp_path / name / "final.safetensors") for name in ("straight", "killed"))
    assert differing(first, second) == []
    assert seen(tmp_path / "killed", ranks) == seen(tmp_path / "straight", ranks)


@pytest.mark.slow
def test_run_of_two_ranks_resumes_on_one_with_the_same_images(pictures: Path, tmp_path: Path) -> None:
    finish(start(tmp_path / "run", pictures, "ema", STEPS, 5, ranks=2))
    begun = seen(tmp_path / "run", 2)
    (tmp_path / "run" / "seen-0.jsonl").unlink()
    assert run(pictures, tmp_path / "run", "ema").state.step == STEPS
    resumed = seen(tmp_path / "run", 1)
    run(pictures, tmp_path / "straight", "ema")
    at = min(resumed)
    assert 5 <= at < STEPS
    assert {step: images for step, images in begun.items() if step < at} | resumed == seen(tmp_path / "straight", 1)


def main(pictures: str, folder: str, kind: str, steps: str, stop_at: str | None = None) -> None:
    """One rank of one run with a checkpoint every second step; rank 0 saves the final tensors."""
    torch.set_num_threads(1)
    disk.SHARED_BYTES = SHARED_BYTES
    with distributed.process_group(torch.device("cpu")):
        limit = None if stop_at is None else int(stop_at)
        finished = run(Path(pictures), Path(folder), kind, steps=int(steps), stop_at=limit, save_every=2)
        if distributed.is_main():
            save_file(
                {name: value.contiguous() for name, value in run_tensors(finished).items()},
                f"{folder}/final.safetensors",
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
