"""`vqpipe train` seen by the one who waits for it: what it logs, shows, keeps and publishes."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from stages import watching
from stages.evaluate import evaluate
from stages.live import Board, headline, lines_of
from stages.train import train
from vqpipe.artifacts import Artifact, open_artifact
from vqpipe.errors import ArtifactError, ConfigError
from vqpipe.training.history import read_history
from vqpipe.training.validation import Validated, Validation

SETTINGS = [
    *("data.image_size=32", "model.quantizer.kind=vq", "model.quantizer.codebook_size=40", "model.base_channels=8"),
    *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4"),
    *("train.warmup_steps=2", "train.save_every=3", "train.whiten_init=false"),
    *("objective.disc_start=4", "train.sample_every=8", "train.log_every=2", "objective.entropy=0.0"),
]


@pytest.fixture
def go(picture_folder: Path, tmp_path: Path) -> Any:
    """`go(name, steps=8, set=[...], ...)` trains a tiny tokenizer and opens it."""

    def run(name: str, steps: int = 8, set: list[str] | None = None, **options: Any) -> Artifact:
        overrides = [*SETTINGS, *(set or [])]
        options = {"preset": "smoke", "global_batch_size": 4, "device": "cpu", **options}
        train([str(picture_folder)], tmp_path / name, steps=steps, overrides=overrides, **options)
        return open_artifact(tmp_path / name, "tokenizer")

    return run


@pytest.fixture
def held_out(picture_folder: Path) -> dict[str, Any]:
    return {"validation": [str(picture_folder)]}


def scripted(monkeypatch: pytest.MonkeyPatch, psnr: dict[int, float]) -> dict[int, dict[str, torch.Tensor]]:
    """Let validations find these PSNRs, one after another; returns the weights that each saw, by step.

    Only the last page is drawn, since a page takes a second.
    """
    seen: dict[int, dict[str, torch.Tensor]] = {}
    look, draw = watching.TokenizerWatcher.validate, watching.TokenizerWatcher.write_page

    def validate(self: watching.TokenizerWatcher, step: int, network: torch.nn.Module) -> None:
        seen[step] = {name: value.clone() for name, value in network.state_dict().items()}
        counts = torch.ones(1, 40, dtype=torch.int64)
        monkeypatch.setattr(
            Validation, "measure", lambda *_: Validated({"valid/images": 4, "valid/psnr": psnr[step]}, counts)
        )
        look(self, step, network)

    def write_page(self: watching.TokenizerWatcher) -> None:
        if self.step == self.steps:
            draw(self)

    monkeypatch.setattr(watching.TokenizerWatcher, "validate", validate)
    monkeypatch.setattr(watching.TokenizerWatcher, "write_page", write_page)
    return seen


def cut_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process die after `step`, whatever was saved until then."""
    advance = watching.TokenizerWatcher.advance

    def die(self: watching.TokenizerWatcher, state: Any) -> None:
        advance(self, state)
        if state.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.TokenizerWatcher, "advance", die)


def test_validation_is_what_eval_measures(go: Any, held_out: dict[str, Any], picture_folder: Path) -> None:
    tokenizer = go("lc", set=["train.sample_every=4"], **held_out)
    rows = read_history(tokenizer.file("metrics.jsonl"))
    (last,) = [row for row in rows if row["step"] == 8 and "valid/psnr" in row]
    assert [row["step"] for row in rows if "valid/psnr" in row] == [4, 8]  # with each picture, unless said otherwise
    report = tokenizer.path.parent / "report"
    evaluate([str(picture_folder)], tokenizer.path, report, batch_size=4, device="cpu")
    metrics = json.loads((report / "metrics.json").read_text())
    for name in ("psnr", "ssim", "utilization"):
        assert last[f"valid/{name}"] == pytest.approx(metrics[name], rel=1e-6)
    assert last["valid/perplexity"] == pytest.approx(metrics["perplexity_per_group"][0])
    assert tokenizer.facts["valid_psnr"] == last["valid/psnr"]
    assert tokenizer.facts["published_step"] == 8


