"""`vqpipe eval-generation` as a function, with a small network in place of Inception."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stages.compare import compare
from stages.eval_generation import eval_generation
from stages.generate import generate
from vqpipe.artifacts import Draft, open_artifact, start
from vqpipe.data.images import ImageSet
from vqpipe.data.tokens import write_token_file
from vqpipe.data.transforms import Framing, center_crop, pixels
from vqpipe.errors import ArtifactError, ConfigError, DataError, WeightsError
from vqpipe.evaluation import generation
from vqpipe.evaluation.generation import (
    GenerationConfig,
    code_usage,
    gaussian_moments,
    read_adm_file,
    samples_artifact,
)
from vqpipe.evaluation.report import evaluate_samples
from vqpipe.metrics import set_metrics
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.metrics.frechet import Moments, frechet_distance
from vqpipe.metrics.inception import clean_resize
from vqpipe.metrics.set_metrics import SetStatistics

SIZES = {"pool": 16, "logits": 20, "spatial": 12}
"""Of the stand-in's outputs: Inception's own take a minute to compare."""


class Mean(nn.Module):
    """float[B, 6]: mean and deviation of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.float().flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], dim=1)


class Stand(nn.Module):
    """In place of Inception: its outputs, each a fixed linear map of 8 x 8 means."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.maps = {name: torch.randn(3 * 64, size, generator=draws) / 50 for name, size in SIZES.items()}

    def forward(self, images: Tensor, outputs: Any = ("pool",)) -> dict[str, Tensor]:
        small = nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
        return {name: small @ self.maps[name] for name in outputs}


class Counted(Stand):
    """Counts its images; after `stop` of them it is interrupted."""

    def __init__(self, stop: int = 1000) -> None:
        super().__init__()
        self.num_images, self.stop = 0, stop

    def forward(self, images: Tensor, outputs: Any = ("pool",)) -> dict[str, Tensor]:
        if self.num_images >= self.stop:
            raise KeyboardInterrupt
        self.num_images += len(images)
        return super().forward(images, outputs)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of 40 and 50 noisy pictures: "samples", 8 px, and "photos", 12 x 16 px."""
    draws = np.random.default_rng(0)
    for name, count, shape in (("samples", 40, (8, 8, 3)), ("photos", 50, (12, 16, 3))):
        (tmp_path / name).mkdir()
        for number in range(count):
            noise = draws.integers(0, 200 if name == "samples" else 256, shape, np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{number:02d}.png")
    return tmp_path


def measure(folder: Path, out: str, samples: str = "samples", **options: Any) -> dict[str, Any]:
    reference = options.pop("reference", [str(folder / "photos")])
    settings: dict[str, Any] = {"image_size": 8, "num_workers": 0, "device": "cpu", **options}
    eval_generation([str(folder / samples)], reference, folder / out, **settings)
    return json.loads((folder / out / "metrics.json").read_text())


def with_network(monkeypatch: pytest.MonkeyPatch, inception: nn.Module | None, extractor: bool = False) -> None:
    named = {"mean": Mean()} if extractor else {}
    digests = dict.fromkeys(named, "1" * 64)
    absent = {"rfid": "rFID needs its weights."}
    found = FeatureNetworks({}, inception, {"stand-in": "0" * 64}, absent, named, digests)
    monkeypatch.setattr(set_metrics, "SIZES", SIZES)
    monkeypatch.setattr("vqpipe.metrics.feature_networks.find_networks", lambda folder, device: found)


def test_weights_of_the_extractor_are_downloaded_only_with_the_option(pictures: Path, hub: Any) -> None:
    with pytest.raises(WeightsError, match="Add --download"):
        measure(pictures, "report", extractor="timm:test_vit")
    assert hub.requests == []
    with pytest.raises(WeightsError, match=r"no model\.safetensors here"):
        measure(pictures, "report", extractor="timm:test_vit", download=True)
    assert "timm/test_vit.r160_in1k/model.safetensors" in hub.requests


def test_without_weights_every_number_is_missing_with_a_reason(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = measure(pictures, "report")
    assert "convention" not in capsys.readouterr().err  # no table without a row
    assert set(metrics["not_computed"]) == {"fid", "sfid", "inception_score", "kid", "prc", "utilization"}
    assert "generate --keep-ids" in metrics["not_computed"]["utilization"]
    assert metrics["not_computed"]["fid"].startswith("needs torch-fidelity's Inception")
    assert not {"fid", "prc"} & set(metrics)
    assert not (pictures / "report.reference").exists()  # there is nothing to compute
    page = (pictures / "report" / "report.html").read_text()
    assert "Download weights-inception" in page
    assert open_artifact(pictures / "report").names("contact-sheet.png")


def test_reports_of_samples_are_compared_in_one_table(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(monkeypatch, None, extractor=True)
    few, many = (measure(pictures, name, limit=limit) for name, limit in (("few", 20), ("many", None)))
    compare([pictures / "few", pictures / "many"], pictures / "both", device="cpu")
    told = capsys.readouterr().err
    assert f"{few['frechet']['mean']:.2f}" in told
    assert f"{many['frechet']['mean']:.2f}" in told
    compared = json.loads((pictures / "both" / "metrics.json").read_text())["compared"]
    assert [each["num_images"] for each in compared.values()] == [20, 40]
    compare([pictures / "few", pictures / "few"], pictures / "twice", device="cpu")
    twice = json.loads((pictures / "twice" / "metrics.json").read_text())["compared"]
    assert list(twice) == ["1: samples", "2: samples"]  # none takes the other's place
    page = (pictures / "both" / "report.html").read_text()
    assert "20 samples" in page
    assert "40 samples" in page
    measure(pictures, "larger", image_size=10)
    with pytest.raises(ArtifactError, match="their image_size differs"):
        compare([pictures / "few", pictures / "larger"], pictures / "unlike", device="cpu")
    assert not list(pictures.glob("unlike*"))


def test_distance_is_that_of_the_formula_and_references_are_measured_once(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(monkeypatch, None, extractor=True)
    metrics = measure(pictures, "report", batch_size=7)
    sides = []
    for name in ("samples", "photos"):
        statistics = Moments(6)
        for file in sorted((pictures / name).iterdir()):
            statistics.update(Mean()(center_crop(Image.open(file), 8)[None]))
        sides.append(statistics)
    assert metrics["frechet"] == {"mean": pytest.approx(frechet_distance(*sides), rel=1e-6)}
    assert (metrics["num_images"], metrics["num_references"]) == (40, 50)
    capsys.readouterr()
    for options in (
        {"statistics": pictures / "report.reference"},
        {"reference": [str(pictures / "report.reference")]},
    ):
        repeated = measure(pictures, f"repeated-{next(iter(options))}", **options)
        assert repeated["frechet"] == metrics["frechet"]
    assert "references:" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="image_size was 8, now 16"):
        measure(pictures, "other", reference=[str(pictures / "report.reference")], image_size=16)


@pytest.mark.parametrize("protocol", ["adm", "cleanfid-raw"])
def test_with_inception_every_number_is_present(pictures: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    with_network(monkeypatch, Stand())
    metrics = measure(pictures, "report", protocol=protocol, fid_min_images=2)
    assert set(metrics["not_computed"]) == {"kid", "utilization"}  # it draws a thousand
    assert min(metrics["fid"], metrics["sfid"]) > 0
    assert metrics["inception_score"]["splits"] == 10
    assert {"precision", "recall", "k"} <= set(metrics["prc"])
    few = measure(pictures, "few", protocol=protocol, statistics=pictures / "report.reference")
    assert "40 samples are fewer than the 2,049" in few["not_computed"]["fid"]
    assert "fid" not in few
    assert few["not_computed"]["fid"].endswith("name a smaller --fid-min-images.")
    options = {"reference": [str(pictures / "report.reference")], "protocol": protocol, "fid_min_images": 2}
    assert measure(pictures, "one", limit=1, **options)["not_computed"]["fid"].endswith("needs. Use more images.")
    own = measure(pictures, "same", samples="photos", **options)
    if protocol == "adm":  # both sides cropped alike, but for the resize: much nearer than noise of another range
        assert own["fid"] < 0.2 * metrics["fid"]


@pytest.mark.parametrize("protocol", ["adm", "cleanfid-raw"])
def test_the_network_sees_what_the_protocol_compares_and_features_of_references_are_kept_evenly(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(generation, "NUM_KEPT", 4)
    seen: list[Tensor] = []
    network = Stand()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with_network(monkeypatch, network)
    measure(pictures, "report", protocol=protocol, image_size=4, batch_size=50)
    photos, samples = (list(map(Image.open, sorted((pictures / name).iterdir()))) for name in ("photos", "samples"))
    crops = [Framing(rule="cover", size=(4, 4))(sample) for sample in samples]
    if protocol == "adm":  # which halves the photos first
        expected = [[center_crop(photo, 4) for photo in photos], crops]
    else:
        expected = [[clean_resize(pixels(photo)) for photo in photos], [clean_resize(crop) for crop in crops]]
    assert len(seen) == 2
    for images, side in zip(seen, expected, strict=True):
        assert torch.equal(images, torch.stack(side))
    file = open_artifact(pictures / "report.reference").file("statistics.safetensors")
    kept = SetStatistics.load(file, torch.device("cpu")).features["pool"]
    assert kept is not None
    torch.testing.assert_close(kept, Stand()(torch.stack([expected[0][i] for i in (0, 16, 33, 49)]))["pool"])


@pytest.mark.parametrize("stop", [20, 70])
def test_resume_after_interruption_measures_no_image_twice(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(set_metrics, "SIZES", SIZES)
    (pictures / "samples" / "03.png").write_bytes(b"no picture")
    sizes = {"image_size": 8, "batch_size": 5, "num_workers": 0, "fid_min_images": 2}
    config = GenerationConfig(protocol="adm", max_skipped=0.1, save_seconds=0, **sizes)

    def run(name: str, inception: nn.Module) -> dict[str, Any] | None:
        sets = [[str(pictures / folder)] for folder in ("samples", "photos")]
        networks = FeatureNetworks({}, inception, {}, {})
        return evaluate_samples(
            pictures / name, *sets, pictures / f"{name}.reference", config, networks, torch.device("cpu")
        )[1]

    cut, resumed = Counted(stop), Counted()
    with pytest.raises(KeyboardInterrupt):
        run("cut", cut)
    assert run("cut", resumed) == run("whole", Stand())
    assert cut.num_images + resumed.num_images == 50 + 39
    assert open_artifact(pictures / "cut").names("*.parquet") == ["skipped.parquet"]


def test_statistics_are_restored_from_a_file_and_from_adms_file(tmp_path: Path) -> None:
    draws = torch.randn(40, 5, dtype=torch.float64)
    statistics = Moments(5)
    statistics.update(draws)
    other = Moments(5)
    other.update(draws + 1)
    stored = SetStatistics(40, {"pool": statistics}, {"timm:a/b": other}, {"pool": draws.float()})
    stored.save(tmp_path / "s.safetensors")
    loaded = SetStatistics.load(tmp_path / "s.safetensors", torch.device("cpu"))
    assert frechet_distance(loaded.moments["pool"], statistics) < 1e-9
    assert torch.equal(loaded.extractors["timm:a/b"].outer, other.outer)
    assert (loaded.num_images, loaded.features.keys()) == (40, {"pool"})
    mean, covariance = (each.numpy() for each in statistics.mean_and_covariance())
    assert frechet_distance(gaussian_moments(mean, covariance, torch.device("cpu")), statistics) < 1e-9

    pairs = {"mu": 2048, "mu_s": 2023}
    arrays = {name: np.full(size, 0.5) for name, size in pairs.items()}
    arrays |= {name.replace("mu", "sigma"): np.eye(size) for name, size in pairs.items()}
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "adm.npz", arr_0=images, **arrays)
    found, sample = read_adm_file(tmp_path / "adm.npz", torch.device("cpu"))
    mean_again, covariance_again = found.moments["spatial"].mean_and_covariance()
    assert torch.equal(mean_again, torch.full((2023,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(covariance_again, torch.eye(2023, dtype=torch.float64))
    assert (sample[1].permute(1, 2, 0).numpy() == images[1]).all()


def test_spatial_statistics_of_adms_file_have_the_order_of_our_features(tmp_path: Path) -> None:
    maps = torch.arange(17 * 17 * 7, dtype=torch.float64).view(17, 17, 7)  # channels last, as TensorFlow flattens them
    ours = maps.permute(2, 0, 1).flatten()
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    arrays |= {"mu_s": maps.flatten().numpy(), "sigma_s": np.diag(maps.flatten())}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    found, _ = read_adm_file(tmp_path / "adm.npz", torch.device("cpu"))
    mean, covariance = found.moments["spatial"].mean_and_covariance()
    assert torch.equal(mean, ours)
    torch.testing.assert_close(covariance.diagonal(), ours)
    assert covariance.count_nonzero() == covariance.diagonal().count_nonzero()


@pytest.fixture(scope="module")
def adm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A file as ADM publishes it, with 5 images of 4 px, and its arrays."""
    arrays: dict[str, np.ndarray] = {"arr_0": np.zeros((5, 4, 4, 3), np.uint8)}
    arrays |= {"mu": np.zeros(2048), "mu_s": np.zeros(2023)}
    arrays |= {"sigma": np.eye(2048), "sigma_s": np.eye(2023)}
    path = tmp_path_factory.mktemp("adm") / "adm.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path, arrays


@pytest.mark.parametrize("damage", ["cut", "empty", "checksum", "npy", "text", "another"])
def test_a_damaged_file_of_adm_is_refused(adm: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, damage: str) -> None:
    content = adm[0].read_bytes()
    path = tmp_path / "bad.npz"
    if damage in ("npy", "another"):
        with path.open("wb") as file:
            np.save(file, np.zeros(3)) if damage == "npy" else np.savez(file, mu=np.zeros(3))
    else:
        path.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "empty": b"",
                "checksum": content[:250] + b"\xff" + content[251:],
                "text": b"no archive",
            }[damage]
        )
    with pytest.raises(DataError, match=r"--reference .*bad\.npz is no reference of the ADM suite.* give images as"):
        read_adm_file(path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arr_0": np.zeros((5, 64))}, r"arr_0 is float64\[5, 64\], not uint8\[n, H, W, 3\]"),
        ({"arr_0": np.zeros((5, 4, 4, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((5, 3, 4, 4), np.uint8)}, r"arr_0 is uint8\[5, 3, 4, 4\]"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"arr_0 is uint8\[0, 4, 4, 3\]"),
        ({"sigma": np.eye(2047)}, r"mu and sigma are \[2048\] and \[2047, 2047\], not \[2048\] and \[2048, 2048\]"),
        ({"mu_s": np.zeros(3)}, r"mu_s and sigma_s are \[3\]"),
        ({"mu": np.full(2048, np.nan)}, "mu and sigma hold NaN or infinity"),
    ],
)
def test_arrays_of_adms_file_that_do_not_fit_are_named(
    adm: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **(adm[1] | changes))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        read_adm_file(tmp_path / "bad.npz", torch.device("cpu"))


def test_samples_are_measured_at_the_size_of_adms_images_or_the_difference_is_told(
    adm: tuple[Path, dict[str, np.ndarray]], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = [str(adm[0])]
    assert measure(pictures, "report", reference=reference, image_size=None)["image_size"] == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "samples are measured at 4 pixels, the size of the images in" in told
    assert measure(pictures, "larger", reference=reference, image_size=8)["image_size"] == 8
    told = " ".join(capsys.readouterr().err.split())
    assert "adm.npz are 4x4, the samples are measured at 8x8" in told
    measure(pictures, "given", reference=reference, image_size=4)
    assert "measured at" not in capsys.readouterr().err


@pytest.mark.parametrize(("folder", "total"), [("photos", 50), ("samples", 40)])
def test_too_many_unreadable_images_stop_the_pass_and_a_larger_tolerance_continues_it(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, folder: str, total: int
) -> None:
    with_network(monkeypatch, None, extractor=True)
    (pictures / folder / "03.png").write_bytes(b"no picture")
    read: list[tuple[str, int]] = []
    original = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, i: (read.append((self.name, i)), original(self, i))[1])
    with pytest.raises(DataError, match=f"^at least 1 of {total} images cannot be used"):
        measure(pictures, "report", batch_size=5)
    assert [i for name, i in read if name == folder] == list(range(5))
    measure(pictures, "report", batch_size=5, max_skipped=0.1)
    assert sorted(read) == [(name, i) for name, count in (("photos", 50), ("samples", 40)) for i in range(count)]


def test_utilization_is_that_of_the_kept_ids_of_the_measured_samples(tmp_path: Path) -> None:
    ids = torch.tensor([[0, 5], [1, 5], [0, 6], [2, 7]])  # two groups of 8 codes, one position
    draft = start(tmp_path / "samples", "images", {}, {})
    assert isinstance(draft, Draft)
    with draft:
        for number, part in enumerate(ids.split(2)):
            with draft.write(f"ids-{number:06d}.parquet") as path:
                write_token_file(path, ["a", "b"], [-1, -1], part[:, None].numpy().astype(np.uint16))
        draft.publish({"codebook_size": 8, "num_groups": 2})
    usage, reasons = code_usage(samples_artifact([str(tmp_path / "samples")]), 3)
    assert usage["utilization_per_group"] == [2 / 8, 2 / 8]  # 0 and 1; 5 and 6
    assert usage["utilization"] == 2 / 8
    assert usage["perplexity_per_group"] == [pytest.approx(1.8899, abs=1e-4)] * 2  # exp of the entropy of 2/3 and 1/3
    assert (usage["num_ids"], usage["codebook_size"], usage["num_groups"]) == (6, 8, 2)
    assert reasons == {}
    assert list(code_usage(samples_artifact([str(tmp_path)]), 3)[1]) == ["utilization"]
    several = samples_artifact([str(tmp_path / "samples")] * 2)
    assert "of one vqpipe generate --keep-ids" in code_usage(several, 3)[1]["utilization"]


def test_samples_of_one_generator_at_several_scales_are_measured_and_compared(
    drawn: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_network(monkeypatch, Stand())
    options = {"statistics": pictures / "reference", "fid_min_images": 2}
    for scale in (1.0, 2.0):
        generate(drawn.generator, pictures / f"s-{scale}", num_images=4, device="cpu", cfg_scale=scale, keep_ids=True)
        capsys.readouterr()
        metrics = measure(pictures, f"report-{scale}", samples=f"s-{scale}", **options)
        told = " ".join(capsys.readouterr().err.split())
        assert (metrics["sampling"]["cfg_scale"], metrics["classes"]) == (scale, "0-2")
        assert metrics["generator"] == {"name": "generator", "content": open_artifact(drawn.generator).digest}
        assert f"FID {metrics['fid']:,.2f}" in told
        assert f"codes in use {100 * metrics['utilization']:.1f} % of 64 codes, over 64 ids" in told
        assert f"perplexity {metrics['perplexity_per_group'][0]:.1f}" in told
        assert re.search(r"not computed: [\w, ]*\bKID\b", told)
    compare([pictures / "report-1.0", pictures / "report-2.0"], pictures / "both", device="cpu")
    told = capsys.readouterr().err
    assert "guidance" in told
    assert "codes in use" in told
    assert "Scale of guidance" in (pictures / "both" / "report.html").read_text()


def test_statistics_of_other_references_are_refused_with_the_option_to_change(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_network(monkeypatch, None, extractor=True)
    measure(pictures, "report", statistics=pictures / "reference")
    match = r"reference exists and was made with other images: photos, not samples\. Choose another --statistics"
    with pytest.raises(ArtifactError, match=match):
        measure(pictures, "other", reference=[str(pictures / "samples")], statistics=pictures / "reference")
