"""The state of all that takes in images, through a file: whoever goes on from it ends as if never interrupted."""

import json
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from vqpipe.analysis import ANALYSES, Analysis, build
from vqpipe.metrics import EvalConfig, populations, usage
from vqpipe.metrics.distortion import Distortion
from vqpipe.metrics.evaluation import Evaluation, Sizes
from vqpipe.metrics.fid import FrechetStatistics
from vqpipe.metrics.networks import FeatureNetworks
from vqpipe.metrics.set_metrics import KeptFeatures
from vqpipe.metrics.state import Accumulator, pack, unpack
from vqpipe.metrics.usage import CodeUsage
from vqpipe.models import VqganConfig, build_autoencoder
from vqpipe.quantizers import MultiGroupConfig, VqConfig
from vqpipe.reports import page
from vqpipe.reports.chosen import ChosenPictures
from vqpipe.tokenizer import Tokenizer

CPU = torch.device("cpu")
NUM_BATCHES, PER_BATCH, SIDE = 6, 2, 16


def through_a_file(one: Accumulator, other: Accumulator) -> None:
    """Give `other` the state of `one`."""
    text, tensors, rows = pack(one.state())
    joined = load(save({name: torch.cat(parts) for name, parts in rows.items() if parts}))
    other.load(unpack(text, load(save(tensors)), {name: [part] for name, part in joined.items()}))


def images_of(number: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    shape = (2, PER_BATCH, 3, SIDE, SIDE)
    originals, again = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    if number == 3:
        again[0] = originals[0]
    return originals, again


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
        lambda counted: (counted.merged().to_dense().tolist(), counted.report(counted.merged(), 1000)),
    )


def features_case(most_bytes: float) -> Case:
    return (
        lambda: KeptFeatures(most_bytes),
        lambda kept, number: kept.update(images_of(number)[0].flatten(1)[:, :5].float()),
        lambda kept: (None if kept.merged() is None else kept.merged().tolist(), kept.bytes),
    )


def take_pictures(chosen: ChosenPictures, number: int) -> None:
    places = [PER_BATCH * number + i for i in range(PER_BATCH)]
    psnr = [float("inf") if place == 5 else float(place * 7 % 5) for place in places]
    chosen.update([f"image {place}" for place in places], places, *images_of(number), psnr)


def take_features(statistics: FrechetStatistics, number: int) -> None:
    statistics.update(images_of(number)[0].flatten(1)[:, :9].float() / 3)


CASES: dict[str, Case] = {
    "distortion": (
        Distortion,
        lambda distortion, number: distortion.update(*images_of(number)),
        lambda distortion: (distortion.merged().result(), distortion.merged().num_identical),
    ),
    "moments": (
        lambda: FrechetStatistics(9),
        take_features,
        lambda statistics: [part.tolist() for part in statistics.mean_and_covariance()],
    ),
    "features": features_case(1e6),
    "features that become too many": features_case(150),
    "usage": usage_case(30),
    "usage of unknown places": usage_case(30, placed=False),
    "sizes": (
        Sizes,
        lambda sizes, number: sizes.update((2, 3, 8, 8 if number < 5 else 9), 4),
        vars,
    ),
    "pictures": (lambda: ChosenPictures(12, 5, 2), take_pictures, ChosenPictures.result),
}


def finish(case: Case, *cuts: int) -> tuple[Any, Any]:
    """The result, and the last state, of a pass that began anew from its state at each cut."""
    make, take, result = case
    one = make()
    for number in range(NUM_BATCHES):
        if number in cuts:
            other = make()
            through_a_file(one, other)
            take(one, number)  # what goes on does not share memory with what stood still
            one = other
        take(one, number)
    text, tensors, _ = pack(one.state())
    return result(one), (text, {name: tensor.tolist() for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cuts", [(0,), (3,), (1, 2, 5)])
def test_what_goes_on_from_a_state_ends_as_if_never_interrupted(name: str, cuts: tuple[int, ...]) -> None:
    whole, resumed = finish(CASES[name]), finish(CASES[name], *cuts)
    assert whole[1][0] == resumed[1][0]
    assert whole == resumed


def test_the_counts_of_a_codebook_too_large_for_counters_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_COUNTERS", 10)
    monkeypatch.setattr(usage, "MOST_WAITING", 20)
    assert finish(usage_case(30)) == finish(usage_case(30), 0, 2, 3)


@pytest.mark.parametrize("metrics", [(), ("kid", "prc", "sfid", "is")])
def test_a_whole_evaluation_goes_on(metrics: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populations, "SIZES", {"pool": 48, "spatial": 48, "logits": 48})
    protocols = ("cleanfid-rawval", "adm")
    config = EvalConfig(image_size=SIDE, protocol=protocols, metrics=metrics, fid_min_images=4)
    networks = FeatureNetworks({}, Pooled(), {}, {}, {"mean": Mean()})

    def take(measured: Evaluation, number: int) -> None:
        originals, again = images_of(number)
        raw = nn.functional.interpolate(originals.float(), 299)
        places = range(PER_BATCH * number, PER_BATCH * (number + 1))
        measured.update(originals, again, ids_of(number, 32), {1: again // 2}, raw=raw, places=places)

    case = (lambda: Evaluation(config, networks, 32, 2, CPU), take, Evaluation.result)
    whole, resumed = finish(case), finish(case, 1, 4)
    assert whole[0]["rfid"].keys() == set(protocols)
    assert whole[0]["prefixes"][0]["rfid"]
    assert whole == resumed


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_goes_on(name: str) -> None:
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


def test_numbers_larger_than_any_tensor_holds_and_infinity_stay_what_they_are() -> None:
    state = {"digest": 2**256 - 1, "scores": [float("inf"), 0.1], "none": None, "png": b"\x00\xff", "empty": b""}
    text, tensors, rows = pack(state | {"zero": torch.zeros((), dtype=torch.int64), "no": torch.zeros(0, 3)})
    back = unpack(text, load(save(tensors)), rows)
    assert back.pop("zero").shape == ()
    assert back.pop("no").shape == (0, 3)
    assert back == state
