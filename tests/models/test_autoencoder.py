import copy

import pytest
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError, DataError
from vqpipe.models import Autoencoder, VqganConfig, autoencoder, build_autoencoder
from vqpipe.quantizers import CvqConfig, EmaConfig, LcConfig, MultiGroupConfig, QuantizerConfig, VqConfig
from vqpipe.quantizers.base import to_rows

QUANTIZERS: dict[str, QuantizerConfig] = {
    "lc": LcConfig(codebook_size=200, code_dim=8, feature_dim=24),
    "vq": VqConfig(codebook_size=200, code_dim=8),
    "ema": EmaConfig(codebook_size=200, code_dim=8),
}
SMALL = {"base_channels": 16, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 32}


def make(kind: str = "lc") -> Autoencoder:
    torch.manual_seed(0)
    model = build_autoencoder(VqganConfig(**SMALL, quantizer=QUANTIZERS[kind]))
    if kind == "lc":
        model.quantizer.load_codebook(torch.randn(200, 24) * torch.linspace(0.1, 4, 24) + 3)
    return model


def smooth_images(count: int = 20, size: int = 32) -> Tensor:
    """Random images with correlated neighboring pixels."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_forward_is_encode_then_decode(kind: str) -> None:
    model, images = make(kind).eval().requires_grad_(False), smooth_images(2)
    reconstruction, quantized = model(images), model.encode(images)
    assert reconstruction.images.shape == images.shape
    assert torch.equal(reconstruction.latent, model.latent(images))
    assert torch.equal(reconstruction.quantized.ids, quantized.ids)
    assert torch.equal(reconstruction.images, model.decode(quantized.codes))


def test_networks_in_bfloat16_run_with_their_quantizer_in_float32() -> None:
    model, images = make().eval().requires_grad_(False), smooth_images(2)
    ids = model.encode(images).ids
    reconstruction = model.bfloat16()(images.bfloat16())
    assert reconstruction.images.dtype == torch.bfloat16
    assert (reconstruction.quantized.ids == ids).float().mean() > 0.9


def test_indivisible_sides_are_rejected() -> None:
    with pytest.raises(DataError, match=r"30 x 32 pixels \(height x width\) are not divisible into cells of 4"):
        make().latent(torch.zeros(1, 3, 30, 32))


def test_abstract_config_is_rejected() -> None:
    with pytest.raises(ConfigError, match="AutoencoderConfig"):
        build_autoencoder(autoencoder.AutoencoderConfig(quantizer=QUANTIZERS["vq"]))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_whiten_init_whitens_latents_and_codes(kind: str) -> None:
    model, images = make(kind), smooth_images()
    before = model.latent(images)
    model.whiten_init(images)
    rows = to_rows(model.latent(images).detach()).double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(8).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.T.cov(correction=0), torch.eye(8).double(), rtol=0, atol=1e-3)
    codes = model.quantizer.codebook()
    torch.testing.assert_close(codes.var(0, unbiased=False).mean(), torch.ones(()), rtol=0, atol=1e-4)
    # ZCA rotates least of all whitenings: each channel stays correlated with its old values.
    old = to_rows(before.detach()).double()
    assert (((old - old.mean(0)) * rows).sum(0) > 0).all()


def test_whiten_init_increases_utilization() -> None:
    model, images = make(), smooth_images()
    used_before = len(model.encode(images).ids.unique())
    model.whiten_init(images)
    used = len(model.encode(images).ids.unique())
    assert used > 100
    assert used > 3 * used_before


def test_whiten_init_is_deterministic_and_changes_no_other_weights() -> None:
    start = make()
    models = [copy.deepcopy(start) for _ in range(2)]
    for model in models:
        torch.manual_seed(5)
        model.whiten_init(smooth_images())
    first, second = (model.state_dict() for model in models)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    changed = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, first[name])}
    assert changed == {
        "quant_conv.weight",
        "quant_conv.bias",
        "quantizer.shift",
        "quantizer.scale",
        "quantizer.projector.0.weight",
        "quantizer.projector.0.bias",
    }


def test_whiten_init_uses_the_images_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth_images()
    model = make()
    mean, covariance = model.latent_moments(images)
    shares: list[Tensor] = []
    monkeypatch.setattr(autoencoder, "all_reduce_sum", lambda tensor: shares.append(tensor.clone()))
    for rank in range(2):
        model.latent_moments(images[rank::2])
    monkeypatch.setattr(autoencoder, "all_reduce_sum", lambda tensor: tensor.copy_(sum(shares)))
    for rank in range(2):
        rank_mean, rank_covariance = model.latent_moments(images[rank::2])
        torch.testing.assert_close(rank_mean, mean)
        torch.testing.assert_close(rank_covariance, covariance, rtol=1e-4, atol=1e-9)


def test_whiten_init_needs_enough_latent_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "all_reduce_sum", lambda tensor: tensor.mul_(8))  # 8 ranks with the same images
    with pytest.raises(DataError, match="4 latent vectors are too few to whiten 8 channels"):
        make().whiten_init(smooth_images(1, size=8))


@torch.no_grad()
def test_whiten_init_of_a_channel_that_does_not_vary_is_finite() -> None:
    model = make("vq")
    assert isinstance(model.quant_conv, nn.Conv2d)
    model.quant_conv.weight[1] = 0.0
    model.whiten_init(smooth_images())
    assert model.quant_conv.weight.isfinite().all()
    covariance = to_rows(model.latent(smooth_images())).double().T.cov(correction=0)
    expected = torch.eye(8).double()
    expected[1, 1] = 0.0
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_whiten_init_whitens_each_group_of_a_grouped_quant_conv() -> None:
    torch.manual_seed(0)
    quantizer = MultiGroupConfig(num_groups=2, group=CvqConfig(codebook_size=20, code_dim=3))
    model = build_autoencoder(VqganConfig(**SMALL, quant_conv="grouped", quantizer=quantizer))
    model.whiten_init(smooth_images())
    covariance = to_rows(model.latent(smooth_images())).double().T.cov(correction=0)
    for group in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(covariance[group, group], torch.eye(3).double(), rtol=0, atol=1e-3)
    assert covariance[:3, 3:].abs().max() > 0.01


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_whiten_init_of_equal_latents_is_an_error(scale: float) -> None:
    model = make("vq")
    assert isinstance(model.quant_conv, nn.Conv2d)
    model.quant_conv.weight.data.mul_(scale)  # at 0 each latent is the bias, also of images that differ
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match=r"latents .* all equal.*train.whiten_init = false"):
        model.whiten_init(torch.full((128, 3, 4, 4), -1.0) if scale else smooth_images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
