"""`vqpipe eval` on an untrained tokenizer: the numbers are those of its own reconstructions."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor
from torch.nn import functional as F

from stages.evaluate import evaluate, perceptual_files
from vqpipe.analysis import ANALYSES, embedding
from vqpipe.artifacts import open_artifact
from vqpipe.codebooks.encoders import PatchEncoder
from vqpipe.codebooks.features import ENCODERS, EncoderKind
from vqpipe.continuous import ContinuousAutoencoder
from vqpipe.data.decoding import decode
from vqpipe.data.images import ImageSet, SelectedImages, open_images
from vqpipe.data.transforms import Framing, center_crop, to_uint8
from vqpipe.data.transforms import pixels as pixels_of
from vqpipe.errors import ArtifactError, ConfigError, DataError, VqpipeError, WeightsError
from vqpipe.evaluation.pictures import NUM_WITH_PREFIXES
from vqpipe.evaluation.random_classes import draw_classes
from vqpipe.metrics.config import SetMetric
from vqpipe.metrics.feature_networks import LPIPS_NETS
from vqpipe.metrics.inception import INCEPTION_FILE
from vqpipe.metrics.protocols import PROTOCOLS
from vqpipe.reports.evaluation import open_evaluation
from vqpipe.reports.page import data_uri
from vqpipe.reports.pictures import to_png
from vqpipe.tiling import reconstruct_any_size
from vqpipe.tokenizer import Tokenizer
from vqpipe.weights import LPIPS_BACKBONES

MakeTokenizer = Callable[..., Path]
MULTI_GROUP = {"kind": "multi_group", "num_groups": 3, "group": {"kind": "vq", "codebook_size": 64, "code_dim": 4}}
RESIDUAL = {"kind": "residual", "depth": 3, "codebook_size": 64, "code_dim": 4}
HISTORY = [
    {"step": i, "images_seen": 8 * i, "loss/total": 1 / i, "psnr": 15.0 + i, "utilization": i / 10} for i in (1, 2, 3)
]


def run(tokenizer: Path, images: Path, out: Path, **options: object) -> Path:
    evaluate(images=[str(images)], tokenizer=tokenizer, out=out, device="cpu", **options)  # type: ignore[arg-type]
    return out


def metrics_of(report: Path) -> dict[str, Any]:
    return json.loads((report / "metrics.json").read_text(encoding="utf-8"))


def crops_of(pictures: Path) -> Tensor:
    """ADM's crops of the pictures: uint8[n, 3, 32, 32]."""
    return torch.stack([center_crop(decode(sample.image), 32) for sample in open_images([pictures])])


def psnr_of(originals: Iterable[Tensor], reconstructions: Iterable[Tensor]) -> list[float]:
    pairs = zip(originals, reconstructions, strict=True)
    return [peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in pairs]


def test_report_equals_metrics_of_decoded_reconstructions(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_tokenizer("tokenizer", history=HISTORY)
    out = run(path, picture_folder, tmp_path / "report", overrides=["eval.num_pictures=2", "eval.num_extremes=1"])
    metrics = metrics_of(out)

    tokenizer, originals = Tokenizer.from_pretrained(path), crops_of(picture_folder)
    ids = tokenizer.encode(originals)
    decoded = tokenizer.decode(ids, (32, 32))
    psnr = psnr_of(originals, decoded)
    counts = np.bincount(ids.flatten(), minlength=64)
    assert metrics["psnr"] == pytest.approx(np.mean(psnr), abs=1e-6)
    assert metrics["utilization"] == np.mean(counts > 0)
    assert np.array_equal(np.load(out / "counts.npy"), [counts])
    assert np.array_equal(np.load(out / "dead-codes.npy"), [(0, code) for code in np.flatnonzero(counts == 0)])
    assert (metrics["num_images"], metrics["image_size"], metrics["num_tokens_per_image"]) == (10, 32, 256)
    assert set(metrics["not_computed"]) == {"lpips_alex", "lpips_vgg", "rfid"}

    report = open_artifact(out, "report")
    assert len(report.names("pictures/*.png")) == 8
    pictures = [(picture["why"], picture["psnr"]) for picture in metrics["pictures"]]
    assert pictures == [
        ("spread", pytest.approx(psnr[0])),
        ("spread", pytest.approx(psnr[5])),
        ("worst", pytest.approx(min(psnr))),
        ("best", pytest.approx(max(psnr))),
    ]
    assert report.facts["psnr"] == metrics["psnr"]
    assert report.lineage["inputs"]["tokenizer"]["name"] == "tokenizer"
    html = report.file("report.html").read_text(encoding="utf-8")
    assert f"{metrics['psnr']:.2f}" in html
    assert html.count("It is at https://download.pytorch.org/models/alexnet-owt-7be5be79.pth</dd>") == 1
    assert "Codes in use" in html
    assert open_artifact(path).digest[:12] in html
    printed = capsys.readouterr().err
    assert "Protocol adm: ADM's crop and rFID." in printed
    assert all(word in printed for word in ("PSNR", "SSIM", "bits per pixel"))
    assert not any(word in printed for word in ("luma", "doubled"))


def test_perceptual_distance_of_own_weights_has_its_own_name(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "own.pth")
    out = run(
        tiny_tokenizer("tokenizer"), picture_folder, tmp_path / "r", perceptual=[f"squeeze={tmp_path / 'own.pth'}"]
    )
    metrics = metrics_of(out)
    assert metrics["perceptual_squeeze"] > 0
    assert list(open_artifact(out).config["weights"]) == ["perceptual_squeeze: own.pth"]
    assert "lpips" not in metrics["protocols"]["adm"]
    assert "perceptual (SqueezeNet)" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="NET is alex, vgg, squeeze"):
        run(tmp_path, picture_folder, tmp_path / "other", perceptual=["resnet=own.pth"])