def test_the_best_weights_are_published_where_asked(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, {2: 20.0, 4: 22.0, 6: 21.0, 8: 19.0})
    best = go("best", set=["train.validate_every=2"], publish="best", **held_out)
    weights = load_file(best.file("model.safetensors"))
    assert weights.keys() == seen[4].keys()
    assert all(torch.equal(value, seen[4][name]) for name, value in weights.items())
    facts = {"published_step": 4, "images_seen": 16, "steps": 8, "valid_psnr": 22.0}
    assert facts.items() <= best.facts.items()
    assert not best.names("best.safetensors")
    last = go("last", set=["train.validate_every=2"], **held_out)
    weights = load_file(last.file("model.safetensors"))
    assert all(torch.equal(value, seen[8][name]) for name, value in weights.items())
    assert last.facts["published_step"] == 8


@pytest.mark.parametrize("cut", [5, 7])
def test_a_run_that_dies_and_is_resumed_has_the_same_best_and_the_same_log(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    asked = {"set": ["train.validate_every=2", "train.save_every=4"], "publish": "best", **held_out}
    found = {2: 20.0, 4: 19.0, 6: 22.0, 8: 21.0}  # the best is made after the checkpoint, before the cut or after it
    with monkeypatch.context() as patch:
        scripted(patch, found)
        straight = go("straight", **asked)
    with monkeypatch.context() as patch:
        scripted(patch, found)
        with patch.context() as dying:
            cut_after(dying, cut)
            with pytest.raises(KeyboardInterrupt):
                go("cut", **asked)
        resumed = go("cut", **asked)
    assert resumed.manifest.files["model.safetensors"] == straight.manifest.files["model.safetensors"]
    assert resumed.facts == straight.facts
    assert resumed.facts["published_step"] == 6
    logs = [read_history(artifact.file("metrics.jsonl")) for artifact in (straight, resumed)]
    kept = [[(row["step"], row.get("loss/total"), row.get("valid/psnr")) for row in log] for log in logs]
    assert kept[0] == kept[1]


def test_the_page_is_there_from_the_start_and_published_at_the_end(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as dying:
        cut_after(dying, 3)
        with pytest.raises(KeyboardInterrupt):
            go("lc", **held_out)
    page = tmp_path / "lc.partial" / "report.html"
    assert "Step 0 of 8" in page.read_text()
    assert str(page) in " ".join(capsys.readouterr().err.split())
    text = go("lc", **held_out).file("report.html").read_text()
    assert "Step 8 of 8" in text
    for part in ("Originals and reconstructions", "Learning rate", "How often each code is chosen", "best at step"):
        assert part in text
    assert "Held-out images, reconstructed at step 8." in text


def test_other_held_out_images_are_another_run(go: Any, held_out: dict[str, Any], picture_folder: Path) -> None:
    go("lc", steps=2, **held_out)
    with pytest.raises(ArtifactError, match=r"made otherwise: config\.train\.validate_every was 8, now 0"):
        go("lc", steps=2)
    (picture_folder.parent / "others").mkdir()
    shutil.copy(next(picture_folder.iterdir()), picture_folder.parent / "others")
    with pytest.raises(ArtifactError, match=r"made otherwise: inputs\.validation"):
        go("lc", steps=2, validation=[str(picture_folder.parent / "others")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"publish": "best"}, "--publish best needs images to judge by"),
        ({"publish": "bets"}, "--publish bets is unknown. Did you mean best"),
        ({"set": ["train.validate_every=2"]}, "validate_every = 2 needs held-out images"),
        ({"log": ["wandb"]}, r"package wandb is not installed.*pip install 'vqpipe\[wandb\]'"),
        ({"log": ["tensorbord"]}, "Did you mean tensorboard"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("vqpipe.training.loggers.import_module", absent)
    with pytest.raises(ConfigError, match=message):
        go("x", **options)
    assert not list(tmp_path.glob("x*"))


def test_a_tokenizer_to_go_on_from_is_not_whitened_again(go: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.whiten_init would change .* Add --set train\.whiten_init=false"):
        go("tuned", set=["train.whiten_init=true"], source=tmp_path / "first")
    assert not list(tmp_path.glob("tuned*"))


class FakeLogger:
    """Stands for TensorBoard."""

    opened: list["FakeLogger"]

    def __init__(self, run: Any) -> None:
        self.run, self.rows, self.pictures, self.closed = run, [], [], False
        self.opened.append(self)

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def show(self, step: int, name: str, png: bytes) -> None:
        self.pictures.append(step)

    def close(self) -> None:
        self.closed = True


def test_loggers_get_every_row_and_picture_and_are_closed_also_when_the_run_dies(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeLogger.opened = []
    monkeypatch.setattr("vqpipe.training.loggers.LOGGERS", {"tensorboard": FakeLogger})
    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    logged = {"log": ["tensorboard"], "set": ["train.sample_every=4"], **held_out}
    with monkeypatch.context() as dying:
        cut_after(dying, 5)
        with pytest.raises(KeyboardInterrupt):
            go("lc", **logged)
    tokenizer = go("lc", **logged)
    first, second = FakeLogger.opened
    assert first.closed
    assert second.closed
    assert second.run.resumed_at == 3
    assert second.run.folder == tmp_path / "lc.logs"
    assert [row["step"] for row in second.run.earlier] == [2]
    assert [*second.run.earlier, *second.rows] == read_history(tokenizer.file("metrics.jsonl"))
    assert second.pictures == [4, 8]


def test_the_second_stage_of_mgvq_starts_from_the_first_with_masking_off(go: Any) -> None:
    groups = ["model.quantizer.kind=multi_group", "model.quantizer.num_groups=2", "model.quantizer.group.kind=vq"]
    groups += ["model.quantizer.group.codebook_size=16", "model.quantizer.group.code_dim=4"]
    settings = [setting for setting in SETTINGS if "quantizer" not in setting]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SETTINGS", settings)
        first = go("first", steps=2, set=groups)
        tuned = [*groups, "model.quantizer.masking=off", "train.learning_rate=0.0", "objective.disc_start=0"]
        second = go("second", steps=2, set=tuned, source=first.path)
    before, after = (load_file(each.file("model.safetensors")) for each in (first, second))
    assert all(torch.equal(value, before[name]) for name, value in after.items())  # the learning rate is 0
    masking = [each.manifest.config["model"]["quantizer"]["masking"] for each in (first, second)]
    assert masking[0] != masking[1] == "off"


ROW = {
    "step": 1200,
    "loss/total": 0.51234,
    "loss/l1": 0.1,
    "psnr": 22.126,
    "utilization": 0.991,
    "perplexity": 812.34,
    "gradient_norm": 0.823,
    "discriminator_gradient_norm": 0.31,
    "nonfinite_steps": 3,
    "learning_rate": 5e-4,
    "images_per_second": 412.3,
    "seconds_per_step": 0.31,
    "data_wait": 0.031,
    "mfu": 0.382,
    "tflops": 377.8,
    "memory_gb": 41.23,
}


def test_the_table_on_a_terminal_says_every_number_that_is_known() -> None:
    screen = io.StringIO()
    board = Board(10_000, Console(file=screen, force_terminal=True, width=110, color_system=None))
    with board.live:
        board.resume(1199)
        board.advance()
        board.show(ROW)
        board.show({"step": 1000, "images_seen": 8000, "valid/psnr": 21.987, "valid/images": 64})
    shown = screen.getvalue()
    expected = ["1,200/10,000 steps", "total 0.5123   l1 0.1", "PSNR 22.13 dB", "PSNR 21.99 dB   step 1,000"]
    expected += ["in use 99.1%   perplexity 812.3", "norm 0.823   discriminator 0.31   skipped steps 3"]
    expected += ["412 images/s", "waiting for images 3%", "MFU 38.2%", "378 TFLOP/s", "memory 41.2 GB"]
    for text in expected:
        assert text in shown, text


def test_numbers_that_are_not_known_are_left_out() -> None:
    few = {"step": 3, "psnr": 20.0, "utilization": 0.5, "images_per_second": 10.0}
    assert dict(lines_of(few)) == {"quality": "PSNR 20.00 dB", "codes": "in use 50.0%", "speed": "10 images/s"}
    assert headline(few) == "psnr 20.00 dB, codes in use 50.0%, 10 images/s"
    assert headline(ROW).endswith("412 images/s, 3 skipped steps")
