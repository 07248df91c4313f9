"""`vqpipe eval` on an untrained tokenizer: the numbers are those of its own reconstructions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from stages.evaluate import evaluate
from vqpipe.artifacts import open_artifact
from vqpipe.data.shards import open_images
from vqpipe.data.transforms import center_crop, decode
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Path]
HISTORY = [
    {"step": i, "images_seen": 8 * i, "loss/total": 1 / i, "psnr": 15.0 + i, "utilization": i / 10} for i in (1, 2, 3)
]


def run(tokenizer: Path, images: Path, out: Path, **options: object) -> Path:
    evaluate(images=[str(images)], tokenizer=tokenizer, out=out, device="cpu", **options)  # type: ignore[arg-type]
    return out


def test_the_report_holds_the_numbers_of_the_tokenizers_own_reconstructions(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer", history=HISTORY)
    out = run(path, picture_folder, tmp_path / "report", overrides=["eval.num_pictures=2"])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))

    tokenizer, samples = Tokenizer.from_pretrained(path), open_images([picture_folder])
    originals = torch.stack([center_crop(decode(sample.image), 32) for sample in samples])
    ids = tokenizer.encode(originals)
    again = tokenizer.decode(ids, (32, 32))
    psnr = [peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(originals, again, strict=True)]
    counts = np.bincount(ids.flatten(), minlength=64)
    assert metrics["psnr"] == pytest.approx(np.mean(psnr), abs=1e-6)
    assert metrics["utilization"] == np.mean(counts > 0)
    assert np.array_equal(np.load(out / "counts.npy"), [counts])
    assert (metrics["num_images"], metrics["image_size"], metrics["num_tokens_per_image"]) == (10, 32, 256)
    assert set(metrics["not_computed"]) == {"lpips_alex", "lpips_vgg", "rfid"}

    report = open_artifact(out, "report")
    assert len(report.names("pictures/*.png")) == 4
    assert report.facts["psnr"] == metrics["psnr"]
    assert report.lineage["inputs"]["tokenizer"]["name"] == "tokenizer"
    html = report.file("report.html").read_text(encoding="utf-8")
    assert f"{metrics['psnr']:.2f}" in html
    assert "Codes in use while training" in html
    assert open_artifact(path).content[:12] in html


def test_batches_change_nothing_and_a_second_run_says_it_is_done(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_tokenizer("tokenizer")
    whole = run(path, picture_folder, tmp_path / "whole")
    parts = run(path, picture_folder, tmp_path / "parts", batch_size=3)
    assert (whole / "metrics.json").read_bytes() == (parts / "metrics.json").read_bytes()
    capsys.readouterr()
    run(path, picture_folder, whole, batch_size=4)
    said = capsys.readouterr()
    assert said.out.strip() == str(whole)
    assert "already published" in said.err
    with pytest.raises(ArtifactError, match="limit was null, now 4"):
        run(path, picture_folder, whole, limit=4)


def test_an_unreadable_image_is_refused_unless_allowed_and_then_counted(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    (picture_folder / "drawn-3.png").write_bytes(b"no picture")
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(DataError, match="1 of 10 images cannot be used"):
        run(path, picture_folder, tmp_path / "strict")
    out = run(path, picture_folder, tmp_path / "lenient", overrides=["eval.max_skipped=0.1"])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["num_images"] == 9
    assert sum(metrics["skipped"].values()) == 1


def test_what_cannot_be_measured_is_said_before_any_work(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(ConfigError, match=r"eval\.protocol"):
        run(path, picture_folder, tmp_path / "report", protocol="other")
    with pytest.raises(DataError, match="multiples of 2"):
        run(path, picture_folder, tmp_path / "report", image_size=33)
    assert not (tmp_path / "report.partial").exists()
