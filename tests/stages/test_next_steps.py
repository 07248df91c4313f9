"""What the commands print at their end: the page to open, and the next command, which runs as it is printed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import cli
from vqpipe.artifacts import open_artifact

PRESET = """
extends = "smoke"
data.image_size = 32
features.image_size = 32
kmeans.k = 50
model.base_channels = 32
model.channel_multipliers = [1, 1]
model.z_channels = 8
discriminator.base_channels = 4
train.steps = 2
train.global_batch_size = 4
train.warmup_steps = 1
"""
Run = Callable[..., Any]


def next_commands(done: Any) -> list[list[str]]:
    """The words of each command that is proposed at the end of another."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[6:]) for line in done.stderr.splitlines() if re.match(r"next: |  or: ", line)]


def test_the_printed_commands_lead_from_images_to_a_report(vqpipe: Run, tmp_path: Path, draw_folder: Any) -> None:
    here = tmp_path / "my work"
    here.mkdir()
    draw_folder(here / "the photos", 8, side=40)
    (here / "tiny preset.toml").write_text(PRESET)
    words = ["extract-features", "--images", "the photos", "--preset", "tiny preset.toml", "--out", "out/features"]
    made = vqpipe(here, *words)
    (kmeans,) = next_commands(made)
    assert made.stdout == "out/features\n"
    assert kmeans[1] == "kmeans"

    made = vqpipe(here, *kmeans[1:])
    (train,) = next_commands(made)
    assert {"tiny preset.toml", "the photos", "out/codebook"} <= set(train)

    made = vqpipe(here, *train[1:])
    evaluate, tokenize = next_commands(made)
    assert made.stdout == "out/tokenizer\n"
    assert f"open: {Path('out/tokenizer/report.html')}" in made.stderr.splitlines()

    made = vqpipe(here, *tokenize[1:])
    detokenize, generator = next_commands(made)
    assert detokenize[-4:-1] == ["--as", "png", "--out"]
    assert generator[:4] == ["vqpipe", "train-generator", "--preset", "gpt-unconditional-tiny"]
    for name in ("--tokens", "--tokenizer"):
        assert (here / generator[generator.index(name) + 1]).is_dir()

    made = vqpipe(here, *evaluate[1:], "--limit", "6")
    assert f"open: {Path('out/report/report.html')}" in made.stderr.splitlines()
    again, other = next_commands(made)
    assert again[-1] == "out/tokens-2"  # a name that is free
    assert other[-3:] == ["builtin:photos-f8", "--out", "out/report-photos-f8"]

    made = vqpipe(here, *other[1:])
    (compare,) = next_commands(made)
    assert compare == ["vqpipe", "compare", "out/report-photos-f8", "out/report", "--out", "out/comparison"]
    made = vqpipe(here, *compare[1:])
    assert next_commands(made) in ([again], [])  # the training images of the better tokenizer, if they are known

    made = vqpipe(here, *detokenize[1:])
    assert len(list((here / "out" / "decoded" / "images").glob("*.png"))) == 8
    (measure,) = next_commands(made)
    assert measure[:4] == ["vqpipe", "eval", "--images", "the photos"]


def test_few_features_are_clustered_into_fewer_codes(vqpipe: Run, tmp_path: Path, draw_folder: Any) -> None:
    draw_folder(tmp_path / "photos", 3, side=40)
    made = vqpipe(tmp_path, "extract-features", "--images", "photos", "--preset", "smoke", "--out", "features")
    (kmeans,) = next_commands(made)
    vectors = open_artifact(tmp_path / "features").facts["num_vectors"]
    assert kmeans[kmeans.index("--k") + 1] == str(vectors // 10)


def published(
    folder: Path,
    name: str,
    kind: str,
    command: list[str],
    files: dict[str, str],
    inputs: dict[str, str] | None = None,
    **facts: Any,
) -> None:
    """An artifact as a command would have published it."""
    from vqpipe import artifacts

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["vqpipe", *command])
        draft = artifacts.start(Path(name), kind, {}, inputs or {})
        assert isinstance(draft, artifacts.Draft)
        with draft:
            for file, text in files.items():
                with draft.write(file) as path:
                    path.write_text(text)
            draft.publish(facts)


