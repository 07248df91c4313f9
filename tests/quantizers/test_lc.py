import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.quantizers import FrozenCodebookQuantizer, LcConfig, build_quantizer, lc
from vqpipe.search import nearest

FEATURES = torch.randn(60, 12, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 12) + 5
LATENT = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def make(**options) -> FrozenCodebookQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(LcConfig(codebook_size=60, code_dim=4, feature_dim=12, **options))
    assert isinstance(quantizer, FrozenCodebookQuantizer)
    quantizer.load_codebook(FEATURES)
    return quantizer


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("options", [{}, {"projector": "mlp"}, {"tune_codebook": True}])
def test_gradient_equals_that_of_projecting_every_code(options: dict, standardize: bool) -> None:
    sparse, dense = make(**options), make(**options)
    if standardize:
        sparse.standardize_codebook()
        dense.load_state_dict(sparse.state_dict())
    sparse(LATENT).losses["codebook"].backward()
    codes = dense.projector((dense.codes - dense.shift) * dense.scale)  # as the released code does
    rows = LATENT.permute(0, 2, 3, 1).reshape(-1, 4)
    F.mse_loss(codes[nearest(rows, codes.detach())], rows).backward()
    assert [name for name, _ in sparse.named_parameters()]
    for (name, ours), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_codebook_never_changes() -> None:
    quantizer = make()
    quantizer.standardize_codebook()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(quantizer(LATENT).losses.values()).backward()
        optimizer.step()
    assert torch.equal(quantizer.state_dict()["codes"], FEATURES)
    assert "codes" not in dict(quantizer.named_parameters())
    assert "codes" in dict(make(tune_codebook=True).named_parameters())


def test_missing_codebook_raises_with_the_option_to_pass() -> None:
    quantizer = build_quantizer(LcConfig(codebook_size=60, code_dim=4, feature_dim=12))
    with pytest.raises(ConfigError, match="--codebook"):
        quantizer(LATENT)
    with pytest.raises(ConfigError, match="--codebook"):
        quantizer.standardize_codebook()


def test_codebook_of_another_shape_is_rejected_with_both_shapes() -> None:
    with pytest.raises(ConfigError, match="50 codes of 8 channels, the model expects 60 of 12") as error:
        make().load_codebook(torch.zeros(50, 8))
    both = "model.quantizer.codebook_size=50 and model.quantizer.feature_dim=8"
    assert error.value.hint == f"Set {both}, or pass another codebook"


def test_without_projector_codes_are_features() -> None:
    with pytest.raises(ConfigError, match="code_dim 4 is not feature_dim 12"):
        make(projector="none")
    quantizer = build_quantizer(
        LcConfig(codebook_size=50, code_dim=12, feature_dim=12, projector="none", codebook_init="uniform")
    )
    assert 0.9 / 50 < quantizer.codebook().abs().max() <= 1 / 50
    assert not list(quantizer.parameters())


def test_projector_is_initialized_as_released() -> None:
    torch.manual_seed(0)
    linear = build_quantizer(LcConfig(codebook_size=2, code_dim=8, feature_dim=768)).projector[0]
    assert linear.weight.std().item() == pytest.approx(8**-0.5, rel=0.05)
    assert 0 < linear.bias.abs().max() <= 768**-0.5


def test_normalize_latent() -> None:
    quantizer = make(normalize_latent=True)
    scaled = quantizer(3 * LATENT)
    assert torch.equal(scaled.ids, quantizer(LATENT).ids)
    torch.testing.assert_close(scaled.losses, make()(F.normalize(LATENT, dim=1)).losses)
    dark = LATENT.index_fill(3, torch.tensor([0]), 0.0)
    torch.testing.assert_close(quantizer(dark).losses, make()(F.normalize(dark, dim=1)).losses)


def test_standardize_codebook_makes_the_projector_orthogonal() -> None:
    quantizer = make()
    quantizer.standardize_codebook()
    weight = quantizer.projector[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=1e-5)
    assert not quantizer.projector[0].bias.any()
    torch.testing.assert_close(quantizer.shift, FEATURES.mean(0))


