"""Signals, and the paths of artifacts."""

import shlex
import signal
import sys
from pathlib import Path

import pytest
import typer

from stages import cli, signals
from stages.options import known_loggers
from vqpipe.files import with_final_name


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)],
    ids=lambda value: str(value),
)
def test_first_signal_requests_a_stop_and_the_second_interrupts(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with signals.StopAfterStep() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        with pytest.raises(signals.Interrupted) as ended:
            signal.raise_signal(number)
        assert ended.value.code == code
        with pytest.raises(signals.Interrupted) as left:
            stop.exit()
        assert left.value.code == code
    assert signal.getsignal(number) == before


def test_an_interrupted_command_is_printed_to_paste_unless_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--images", "my photos", "--set", "train.freeze=['encoder']", "--out", "lc"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vqpipe", *words])
    said, command = signals.interrupted().split("\nnext: ")
    assert said == signals.INTERRUPTED
    assert shlex.split(command) == ["vqpipe", *words]
    monkeypatch.setattr(sys, "argv", ["vqpipe", "reconstruct", *map(str, range(1000))])
    assert signals.interrupted() == signals.INTERRUPTED


def test_dot_and_dot_dot_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_final_name(Path(".")) == tmp_path.resolve()
    assert with_final_name(Path("..")) == tmp_path.resolve().parent
    assert with_final_name(Path("out/")) == Path("out")


def test_unknown_logger_is_wrong_usage() -> None:
    assert known_loggers(["tensorboard", "wandb"]) == ["tensorboard", "wandb"]
    with pytest.raises(typer.BadParameter, match="'tensorbord' is not one of tensorboard, wandb"):
        known_loggers(["tensorbord"])


WRONG = {
    "settings": ("", 2, "Missing argument 'COMMAND'. Choose from:"),
    "settings trian": ("", 2, "'trian' is not one of 'extract-features', 'kmeans', 'train'"),
    "presets smal": ("", 1, "no preset is called 'smal'. Did you mean small?"),
    "train --images photos --preset smal": ("out", 1, "no preset is called 'smal'. Did you mean small?"),
    "presets photos": ("", 1, "no preset is called 'photos'. vqpipe presets lists all; a file's name ends in .toml."),
    "train --images photos --preset small --from photoz": ("out", 1, "no such folder. Did you mean photos?"),
    "train --images photo --preset small": ("out", 1, "no such images: photo. Did you mean photos?"),
    "tokenize --images photo --tokenizer builtin:photos-f8": ("out", 1, "no such images: photo. Did you mean photos?"),
    "tokenize --images photos --tokenizer photos-f8": ("out", 1, "such folder. Did you mean builtin:photos-f8?"),
    "tokenize --images photos --tokenizer user/name": ("out", 1, "or write hf:user/name for a repository"),
    "tokenize --images photos/train --tokenizer builtin:photos-f8": ("out", 1, "Did you mean builtin:photos/train?"),
    "tokenize --images photos --tokenizer photoz": ("out", 1, "no such folder. Did you mean photos?"),
    "tokenize --images photos/1.jpg photos/2.jpg photos/3.jpg --tokenizer builtin:photos-f8": (
        "out",
        2,
        "--images takes one value, not also photos/2.jpg, photos/3.jpg. Quote a pattern or a name with spaces, or give",
    ),
    "eval --images photos --tokenizer photoz": ("out", 1, "no such folder. Did you mean photos?"),
    "detokenize --tokens photoz --tokenizer photos": ("out", 1, "no such folder. Did you mean photos?"),
    "generate --generator photoz": ("out", 1, "no such folder. Did you mean photos?"),
    "train-generator --tokens photoz --tokenizer photos": ("out", 1, "no such folder. Did you mean photos?"),
    "train-classifier --tokens photoz --tokenizer photos": ("out", 1, "no such folder. Did you mean photos?"),
    "compare photos photoz": ("out", 1, "no such folder. Did you mean photos?"),
    "push photoz me/photos": ("", 1, "no such folder. Did you mean photos?"),
    "eval-generation --images photos --reference photoz": ("out", 1, "no such images: photoz. Did you mean photos?"),
    "inspect photos photos": ("", 2, "Unexpected argument: photos"),
    "inspect --json photos more": ("", 2, "Unexpected argument: more"),
    "train --images photos --preset small --set train.betas=[0.9, 0.99]": ("out", 2, "also 0.99]. Quote a value with"),
    "tokenize --images photos --tokenizer photos --image-size big": ("out", 2, "'big' is not an image size. Write 256"),
    "tokenize --images photos --tokenizer photos --image-size 0": ("out", 2, "'0' is not an image size. Write 256"),
    "generate --generator photos --seed -1": ("out", 2, "--seed': Input should be greater than or equal to 0"),
    "eval --images photos --tokenizer photos --seed 4294967296": (
        "out",
        2,
        "--seed': Input should be less than or equal",
    ),
    "tokenize --images photos --tokenizer photos --precision fp31": ("out", 2, "--precision': 'fp31' is not one of"),
}
"""Wrong words -> the value of --out, the exit code, and what is said."""


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_refused_before_pytorch_is_loaded(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, code, said = WRONG[words]
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vqpipe", *words.split(), *(["--out", out] if out else [])])
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it is an ImportError
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in printed
    assert "Value error" not in printed
