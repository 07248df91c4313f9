import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vqpipe.quantizers import EmaConfig, ResidualConfig, ResidualQuantizer, build_quantizer, residual

K, C, D = 20, 3, 4
B, H, W = 2, 4, 5


def make(**settings: object) -> ResidualQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(ResidualConfig(codebook_size=K, code_dim=C, **settings))
    assert isinstance(quantizer, ResidualQuantizer)
    quantizer.standardize_codebook()
    return quantizer


def latent_of(seed: int = 1, images: int = B) -> Tensor:
    return torch.randn(images, C, H, W, generator=torch.Generator().manual_seed(seed))


def as_rows(latent: Tensor) -> Tensor:
    return latent.permute(0, 2, 3, 1).reshape(-1, C)


def greedy(quantizer: ResidualQuantizer, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, D], partial sums [D, N, C] and residuals [D, N, C], in float64, one vector at a time."""
    codebooks = [codebook.double() for codebook in quantizer.codebook().unbind()]
    ids, sums, residuals = [], [], []
    for vector in as_rows(latent).double():
        total = torch.zeros(C, dtype=torch.float64)
        for codebook in codebooks:
            residuals.append(vector - total)
            ids.append(int((codebook - residuals[-1]).square().sum(1).argmin()))
            total = total + codebook[ids[-1]]
            sums.append(total)
    shape = (-1, len(codebooks), C)
    return (
        torch.tensor(ids).view(-1, len(codebooks)),
        torch.stack(sums).view(shape).transpose(0, 1),
        torch.stack(residuals).view(shape).transpose(0, 1),
    )


@pytest.mark.parametrize("shared", [True, False])
def test_each_depth_takes_the_nearest_code_of_the_residual(shared: bool) -> None:
    quantizer, latent = make(shared=shared), latent_of()
    ids, sums, _ = greedy(quantizer, latent)
    quantized = quantizer(latent)
    assert torch.equal(quantized.ids, ids.view(B, -1))  # the depths of a position are adjacent
    torch.testing.assert_close(as_rows(quantized.codes).double(), sums[-1], rtol=0, atol=1e-5)
    errors = (as_rows(latent).double() - sums).square().mean((1, 2))
    torch.testing.assert_close(quantized.losses["commitment"].double(), errors.mean(), rtol=1e-5, atol=0)


def test_first_depths_decode_to_the_partial_sums() -> None:
    quantizer, latent = make(), latent_of()
    ids, sums, _ = greedy(quantizer, latent)
    layout = quantizer.layout(H, W)
    for kept in range(1, D + 1):
        prefix = ids.masked_fill(torch.arange(D) >= kept, -1)
        codes = quantizer.lookup(prefix.view(B, -1), layout)
        torch.testing.assert_close(as_rows(codes).double(), sums[kept - 1], rtol=0, atol=1e-5)


def test_codebook_is_shared_or_one_per_depth() -> None:
    assert len(list(make().codebooks)) == 1
    codebooks = make(shared=False).codebook()
    assert codebooks.shape == (D, K, C)
    assert not torch.equal(codebooks[0], codebooks[1])


@pytest.mark.parametrize("shared", [True, False])
def test_update_is_a_moving_average_of_the_residuals(shared: bool) -> None:
    quantizer, latent = make(shared=shared, restart=False), latent_of()
    ids, _, residuals = greedy(quantizer, latent)
    before = quantizer.codebook().double()
    ones = one_hot(ids.T, K).double()  # [D, N, K]
    counts, sums = ones.sum(1), ones.transpose(1, 2) @ residuals
    if shared:
        counts, sums = counts.sum(0, keepdim=True), sums.sum(0, keepdim=True)
        before = before[:1]
    counts = 0.99 + 0.01 * counts
    total = counts.sum(1, keepdim=True)
    smoothed = (counts + 1e-5) / (total + K * 1e-5) * total
    expected = (0.99 * before + 0.01 * sums) / smoothed.unsqueeze(-1)
    quantizer.update(latent, ids.view(B, -1))
    after = quantizer.codebook().double()
    torch.testing.assert_close(after, expected.expand(D, K, C), rtol=0, atol=1e-6)


def test_masked_ids_are_ignored_in_the_update() -> None:
    quantizer, expected, latent = make(restart=False), make(restart=False), latent_of()
    ids = quantizer(latent).ids
    expected.update(latent[:1], ids[:1])
    ids[1] = -1
    quantizer.update(latent, ids)
    assert torch.equal(quantizer.codebook(), expected.codebook())


def test_update_without_valid_ids_changes_nothing() -> None:
    quantizer, latent = make(), latent_of()
    before = quantizer.codebook()
    quantizer.update(latent, torch.full((B, H * W * D), -1))
    torch.testing.assert_close(quantizer.codebook(), before)


def test_unused_codes_restart_at_residuals() -> None:
    quantizer, averaged, latent = make(), make(restart=False), latent_of()
    ids, _, residuals = greedy(quantizer, latent)
    used = torch.zeros(K, dtype=torch.bool).index_fill(0, ids.unique(), True)
    assert 0 < used.sum() < K
    quantizer.update(latent, ids.view(B, -1))
    averaged.update(latent, ids.view(B, -1))
    codes = quantizer.codebook()[0]
    assert torch.equal(codes[used], averaged.codebook()[0][used])
    to_residuals = torch.cdist(codes[~used].double(), residuals.flatten(0, 1)).min(1)
    assert to_residuals.values.max() < 1e-5
    assert len(to_residuals.indices.unique()) == len(to_residuals.indices)
    (inner,) = quantizer.quantizers()
    assert torch.equal(inner.counts[~used], torch.ones(int((~used).sum())))
    assert torch.equal(inner.sums[~used], codes[~used])


def test_codes_restart_at_residuals_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    others = torch.full((500, C), 7.0)
    monkeypatch.setattr(residual, "gather_rows", lambda rows: others)
    quantizer, latent = make(), latent_of()
    quantizer.update(latent, quantizer(latent).ids)
    assert (quantizer.codebook()[0] == 7.0).all(1).any()


def test_too_few_vectors_are_copied_with_noise() -> None:
    vectors = torch.randn(5, C)
    sampled = residual.sample_vectors(vectors, 12)
    assert len(sampled.unique(dim=0)) == 12
    assert torch.cdist(sampled, vectors).min(1).values.max() <= residual.COPY_NOISE
    sampled = residual.sample_vectors(vectors, 5)
    assert torch.equal(sampled.sort(0).values, vectors.sort(0).values)


def test_depth_one_equals_ema() -> None:
    quantizer, latent = make(depth=1, restart=False), latent_of()
    ema = build_quantizer(EmaConfig(codebook_size=K, code_dim=C))
    ema.load_state_dict(quantizer.quantizers()[0].state_dict())
    for _ in range(2):
        expected, found = ema(latent), quantizer(latent)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.codes, expected.codes)
        torch.testing.assert_close(found.losses, expected.losses)
        ema.update(latent, expected.ids)
        quantizer.update(latent, found.ids)


def test_decay_and_epsilon_are_those_of_the_settings() -> None:
    settings = {"decay": 0.75, "epsilon": 0.5}
    quantizer, latent = make(depth=1, restart=False, **settings), latent_of()
    ema = build_quantizer(EmaConfig(codebook_size=K, code_dim=C, **settings))
    ema.load_state_dict(quantizer.quantizers()[0].state_dict())
    ids = quantizer(latent).ids
    quantizer.update(latent, ids)
    ema.update(latent, ids)
    assert torch.equal(quantizer.codebook()[0], ema.codebook())


def test_codes_used_less_than_once_per_step_restart() -> None:
    quantizer, latent = make(depth=1), latent_of()
    (inner,) = quantizer.quantizers()
    inner.counts.fill_(5.0)
    inner.counts[:2] = torch.tensor([1.006, 1.02])  # 0.99 times these are below and above 1
    quantizer.update(latent, torch.full((B, H * W), 2))
    assert inner.counts[:3].tolist() == pytest.approx([1.0, 1.02 * 0.99, 5.0 * 0.99 + 0.01 * B * H * W])
    distances = torch.cdist(inner.codes[:2], as_rows(latent)).amin(1)
    assert distances[0] < 1e-6
    assert distances[1] > 1e-2