def wide(standardize: bool) -> tuple[FrozenCodebookQuantizer, Tensor]:
    """A codebook with the sizes of CLIP features, off center, and vectors among its codes: float32[500, 8]."""
    torch.manual_seed(0)
    quantizer = build_quantizer(LcConfig(codebook_size=3000, code_dim=8))
    assert isinstance(quantizer, FrozenCodebookQuantizer)
    quantizer.load_codebook(torch.randn(3000, 768) * torch.logspace(-2, 0, 768) + torch.randn(768))
    if standardize:
        quantizer.standardize_codebook()
    codes = quantizer.codebook()
    return quantizer, codes[:500] + 0.5 * codes.std(0) * torch.randn(500, 8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("standardize", [True, False])
def test_ids_are_those_of_a_float64_projection(
    standardize: bool, onednn: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lc, "ONEDNN", onednn and lc.ONEDNN)
    quantizer, vectors = wide(standardize)
    quantizer.train(training).requires_grad_(training)
    ids = quantizer(vectors.view(500, 8, 1, 1)).ids.flatten()
    layer = quantizer.projector[0]
    centered = (quantizer.codes.double() - quantizer.shift) * quantizer.scale
    codes = centered @ layer.weight.detach().double().T + layer.bias.detach()
    distances = torch.cdist(vectors.double(), codes).square()
    excess = distances.gather(1, ids[:, None])[:, 0] - distances.amin(1)
    longest = (quantizer.codes * quantizer.scale).norm(dim=1).amax() * layer.weight.norm()
    assert (excess <= 2**-20 * longest * distances.amax(1).sqrt()).all()  # rounding of a product, times the distance
    assert (ids == distances.argmin(1)).float().mean() > 0.99
    assert len(ids.unique()) > 300


def test_frozen_weights_project_by_f_linear_and_training_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*operands: Tensor) -> Tensor:
        calls.append(len(operands[0]))
        return F.linear(*operands)

    calls: list[int] = []
    monkeypatch.setattr(lc, "ONEDNN", True)
    monkeypatch.setattr(lc, "onednn_linear", counted)
    quantizer = make()
    sum(quantizer(LATENT).losses.values()).backward()
    assert calls == [60]  # the selected codes, which have a gradient, are projected by F.linear
    quantizer.eval().requires_grad_(False)
    layer = quantizer.projector[0]
    assert torch.equal(quantizer.codebook(), F.linear(FEATURES, layer.weight, layer.bias))
    assert calls == [60]


class TestProjectionCache:
    """The projected codebook of frozen weights is cached, and never stale after any change of the weights."""

    def test_cached_while_frozen(self) -> None:
        quantizer = make().eval().requires_grad_(False)
        assert quantizer.codebook() is quantizer.codebook()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("fused", [True, False])
    def test_recomputed_after_an_optimizer_step(self, fused: bool, training: bool) -> None:
        quantizer = make().train(training)
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.1, fused=fused, foreach=not fused)
        for _ in range(2):
            sum(quantizer(LATENT).losses.values()).backward()
            optimizer.step()
            self.assert_current(quantizer)

    def test_recomputed_after_a_weight_average_update(self) -> None:
        quantizer, other = make().eval().requires_grad_(False), make()
        average = copy.deepcopy(quantizer)
        quantizer.codebook()
        average.codebook()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), [p + 1 for p in other.parameters()], 0.5)
        self.assert_current(average)

    def test_recomputed_after_loading(self) -> None:
        quantizer = make().eval().requires_grad_(False)
        quantizer.codebook()
        quantizer.load_codebook(FEATURES + 1)
        self.assert_current(quantizer)
        state = {name: tensor + 1 for name, tensor in quantizer.state_dict().items()}
        quantizer.load_state_dict(state, assign=True)
        quantizer.requires_grad_(False)
        self.assert_current(quantizer)
        quantizer.standardize_codebook()
        self.assert_current(quantizer)

    def test_works_under_inference_mode(self) -> None:
        with torch.inference_mode():
            quantizer = make().eval().requires_grad_(False)
            self.assert_current(quantizer)

    @staticmethod
    def assert_current(quantizer: FrozenCodebookQuantizer) -> None:
        want: Tensor = quantizer.projector((quantizer.codes - quantizer.shift) * quantizer.scale)
        torch.testing.assert_close(quantizer.codebook(), want.detach(), rtol=1e-4, atol=1e-4)
