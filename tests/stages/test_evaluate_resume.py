"""A killed `vqpipe eval`: the same command resumes inside its pass, and its report is the same, file by file."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from torch import Tensor, nn

from stages.console import ProgressBar
from stages.evaluate import evaluate
from vqpipe.artifacts import states as saved_states
from vqpipe.data.images import ImageSet
from vqpipe.evaluation.image_pass import Checkpoints
from vqpipe.metrics import set_metrics
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.reports import plots

MakeTokenizer = Callable[..., Path]
MULTI_GROUP = {"kind": "multi_group", "num_groups": 2, "group": {"kind": "vq", "codebook_size": 64, "code_dim": 4}}
EACH_BATCH = "eval.save_seconds=0"
OPTIONS: dict[str, Any] = {
    "protocol": ["cleanfid-rawval", "adm"],
    "metrics": ["prc", "sfid", "is"],
    "analyze": ["replacement", "patches"],
    "fid_min_images": 4,
    "batch_size": 2,
    "num_workers": 0,
    "overrides": [EACH_BATCH, "eval.max_skipped=0.2", "eval.num_pictures=4", "eval.num_extremes=2"],
}
PLAIN: dict[str, Any] = {"protocol": ["adm"], "metrics": ["prc"], "analyze": []}


ONE_AXES = plots.one_axes


def drawn_lines(figure: Figure, salt: str) -> str:
    """The points of all lines, in place of a rendering, which takes most of the time of a report."""
    return str([line.get_xydata().tolist() for axes in figure.axes for line in axes.lines])


class Cut(BaseException):
    """In the place of a kill, for tests in one process."""


class Pooled(nn.Module):
    """Stands in for Inception: 48 pooled pixels in each output."""

    def forward(self, images: Tensor, outputs: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        return dict.fromkeys(outputs, nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the images that are read, one after another."""
    positions = list[int]()
    original = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, i: (positions.append(i), original(self, i))[1])
    return positions