PAGE = {"report.html": ""}
ENDINGS: dict[str, tuple[str, list[str], dict[str, str], list[str]]] = {
    "prepare-data": ("dataset", [], {}, ["next: vqpipe extract-features --images made --out features"]),
    "import-checkpoint": (
        "tokenizer",
        ["weights.pth"],
        {},
        [
            "next: vqpipe eval --images builtin:photos --tokenizer made --out report",
            "  or: vqpipe tokenize --images builtin:photos --tokenizer made --out tokens-2",
        ],
    ),
    "train": (
        "tokenizer",
        ["--import", "my.py", "--images", "a b"],
        {},
        [
            "next: vqpipe eval --images builtin:photos --tokenizer made --out report --import my.py",
            "  or: vqpipe tokenize --images 'a b' --tokenizer made --out tokens-2 --import my.py",
        ],
    ),
    "train-generator": (
        "generator",
        ["--tokens", "tokens"],
        PAGE,
        ["open: made/report.html", "next: vqpipe generate --generator made --out samples"],
    ),
    "generate": (
        "images",
        ["--generator", "generator"],
        {"contact-sheet.png": ""},
        [
            "open: made/contact-sheet.png",
            "next: vqpipe eval-generation --images made --reference 'a b' --out samples-report",
        ],
    ),
    "reconstruct": (
        "images",
        ["--shared-norms", "a b/a.jpg", "a b", "--tokenizer", "tokens", "--limit", "2"],
        {"a.png": "", "b.png": ""},
        [
            "open: made/a.png",
            "next: vqpipe eval --images 'a b/a.jpg' --images 'a b' --limit 2 --tokenizer tokens --out report",
        ],
    ),
    "eval-generation": ("report", ["--images", "made"], {**PAGE, "sheet.png": ""}, ["open: made/report.html"]),
    "compare": ("report", ["one", "two"], PAGE, ["open: made/report.html"]),
    "bench": ("report", [], PAGE, ["open: made/report.html"]),
    "train-classifier": ("classifier", ["--tokens", "tokens"], PAGE, ["open: made/report.html"]),
    "demo": ("tokenizer", [], PAGE, []),
}


