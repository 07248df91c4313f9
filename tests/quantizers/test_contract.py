"""The contract of every quantizer. Add an example of a new one to EXAMPLES to run these tests on it."""

import pytest
import torch
from torch import Tensor

from vqpipe.config import all_subclasses, from_table, to_table
from vqpipe.errors import ConfigError, DataError, NumericError
from vqpipe.quantizers import (
    BridgedQuantizer,
    BsqConfig,
    CodebookConfig,
    CvqConfig,
    DiveqConfig,
    EmaConfig,
    FsqConfig,
    GqConfig,
    IbqConfig,
    LcConfig,
    LeechConfig,
    LfqConfig,
    MultiGroupConfig,
    MultiScaleConfig,
    Quantizer,
    QuantizerConfig,
    RegVqConfig,
    ResidualConfig,
    SimVqConfig,
    SqvaeConfig,
    VqBridgeConfig,
    VqConfig,
    build_quantizer,
)

EXAMPLES: dict[str, QuantizerConfig] = {
    "vq": VqConfig(codebook_size=48, code_dim=6),
    "vq-cosine": VqConfig(codebook_size=48, code_dim=6, metric="cosine"),
    "vq-decorrelate": VqConfig(codebook_size=48, code_dim=6, decorrelate=True),
    "cvq": CvqConfig(codebook_size=48, code_dim=6),
    "cvq-normalize": CvqConfig(codebook_size=48, code_dim=6, normalize=True),
    "ema": EmaConfig(codebook_size=48, code_dim=6),
    "lc": LcConfig(codebook_size=48, code_dim=6, feature_dim=12),
    "lc-mlp": LcConfig(codebook_size=48, code_dim=6, feature_dim=12, projector="mlp"),
    "lc-none": LcConfig(codebook_size=48, code_dim=6, feature_dim=6, projector="none", codebook_init="uniform"),
    "lc-tuned": LcConfig(codebook_size=48, code_dim=6, feature_dim=12, tune_codebook=True),
    "lc-normalize": LcConfig(codebook_size=48, code_dim=6, feature_dim=12, normalize_latent=True),
    "multi-group": MultiGroupConfig(num_groups=3, group=CvqConfig(codebook_size=48, code_dim=6), masking="off"),
    "multi-group-lc": MultiGroupConfig(
        num_groups=2, group=LcConfig(codebook_size=48, code_dim=3, feature_dim=12), masking="off"
    ),
    "multi-group-normalize": MultiGroupConfig(
        group=CvqConfig(codebook_size=48, code_dim=6, normalize=True), masking="off"
    ),
    "multi-group-cosine": MultiGroupConfig(
        num_groups=2, group=VqConfig(codebook_size=48, code_dim=3, metric="cosine"), masking="off"
    ),
    "multi-group-lfq": MultiGroupConfig(num_groups=4, group=LfqConfig(code_dim=8), masking="off"),
    "lfq": LfqConfig(code_dim=6),
    "lfq-groups": LfqConfig(code_dim=6, entropy_bits=4),
    "fsq": FsqConfig(levels=(8, 5, 4)),
    "ifsq": FsqConfig(levels=(7, 5, 3), bound="sigmoid"),
    "bsq": BsqConfig(code_dim=6),
    "bsq-groups": BsqConfig(code_dim=12, bits_per_id=4, normalize=False, commitment=True, entropy_bits=4),
    "leech": LeechConfig(),
    "diveq": DiveqConfig(codebook_size=48, code_dim=6),
    "gq": GqConfig(codebook_size=48, code_dim=3),
    "sqvae": SqvaeConfig(codebook_size=48, code_dim=6),
    "regvq": RegVqConfig(codebook_size=48, code_dim=6),
    "vqbridge": VqBridgeConfig(codebook_size=48, code_dim=6, patch_size=2),
    "vqbridge-features": VqBridgeConfig(codebook_size=48, code_dim=6, patch_size=2, frozen_dim=12),
    "simvq": SimVqConfig(codebook_size=48, code_dim=6),
    "ibq": IbqConfig(codebook_size=48, code_dim=6),
    "ibq-normalize": IbqConfig(codebook_size=48, code_dim=6, normalize=True),
    "multi-scale": MultiScaleConfig(codebook_size=48, code_dim=6, scales=(1, 2, 4)),
    "multi-scale-cosine": MultiScaleConfig(codebook_size=48, code_dim=6, metric="cosine"),
    "residual": ResidualConfig(codebook_size=48, code_dim=6),
    "residual-not-shared": ResidualConfig(codebook_size=48, code_dim=6, depth=2, shared=False),
}
"""The first of each kind is trained in bfloat16 too, by tests/training/test_bf16.py."""
WITHOUT_CODEBOOK = ("fsq", "ifsq", "lfq", "lfq-groups", "bsq", "bsq-groups", "multi-group-lfq")
"""Examples without a stored codebook."""
TRAINED_BY_THE_DECODER = ("ibq", "ibq-normalize", "diveq", "sqvae")
"""Examples whose weights get the decoder's gradient by design."""
SAMPLED_IN_TRAINING = ("gq", "sqvae")
"""Examples whose codes in training are samples, not codes of the codebook."""
FIXED_CODES = ("leech", "gq", "vqbridge", "vqbridge-features")
"""Examples whose codes are computed, so that they cannot be standardized."""