def test_batch_size_does_not_change_metrics_and_a_second_run_is_skipped(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_tokenizer("tokenizer")
    single = run(path, picture_folder, tmp_path / "single")
    parts = run(path, picture_folder, tmp_path / "parts", batch_size=3)
    assert (single / "metrics.json").read_bytes() == (parts / "metrics.json").read_bytes()
    capsys.readouterr()
    run(path, picture_folder, single, batch_size=4)
    said = capsys.readouterr()
    assert said.out.strip() == str(single)
    assert "already published" in said.err
    with pytest.raises(ArtifactError, match="limit was not set, now 4"):
        run(path, picture_folder, single, limit=4)


def test_unreadable_image_is_an_error_unless_max_skipped_allows_it(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    (picture_folder / "drawn-3.png").write_bytes(b"no picture")
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(DataError, match="1 of 10 images cannot be used"):
        run(path, picture_folder, tmp_path / "strict")
    out = run(path, picture_folder, tmp_path / "lenient", overrides=["eval.max_skipped=0.1"])
    metrics = metrics_of(out)
    assert metrics["num_images"] == 9
    assert sum(metrics["skipped"].values()) == 1
    for file in picture_folder.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 10 images of .* can be read\. Check them"):
        run(path, picture_folder, tmp_path / "none", overrides=["eval.max_skipped=1"])


@pytest.mark.parametrize("quantizer", [MULTI_GROUP, RESIDUAL], ids=["multi_group", "residual"])
def test_k_curve_equals_decoding_the_first_k_groups(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, quantizer: dict[str, Any]
) -> None:
    path = tiny_tokenizer("tokenizer", quantizer=quantizer)
    out = run(path, picture_folder, tmp_path / "report", batch_size=4)
    metrics = metrics_of(out)
    curve = metrics["prefixes"]
    assert [row["groups"] for row in curve] == [1, 2, 3]
    assert curve[-1] == {"groups": 3, **{key: metrics[key] for key in curve[-1] if key != "groups"}}
    tokenizer, originals = Tokenizer.from_pretrained(path), crops_of(picture_folder)
    ids = tokenizer.encode(originals)
    for row in curve:
        decoded = tokenizer.decode(ids, (32, 32), groups=row["groups"])
        assert row["psnr"] == pytest.approx(np.mean(psnr_of(originals, decoded)), abs=1e-6)
        assert row["bits_per_pixel"] == row["groups"] * 6 / 4
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "PSNR (dB) from the first k groups" in html
    assert f"<td>{curve[0]['psnr']:.2f} dB</td>" in html
    for k in (1, 2, 3):  # the pictures of the section: the first of the set among them, decoded in the same batch
        assert data_uri(to_png(tokenizer.decode(ids[:4], (32, 32), groups=k)[0])) in html
    assert html.count('data-label="first 2 groups"') == NUM_WITH_PREFIXES
    assert not open_artifact(out, "report").names("pictures/*group*")

    plain = run(path, picture_folder, tmp_path / "plain", overrides=["eval.prefixes=false"])
    without = metrics_of(plain)
    assert "first 2 groups" not in (plain / "report.html").read_text(encoding="utf-8")
    other = ("prefixes", "commands")
    assert {**without, "commands": 0} == {**{k: v for k, v in metrics.items() if k not in other}, "commands": 0}


@pytest.mark.slow
def test_two_ranks_equal_one_rank_with_a_sparsely_counted_codebook(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    group = {"kind": "lfq", "code_dim": 36}
    path = tiny_tokenizer("tokenizer", quantizer={"kind": "multi_group", "num_groups": 2, "group": group})
    one = run(path, picture_folder, tmp_path / "one", batch_size=3)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stages", "eval"]
    words = ["--images", str(picture_folder), "--tokenizer", str(path), "--out", str(tmp_path / "two")]
    command = [sys.executable, *torchrun, *words, "--batch-size", "3", "--device", "cpu"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=True)
    assert metrics_of(one) | {"commands": 0} == metrics_of(tmp_path / "two") | {"commands": 0}
    assert (one / "counts.npy").read_bytes() == (tmp_path / "two" / "counts.npy").read_bytes()
    evaluated = open_evaluation(open_artifact(one))
    ids = Tokenizer.from_pretrained(path).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert evaluated.counts.shape == (2, 2**36)
    assert int(evaluated.counts[0].sum()) == 10 * ids.shape[1] // 2
    assert "of 2 x 68,719,476,736 codes" in (one / "report.html").read_text(encoding="utf-8")


def test_continuous_autoencoder_has_no_code_metrics(tiny_vae: Path, picture_folder: Path, tmp_path: Path) -> None:
    out = run(tiny_vae, picture_folder, tmp_path / "report", image_size=32)
    metrics = metrics_of(out)
    autoencoder, originals = ContinuousAutoencoder.from_pretrained(tiny_vae), crops_of(picture_folder)
    decoded = autoencoder.decode(autoencoder.encode(originals), (32, 32))
    assert metrics["psnr"] == pytest.approx(np.mean(psnr_of(originals, decoded)), abs=0.01)
    assert metrics["tokenizer"]["latent_shape"] == [4, 16, 16]
    assert metrics["not_computed"]["utilization"] == "continuous latents: no ids"
    assert "utilization" not in metrics
    assert np.load(out / "counts.npy").shape == (0, 0)
    assert not (out / "dead-codes.npy").exists()
    report = open_artifact(out, "report")
    assert report.lineage["inputs"]["tokenizer"]["name"] == "tiny-vae"
    html = report.file("report.html").read_text(encoding="utf-8")
    assert "Continuous latents of 4 x 16 x 16, downsample factor 2" in html
    assert html.count("codes in use") == html.count("<dt>codes in use</dt>") == 1  # why it is not computed


def test_unknown_protocol_or_indivisible_size_is_an_error_before_any_work(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(ConfigError, match=r"eval\.protocol"):
        run(path, picture_folder, tmp_path / "report", protocol=["adm", "other"])
    with pytest.raises(DataError, match="multiples of 2"):
        run(path, picture_folder, tmp_path / "report", image_size=33)
    assert not (tmp_path / "report.partial").exists()


def test_several_protocols_in_one_pass_equal_separate_evaluations(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_tokenizer("tokenizer")
    read = list[int]()
    monkeypatch.setattr(
        ImageSet, "read", lambda self, i, original=ImageSet.read: (read.append(i), original(self, i))[1]
    )
    names = ["cleanfid-rawval", "adm", "cleanfid-matched"]
    together = metrics_of(run(path, picture_folder, tmp_path / "all", protocol=names, num_workers=0))
    assert sorted(read) == list(range(10))
    assert list(together["protocols"]) == names
    alone = metrics_of(run(path, picture_folder, tmp_path / "alone", protocol=["cleanfid-matched"]))
    assert alone["protocol"] == "cleanfid-matched"
    assert together["protocols"]["cleanfid-matched"] == alone["protocols"]["cleanfid-matched"]
    assert together["reference"] == together["protocols"]["cleanfid-rawval"]["reference_digest"] != alone["reference"]
    digests = {numbers["reference_digest"] for numbers in together["protocols"].values()}
    assert len(digests) == 2  # 40 x 48 pixels: ADM and MGVQ resize alike, VQGAN-LC does not

    tokenizer, samples = Tokenizer.from_pretrained(path), open_images([picture_folder])
    originals = torch.stack([Framing(rule="cover", size=(32, 32))(decode(sample.image)) for sample in samples])
    decoded = tokenizer.decode_float(tokenizer.encode(originals), (32, 32)).double()
    error = (((decoded + 1) * 127.5).clamp(0, 255) - originals).square().mean()
    assert together["protocols"]["cleanfid-matched"]["psnr"] == pytest.approx(
        float(10 * torch.log10(255**2 / error)), abs=1e-4
    )


def test_native_sizes_are_padded_or_tiled_and_bits_count_all_pixels(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    Image.open(picture_folder / "drawn-9.png").crop((0, 0, 31, 27)).save(picture_folder / "drawn-9.png")
    metrics = metrics_of(run(path, picture_folder, tmp_path / "report", image_size="native"))
    tokens, pixels = 9 * 20 * 24 + 14 * 16, 9 * 40 * 48 + 27 * 31
    assert metrics["bits_per_pixel"] == pytest.approx(6 * tokens / pixels)
    assert metrics["padded"]["num_images"] == 1
    assert "all bits over all pixels" in metrics["mixed_sizes"]
    assert metrics["image_size"] == "native"
    tokenizer = Tokenizer.from_pretrained(path)
    samples = [pixels_of(decode(sample.image)) for sample in open_images([picture_folder])]
    decoded = [reconstruct_any_size(tokenizer, image).image for image in samples]
    assert metrics["psnr"] == pytest.approx(np.mean(psnr_of(samples, decoded)), abs=1e-6)

    tiled = metrics_of(run(path, picture_folder, tmp_path / "tiled", image_size="native", tile=32))
    decoded = [reconstruct_any_size(tokenizer, image, tile=32, overlap=4, rounded=False).image for image in samples]
    decoded = [to_uint8(image) for image in decoded]  # once, behind the blending
    assert tiled["psnr"] == pytest.approx(np.mean(psnr_of(samples, decoded)), abs=1e-6)
    assert tiled["tiles"]["num_images"] == 9
    text = (tmp_path / "tiled" / "report.html").read_text()
    assert "In tiles of 32 px: 9 images (overlapping tiles" in text
    assert "Padded: 1 image (mirrored to multiples of 2 pixels" in text
    assert tiled["bits_per_pixel"] > metrics["bits_per_pixel"]


def test_an_icon_costs_only_its_own_ssim(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_tokenizer("tokenizer")
    whole = metrics_of(run(path, picture_folder, tmp_path / "whole", image_size="native"))
    for name, size in (("icon", (8, 8)), ("dot", (3, 1))):
        Image.open(picture_folder / "drawn-9.png").crop((0, 0, *size)).save(picture_folder / f"{name}.png")
    capfd.readouterr()
    report = run(path, picture_folder, tmp_path / "report", image_size="native", protocol=["adm", "cleanfid-matched"])
    metrics = metrics_of(report)
    assert (whole["num_images"], metrics["num_images"]) == (10, 12)
    assert metrics["ssim"] == whole["ssim"]
    assert "ssim" not in metrics["not_computed"]
    assert metrics["psnr"] != whole["psnr"]
    assert metrics["not_measured"]["ssim"] == {
        "count": 2,
        "images": [
            {"key": "dot", "reason": "3 x 1 pixels, and ssim needs sides of at least 11"},
            {"key": "icon", "reason": "8 x 8 pixels, and ssim needs sides of at least 11"},
        ],
    }
    assert [image["key"] for image in metrics["not_measured"]["ssim_uniform7"]["images"]] == ["dot"]
    assert "not_measured" not in whole
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "Images that are not measured" in page
    assert "icon (8 x 8 pixels, and ssim needs sides of at least 11)" in page
    assert "; over 10 of 12 images" in page
    assert "ssim is not measured on 2 of 12 images: dot (3 x 1 pixels" in capfd.readouterr().err


def test_images_that_are_all_too_small_have_no_ssim(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    metrics = metrics_of(run(tiny_tokenizer("tokenizer"), picture_folder, tmp_path / "report", image_size=8))
    assert "ssim" not in metrics
    assert metrics["not_computed"]["ssim"] == "every image is smaller than this metric is defined for"
    assert "ssim_uniform7" in metrics


def test_rectangular_crop_uses_the_cover_rule_in_every_protocol(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    metrics = metrics_of(run(path, picture_folder, tmp_path / "report", image_size="40x24"))
    assert metrics["image_size"] == "40x24"
    assert metrics["protocols"]["adm"]["crop"].startswith("cover")
    assert metrics["num_tokens_per_image"] == 12 * 20
    assert metrics["tokenizer"]["latent_shape"] == [4, 12, 20]


def test_help_lists_every_protocol_metric_and_weights_file() -> None:
    text = evaluate.__doc__ or ""
    files = [INCEPTION_FILE, *(LPIPS_BACKBONES[net][0] for net in LPIPS_NETS)]
    assert [word for word in (*PROTOCOLS, *files) if word not in text] == []
    metric = inspect.signature(evaluate).parameters["metrics"].annotation.__metadata__[0].metavar
    assert metric.split(",") == list(get_args(SetMetric))
    analysis = inspect.signature(evaluate).parameters["analyze"].annotation.__metadata__[0].metavar
    assert analysis.split("|") == list(ANALYSES)


def test_analysis_is_in_the_metrics_and_on_the_page(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    out = run(path, picture_folder, tmp_path / "report", analyze=["replacement"])
    metrics = metrics_of(out)
    rows = metrics["analyses"]["replacement"]["rows"]
    assert rows[0]["psnr"] == pytest.approx(metrics["psnr"], abs=1e-9)
    assert f"<td>{rows[1]['psnr']:.3f}</td>" in (out / "report.html").read_text(encoding="utf-8")


def sorted_into_classes(pictures: Path, count: int) -> Path:
    """Move the pictures into subfolders class-0, class-1, ..., one after another."""
    for number, file in enumerate(sorted(pictures.iterdir())):
        folder = pictures / f"class-{number % count}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    return pictures


def test_random_classes_measures_their_images_only(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path, pictures = tiny_tokenizer("tokenizer"), sorted_into_classes(picture_folder, 4)
    options: dict[str, Any] = {"random_classes": 2, "seed": 3, "analyze": ["replacement"]}
    out = run(path, pictures, tmp_path / "report", **options, num_workers=2)
    metrics = metrics_of(out)
    drawn = metrics["random_classes"]
    assert (len(drawn["classes"]), drawn["num_classes"], drawn["seed"]) == (2, 4, 3)
    assert "Only images of 2 of 4 classes were used, drawn at random (seed 3)." in (out / "report.html").read_text()
    config = open_artifact(out, "report").manifest.config
    assert (config["random_classes"], config["seed"]) == (2, 3)

    for folder in list(pictures.iterdir()):
        if folder.name not in drawn["classes"]:
            shutil.rmtree(folder)
    alone = metrics_of(run(path, pictures, tmp_path / "alone", analyze=["replacement"]))
    other = ("commands", "random_classes")
    assert {k: v for k, v in metrics.items() if k not in other} == {k: v for k, v in alone.items() if k not in other}
    assert metrics["analyses"]["replacement"]["num_images"] == metrics["num_images"] < 10


def test_random_classes_are_drawn_from_those_that_have_images(picture_folder: Path) -> None:
    images = open_images([sorted_into_classes(picture_folder, 5)])
    chosen, drawn = draw_classes(SelectedImages(images, np.flatnonzero(images.labels >= 3)), 2, seed=0)
    assert drawn == {"classes": ["class-3", "class-4"], "num_classes": 2, "seed": 0}
    assert chosen.labels.tolist() == [3, 3, 4, 4]


def test_limit_applies_after_random_classes_and_the_seed_draws_them(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path, pictures = tiny_tokenizer("tokenizer"), sorted_into_classes(picture_folder, 5)
    reports = [run(path, pictures, tmp_path / str(seed), random_classes=2, seed=seed, limit=3) for seed in range(4)]
    metrics = [metrics_of(report) for report in reports]
    for each in metrics:
        assert each["num_images"] == 3
        assert {picture["name"].split("/")[0] for picture in each["pictures"]} == set(each["random_classes"]["classes"])
    assert len({tuple(each["random_classes"]["classes"]) for each in metrics}) > 1
    with pytest.raises(ArtifactError, match="random_classes was 2, now 3"):
        run(path, pictures, reports[0], random_classes=3, seed=0, limit=3)


def test_random_classes_need_labels_and_enough_classes(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(DataError, match=r"--random-classes 2: the images of pictures have no classes\. Give a folder"):
        run(path, picture_folder, tmp_path / "report", random_classes=2)
    with pytest.raises(DataError, match="--random-classes 6: pictures has 5 classes"):
        run(path, sorted_into_classes(picture_folder, 5), tmp_path / "report", random_classes=6)
    assert not (tmp_path / "report.partial").exists()


def test_embedding_codes_are_on_the_page_and_need_the_analysis(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "tsne", lambda vectors, seed: vectors[:, :2].numpy())
    path = tiny_tokenizer("tokenizer")
    out = run(path, picture_folder, tmp_path / "report", analyze=["embedding"], embedding_codes=20)
    assert metrics_of(out)["analyses"]["embedding"]["maps"][0]["codes"] == 20
    assert "20 of 64 are shown, sampled uniformly (seed 0)" in (out / "report.html").read_text(encoding="utf-8")
    assert open_artifact(out, "report").manifest.config["embedding_codes"] == 20
    with pytest.raises(ConfigError, match=r"--embedding-codes without --analyze embedding"):
        run(path, picture_folder, tmp_path / "other", embedding_codes=20)


@pytest.mark.parametrize("wrong", [{"protocol": ["vqgan"]}, {"weights": Path("nowhere")}, {"analyze": ["codes"]}])
def test_a_wrong_option_is_refused_before_the_images_are_hashed(
    wrong: dict[str, Any],
    tiny_tokenizer: MakeTokenizer,
    picture_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stages.console.open_images", lambda *args, **options: pytest.fail("hashed"))
    with pytest.raises(VqpipeError, match=r"nowhere|vqgan|codes"):
        run(tiny_tokenizer("tokenizer"), picture_folder, tmp_path / "report", **wrong)


def test_a_network_of_perceptual_is_named_once() -> None:
    assert perceptual_files(["alex=a", "vgg=b"]) == {"alex": Path("a"), "vgg": Path("b")}
    with pytest.raises(ConfigError, match="--perceptual names alex twice"):
        perceptual_files(["alex=a", "alex=b"])


def test_extractor_without_weights_or_network_is_an_error(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path
) -> None:
    path = tiny_tokenizer("tokenizer")
    for name in ("patch-pca", "dino"):
        with pytest.raises(ConfigError, match=f"--extractor {name} is no pretrained network. Use open_clip:"):
            run(path, picture_folder, tmp_path / "report", extractor=name)
    with pytest.raises(ConfigError, match="without --extractor"):
        run(path, picture_folder, tmp_path / "report", extractor_weights=tmp_path / "file")
    with pytest.raises(WeightsError, match="does not exist"):
        run(path, picture_folder, tmp_path / "report", extractor="timm:resnet18", extractor_weights=tmp_path / "file")


def test_a_kind_of_encoder_that_a_script_adds_is_an_extractor(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Means(PatchEncoder):
        dim, grid_size, transform = 3, 4, staticmethod(partial(center_crop, size=32))

        def forward(self, images: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(images.float(), 4)

    kind = EncoderKind("mine:NAME", lambda config, name, weights: Means(), lambda name: ("", ()))
    monkeypatch.setitem(ENCODERS, "mine", kind)
    (tmp_path / "weights").write_bytes(b"weights")
    options: dict[str, Any] = {
        "extractor": "mine:means",
        "extractor_weights": tmp_path / "weights",
        "fid_min_images": 2,
    }
    metrics = metrics_of(run(tiny_tokenizer("tokenizer"), picture_folder, tmp_path / "report", **options))
    assert metrics["frechet"].keys() == {"mine:means"}
    assert metrics["frechet"]["mine:means"] > 0


def test_weights_of_the_extractor_are_downloaded_only_with_the_option(
    tiny_tokenizer: MakeTokenizer, picture_folder: Path, tmp_path: Path, hub: Any
) -> None:
    path = tiny_tokenizer("tokenizer")
    with pytest.raises(WeightsError, match=r"Add --download to fetch model.safetensors .* --extractor-weights FILE"):
        run(path, picture_folder, tmp_path / "report", extractor="timm:test_vit")
    assert hub.requests == []
    with pytest.raises(WeightsError, match=r"no model\.safetensors here"):
        run(path, picture_folder, tmp_path / "report", extractor="timm:test_vit", download=True)
    assert "timm/test_vit.r160_in1k/model.safetensors" in hub.requests
