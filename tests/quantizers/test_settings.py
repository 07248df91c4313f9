"""Settings that several quantizers share: the metric, unit vectors and the weights of the entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqpipe.errors import ConfigError
from vqpipe.quantizers import (
    BsqConfig,
    CvqConfig,
    DiveqConfig,
    EmaConfig,
    IbqConfig,
    LcConfig,
    LeechConfig,
    LfqConfig,
    MultiScaleConfig,
    Quantizer,
    QuantizerConfig,
    RegVqConfig,
    ResidualConfig,
    SimVqConfig,
    VqConfig,
    build_quantizer,
)
from vqpipe.quantizers.base import CodebookQuantizer, to_rows

SIZES = {"codebook_size": 40, "code_dim": 6}
COSINE, UNIT = SIZES | {"metric": "cosine"}, SIZES | {"normalize": True}
FEATURES = {"feature_dim": 12, "codebook_init": "uniform"}
LATENT = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(1))


def kind_of(config: QuantizerConfig | type[QuantizerConfig]) -> str:
    return config.kind


def make(config: QuantizerConfig) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(config)


@pytest.mark.parametrize(
    "config",
    [
        VqConfig(**COSINE),
        CvqConfig(**COSINE),
        DiveqConfig(**COSINE),
        EmaConfig(**COSINE),
        LcConfig(**COSINE, **FEATURES),
        SimVqConfig(**COSINE),
        ResidualConfig(**COSINE, depth=1),
        MultiScaleConfig(**COSINE, scales=(1,)),
    ],
    ids=kind_of,
)
def test_cosine_metric_takes_the_code_of_the_largest_cosine(config: QuantizerConfig) -> None:
    quantizer = make(config).eval()
    (codes,) = quantizer.all_codes()
    expected = F.cosine_similarity(to_rows(LATENT)[:, None], codes[None], dim=2).argmax(1)
    assert torch.equal(quantizer(LATENT).ids.flatten(), expected)


@pytest.mark.parametrize(
    "config",
    [
        VqConfig(**UNIT),
        CvqConfig(**UNIT),
        EmaConfig(**UNIT),
        LcConfig(**UNIT, **FEATURES),
        LcConfig(**UNIT, **FEATURES, normalize_latent=True),
        RegVqConfig(**UNIT),
        SimVqConfig(**UNIT),
    ],
    ids=kind_of,
)
def test_normalize_compares_and_returns_unit_vectors(config: QuantizerConfig) -> None:
    quantizer = make(config).eval()
    assert isinstance(quantizer, CodebookQuantizer)
    unit, rows = F.normalize(quantizer.raw_codebook().detach(), dim=1), F.normalize(to_rows(LATENT), dim=1)
    codes, ids, losses = quantizer(LATENT)
    assert torch.equal(ids.flatten(), (rows @ unit.T).argmax(1))
    torch.testing.assert_close(to_rows(codes), unit[ids.flatten()])
    torch.testing.assert_close(losses["commitment"], F.mse_loss(rows, unit[ids.flatten()]))


@pytest.mark.parametrize("config", [VqConfig(**UNIT), BsqConfig(code_dim=6), LeechConfig()], ids=kind_of)
def test_gradient_of_a_normalized_latent_is_orthogonal_to_it(config: QuantizerConfig) -> None:
    quantizer = make(config)
    latent = torch.randn(2, quantizer.latent_dim, 3, 5, requires_grad=True)
    codes = quantizer(latent).codes
    (gradient,) = torch.autograd.grad((codes * torch.randn_like(codes)).sum(), latent)
    assert gradient.any()
    assert (gradient * latent).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("config", [IbqConfig, LfqConfig, BsqConfig], ids=kind_of)
def test_entropy_has_the_weights_of_the_settings(config: type[QuantizerConfig]) -> None:
    sizes = SIZES if config is IbqConfig else {"code_dim": 6}

    def entropy(sample: float, batch: float) -> Tensor:
        quantizer = make(config(**sizes, sample_weight=sample, batch_weight=batch, entropy_temperature=1.0))
        return quantizer(LATENT).losses["entropy"]

    torch.testing.assert_close(entropy(0.7, 1.3), 0.7 * entropy(1.0, 0.0) + 1.3 * entropy(0.0, 1.0))
    assert entropy(1.0, 0.0) > 0 > entropy(0.0, 1.0)


@pytest.mark.parametrize("config", [EmaConfig, ResidualConfig], ids=kind_of)
@pytest.mark.parametrize(
    ("name", "value"),
    [*(("decay", value) for value in (-0.1, 1.0, 2.0)), *(("epsilon", value) for value in (0.0, -1e-5, float("nan")))],
)
def test_averages_need_a_decay_below_1_and_a_positive_epsilon(
    config: type[QuantizerConfig], name: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        config(**SIZES, **{name: value})