def make(name: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(EXAMPLES[name])
    if isinstance(config := one_group(EXAMPLES[name]), LcConfig) and config.codebook_init == "artifact":
        quantizer.load_codebook(torch.randn(config.codebook_size, config.feature_dim))
    if isinstance(quantizer, BridgedQuantizer):
        if quantizer.config.needs_codebook:
            quantizer.load_codebook(torch.randn(quantizer.codes.shape))
        torch.nn.init.normal_(quantizer.bridge.head.weight)  # all codes start at 0
    return quantizer


def is_normalized(config: QuantizerConfig) -> bool:
    """Whether the codes are unit vectors."""
    config = one_group(config)
    return isinstance(config, CodebookConfig) and config.normalize


def one_group(config: QuantizerConfig) -> QuantizerConfig:
    return config.group if isinstance(config, MultiGroupConfig) else config


def takes_codebook(config: QuantizerConfig) -> bool:
    """Whether the codes come from a codebook artifact."""
    return isinstance(config, LcConfig) or (isinstance(config, VqBridgeConfig) and config.frozen_dim > 0)


def latent_of(quantizer: Quantizer, height: int = 3, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, quantizer.latent_dim, height, width, generator=generator)


def state_of(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(quantizer: Quantizer, before: dict[str, Tensor]) -> None:
    after = quantizer.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in after if not torch.equal(after[name], before[name])] == []


def test_every_quantizer_has_an_example() -> None:
    concrete = {cls for cls in all_subclasses(Quantizer) if "config_class" in vars(cls)}
    assert concrete - {type(make(name)) for name in EXAMPLES} == set()


@pytest.mark.parametrize("name", EXAMPLES)
def test_ids_follow_layout_and_range(name: str) -> None:
    quantizer = make(name)
    latent = latent_of(quantizer)
    quantized = quantizer(latent)
    assert quantized.codes.shape == latent.shape
    assert quantized.ids.dtype == torch.int64
    assert quantized.ids.shape == (2, quantizer.layout(3, 5).num_tokens)
    assert quantized.ids.min() >= 0
    assert quantized.ids.max() < quantizer.codebook_size
    assert quantizer.layout(3, 5).num_groups == quantizer.num_groups


@pytest.mark.parametrize("name", EXAMPLES)
def test_images_are_quantized_independently(name: str) -> None:
    quantizer = make(name).eval()
    latent = latent_of(quantizer)
    assert torch.equal(quantizer(latent).ids[1:], quantizer(latent[1:]).ids)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_images_have_no_ids(name: str) -> None:
    quantizer = make(name).eval()
    with torch.no_grad():
        codes, ids, _ = quantizer(latent_of(quantizer)[:0])
    assert codes.shape == (0, quantizer.latent_dim, 3, 5)
    assert ids.shape == (0, quantizer.layout(3, 5).num_tokens)


@pytest.mark.parametrize(
    "name",
    [
        *("lc", "bsq-groups", "multi-scale"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gq", "multi-group", "residual", "vqbridge")),
    ],
)
def test_evaluation_exports_to_a_graph_of_any_batch_size(name: str) -> None:
    quantizer = make(name).eval().requires_grad_(False)
    latent = latent_of(quantizer)
    exported = torch.export.export(quantizer, (latent,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    latent = torch.cat([latent, latent[:1]])
    assert torch.equal(exported.module()(latent).ids, quantizer(latent).ids)


@pytest.mark.parametrize("name", EXAMPLES)
def test_lookup_equals_forward_exactly_in_evaluation(name: str) -> None:
    quantizer = make(name).eval().requires_grad_(False)
    quantized = quantizer(latent_of(quantizer))
    assert torch.equal(quantizer.lookup(quantized.ids, quantizer.layout(3, 5)), quantized.codes)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in SAMPLED_IN_TRAINING])
def test_lookup_agrees_with_forward_in_training(name: str) -> None:
    quantizer = make(name).train()
    quantized = quantizer(latent_of(quantizer))
    torch.testing.assert_close(quantizer.lookup(quantized.ids, quantizer.layout(3, 5)), quantized.codes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_negative_id_gives_the_zero_vector(name: str) -> None:
    quantizer = make(name)
    layout = quantizer.layout(3, 5)
    codes = quantizer.lookup(torch.full((2, layout.num_tokens), -1), layout)
    assert codes.shape == (2, quantizer.latent_dim, 3, 5)
    assert not codes.any()


@pytest.mark.parametrize("name", EXAMPLES)
def test_codes_of_ids_are_rows_of_the_codebook_and_combine_to_the_codes_of_positions(name: str) -> None:
    quantizer = make(name).eval().requires_grad_(False)
    layout, ids = quantizer.layout(3, 5), quantizer(latent_of(quantizer)).ids
    codes = quantizer.token_codes(ids)
    assert codes.shape[2] == quantizer.token_dim
    groups = torch.arange(ids.shape[1]) % quantizer.num_groups
    torch.testing.assert_close(codes, quantizer.all_codes()[groups, ids], rtol=0, atol=1e-6)
    assert torch.equal(quantizer.combine(codes, layout), quantizer.lookup(ids, layout))
    ids[0, :4] = -1
    assert not quantizer.token_codes(ids)[0, :4].any()
    assert torch.equal(quantizer.combine(quantizer.token_codes(ids), layout), quantizer.lookup(ids, layout))
    codes.requires_grad_()
    combined = quantizer.combine(codes, layout)
    (combined * torch.randn_like(combined)).sum().backward()
    assert codes.grad is not None
    assert codes.grad.abs().sum(-1).bool().all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_ids_outside_the_codebook_are_rejected(name: str) -> None:
    quantizer = make(name)
    layout = quantizer.layout(3, 5)
    with pytest.raises(DataError):
        quantizer.lookup(torch.full((2, layout.num_tokens), quantizer.codebook_size), layout)
    with pytest.raises(DataError):
        quantizer.lookup(torch.zeros(2, layout.num_tokens + 1, dtype=torch.int64), layout)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradient_of_codes_reaches_the_latent(name: str) -> None:
    quantizer = make(name).train()
    latent = latent_of(quantizer).requires_grad_()
    quantizer(latent).codes.sum().backward()
    assert latent.grad is not None
    assert latent.grad.any()
    if name not in TRAINED_BY_THE_DECODER:
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_are_finite_scalars_that_train_every_weight(name: str) -> None:
    quantizer = make(name).train()
    codes, _, losses = quantizer(latent_of(quantizer))
    assert set(losses) == set(quantizer.loss_names)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    total = sum(losses.values(), codes.sum() if name in TRAINED_BY_THE_DECODER else torch.zeros(()))
    if total.requires_grad:
        total.backward()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", EXAMPLES)
def test_evaluation_without_gradients_computes_no_matrix_of_all_distances(name: str) -> None:
    quantizer = make(name).eval()
    with torch.no_grad():
        codes, ids, losses = quantizer(latent_of(quantizer))
    left_out = set(quantizer.loss_names) - set(losses)
    kind = getattr(quantizer.config, "group", quantizer.config).kind
    assert left_out == {"ibq": {"entropy"}, "regvq": {"prior"}, "sqvae": {"entropy"}}.get(kind, set())
    whole = quantizer(latent_of(quantizer))
    assert torch.equal(ids, whole.ids)
    assert torch.equal(codes, whole.codes)
    assert all(torch.equal(loss, whole.losses[term]) for term, loss in losses.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EXAMPLES)
def test_forward_and_lookup_do_not_change_the_state(name: str, training: bool) -> None:
    quantizer = make(name).train(training)
    before = state_of(quantizer)
    quantizer.lookup(quantizer(latent_of(quantizer)).ids, quantizer.layout(3, 5))
    assert_same_state(quantizer, before)


@pytest.mark.parametrize("name", EXAMPLES)
def test_update_is_deterministic(name: str) -> None:
    first, second = make(name), make(name)
    for quantizer in (first, second):
        latent = latent_of(quantizer)
        torch.manual_seed(2)
        quantizer.update(latent, quantizer(latent).ids)
    assert_same_state(first, state_of(second))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_quantizer_without_an_update_does_not_change_in_it(name: str) -> None:
    quantizer = make(name).train()
    before, latent = state_of(quantizer), latent_of(quantizer)
    if not quantizer.has_update:
        quantizer.update(latent, quantizer(latent).ids)
        assert_same_state(quantizer, before)


@pytest.mark.parametrize("name", EXAMPLES)
def test_autocast_changes_nothing(name: str) -> None:
    quantizer = make(name)
    latent = latent_of(quantizer)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(latent)
    torch.manual_seed(2)
    outside = quantizer(latent)
    assert inside.codes.dtype == torch.float32
    assert torch.equal(inside.ids, outside.ids)
    assert torch.equal(inside.codes, outside.codes)
    assert all(torch.equal(inside.losses[term], outside.losses[term]) for term in outside.losses)


@pytest.mark.parametrize("name", EXAMPLES)
def test_converting_a_module_leaves_its_quantizer_in_float32(name: str) -> None:
    quantizer = make(name).eval()
    latent = latent_of(quantizer).to(torch.bfloat16)
    expected = quantizer(latent)
    torch.nn.Sequential(quantizer).bfloat16()
    codes, ids, _ = quantizer(latent)
    assert codes.dtype == torch.float32
    assert torch.equal(ids, expected.ids)
    assert torch.equal(codes, expected.codes)


def test_weights_that_were_assigned_in_another_type_are_converted_to_float32() -> None:
    quantizer = make("vq")
    quantizer.load_state_dict({name: value.half() for name, value in quantizer.state_dict().items()}, assign=True)
    assert {value.dtype for value in quantizer.float().state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", EXAMPLES)
def test_codes_that_are_read_under_autocast_are_those_of_float32(name: str) -> None:
    first, second = (make(name).eval().requires_grad_(False) for _ in range(2))
    expected = second(latent_of(second))
    codes = second.token_codes(expected.ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first.token_codes(expected.ids), codes)
        assert torch.equal(first.all_codes(), second.all_codes())
        assert torch.equal(first.combine(codes, first.layout(3, 5)), expected.codes)
    assert torch.equal(first(latent_of(first)).codes, expected.codes)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_latent_raises_or_in_training_gives_nonfinite_output(name: str, bad: float) -> None:
    quantizer = make(name)
    latent = latent_of(quantizer)
    latent[0, 0, 0, 0] = bad
    with pytest.raises(NumericError):
        quantizer.eval()(latent)
    if name in ("fsq", "ifsq") and bad == torch.inf:
        return  # tanh maps infinity to the outermost level
    quantized = quantizer.train()(latent)
    assert not torch.isfinite(quantized.codes.sum() + sum(quantized.losses.values()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_state_and_config_restore_the_quantizer(name: str) -> None:
    quantizer = make(name).eval()
    restored = build_quantizer(from_table(QuantizerConfig, to_table(quantizer.config))).eval()
    assert restored.config == quantizer.config
    restored.load_state_dict(quantizer.state_dict())
    latent = latent_of(quantizer)
    assert torch.equal(restored(latent).ids, quantizer(latent).ids)


@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_restore_a_quantizer_that_was_built_on_the_meta_device(name: str) -> None:
    quantizer = make(name).eval()
    with torch.device("meta"):
        restored = build_quantizer(quantizer.config).eval()
    restored.load_state_dict(quantizer.state_dict(), assign=True)
    latent = latent_of(quantizer)
    assert torch.equal(restored(latent).ids, quantizer(latent).ids)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not takes_codebook(one_group(EXAMPLES[name]))])
def test_other_quantizers_do_not_load_a_codebook(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"the {one_group(EXAMPLES[name]).kind} quantizer"):
        make(name).load_codebook(torch.zeros(40, 6))


@pytest.mark.parametrize("name", WITHOUT_CODEBOOK)
def test_all_codes_are_those_of_all_ids(name: str) -> None:
    quantizer = make(name)
    side = quantizer.codebook_size
    ids = torch.arange(side).repeat_interleave(quantizer.num_groups)[None]
    codes = quantizer.lookup(ids, quantizer.layout(1, side)).view(quantizer.num_groups, -1, side).transpose(1, 2)
    assert torch.equal(quantizer.all_codes(), codes)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in (*WITHOUT_CODEBOOK, *FIXED_CODES)])
def test_standardized_codes_have_zero_mean_and_unit_variance(name: str) -> None:
    quantizer = make(name)
    quantizer.standardize_codebook()
    codes = quantizer.codebook().detach()  # [K, C], or [G, K, C / G]
    if is_normalized(EXAMPLES[name]):
        torch.testing.assert_close(codes.norm(dim=-1), torch.ones(codes.shape[:-1]))
        assert codes.mean(-2).norm(dim=-1).max() < 0.3
    else:
        variance = codes.var(-2, unbiased=False).mean(-1)
        torch.testing.assert_close(codes.mean(-2), torch.zeros_like(codes[..., 0, :]), rtol=0, atol=1e-5)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-5)
    second = make(name)
    second.standardize_codebook()
    assert_same_state(second, state_of(quantizer))


SIZES = {"codebook_size": 20, "code_dim": 3}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (VqConfig, {"codebook_size": 1, "code_dim": 8}, "codebook_size = 1"),
        (CvqConfig, SIZES | {"decay": 1.0}, "decay"),
        (IbqConfig, SIZES | {"metric": "cosine"}, "normalize = true"),
        *((FsqConfig, {"levels": levels}, "levels") for levels in ((), (8, 1), (2,) * 63)),
        (LfqConfig, {"code_dim": 0}, "code_dim"),
        (LfqConfig, {"code_dim": 63}, "code_dim"),
        (LfqConfig, {"entropy_bits": 30}, "entropy_bits"),
        (LfqConfig, {"entropy_temperature": 0.0}, "entropy_temperature"),
        (FsqConfig, {"levels": (8, 5), "bound": "sigmoid"}, "odd"),
        (BsqConfig, {"code_dim": 18, "bits_per_id": 4}, "divide"),
        (BsqConfig, {"code_dim": 64}, "64 bits"),
        (DiveqConfig, SIZES | {"min_hit_rate": 2.0}, "min_hit_rate"),
        (GqConfig, {"code_dim": 0}, "code_dim = 0"),
        *((GqConfig, {"codebook_seed": seed}, "codebook_seed") for seed in (2**64, -(2**63) - 1)),
        *((LcConfig, SIZES | {"feature_dim": dim}, "feature_dim = ") for dim in (0, -1)),
        (SqvaeConfig, SIZES | {"normalize": True}, "squared distances"),
        (RegVqConfig, SIZES | {"mask_ratio": 1.5}, "mask_ratio"),
        (VqBridgeConfig, {"codebook_size": 1009, "patch_size": 4}, "patches of 4 x 4"),
        (ResidualConfig, SIZES | {"depth": 0}, "depth = 0"),
        (ResidualConfig, SIZES | {"normalize": True}, "unit vectors"),
        *((MultiScaleConfig, {"scales": scales}, "should grow") for scales in ((), (2, 1), (0, 4), (1, 2, 2))),
        (MultiScaleConfig, {"num_phis": 0}, "num_phis = 0"),
        (MultiScaleConfig, {"phi_ratio": 1.5}, "phi_ratio"),
        (MultiScaleConfig, {"normalize": True}, "unit vectors"),
        (MultiGroupConfig, {"num_groups": 0}, "num_groups = 0"),
        *(
            (MultiGroupConfig, {"num_groups": 3, "keep_probabilities": shares}, "keep_probabilities")
            for shares in [(0.5, 0.5), (0.5, 0.5, 0.5), (1.5, -0.5, 0.0)]
        ),
    ],
    ids=str,
)
def test_invalid_settings_are_rejected(config: type[QuantizerConfig], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