@pytest.mark.parametrize(("ids", "codes", "steps"), [(64, 4096, []), (256, 16_384, ["--steps", "100"])])
def test_a_generator_that_takes_hours_on_a_cpu_is_proposed_with_fewer_steps(
    ids: int, codes: int, steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import next_steps

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    published(tmp_path, "made", "tokens", ["tokenize"], {}, num_tokens=ids, codebook_size=codes)
    assert next_steps.generator_steps(open_artifact(tmp_path / "made")) == steps


@pytest.mark.parametrize(("preset", "precision"), [("small", None), ("mgvq-f16-g4", "fp32")])
def test_fp32_is_proposed_on_a_slow_cpu_for_presets_in_bf16_alone(
    preset: str, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import next_steps

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(next_steps, "bf16_is_faster", lambda device: False)
    assert next_steps.train_precision(preset) == precision


@pytest.mark.parametrize(("image_size", "proposed"), [(64, True), ("64x40", False), ("native", False)])
def test_a_generator_is_proposed_for_square_images_alone(
    image_size: int | str, proposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import next_steps

    facts = {"num_tokens": 64, "codebook_size": 64, "image_size": image_size}
    published(tmp_path, "made", "tokens", ["tokenize"], {}, **facts)
    monkeypatch.chdir(tmp_path)
    assert any("train-generator" in line for line in next_steps.lines(open_artifact(Path("made")))) == proposed


@pytest.mark.parametrize("command", ENDINGS)
def test_every_command_ends_with_what_to_open_or_to_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import next_steps

    kind, words, files, expected = ENDINGS[command]
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "a.jpg").touch()
    published(tmp_path, "tokens", "tokens", ["tokenize", "--images=a b", "--tokenizer", "t"], {})
    published(tmp_path, "generator", "generator", ["train-generator", "--tokens", "tokens"], {})
    published(tmp_path, "made", kind, [command, *words], files)
    monkeypatch.chdir(tmp_path)
    assert next_steps.lines(open_artifact(Path("made"))) == expected


def test_reports_that_were_measured_in_another_way_are_not_proposed_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import next_steps

    facts = {"psnr": 20.0, "protocol": "adm", "num_images": 8}
    for name, size in (("one", 64), ("two", 64), ("three", 128)):
        inputs = {"images": "photos", "tokenizer": name}
        published(tmp_path, name, "report", ["eval"], PAGE, inputs, **facts, image_size=size)
    monkeypatch.chdir(tmp_path)
    proposed = "next: vqpipe compare one two --out comparison"
    assert next_steps.lines(open_artifact(Path("one"))) == [f"open: {Path('one/report.html')}", proposed]


@pytest.mark.parametrize(
    ("words", "measured"),
    [(["a.jpg"], "a.jpg"), (["."], "builtin:photos"), (["a.jpg"] * 9, "builtin:photos")],
    ids=["a file", "the folder of the artifact", "many files"],
)
def test_reconstructions_beside_their_image_are_not_proposed_to_measure_on(
    words: list[str], measured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import next_steps

    (tmp_path / "a.jpg").touch()
    published(tmp_path, "made", "images", ["reconstruct", *words, "--tokenizer", "builtin:photos-f8"], {})
    monkeypatch.chdir(tmp_path)
    proposed = f"next: vqpipe eval --images {measured} --tokenizer builtin:photos-f8 --out report"
    assert next_steps.lines(open_artifact(Path("made"))) == [proposed]


def test_the_printed_commands_leave_out_the_images_that_were_damaged(
    vqpipe: Run, tmp_path: Path, draw_folder: Any
) -> None:
    draw_folder(tmp_path / "photos", 4, side=40)
    good, damaged = sorted((tmp_path / "photos").iterdir())[:2]
    damaged.write_bytes(damaged.read_bytes()[:60])
    builtin = ["--tokenizer", "builtin:photos-f8"]
    tokenize = ["--images", "photos", "--image-size", "32", "--max-skipped", "0.5", "--num-workers", "0"]
    detokenize, *_ = next_commands(vqpipe(tmp_path, "tokenize", *tokenize, *builtin, "--out", "tokens"))
    (evaluate,) = next_commands(vqpipe(tmp_path, *detokenize[1:]))
    assert vqpipe(tmp_path, *evaluate[1:]).returncode == 0
    assert open_artifact(tmp_path / "report").facts["num_images"] == 3

    files = vqpipe(tmp_path, "reconstruct", f"photos/{good.name}", *builtin, "--out", "reconstructed")
    (evaluate,) = next_commands(files)
    assert vqpipe(tmp_path, *evaluate[1:]).returncode == 0
    assert open_artifact(tmp_path / "report-2").facts["num_images"] == 1


def test_no_warning_of_another_package_is_printed(tmp_path: Path) -> None:
    noisy = (
        "import logging, os, sys, warnings\n"
        "from stages import cli\n"
        "def app():\n"
        "    warnings.warn('a warning')\n"
        "    logging.getLogger('somebody.else').warning('a log line')\n"
        "    logging.getLogger('somebody.else').error('an error')\n"
        "    logging.getLogger('vqpipe').warning('ours')\n"
        "    os.system(f'{sys.executable} -c \"import warnings; warnings.warn(1 * str(2))\"')\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = str(Path(cli.__file__).parents[1])

    def said(*options: str) -> str:
        words = [sys.executable, *options, "-c", noisy]
        return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stderr

    assert said() == "an error\nours\n"
    assert "a warning" in said("-W", "default")
    assert "a log line" in said("-W", "default")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--images", "photos"], "the lc quantizer has no codebook yet. Pass --codebook DIR"),
        (
            ["--images", "photos", "--set", "model.quantizer.kind=vq"],
            "train.warmup_steps = 90 is more than train.steps",
        ),
    ],
)
def test_missing_inputs_are_refused_before_the_schedule(
    vqpipe: Run, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "photos").mkdir()
    done = vqpipe(
        tmp_path, "train", "--preset", "smoke", "--steps", "9", "--set", "train.warmup_steps=90", "--out", "o", *words
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_short_run_is_called_a_first_look_and_its_warm_up_shortened_in_proportion() -> None:
    from stages import recipe
    from vqpipe.errors import ConfigError

    said: list[str] = []

    def warmup(*overrides: str, **flags: Any) -> int:
        loaded = recipe.load_tokenizer("small", list(overrides), say=said.append, train=flags)
        return loaded.train.warmup_steps

    assert warmup(steps=30) == warmup("train.steps=30") == 1  # small: 100 of 3,000
    first_look = "a first look: {} of the preset's 3,000 steps, which give much better results"
    assert said == [first_look.format(30), "warm-up: 1 step instead of 100, in the same proportion"] * 2
    said.clear()
    assert warmup(steps=100) == 100
    assert said == [first_look.format(100)]
    said.clear()
    assert warmup(steps=1000) == warmup() == 100
    assert said == []
    with pytest.raises(ConfigError, match=r"train\.warmup_steps = 100 is more than train\.steps = 30"):
        warmup("train.warmup_steps=100", steps=30)


def test_reason_of_missing_weights_is_printed_once_with_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    from stages import console
    from vqpipe.metrics.feature_networks import find_networks

    absent = find_networks(None).absent
    reasons = {**absent, "kid": absent["rfid"]}
    console.show_numbers([("PSNR", "21.5", "RGB")], reasons)
    lines = capsys.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("not computed"))
    assert "--weights DIR" in lines[first]
    names = ["LPIPS (AlexNet)", "LPIPS (VGG)", "rFID, KID"]
    files = ["alexnet-owt-7be5be79.pth", "vgg16-397923af.pth", "weights-inception-2015-12-05-6726825d.pth"]
    for line, name, file in zip(lines[first + 1 :], names, files, strict=True):
        assert line.startswith(f"  {name}: https://")
        assert line.endswith(f"/{file}")
    console.show_numbers([], reasons)
    assert capsys.readouterr().err.splitlines() == lines[first:]  # without a number, no table
