"""States through a file: a resumed metric has the result of one that was never interrupted."""

import json
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from vqpipe.analysis import ANALYSES, Analysis, build
from vqpipe.evaluation.measurement import EvaluationMetrics
from vqpipe.evaluation.pictures import SelectedPictures
from vqpipe.metrics import EvalConfig, set_metrics, usage
from vqpipe.metrics.distortion import Distortion
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.metrics.frechet import Moments
from vqpipe.metrics.resumable import Resumable, Rows, pack, unpack
from vqpipe.metrics.set_metrics import FeatureBank
from vqpipe.metrics.usage import CodeUsage
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.quantizers import MultiGroupConfig, VqConfig
from vqpipe.reports import page
from vqpipe.tokenizer import Tokenizer

CPU = torch.device("cpu")
NUM_BATCHES, PER_BATCH, SIDE = 6, 2, 16


def through_a_file(one: Resumable, other: Resumable) -> None:
    """Restore the state of `one` in `other`."""
    text, tensors, _ = pack(one.state())
    other.load_state(unpack(text, load(save(tensors))))


def images_of(number: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    shape = (2, PER_BATCH, 3, SIDE, SIDE)
    originals, reconstructions = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    if number == 3:
        reconstructions[0] = originals[0]
    return originals, reconstructions


def ids_of(number: int, codebook_size: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(-1, codebook_size, (PER_BATCH, 8), generator=random)
    return ids.where(torch.rand(ids.shape, generator=random) < 0.5, ids % 7)


class Pooled(nn.Module):
    """Stands in for Inception: 48 pooled pixels in each output."""

    def forward(self, images: Tensor, outputs: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        return dict.fromkeys(outputs, nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1))


class Mean(nn.Module):
    """An extractor of the user's."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 7


Case = tuple[Callable[[], Any], Callable[[Any, int], object], Callable[[Any], object]]


def usage_case(codebook_size: int, placed: bool = True) -> Case:
    def take(counted: CodeUsage, number: int) -> None:
        counted.update(ids_of(number, codebook_size), start=PER_BATCH * number if placed else None)

    return (
        lambda: CodeUsage(codebook_size, 2),
        take,
        lambda counted: (counted.merged().counts.to_dense().tolist(), counted.compute(1000)[1:]),
    )


def features_case(max_bytes: float) -> Case:
    return (
        lambda: FeatureBank(max_bytes),
        lambda bank, number: bank.update(images_of(number)[0].flatten(1)[:, :5].float()),
        lambda bank: (None if bank.compute() is None else bank.compute().tolist(), bank.num_bytes),
    )


def take_pictures(chosen: SelectedPictures, number: int) -> None:
    places = [PER_BATCH * number + i for i in range(PER_BATCH)]
    psnr = [float("inf") if place == 5 else float(place * 7 % 5) for place in places]
    chosen.update([f"image {place}" for place in places], places, *images_of(number), psnr)


def take_features(statistics: Moments, number: int) -> None:
    statistics.update(images_of(number)[0].flatten(1)[:, :9].float() / 3)


CASES: dict[str, Case] = {
    "distortion": (
        Distortion,
        lambda distortion, number: distortion.update(*images_of(number)),
        lambda distortion: (distortion.compute(), distortion.merged().num_identical),
    ),
    "moments": (
        lambda: Moments(9),
        take_features,
        lambda statistics: [part.tolist() for part in statistics.mean_and_covariance()],
    ),
    "features": features_case(1e6),
    "features that become too many": features_case(150),
    "usage": usage_case(30),
    "usage of unknown places": usage_case(30, placed=False),
    "pictures": (lambda: SelectedPictures(12, 5, 2), take_pictures, SelectedPictures.selected),
}


def finish(case: Case, *cuts: int) -> tuple[Any, Any]:
    """The result, and the last state, of a pass that is interrupted and resumed at each cut."""
    make, take, result = case
    one = make()
    for number in range(NUM_BATCHES):
        if number in cuts:
            other = make()
            through_a_file(one, other)
            take(one, number)  # the resumed metric does not share memory with the interrupted one
            one = other
        take(one, number)
    text, tensors, _ = pack(one.state())
    return result(one), (text, {name: tensor.tolist() for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cuts", [(0,), (3,), (1, 2, 5)])
def test_resumed_metric_has_the_same_result_and_state(name: str, cuts: tuple[int, ...]) -> None:
    whole, resumed = finish(CASES[name]), finish(CASES[name], *cuts)
    assert whole[1][0] == resumed[1][0]
    assert whole == resumed


def test_resumed_sparse_counts_have_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_COUNTERS", 10)
    monkeypatch.setattr(usage, "MIN_SORTED", 20)
    assert finish(usage_case(30)) == finish(usage_case(30), 0, 2, 3)


@pytest.mark.parametrize("metrics", [(), ("kid", "prc", "sfid", "is")])
def test_resumed_tokenizer_metrics_are_the_same(metrics: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_metrics, "SIZES", {"pool": 48, "spatial": 48, "logits": 48})
    protocols = ("cleanfid-rawval", "adm")
    config = EvalConfig(image_size=SIDE, protocol=protocols, metrics=metrics, fid_min_images=4)
    networks = FeatureNetworks({}, Pooled(), {}, {}, {"mean": Mean()})

    def take(metrics: EvaluationMetrics, number: int) -> None:
        originals, images = images_of(number)
        raw = nn.functional.interpolate(originals.float(), 299)
        positions = range(PER_BATCH * number, PER_BATCH * (number + 1))
        metrics.update(originals, images, ids_of(number, 32), {1: images // 2}, raw=raw, positions=positions)

    case = (lambda: EvaluationMetrics(config, networks, 32, 2, CPU), take, lambda metrics: metrics.compute()[0])
    whole, resumed = finish(case), finish(case, 1, 4)
    assert whole[0]["rfid"].keys() == set(protocols)
    assert whole[0]["prefixes"][0]["rfid"]
    assert whole == resumed


@pytest.mark.parametrize("name", ANALYSES)
def test_resumed_analysis_has_the_same_result_and_page(name: str) -> None:
    torch.manual_seed(0)
    groups = MultiGroupConfig(num_groups=2, group=VqConfig(codebook_size=60, code_dim=3))
    model = build_autoencoder(
        VqganConfig(quantizer=groups, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=16)
    )
    model.quantizer.standardize_codebook()
    tokenizer = Tokenizer(model)

    def make() -> Analysis:
        return build([name], tokenizer)[0]

    def take(analysis: Analysis, number: int) -> None:
        originals, _ = images_of(number)
        ids = tokenizer.encode(originals)
        analysis.update(originals, tokenizer.decode(ids, (SIDE, SIDE)), ids, [f"image {number}.{i}" for i in range(2)])

    def result(analysis: Analysis) -> tuple[str, str]:
        found = analysis.result()
        return json.dumps(found), page.render(page.ReportPage("analysis", "", analysis.sections(found)))

    whole, resumed = finish((make, take, result)), finish((make, take, result), 2, 3)
    assert "not_computed" not in whole[0][0]
    assert whole == resumed


def test_large_numbers_infinity_and_bytes_survive_packing() -> None:
    state = {"digest": 2**256 - 1, "scores": [float("inf"), 0.1], "none": None, "png": b"\x00\xff", "empty": b""}
    text, tensors, _ = pack(state | {"zero": torch.zeros((), dtype=torch.int64), "no": torch.zeros(0, 3)})
    back = unpack(text, load(save(tensors)))
    assert back.pop("zero").shape == ()
    assert back.pop("no").shape == (0, 3)
    assert back == state


def test_packing_names_kept_features_and_files_as_unchanging() -> None:
    _, tensors, unchanging = pack({"sum": torch.zeros(3), "rows": Rows([torch.ones(2, 2)]), "png": b"bytes"})
    assert [tensors[name].numel() for name in unchanging] == [4, 5]
