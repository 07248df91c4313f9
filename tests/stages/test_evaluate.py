"""`vqpipe eval` on an untrained tokenizer: the numbers are those of its own reconstructions."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from stages.evaluate import evaluate
from vqpipe.artifacts import open_artifact
from vqpipe.continuous import ContinuousAutoencoder
from vqpipe.data.shards import open_images
from vqpipe.data.transforms import center_crop, decode
from vqpipe.errors import ArtifactError, ConfigError, DataError
from vqpipe.reports.evaluation import open_evaluation
from vqpipe.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Path]
MULTI_GROUP = {"kind": "multi_group", "num_groups": 3, "group": {"kind": "vq", "codebook_size": 64, "code_dim": 4}}
RESIDUAL = {"kind": "residual", "depth": 3, "codebook_size": 64, "code_dim": 4}
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


@pytest.mark.parametrize("quantizer", [MULTI_GROUP, RESIDUAL], ids=["multi_group", "residual"])
def test_the_k_curve_is_that_of_decoding_the_first_groups(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, quantizer: dict[str, Any]
) -> None:
    path = tiny_tokenizer("tokenizer", quantizer=quantizer)
    out = run(path, picture_folder, tmp_path / "report", batch_size=4)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    curve = metrics["prefixes"]
    assert [row["groups"] for row in curve] == [1, 2, 3]
    assert curve[-1] == {"groups": 3, **{key: metrics[key] for key in curve[-1] if key != "groups"}}
    tokenizer, samples = Tokenizer.from_pretrained(path), open_images([picture_folder])
    originals = torch.stack([center_crop(decode(sample.image), 32) for sample in samples])
    ids = tokenizer.encode(originals)
    for row in curve:
        again = tokenizer.decode(ids, (32, 32), groups=row["groups"])
        psnr = [peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(originals, again, strict=True)]
        assert row["psnr"] == pytest.approx(np.mean(psnr), abs=1e-6)
        assert row["bits_per_pixel"] == row["groups"] * 6 / 4
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "PSNR from the first k groups, dB" in html
    assert f"<td>{curve[0]['psnr']:.2f} dB</td>" in html

    plain = run(path, picture_folder, tmp_path / "plain", overrides=["eval.prefixes=false"])
    without = json.loads((plain / "metrics.json").read_text(encoding="utf-8"))
    assert without == {key: value for key, value in metrics.items() if key != "prefixes"}


@pytest.mark.slow
def test_two_ranks_count_a_codebook_too_large_for_counters_and_measure_its_groups_as_one_does(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    group = {"kind": "lfq", "code_dim": 36}
    path = tiny_tokenizer("tokenizer", quantizer={"kind": "multi_group", "num_groups": 2, "group": group})
    one = run(path, picture_folder, tmp_path / "one", batch_size=3)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stages", "eval"]
    words = ["--images", str(picture_folder), "--tokenizer", str(path), "--out", str(tmp_path / "two")]
    command = [sys.executable, *torchrun, *words, "--batch-size", "3", "--device", "cpu"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120, check=True)
    for name in ("metrics.json", "counts.npy"):
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    evaluated = open_evaluation(open_artifact(one))
    ids = Tokenizer.from_pretrained(path).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert evaluated.counts.shape == (2, 2**36)
    assert int(evaluated.counts[0].sum()) == 10 * ids.shape[1] // 2
    assert "of 2 x 68,719,476,736 codes" in (one / "report.html").read_text(encoding="utf-8")


def test_a_continuous_autoencoder_is_measured_without_ids(tiny_vae: Path, picture_folder: Path, tmp_path: Path) -> None:
    out = run(tiny_vae, picture_folder, tmp_path / "report", image_size=32)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    autoencoder, samples = ContinuousAutoencoder.from_pretrained(tiny_vae), open_images([picture_folder])
    originals = torch.stack([center_crop(decode(sample.image), 32) for sample in samples])
    again = autoencoder.decode(autoencoder.encode(originals), (32, 32))
    psnr = [peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(originals, again, strict=True)]
    assert metrics["psnr"] == pytest.approx(np.mean(psnr), abs=0.01)
    assert metrics["tokenizer"]["latent_shape"] == [4, 16, 16]
    assert metrics["not_computed"]["utilization"] == "continuous latents: no ids"
    assert "utilization" not in metrics
    assert np.load(out / "counts.npy").shape == (0, 0)
    report = open_artifact(out, "report")
    assert report.lineage["inputs"]["tokenizer"]["name"] == "tiny-vae"
    html = report.file("report.html").read_text(encoding="utf-8")
    assert "Continuous latents of 4 x 16 x 16, downsample factor 2" in html
    assert "codes in use" not in html


def test_what_cannot_be_measured_is_said_before_any_work(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(ConfigError, match=r"eval\.protocol"):
        run(path, picture_folder, tmp_path / "report", protocol="other")
    with pytest.raises(DataError, match="multiples of 2"):
        run(path, picture_folder, tmp_path / "report", image_size=33)
    assert not (tmp_path / "report.partial").exists()
