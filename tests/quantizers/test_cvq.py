import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.quantizers import ClusteredQuantizer, CvqConfig, build_quantizer, cvq


def make(codebook_size: int = 6, code_dim: int = 2, **settings: object) -> ClusteredQuantizer:
    torch.manual_seed(0)
    config = CvqConfig(codebook_size=codebook_size, code_dim=code_dim, **settings)  # type: ignore[arg-type]
    quantizer = build_quantizer(config)
    assert isinstance(quantizer, ClusteredQuantizer)
    return quantizer


def latent_of(seed: int, code_dim: int = 2) -> Tensor:
    return torch.randn(3, code_dim, 2, 4, generator=torch.Generator().manual_seed(seed))


def vectors_of(latent: Tensor) -> Tensor:
    return latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])


@pytest.mark.parametrize("normalize", [False, True])
def test_three_updates_match_the_formula(normalize: bool) -> None:
    quantizer = make(anchor="closest", normalize=normalize)
    frequencies, stored = torch.zeros(6, dtype=torch.float64), quantizer.codes.detach().double()
    for step in range(3):
        latent = latent_of(step)
        ids = quantizer(latent).ids
        vectors, codes = vectors_of(latent).double(), stored
        if normalize:
            vectors, codes = F.normalize(vectors), F.normalize(codes)
        closest = vectors[torch.cdist(codes, vectors).argmin(1)]
        shares = torch.bincount(ids.flatten(), minlength=6) / ids.numel()
        frequencies = frequencies + 0.01 * (shares - frequencies)
        alphas = torch.exp(-(frequencies * 6 * 10) / 0.01 - 0.001)[:, None]
        stored = (1 - alphas) * stored + alphas * closest
        quantizer.update(latent, ids)
        torch.testing.assert_close(quantizer.codes.detach().double(), stored, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantizer.frequencies.double(), frequencies, rtol=1e-5, atol=1e-8)


def test_used_codes_stay_and_unused_codes_move() -> None:
    quantizer = make()
    before = quantizer.codes.detach().clone()
    ids = torch.arange(24).remainder(5).view(3, 8)  # code 5 is unused
    quantizer.update(latent_of(0), ids)
    after = quantizer.codes.detach()
    torch.testing.assert_close(after[:5], before[:5], rtol=0, atol=1e-4)
    assert (vectors_of(latent_of(0)) - after[5]).norm(dim=1).min() < 0.01


def test_only_unused_codes_are_searched_if_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = make(anchor="closest")
    quantizer.frequencies.fill_(1 / 6)
    quantizer.frequencies[2] = 0
    before, ids = quantizer.codes.detach().clone(), torch.arange(24).remainder(2).view(3, 8)
    searched: list[int] = []
    anchors = quantizer.anchors
    monkeypatch.setattr(quantizer, "anchors", lambda codes, v: searched.append(len(codes)) or anchors(codes, v))
    quantizer.update(latent_of(0), ids)
    assert searched == [1]
    assert (quantizer.codes != before).any(dim=1).tolist() == [False, False, True, False, False, False]


def test_probrandom_samples_by_the_softmax_of_minus_the_squared_distance() -> None:
    quantizer = make(20_000)
    code, vectors = torch.tensor([0.5, -0.2]), torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.4, -1.5], [-9.0, 0.0]])
    sampled = quantizer.anchors(code.expand(20_000, 2), vectors)
    shares = torch.bincount(sampled, minlength=4) / 20_000
    expected = [math.exp(-float((code - vector).square().sum())) for vector in vectors]
    torch.testing.assert_close(shares, torch.tensor(expected) / sum(expected), rtol=0, atol=0.01)


def test_random_samples_latents_uniformly() -> None:
    sampled = make(anchor="random").anchors(torch.zeros(20_000, 2), torch.tensor([[0.0, 0.0], [50.0, 0.0]]))
    assert abs(sampled.double().mean() - 0.5) < 0.02


def test_result_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    one_chunk, chunked = make(50, anchor="closest"), make(50, anchor="closest")
    ids = torch.arange(24).view(3, 8)  # codes 24 to 49 are unused
    one_chunk.update(latent_of(0), ids)
    monkeypatch.setattr(cvq, "DISTANCES_PER_CHUNK", 24 * 8)
    searched: list[int] = []
    anchors = chunked.anchors
    monkeypatch.setattr(
        chunked, "anchors", lambda codes, vectors: searched.append(len(codes)) or anchors(codes, vectors)
    )
    chunked.update(latent_of(0), ids)
    torch.testing.assert_close(chunked.codes, one_chunk.codes)
    assert searched == [8, 8, 8, 2]  # the three chunks without unused codes are skipped


