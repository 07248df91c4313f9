"""`vqpipe train`: log, samples, validation, best weights, and what is published."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stages import recipe
from stages.evaluate import evaluate
from stages.train import train
from vqpipe import tokenizer_files
from vqpipe.artifacts import Artifact, Draft, open_artifact
from vqpipe.data.images import open_images
from vqpipe.errors import ArtifactError, ConfigError, VqpipeError
from vqpipe.files import hash_file, read_rows
from vqpipe.progress import Throttle
from vqpipe.quantizers import LcConfig, MultiGroupConfig, QuantizerConfig, VqBridgeConfig, VqConfig
from vqpipe.tokenizer import Tokenizer
from vqpipe.training.callbacks import Callback, RunReport
from vqpipe.training.checkpoint import TrainState
from vqpipe.training.loggers import LOGGERS, Logger
from vqpipe.training.run import Run
from vqpipe.training.tokenizer_run import RunInputs, check_run, start_tokenizer_run, train_tokenizer
from vqpipe.training.validation import Validation

SETTINGS = [
    *("data.image_size=16", "model.quantizer.kind=vq", "model.quantizer.codebook_size=40", "model.base_channels=8"),
    *("model.z_channels=8", "model.channel_multipliers=[1, 2]", "discriminator.base_channels=4"),
    *("train.warmup_steps=2", "train.save_every=3", "train.whiten_init=false"),
    *("objective.disc_start=4", "train.sample_every=8", "train.log_every=2", "objective.entropy=0.0"),
]


TIMES = ("images_per_second", "seconds_per_step", "data_wait", "tflops")


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
    """Make validations return these PSNRs by step; returns the weights that each measured, by step.

    Only the last page is written, since a page takes a second.
    """
    measured: dict[int, dict[str, torch.Tensor]] = {}
    on_validate, write = Validation.on_validate, RunReport.write

    def scripted_validate(self: Validation, step: int, network: torch.nn.Module) -> dict[str, Any]:
        measured[step] = {name: value.clone() for name, value in network.state_dict().items()}
        result = {"valid/images": 4, "valid/psnr": psnr[step]}, torch.ones(1, 40, dtype=torch.int64)
        monkeypatch.setattr(self, "measure", lambda network: result)
        return on_validate(self, step, network)

    def write_last(self: RunReport, step: int) -> None:
        if step == self.settings["train"]["steps"]:
            write(self, step)

    monkeypatch.setattr(Validation, "on_validate", scripted_validate)
    monkeypatch.setattr(RunReport, "write", write_last)
    return measured


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise KeyboardInterrupt after `step`, before its checkpoint."""
    on_step_end = RunReport.on_step_end

    def interrupted(self: RunReport, state: TrainState) -> None:
        on_step_end(self, state)
        if state.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunReport, "on_step_end", interrupted)


def test_validation_numbers_equal_those_of_eval(go: Any, held_out: dict[str, Any], picture_folder: Path) -> None:
    tokenizer = go("lc", set=["train.sample_every=4"], **held_out)
    rows = read_rows(tokenizer.file("metrics.jsonl"))
    (last,) = [row for row in rows if row["step"] == 8 and "valid/psnr" in row]
    assert [row["step"] for row in rows if "valid/psnr" in row] == [4, 8]  # with each sample, by default
    report = tokenizer.path.parent / "report"
    evaluate([str(picture_folder)], tokenizer.path, report, batch_size=4, device="cpu")
    metrics = json.loads((report / "metrics.json").read_text())
    for name in ("psnr", "ssim", "utilization"):
        assert last[f"valid/{name}"] == pytest.approx(metrics[name], rel=1e-6)
    assert last["valid/perplexity"] == pytest.approx(metrics["perplexity_per_group"][0])
    assert metrics["training"] == tokenizer.config
    assert tokenizer.facts["valid_psnr"] == last["valid/psnr"]
    assert tokenizer.facts["published_step"] == 8


