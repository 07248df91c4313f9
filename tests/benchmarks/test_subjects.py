"""Every subject at its smallest: all methods do the same work, and whoever cannot is named."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import faiss
import pytest
import torch
from torch import Tensor

from stages import bench, recipe
from vqpipe.benchmarks import clustering, evaluating, loading, measure, networks, search, tokenizing, training
from vqpipe.benchmarks.measure import Case, Settings, Stopwatch, Unavailable
from vqpipe.benchmarks.released_step import ReleasedStep
from vqpipe.data.transforms import to_float
from vqpipe.losses import Objective
from vqpipe.models import Autoencoder, PatchDiscriminator
from vqpipe.quantizers import base

SETTINGS = Settings(device=torch.device("cpu"), rounds=2, quick=True)


def run(plan: measure.Plan, settings: Settings = SETTINGS) -> Case:
    """Measure a plan, and check what every case promises."""
    calls: list[str] = []
    case = plan.run(Stopwatch(settings, calls.append, rest=0.0))
    assert case.title == plan.title
    assert len(calls) <= plan.methods * (measure.CALLS_BEFORE + settings.rounds)
    assert any(row.ours for row in case.rows)
    for row in case.rows:
        assert row.wall_min_ms <= row.wall_ms
        assert row.version
    assert not {row.name for row in case.rows} & case.not_run.keys()
    json.dumps(case.to_table(), allow_nan=False)
    return case


@pytest.fixture
def faiss_as_it_was() -> Iterator[dict[str, int]]:
    before = {name: getattr(faiss.cvar, name) for name in search.faiss_defaults()}
    yield before
    for name, value in before.items():
        setattr(faiss.cvar, name, value)


def test_search_methods_find_the_same_codes_and_stand_over_a_floor() -> None:
    for plan in search.plans(SETTINGS):
        case = run(plan)
        assert [row.name for row in case.rows] == [
            *("vqpipe", "naive expansion", "torch.cdist"),
            *("faiss as it comes", "faiss tuned", "scikit-learn"),
        ]
        assert all(row.exact and row.same_ids == 1.0 for row in case.rows)
        assert case.facts["checked_vectors"] == case.settings["vectors"]
        work = 2 * case.settings["vectors"] * case.settings["codes"] * case.settings["dim"]
        floor = case.facts["flop_floor_ms"]
        assert floor == pytest.approx(1e3 * work / (1e9 * case.facts["matmul_gflops"]))
        assert case.rows[0].extra["over_floor"] == pytest.approx(case.rows[0].wall_ms / floor)
        assert "quick look" in case.not_run["torch.compile of naive"]


def test_default_shapes_are_the_published_ones() -> None:
    titles = [plan.title for plan in search.plans(Settings(device=torch.device("cpu")))]
    assert titles[0] == "nearest code: N = 4,096, K = 100,000, D = 8"
    assert len(titles) == 4


def test_shares_are_taken_of_the_checked_vectors_only() -> None:
    truth = torch.tensor([0, 1, 2, 3])
    assert search.share_of_equal(truth, torch.tensor([0, 1, 9, 3, 7, 7])) == 0.75
    vectors, codes = torch.tensor([[0.9], [-3.0]]), torch.tensor([[1.0], [0.0], [-2.0]])
    assert search.reference_ids(vectors, codes).tolist() == [0, 2]


def test_a_matrix_over_the_budget_is_left_out_with_its_size() -> None:
    small = Settings(device=torch.device("cpu"), rounds=1, quick=True, memory=0.005)
    case = run(search.plans(small)[0], small)
    assert case.not_run["naive expansion"] == "3 matrices of N x K take 0.0123 GB, the budget is 0.005 GB"
    assert "torch.cdist" in {row.name for row in case.rows}
    with pytest.raises(Unavailable, match=r"N x K distances take 26\.2 GB, the budget is 8 GB"):
        search.need_matrices(1, Settings(device=torch.device("cpu")), torch.empty(65_536, 1), torch.empty(100_000, 1))


def test_faiss_is_measured_as_it_comes_and_left_as_it_was(faiss_as_it_was: dict[str, int]) -> None:
    defaults = search.faiss_defaults()
    assert defaults["distance_compute_blas_threshold"] > 1
    faiss.cvar.distance_compute_blas_threshold = 17  # as our own search may have left it
    seen = []
    with search.faiss_settings(defaults):
        seen.append(faiss.cvar.distance_compute_blas_threshold)
        with search.faiss_settings(search.FAISS_TUNING):
            seen.append(faiss.cvar.distance_compute_blas_threshold)
    assert seen == [defaults["distance_compute_blas_threshold"], 1]
    assert faiss.cvar.distance_compute_blas_threshold == 17


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_sklearn(module: str) -> Any:
        if module.startswith("sklearn"):
            raise Unavailable("sklearn is not installed")
        return measure.need(module)

    monkeypatch.setattr(search, "need", without_sklearn)
    case = run(search.plans(SETTINGS)[0])
    assert case.not_run["scikit-learn"] == "sklearn is not installed"
    assert "faiss tuned" in {row.name for row in case.rows}


def test_lloyd_reaches_the_same_inertia_everywhere_from_the_same_centres() -> None:
    same, own = (run(plan) for plan in clustering.plans(SETTINGS))
    names = ["vqpipe", "faiss", "scikit-learn", "scikit-learn mini-batch"]
    assert [row.name for row in same.rows] == [*names[:2], "faiss tuned", *names[2:]]
    for row in same.rows:
        if row.exact:
            assert row.extra["inertia_ratio"] == pytest.approx(1.0, rel=0.005)
    assert [row.name for row in own.rows] == names
    ours = own.rows[0].extra["inertia_ratio"]
    assert isinstance(ours, float)
    assert ours < 1.0  # seeded, where faiss draws points
    assert all(row.rounds == 1 for row in own.rows)


def test_inertia_is_the_mean_squared_distance_to_the_nearest() -> None:
    points, centres = torch.tensor([[0.0], [2.0], [11.0]]), torch.tensor([[1.0], [10.0]])
    assert clustering.inertia(points, centres) == pytest.approx(1.0)


@pytest.mark.slow
def test_the_training_step_is_measured_at_both_sizes_with_either_search_and_as_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched = []

    def counting(vectors: Tensor, codes: Tensor) -> Tensor:
        searched.append(len(codes))
        return search.expanded(vectors, codes)

    monkeypatch.setattr(networks, "expanded", counting)
    settings = Settings(device=torch.device("cpu"), rounds=1, quick=True)
    (plan,) = bench.plans("train", settings)
    before = base.nearest
    case = run(plan, settings)
    assert base.nearest is before
    assert [row.name for row in case.rows] == [
        *("vqpipe, K = 100", "naive search, K = 100", "released step, K = 100"),
        *("vqpipe, K = 2,000", "naive search, K = 2,000", "released step, K = 2,000"),
    ]
    assert set(searched) == {100, 2000}
    walls = {row.name: row.wall_ms for row in case.rows}
    assert case.rows[4].ratio_wall == pytest.approx(walls["naive search, K = 2,000"] / walls["vqpipe, K = 2,000"])
    over_released = walls["released step, K = 2,000"] / walls["vqpipe, K = 2,000"]
    assert case.rows[5].ratio_wall == pytest.approx(over_released)
    assert case.facts["over_released"] == pytest.approx(over_released)
    for row in (case.rows[0], case.rows[3]):
        share = row.extra["search_share"]
        assert isinstance(share, float)
        assert 0 < share < 1
    assert case.facts["cost_of_k"] == pytest.approx(walls["vqpipe, K = 2,000"] / walls["vqpipe, K = 100"])


@pytest.mark.slow
def test_without_memory_for_it_the_released_step_is_left_out_with_its_fact() -> None:
    small = Settings(device=torch.device("cpu"), rounds=1, quick=True, memory=0.001)
    case = run(bench.plans("train", small)[0], small)
    reason = "3 matrices of N x K = 128 x 2,000 take 0.00307 GB, the budget is 0.001 GB"
    assert case.not_run == {"naive search, K = 2,000": reason, "released step, K = 2,000": reason}
    assert "released step, K = 100" in {row.name for row in case.rows}
    assert "over_released" not in case.facts


def released_and_ours() -> tuple[ReleasedStep, Autoencoder, PatchDiscriminator, Objective, Tensor]:
    """The released step, and copies of its networks under our objective, in float32."""
    settings = recipe.load(bench.TRAINED)
    model = networks.build(networks.with_codes(settings.model, 300), 32, torch.device("cpu"), seed=0).train()
    discriminator = PatchDiscriminator(settings.discriminator).train()
    config = replace(settings.objective, disc_start=0)
    released = ReleasedStep(model, discriminator, config, settings.train)
    objective = Objective(config, model.quantizer.loss_names)
    return released, model, discriminator, objective, to_float(networks.photographs(3, 32))


def test_the_released_step_has_our_losses_and_gradients() -> None:
    """Else it would be no baseline: all that it does beside them is waste."""
    released, model, discriminator, objective, images = released_and_ours()
    loss, ids = released.generator_loss(images)
    loss.backward()
    made = model(images)
    ours, _ = objective.generator_loss(
        images, made.images, made.quantized.losses, discriminator(made.images), model.last_layer
    )
    ours.backward()
    assert torch.equal(ids, made.quantized.ids.flatten())
    assert len(ids.unique()) > 10
    torch.testing.assert_close(loss, ours)
    pairs = zip(model.named_parameters(), released.model.parameters(), strict=True)
    for (name, parameter), its in pairs:
        assert parameter.grad is not None, name
        torch.testing.assert_close(its.grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    released.discriminator_optimizer.zero_grad()
    discriminator.zero_grad()
    released.discriminator_loss(images).backward()
    objective.discriminator_loss(discriminator(images), discriminator(made.images.detach()))[0].backward()
    for parameter, its in zip(discriminator.parameters(), released.discriminator.parameters(), strict=True):
        torch.testing.assert_close(its.grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_released_step_makes_its_networks_twice_and_counts_its_codes() -> None:
    released, model, *_, images = released_and_ours()
    passes = []
    released.model.decoder.register_forward_hook(lambda *_: passes.append(1))
    before = released.model.last_layer.detach().clone()
    released.step(images)
    assert len(passes) == 2
    assert released.counts.sum() == 3 * 16
    assert not torch.equal(released.model.last_layer, before)
    assert torch.equal(model.last_layer, before)  # ours is another network


def test_what_k_costs_is_the_median_of_the_rounds() -> None:
    large, small = measure.Samples(wall=[2.0, 9.0, 3.0]), measure.Samples(wall=[1.0, 1.0, 2.0])
    assert training.cost(large, small) == 2.0


def test_tokenizing_gives_the_ids_of_a_float64_search() -> None:
    for plan in bench.plans("tokenize", SETTINGS):
        case = run(plan)
        assert [(row.name, row.same_ids) for row in case.rows] == [("vqpipe", 1.0), ("naive search", 1.0)]
        assert case.facts["checked_vectors"] == case.settings["vectors"]


def test_a_tokenizer_s_codebook_is_in_use() -> None:
    """A fresh network beside its codes would choose a handful, and the search would be timed on ties."""
    config = networks.with_codes(recipe.load(bench.TRAINED).model, 2000)
    model = networks.build(config, 64, torch.device("cpu"), seed=0)
    tokenizer = tokenizing.Tokenizer(model)
    ids = tokenizer.encode(networks.photographs(8, 64))
    assert len(ids.unique()) > 100


def test_decoders_tars_and_features_are_compared_on_the_same_bytes() -> None:
    jpeg, tar, features = (run(plan) for plan in loading.plans(SETTINGS))
    assert {"vqpipe", "PIL", "torchvision"} <= {row.name for row in jpeg.rows}
    assert {row.name for row in jpeg.rows} | jpeg.not_run.keys() == {
        *("vqpipe", "PIL", "simplejpeg", "torchvision", "OpenCV")
    }
    shares = {row.name: row.extra["same_pixels"] for row in jpeg.rows}
    assert shares["PIL"] == shares["vqpipe"] == 1.0
    assert [row.name for row in tar.rows] == ["vqpipe", "vqpipe, first time", "webdataset", "tarfile"]
    assert not [row.name for row in tar.rows if row.note == "reads other bytes"]
    assert [row.name for row in features.rows] == ["vqpipe", "numpy, whole", "numpy to torch, mapped"]
    assert features.unit == "MB"


@pytest.mark.slow
def test_generators_are_measured_beside_the_plain_ways() -> None:
    loss, sampling = (run(plan) for plan in bench.plans("generate", SETTINGS))
    assert [row.name for row in loss.rows] == ["vqpipe", "all logits at once"]
    assert loss.facts["largest_difference"] < 1e-5
    assert [row.name for row in sampling.rows] == ["vqpipe", "whole sequence for every id"]
    assert sampling.facts["same_ids_as_whole"] == 1.0
    small = replace(SETTINGS, memory=1e-4)
    loss = run(bench.plans("generate", small)[0], small)
    assert loss.not_run == {
        "all logits at once": "3 tensors of 64 x 2,000 logits take 0.00154 GB, the budget is 0.0001 GB"
    }
    assert loss.facts == {}


def test_an_evaluation_is_measured_beside_encoding_and_decoding_alone() -> None:
    (plan,) = bench.plans("eval", SETTINGS)
    case = run(plan)
    assert [row.name for row in case.rows] == [evaluating.OURS, evaluating.PLAIN]
    assert case.facts.keys() == {"eval_over_plain", "eval_over_plain_cpu", "eval_wanted"}
    ours, plain = measure.Samples(wall=[2.0, 9.0, 3.0], cpu=[4.0]), measure.Samples(wall=[1.0, 3.0, 3.0], cpu=[2.0])
    assert evaluating.over_plain(ours, plain) == (2.0, 2.0)  # of the rounds' ratios 2, 3 and 1