def test_masked_latents_are_ignored() -> None:
    latent, ids = latent_of(0), torch.arange(24).remainder(3).view(3, 8)
    quantizer, without = make(), make()
    masked = ids.clone()
    masked[1] = -1
    torch.manual_seed(1)
    quantizer.update(latent, masked)
    torch.manual_seed(1)
    without.update(latent[[0, 2]], ids[[0, 2]])
    assert torch.equal(quantizer.codes, without.codes)
    assert torch.equal(quantizer.frequencies, without.frequencies)

    before = quantizer.state_dict()["codes"].clone()
    frequencies = quantizer.frequencies.clone()
    quantizer.update(latent, torch.full_like(ids, -1))
    assert torch.equal(quantizer.codes, before)
    assert torch.equal(quantizer.frequencies, frequencies)


def test_collapsed_codebook_recovers() -> None:
    quantizer, latent = make(16), 5 + latent_of(0)
    assert len(quantizer(latent).ids.unique()) < 4
    for _ in range(20):
        quantizer.update(latent, quantizer(latent).ids)
    assert len(quantizer(latent).ids.unique()) >= 8


def test_normalized_codes_are_initialized_and_restarted_as_unit_vectors() -> None:
    quantizer, latent = make(normalize=True), latent_of(0)
    torch.testing.assert_close(quantizer.codes.norm(dim=1), torch.ones(6))
    quantizer.update(latent, torch.zeros(3, 8, dtype=torch.int64))
    torch.testing.assert_close(quantizer.codes.norm(dim=1), torch.ones(6), rtol=0, atol=2e-3)


def test_ranks_get_the_codebook_of_their_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = latent_of(0)
    ids = make()(latent).ids
    alone = make()
    torch.manual_seed(1)
    alone.update(latent, ids)

    counts = torch.bincount(ids.flatten(), minlength=6).float()
    monkeypatch.setattr(cvq, "all_reduce_sum", lambda tensor: tensor.copy_(counts))
    monkeypatch.setattr(cvq, "gather_rows", lambda rows: vectors_of(latent))
    sent: list[Tensor] = []
    monkeypatch.setattr(cvq, "broadcast", lambda tensor: sent.append(tensor.detach().clone()))
    first = make()
    torch.manual_seed(1)
    first.update(latent[:1], ids[:1])
    monkeypatch.setattr(cvq, "is_main", lambda: False)
    monkeypatch.setattr(cvq, "broadcast", lambda tensor: tensor.copy_(sent[0]))
    second = make()
    torch.manual_seed(2)  # each rank has its own random numbers
    second.update(latent[1:], ids[1:])
    for quantizer in (first, second):
        assert torch.equal(quantizer.codes, alone.codes)
        assert torch.equal(quantizer.frequencies, alone.frequencies)


def test_anchors_under_the_cosine_metric_ignore_length() -> None:
    code, vectors = torch.tensor([[1.0, 0.0]]), torch.tensor([[100.0, 1.0], [0.8, 0.6], [0.0, 0.01]])
    assert make(metric="cosine", anchor="closest").anchors(code, vectors).tolist() == [0]
    sampled = make(metric="cosine").anchors(code.expand(20_000, 2), vectors)
    expected = (-(code - F.normalize(vectors, dim=1)).square().sum(1)).softmax(0)
    torch.testing.assert_close(torch.bincount(sampled, minlength=3) / 20_000, expected, rtol=0, atol=0.02)


def test_decay_is_that_of_the_settings() -> None:
    quantizer = make(4, decay=0.5, anchor="closest")
    before = quantizer.codes.detach().clone()
    ids = torch.tensor([[0] * 60 + [1] * 39 + [2]])  # code 3 is unused
    quantizer.update(torch.full((1, 2, 10, 10), 8.0), ids)
    frequencies = 0.5 * torch.tensor([0.6, 0.39, 0.01, 0.0])
    alphas = torch.exp(-4 * frequencies * 10 / 0.5 - 0.001)[:, None]
    torch.testing.assert_close(quantizer.frequencies, frequencies)
    torch.testing.assert_close(quantizer.codes.detach(), (1 - alphas) * before + alphas * 8.0)