@pytest.fixture
def run(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`run(folder, cut=images)` -> the report, or as it was when so many images were measured: with two groups, two
    protocols, the features of all images, and two pictures that cannot be read."""
    monkeypatch.setattr(set_metrics, "SIZES", {"pool": 48, "spatial": 48, "logits": 48})
    monkeypatch.setattr(set_metrics, "CHUNK_BYTES", 700)  # a chunk of two batches
    monkeypatch.setattr(saved_states, "SHARED_BYTES", 700)
    networks = FeatureNetworks({}, Pooled(), {}, {})
    monkeypatch.setattr("vqpipe.metrics.feature_networks.find_networks", lambda *_: networks)
    for number in (4, 5):
        (picture_folder / f"drawn-{number}.png").write_bytes(b"no picture")
    tokenizer, advance = tiny_tokenizer("tokenizer", quantizer=MULTI_GROUP), ProgressBar.advance

    def run(name: str, cut: int | None = None, **options: Any) -> Path:
        def stop(bar: ProgressBar, count: int = 1) -> None:
            advance(bar, count)
            if bar.done == cut:
                raise Cut

        out = tmp_path / name / "report"
        out.parent.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(ProgressBar, "advance", stop)
            try:
                evaluate([str(picture_folder)], tokenizer, out, device="cpu", **OPTIONS | options)
            except Cut:
                return out.with_name("report.partial")
        return out

    return run


def files_of(report: Path) -> dict[str, bytes]:
    """All but the manifest, which holds times."""
    files = (file for file in report.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(report)): file.read_bytes() for file in files}


def states(partial: Path) -> list[Path]:
    return sorted(partial.glob("states/rank-0/images-*"))


def shared(partial: Path) -> set[str]:
    """The files of features and pictures that states share."""
    return {file.name for file in partial.glob("states/rank-0/shared-*")}


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_resume_after_interruption_gives_identical_files(
    run: Callable[..., Path], read: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "one_axes", ONE_AXES)
    monkeypatch.setattr(plots, "to_svg", drawn_lines)
    whole = files_of(run("whole"))
    assert b'"sfid"' in whole["metrics.json"]
    run("cut", 6)  # the images of the third batch cannot be read
    read.clear()
    capsys.readouterr()
    assert files_of(run("cut")) == whole
    assert read == list(range(6, 10))
    assert "resuming after 6 images" in capsys.readouterr().err
    run("repeated", 2)
    run("repeated", 4)
    partial = run("repeated", 8)
    assert [path.name for path in states(partial)] == ["images-00000006", "images-00000008"]
    assert files_of(run("repeated")) == whole


def test_kept_features_and_pictures_are_written_once(run: Callable[..., Path]) -> None:
    first = shared(run("cut", 6))
    assert first
    partial = run("cut", 8)
    assert first < shared(partial)
    content = [json.loads((path / "state.json").read_text()) for path in states(partial)]
    assert all(set(table["shared"]) == {"once"} for table in content)


def test_resume_after_the_last_image_reads_no_image(
    run: Callable[..., Path], read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("vqpipe.evaluation.report.publish_evaluation", stop)
        assert run("cut").name == "report.partial"
    read.clear()
    resumed = files_of(run("cut"))
    assert read == []
    assert resumed == files_of(run("whole"))


def test_damaged_state_falls_back_to_the_previous_one_or_restarts(
    run: Callable[..., Path], read: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = files_of(run("whole", **PLAIN))
    newest = states(run("newest", 8, **PLAIN))[-1]
    damage(newest / "state.safetensors")
    read.clear()
    assert files_of(run("newest", **PLAIN)) == whole
    assert read == list(range(6, 10))
    assert f"{newest.name}: state.safetensors is damaged" in capsys.readouterr().err
    for name in ("state.safetensors", "state.json"):
        for state in states(run(name, 8, **PLAIN)):
            damage(state / name)
        read.clear()
        capsys.readouterr()
        assert files_of(run(name, **PLAIN)) == whole
        assert read == list(range(10))
        assert "the pass starts from the beginning" in capsys.readouterr().err


def test_state_of_other_ranks_or_versions_is_not_resumed(
    run: Callable[..., Path], read: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, made_by = files_of(run("whole", **PLAIN)), Checkpoints.made_by
    for what, was in {"ranks": 2, "torch": "1.0", "format": 0}.items():
        other = {what: was}
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "made_by", lambda self, other=other: made_by(self) | other)
            run(what, 6, **PLAIN)
        read.clear()
        capsys.readouterr()
        assert files_of(run(what, **PLAIN)) == whole
        assert f"saved by another run ({what} was " in capsys.readouterr().err
        assert read == list(range(10))


def test_state_of_another_share_of_the_images_is_not_resumed(
    run: Callable[..., Path], read: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = iter([(0, 8), (0, 4)])  # those of the first rank with two batch sizes
    monkeypatch.setattr("vqpipe.evaluation.image_pass.rank_share", lambda *_: next(shares))
    run("cut", 6, **PLAIN)
    read.clear()
    assert json.loads((run("cut", **PLAIN) / "metrics.json").read_text())["num_images"] == 4
    assert read == list(range(4))
    assert "saved by another run (share was [0, 8], now [0, 4])" in capsys.readouterr().err


@pytest.mark.slow
def test_short_run_saves_no_state_and_tiled_evaluation_is_resumed(run: Callable[..., Path]) -> None:
    quick = run("quick", 10, overrides=[each for each in OPTIONS["overrides"] if each != EACH_BATCH])
    assert not (quick / "states").exists()
    native = {"image_size": "native", "tile": 32, "analyze": [], "protocol": ["adm"], "batch_size": None}
    run("native", 3, **native)
    run("native", 7, **native)
    resumed = files_of(run("native", **native))
    assert b'"tiles"' in resumed["metrics.json"]
    assert resumed == files_of(run("whole", **native))


@pytest.fixture
def start(tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """`start(name, ranks, crash)` runs `vqpipe eval` in the folder `name`, killed at file operation `crash`, (number,
    which); the exit code."""
    tokenizer = tiny_tokenizer("tokenizer", quantizer=MULTI_GROUP)
    words = ["eval", "--images", str(picture_folder), "--tokenizer", str(tokenizer), "--out", "report"]
    words += ["--device", "cpu", "--batch-size", "2", "--num-workers", "0", "--analyze", "replacement"]
    words += ["--set", EACH_BATCH, "--set", "eval.num_pictures=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    killer = str(Path(__file__).parents[1] / "faults" / "crash.py")

    def start(name: str, ranks: int = 1, crash: tuple[int, str] | None = None) -> int:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        program = [killer, str(crash[0]), ".", crash[1]] if crash else ["-m", "stages"]
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, *torchrun, *program, *words]
        return subprocess.run(
            command, cwd=tmp_path / name, env=environment, timeout=300, capture_output=True
        ).returncode

    return start


@pytest.mark.slow
def test_report_is_identical_after_two_sigkills_while_saving(start: Callable[..., int], tmp_path: Path) -> None:
    assert start("uninterrupted") == 0
    for number in (1, 4):  # of five states
        name = f"{number}"
        assert start(name, crash=(number, "fsync */state.safetensors")) == -signal.SIGKILL
        assert start(name, crash=(1, "rename */.saving-images-????????")) == -signal.SIGKILL
        assert start(name) == 0
        assert files_of(tmp_path / name / "report") == files_of(tmp_path / "uninterrupted" / "report")


@pytest.mark.slow
def test_killed_ranks_resume_and_a_different_number_of_ranks_restarts(
    start: Callable[..., int], tmp_path: Path
) -> None:
    assert start("uninterrupted", ranks=2) == 0
    for name, ranks in (("two", 2), ("one", 1)):
        assert start(name, ranks=2, crash=(2, "rename */.saving-images-????????")) != 0
        assert list((tmp_path / name).glob("report.partial/states/rank-*/images-*"))
        assert start(name, ranks) == 0
        assert files_of(tmp_path / name / "report") == files_of(tmp_path / "uninterrupted" / "report")