def test_publish_best_publishes_the_weights_of_the_best_validation(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = scripted(monkeypatch, {2: 20.0, 4: 22.0, 6: 21.0, 8: 19.0})
    best = go("best", set=["train.validate_every=2"], publish="best", **held_out)
    weights = load_file(best.file("model.safetensors"))
    assert weights.keys() == measured[4].keys()
    assert all(torch.equal(value, measured[4][name]) for name, value in weights.items())
    facts = {"published_step": 4, "images_seen": 16, "steps": 8, "valid_psnr": 22.0}
    assert facts.items() <= best.facts.items()
    assert not best.names("best.safetensors")
    last = go("last", set=["train.validate_every=2"], **held_out)
    weights = load_file(last.file("model.safetensors"))
    assert all(torch.equal(value, measured[8][name]) for name, value in weights.items())
    assert last.facts["published_step"] == 8


def test_without_a_best_validation_the_last_weights_are_published_with_a_word(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = scripted(monkeypatch, dict.fromkeys((2, 4, 6, 8), math.nan))
    published = go("best", set=["train.validate_every=2"], publish="best", **held_out)
    weights = load_file(published.file("model.safetensors"))
    assert all(torch.equal(value, measured[8][name]) for name, value in weights.items())
    assert published.facts["published_step"] == 8
    said = " ".join(capsys.readouterr().err.split())
    assert "no validation gave a number valid/psnr: the weights of the last step are published" in said


def test_a_weight_of_a_loss_that_the_quantizer_lacks_has_no_effect_and_is_named(
    go: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    go("vq", steps=2)
    assert "no effect of" not in capsys.readouterr().err
    go("entropy", steps=2, set=["objective.entropy=0.1", "objective.prior=1.0"])
    said = " ".join(capsys.readouterr().err.split())
    assert "no effect of objective.entropy and objective.prior: the vq quantizer has no such loss" in said


@pytest.mark.parametrize("cut", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_resumed_run_has_the_same_best_weights_and_log(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    options = {"set": ["train.validate_every=2", "train.save_every=4"], "publish": "best", **held_out}
    found = {2: 20.0, 4: 19.0, 6: 22.0, 8: 21.0}  # the best is after the checkpoint, and before or after the cut
    with monkeypatch.context() as patch:
        scripted(patch, found)
        straight = go("straight", **options)
    with monkeypatch.context() as patch:
        scripted(patch, found)
        with patch.context() as inner:
            interrupt_after(inner, cut)
            with pytest.raises(KeyboardInterrupt):
                go("cut", **options)
        resumed = go("cut", **options)
    assert resumed.manifest.files["model.safetensors"] == straight.manifest.files["model.safetensors"]
    assert resumed.facts == straight.facts
    assert resumed.facts["published_step"] == 6
    logs = [read_rows(artifact.file("metrics.jsonl")) for artifact in (straight, resumed)]
    kept = [[(row["step"], row.get("loss/total"), row.get("valid/psnr")) for row in log] for log in logs]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("publish", ["last", "best"])
def test_resumed_run_may_sample_more_often_unless_that_chooses_the_weights(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, publish: str
) -> None:
    options = {"publish": publish, **held_out}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            go("cut", **options)
    if publish == "best":
        with pytest.raises(ArtifactError, match=r"train\.sample_every was 8, now 2\. Finish it with those"):
            go("cut", set=["train.sample_every=2"], **options)
    else:
        rows = read_rows(go("cut", set=["train.sample_every=2"], **options).file("metrics.jsonl"))
        assert [row["step"] for row in rows if "valid/psnr" in row] == [4, 6, 8]


def test_report_is_written_at_the_start_and_published_at_the_end(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            go("lc", **held_out)
    page = tmp_path / "lc.partial" / "report.html"
    text = page.read_text()
    assert re.search(r"Step 2 of 8\. Written 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", text)  # the first row of the log
    assert "training PSNR" in text
    assert '<body data-reload="15" data-successor="lc">' in text
    assert '<meta http-equiv="refresh" content="15">' in text
    said = capsys.readouterr().err
    assert str(page) in " ".join(said.split())
    parts = ["reading and hashing the images", "building the network", "preparing to train"]
    assert [line for line in said.splitlines() if line in parts] == parts  # at once, not after seconds
    text = go("lc", **held_out).file("report.html").read_text()
    assert "Step 8 of 8" in text
    assert "<body>" in text
    assert 'http-equiv="refresh"' not in text
    for part in ("Originals and reconstructions", "Learning rate", "Codebook utilization", "best at step"):
        assert part in text
    assert "Held-out images, reconstructed at step 8." in text


def test_finished_run_is_trained_further_as_the_error_says(
    go: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    go("lc", steps=2, global_batch_size=64)
    assert "images for the 64 of a step: each is drawn several times" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match=r"train\.steps was 2, now 4.*To train it further: --from .*lc in place of"):
        go("lc", steps=4, global_batch_size=64)
    further = go("further", steps=2, source=tmp_path / "lc")
    assert further.facts["steps"] == 2


@pytest.mark.parametrize("weight_ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_page_shows_pictures_between_samples_and_changes_no_result(
    go: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weight_ema: float
) -> None:
    pages: list[str] = []
    render = RunReport.render

    def kept(self: RunReport, step: int) -> None:
        render(self, step)
        pages.append((self.draft.path / "report.html").read_text())

    settings = [f"train.weight_ema={weight_ema}", "model.quantizer.kind=lc", "model.quantizer.codebook_init=uniform"]
    made = []
    for due in (True, False):
        pages.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Throttle, "due", lambda self, due=due: due)
            patch.setattr(RunReport, "render", kept)
            made.append(go(f"previews-{due}", set=settings))
        assert any("reconstructed at step 4." in text for text in pages) == due
    for name in ("model.safetensors", "pictures/step-00000008.png"):
        assert made[0].manifest.files[name] == made[1].manifest.files[name]
    assert made[0].manifest.files.keys() == made[1].manifest.files.keys()
    rows = [read_rows(each.file("metrics.jsonl")) for each in made]
    numbers = [[{k: v for k, v in row.items() if k not in TIMES} for row in each] for each in rows]
    assert numbers[0] == numbers[1]


def test_other_held_out_images_are_another_request(go: Any, held_out: dict[str, Any], picture_folder: Path) -> None:
    go("lc", steps=2, **held_out)
    with pytest.raises(ArtifactError, match="exists and was made with a validation"):
        go("lc", steps=2)
    (picture_folder.parent / "others").mkdir()
    shutil.copy(next(picture_folder.iterdir()), picture_folder.parent / "others")
    with pytest.raises(ArtifactError, match=r"made with other images: pictures, not others"):
        go("lc", steps=2, validation=[str(picture_folder.parent / "others")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"publish": "best"}, "--publish best needs held-out images"),
        ({"set": ["train.validate_every=2"]}, "validate_every = 2 needs held-out images"),
        ({"log": ["wandb"]}, r"package wandb is not installed.*pip install 'vqpipe\[wandb\]'"),
        ({"log": ["tensorbord"]}, "Did you mean tensorboard"),
    ],
)
def test_options_are_refused_before_anything_is_written(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("vqpipe.training.loggers.import_module", absent)
    with pytest.raises(ConfigError, match=message):
        go("x", **options)
    assert not list(tmp_path.glob("x*"))


LPIPS = ("perceptual=vgg", "lpips=1.0", "lpips_weights=absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"preset's: model\.base_channels was 32, now 8\. Choose .*, or add .*--set model\.base_channels=32"),
        ({"set": ["data.image_size=31"], "source": None}, "image_size = 31 is not divisible"),
        ({"set": [f"objective.{each}" for each in LPIPS], "source": None}, "vgg16-397923af.pth"),
    ],
)
def test_an_error_in_the_settings_comes_before_notes_and_images(
    go: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("stages.console.open_images", lambda *names, **options: pytest.fail("opened"))
    with pytest.raises(VqpipeError, match=message):
        go("x", **{"source": tiny_tokenizer("first"), **options})
    assert capsys.readouterr().err == ""


def test_a_plan_says_what_was_adapted_and_refuses_a_codebook_that_does_not_fit(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "codebook.npy", np.eye(37, 64, dtype=np.float32))
    codes = ["model.quantizer.kind=lc", "model.quantizer.codebook_size=40"]
    with pytest.raises(ConfigError, match="37"):
        go("x", set=codes, codebook=tmp_path / "codebook.npy", plan=True)
    monkeypatch.setattr("stages.estimates.plan_here", lambda *arguments: pytest.fail("planned"))
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", [each for each in SETTINGS if "warmup" not in each])
    with pytest.raises(pytest.fail.Exception, match="planned"):
        go("x", steps=2, preset="small", plan=True)
    assert "a first look: 2 of the preset's" in capsys.readouterr().err


def test_whiten_init_with_from_is_refused(go: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.whiten_init would change .* Add --set train\.whiten_init=false"):
        go("tuned", set=["train.whiten_init=true"], source=Path("builtin:photos-f8"))
    assert not list(tmp_path.glob("tuned*"))


def test_tokenizer_without_a_manifest_is_trained_further_and_its_weights_are_read_once(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = go("first", steps=2)
    Tokenizer.from_pretrained(first.path).save_pretrained(tmp_path / "saved")
    read: list[Path] = []
    load = tokenizer_files.load_tensors
    monkeypatch.setattr(tokenizer_files, "load_tensors", lambda path: read.append(path) or load(path))
    tuned = go("tuned", steps=2, source=tmp_path / "saved", set=["train.learning_rate=1e-9"])
    assert read == [tmp_path / "saved" / "model.safetensors"]
    weights, further = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", tuned.path))
    for name, value in weights.items():
        torch.testing.assert_close(further[name], value, rtol=0, atol=1e-5)
    source = tuned.lineage["inputs"]["from"]
    assert (source["name"], source["content"]) == ("saved", hash_file(read[0]))


def test_an_image_size_that_the_model_cannot_take_is_refused_before_whitening(go: Any, tmp_path: Path) -> None:
    message = r"data\.image_size = 31 is not divisible by the downsample factor of the model, 2\. Set .*=30"
    with pytest.raises(ConfigError, match=message):
        go("x", set=["data.image_size=31", "train.whiten_init=true"])
    assert not list(tmp_path.glob("x*"))


class FakeLogger(Logger):
    """In place of TensorBoard."""

    opened: list["FakeLogger"]

    def connect(self, step: int) -> None:
        self.step, self.earlier = step, list(self.metrics.rows)
        self.rows: list[dict[str, Any]] = []
        self.images: list[int] = []
        self.closed = False
        self.opened.append(self)

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(dict(row))

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.images.append(step)

    def close(self) -> None:
        self.closed = True


def test_loggers_get_every_row_and_image_and_are_closed_also_when_the_run_fails(
    go: Any, held_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeLogger.opened = []
    monkeypatch.setitem(LOGGERS, "tensorboard", FakeLogger)
    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    logged = {"log": ["tensorboard"], "set": ["train.sample_every=4"], **held_out}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            go("lc", **logged)
    tokenizer = go("lc", **logged)
    first, second = FakeLogger.opened
    assert first.closed
    assert second.closed
    assert second.step == 3
    assert second.folder == tmp_path / "lc.logs"
    assert [row["step"] for row in second.earlier] == [2]
    assert [*second.earlier, *second.rows] == read_rows(tokenizer.file("metrics.jsonl"))
    assert second.images == [4, 8]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((40, 7), "holds 40 codes of 7 channels, .* Set model.quantizer.feature_dim=7, or"),
        ((39, 6), "holds 39 codes of 6 channels, .* Set model.quantizer.codebook_size=39, or"),
    ],
)
def test_codebook_of_another_shape_is_refused_before_images_are_read(
    shape: tuple[int, int], message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "codebook.npy", np.eye(*shape, dtype=np.float32))
    (tmp_path / "no images").mkdir()
    overrides = [*SETTINGS, "model.quantizer.kind=lc", "model.quantizer.feature_dim=6"]
    with pytest.raises(ConfigError, match=message):
        train(
            [str(tmp_path / "no images")],
            tmp_path / "lc",
            tmp_path / "codebook.npy",
            preset="smoke",
            overrides=overrides,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"codebook.npy", "no images"}


def test_codebook_replaces_the_sizes_of_the_preset_and_the_codes_of_another_tokenizer(
    go: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.random.default_rng(0).standard_normal((37, 6), np.float32)
    np.save(tmp_path / "codebook.npy", codes)
    np.save(tmp_path / "other.npy", 2 * codes)
    settings = [setting for setting in SETTINGS if "quantizer" not in setting]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SETTINGS", settings)
        made = go("lc", steps=2, codebook=tmp_path / "codebook.npy")  # preset smoke: 1000 codes of 64 channels
        again = go("lc", steps=2, codebook=tmp_path / "codebook.npy", set=["model.quantizer.codebook_size=37"])
        capsys.readouterr()
        tuned = go("tuned", steps=2, codebook=tmp_path / "other.npy", source=made.path, set=["train.whiten_init=false"])
    assert again.digest == made.digest
    assert made.facts["codebook_size"] == 37
    quantizer = made.manifest.config["model"]["quantizer"]
    assert (quantizer["codebook_size"], quantizer["feature_dim"], quantizer["code_dim"]) == (37, 6, 8)
    assert "37 codes" in (made.path / "README.md").read_text()
    page = (made.path / "report.html").read_text()
    assert "37 codes" in page
    assert "1,000 codes" not in page
    assert "the codes of --codebook replace those of" in " ".join(capsys.readouterr().err.split())
    saved = [load_file(each.file("model.safetensors"))["quantizer.codes"] for each in (made, tuned)]
    assert np.array_equal(saved, [codes, 2 * codes])


@pytest.mark.parametrize(
    ("quantizer", "sizes"),
    [
        (LcConfig(codebook_size=9), {"codebook_size": 12, "feature_dim": 6}),
        (
            LcConfig(codebook_size=9, code_dim=8, feature_dim=8, projector="none"),
            {"codebook_size": 12, "feature_dim": 6, "code_dim": 6},
        ),
        (
            MultiGroupConfig(num_groups=2, group=LcConfig(codebook_size=9)),
            {"group.codebook_size": 12, "group.feature_dim": 6},
        ),
        (
            MultiGroupConfig(num_groups=2, group=LcConfig(codebook_size=6)),  # concatenated
            {"group.codebook_size": 6, "group.feature_dim": 6},
        ),
        (VqBridgeConfig(codebook_size=9), {"codebook_size": 12, "frozen_dim": 6}),
        (VqConfig(codebook_size=9, code_dim=4), {}),
    ],
)
def test_settings_that_follow_from_a_codebook(quantizer: QuantizerConfig, sizes: dict[str, int]) -> None:
    assert quantizer.codebook_settings(12, 6) == sizes


def test_job_from_python_takes_callbacks_and_returns_none_when_stopped(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", "https://me:password@host/images.tar"])
    config = recipe.load_tokenizer("smoke", [*SETTINGS, "train.steps=2", "train.global_batch_size=4"])
    inputs = RunInputs(images=open_images([str(picture_folder)]))
    check_run(config)

    class AddsNumber(Callback):
        def on_log(self, row: dict[str, Any]) -> None:
            row["own"] = 2.0

    def job(stop: bool) -> Artifact | None:
        draft = start_tokenizer_run(tmp_path / "lc", config, inputs, seed=0)
        assert isinstance(draft, Draft)
        with draft:
            options = {"seed": 0, "device": torch.device("cpu"), "stop_requested": lambda: stop}
            return train_tokenizer(Run(draft=draft, callbacks=[AddsNumber()], **options), config, inputs)

    assert job(stop=True) is None
    assert not (tmp_path / "lc").exists()
    tokenizer = job(stop=False)
    assert tokenizer is not None
    assert tokenizer.facts["steps"] == 2
    assert [row["own"] for row in read_rows(tokenizer.file("metrics.jsonl"))] == [2.0]
    assert "vqpipe https://host/images.tar" in tokenizer.file("report.html").read_text()


def test_images_that_are_too_small_for_the_discriminator_are_an_error() -> None:
    deep = ["discriminator.num_layers=3", "objective.adversarial=0.1"]
    check_run(recipe.load_tokenizer("smoke", ["data.image_size=24", *deep]))
    with pytest.raises(ConfigError, match=r"image_size = 20 is too small for the discriminator, which needs 24 pixels"):
        check_run(recipe.load_tokenizer("smoke", ["data.image_size=20", *deep]))


def test_manifest_records_the_weights_of_image_sets(go: Any, picture_folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy(picture_folder / "drawn-0.png", others)
    sets = [str(picture_folder), str(others)]

    def mixed(out: str, weights: str) -> None:
        overrides = [*SETTINGS, f"data.set_weights={weights}"]
        train(sets, tmp_path / out, steps=2, overrides=overrides, preset="smoke", global_batch_size=4, device="cpu")

    mixed("mixed", "[3, 1]")
    tokenizer = open_artifact(tmp_path / "mixed", "tokenizer")
    assert tokenizer.config["data"]["set_weights"] == [3.0, 1.0]
    assert tokenizer.facts["image_sets"] == [
        {"name": "pictures", "num_images": 10, "weight": 3.0},
        {"name": "others", "num_images": 1, "weight": 1.0},
    ]
    for weights in ("[3]", "[3, 1, 1]", "[-1, 2]", "[0, 0]"):
        with pytest.raises(ConfigError, match=r"data\.set_weights.*--images"):
            mixed("refused", weights)
    assert not list(tmp_path.glob("refused*"))
    plain = go("plain", steps=2)
    assert "set_weights" not in plain.config["data"]
    assert "image_sets" not in plain.facts


@pytest.mark.parametrize(
    "setting",
    [
        "train.save_every=7",
        "data.num_workers=0",
        *(
            pytest.param(setting, marks=pytest.mark.slow)
            for setting in ("train.log_every=1", "train.max_nonfinite_steps=3", "train.keep_every=3")
        ),
    ],
)
def test_resumable_setting_may_differ_on_resume(go: Any, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            go("lc")
    assert go("lc", set=[setting]).facts["steps"] == 8


def test_from_starts_with_the_weights_of_another_tokenizer_and_masking_may_differ(go: Any) -> None:
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


def test_limit_trains_on_the_first_images(picture_folder: Path, tmp_path: Path, go: Any) -> None:
    limited = go("limited", steps=2, limit=4)
    few = tmp_path / "few"
    few.mkdir()
    for number in range(4):
        shutil.copy(picture_folder / f"drawn-{number}.png", few)
    options: dict[str, Any] = {"preset": "smoke", "global_batch_size": 4, "device": "cpu", "overrides": SETTINGS}
    train([str(few)], tmp_path / "few-out", steps=2, **options)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("limited", "few-out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert limited.inputs["images"] != open_images([picture_folder]).digest
