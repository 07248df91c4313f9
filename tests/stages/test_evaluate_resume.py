"""A killed `vqpipe eval`: the same command goes on inside its pass, and its report is the same file by file."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from stages import console
from stages.evaluate import evaluate
from stages.resuming import Saving
from vqpipe.artifacts.saved import Checkpoints, Saved
from vqpipe.data.images import ImageSet
from vqpipe.metrics import populations
from vqpipe.metrics.networks import FeatureNetworks

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


class Cut(BaseException):
    """In the place of a kill, for tests in one process."""


class Pooled(nn.Module):
    """Stands in for Inception: 48 pooled pixels in each output."""

    def forward(self, images: Tensor, outputs: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        return dict.fromkeys(outputs, nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of the images that are read, one after another."""
    places = list[int]()
    whole = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, i: (places.append(i), whole(self, i))[1])
    return places


@pytest.fixture
def run(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`run(folder, cut=images)` -> the report, or as it was when so many images were measured: with two groups, two
    protocols, the features of all images, and two pictures that cannot be read."""
    monkeypatch.setattr(populations, "SIZES", {"pool": 48, "spatial": 48, "logits": 48})
    monkeypatch.setattr("vqpipe.metrics.networks.find_networks", lambda *_: FeatureNetworks({}, Pooled(), {}, {}))
    for number in (4, 5):
        (picture_folder / f"drawn-{number}.png").write_bytes(b"no picture")
    tokenizer, advance = tiny_tokenizer("tokenizer", quantizer=MULTI_GROUP), console.Bar.advance

    def run(name: str, cut: int | None = None, **options: Any) -> Path:
        def stop(bar: console.Bar, count: int = 1) -> None:
            advance(bar, count)
            if bar.done == cut:
                raise Cut

        out = tmp_path / name / "report"
        out.parent.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(console.Bar, "advance", stop)
            try:
                evaluate([str(picture_folder)], tokenizer, out, device="cpu", **OPTIONS | options)
            except Cut:
                return out.with_name("report.partial")
        return out

    return run


def files_of(report: Path) -> dict[str, bytes]:
    """All but the manifest, in which times stand."""
    files = (file for file in report.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(report)): file.read_bytes() for file in files}


def states(partial: Path, series: str = "rank-0") -> list[Path]:
    return sorted(partial.glob(f"states/{series}-????????.safetensors"))


def test_wherever_it_is_cut_the_same_command_goes_on_to_the_same_files(
    run: Callable[..., Path], read: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = files_of(run("whole"))
    assert b'"sfid"' in whole["metrics.json"]
    run("cut", 6)  # the images of the third batch cannot be read
    read.clear()
    capsys.readouterr()
    assert files_of(run("cut")) == whole
    assert read == list(range(6, 10))
    assert "going on after 6 images" in capsys.readouterr().err
    run("again", 2)
    run("again", 4)
    partial = run("again", 8)
    assert [file.name[7:15] for file in states(partial)] == ["00000003", "00000004"]
    assert len(states(partial, "rank-0-rows")) == 3  # the third batch brings nothing
    assert files_of(run("again")) == whole


def test_what_is_cut_after_the_pass_reads_no_image_again(
    run: Callable[..., Path], read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("stages.eval_report.publish", stop)
        assert run("cut").name == "report.partial"
    read.clear()
    resumed = files_of(run("cut"))
    assert read == []
    assert resumed == files_of(run("whole"))


def test_rows_whose_state_was_not_written_any_more_are_written_again(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def stop(self: Checkpoints, series: str, saved: Saved, keep: int | None = 2) -> None:
        if series == "rank-0" and saved.step == 2:
            raise Cut
        save(self, series, saved, keep)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        partial = run("cut", **PLAIN)
    assert (len(states(partial)), len(states(partial, "rank-0-rows"))) == (1, 2)
    assert files_of(run("cut", **PLAIN)) == files_of(run("whole", **PLAIN))


def test_a_damaged_state_is_passed_over_for_the_one_before_and_else_the_pass_begins_anew(
    run: Callable[..., Path], read: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = files_of(run("whole", **PLAIN))
    newest = states(run("newest", 8, **PLAIN))[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    read.clear()
    assert files_of(run("newest", **PLAIN)) == whole
    assert read == list(range(6, 10))
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    for name in ("rank-0", "rank-0-rows"):
        for file in states(run(name, 8, **PLAIN), name):
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        read.clear()
        capsys.readouterr()
        assert files_of(run(name, **PLAIN)) == whole
        assert read == list(range(10))
        lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert lines == ["what was saved of this pass is damaged: it begins anew"]


def test_a_state_of_other_ranks_or_versions_is_not_taken_up(
    run: Callable[..., Path], read: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, made_by = files_of(run("whole", **PLAIN)), Saving.made_by
    for what, was in {"ranks": 2, "torch": "1.0", "format": 0}.items():
        other = {what: was}
        with monkeypatch.context() as patch:
            patch.setattr(Saving, "made_by", lambda self, other=other: made_by(self) | other)
            run(what, 6, **PLAIN)
        read.clear()
        capsys.readouterr()
        assert files_of(run(what, **PLAIN)) == whole
        assert f"is of another run ({what} was " in capsys.readouterr().err
        assert read == list(range(10))


def test_a_quick_run_writes_no_state_and_whole_images_in_tiles_go_on(run: Callable[..., Path]) -> None:
    quick = run("quick", 10, overrides=[each for each in OPTIONS["overrides"] if each != EACH_BATCH])
    assert not (quick / "states").exists()
    native = {"image_size": "native", "tile": 32, "analyze": [], "protocol": ["adm"], "batch_size": None}
    run("native", 3, **native)
    run("native", 7, **native)
    resumed = files_of(run("native", **native))
    assert b'"tiles"' in resumed["metrics.json"]
    assert resumed == files_of(run("whole", **native))


def start(ranks: int, tokenizer: Path, pictures: Path, out: Path, crash: tuple[int, str] | None = None) -> int:
    """`vqpipe eval` as people start it, killed at file operation `(number, which)`; the exit code."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = ["eval", "--images", str(pictures), "--tokenizer", str(tokenizer), "--out", "report", "--device", "cpu"]
    words += ["--batch-size", "2", "--num-workers", "0", "--set", EACH_BATCH, "--set", "eval.num_pictures=3"]
    words += ["--analyze", "replacement"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    out.mkdir(exist_ok=True)
    program = [str(Path(__file__).parents[1] / "faults" / "crash.py"), str(crash[0]), ".", crash[1]] if crash else []
    command = [sys.executable, *torchrun, *(program or ["-m", "stages"]), *words]
    return subprocess.run(command, cwd=out, env=environment, timeout=120, capture_output=True).returncode


@pytest.mark.slow
def test_killed_twice_amid_its_saves_the_numbers_are_the_same(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    given = tiny_tokenizer("tokenizer", quantizer=MULTI_GROUP), picture_folder
    assert start(1, *given, tmp_path / "whole") == 0
    whole = files_of(tmp_path / "whole" / "report")
    for point in (21, 47):  # amid the first save of five, amid the fourth
        out = tmp_path / f"{point}"
        assert start(1, *given, out, (point, "* *")) == -signal.SIGKILL
        assert start(1, *given, out, (5, "* *")) == -signal.SIGKILL
        assert start(1, *given, out) == 0
        assert files_of(out / "report") == whole


@pytest.mark.slow
def test_two_ranks_that_are_killed_go_on_and_other_ranks_begin_anew(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    given = tiny_tokenizer("tokenizer", quantizer=MULTI_GROUP), picture_folder
    assert start(2, *given, tmp_path / "whole") == 0
    whole = files_of(tmp_path / "whole" / "report")
    for name, ranks in (("two", 2), ("one", 1)):
        out = tmp_path / name
        assert start(2, *given, out, (4, "rename *")) != 0
        assert states(out / "report.partial")
        assert start(ranks, *given, out) == 0
        assert files_of(out / "report") == whole
