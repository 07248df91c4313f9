from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.models import Magvit, MagvitConfig, build_autoencoder
from vqpipe.models.magvit import AdaptiveGroupNorm, depth_to_space
from vqpipe.models.vqgan import ResidualBlock
from vqpipe.quantizers import LfqConfig, QuantizerConfig, ResidualConfig, VqConfig

F16, F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
VQ = VqConfig(codebook_size=16, code_dim=6)


def make(quantizer: QuantizerConfig = VQ, multipliers: tuple[int, ...] = (1, 2, 4), **settings: object) -> Magvit:
    torch.manual_seed(0)
    config = MagvitConfig(
        base_channels=16, channel_multipliers=multipliers, num_res_blocks=1, quantizer=quantizer, **settings
    )
    model = build_autoencoder(config)
    assert isinstance(model, Magvit)
    return model


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("multipliers", "encoder", "decoder", "tensors"),
    [(F16, 49_751_442, 65_376_387, 159 + 180), (F8, 48_422_162, 63_599_491, 133 + 150)],
    ids=["f16", "f8"],
)
def test_number_of_parameters_is_as_released(
    multipliers: tuple[int, ...], encoder: int, decoder: int, tensors: int
) -> None:
    with torch.device("meta"):
        model = build_autoencoder(MagvitConfig(channel_multipliers=multipliers, quantizer=LfqConfig(code_dim=18)))
    assert size_of(model.encoder) == encoder
    assert size_of(model.decoder) == decoder
    names = {name for name in model.state_dict() if not name.startswith("quantizer.")}
    assert len(names) == tensors
    last = len(multipliers) - 1
    assert names > {
        "encoder.conv_in.weight",
        "encoder.down.0.block.3.norm2.bias",
        f"encoder.down.{last}.block.0.nin_shortcut.weight",
        "encoder.down.0.downsample.bias",
        "encoder.mid_block.3.conv2.weight",
        "encoder.conv_out.bias",
        "decoder.mid_block.0.norm1.weight",
        f"decoder.adaptive.{last}.gamma.weight",
        "decoder.adaptive.0.beta.bias",
        f"decoder.up.{last}.upsample.conv1.bias",
        "decoder.up.0.block.3.conv1.weight",
        "decoder.conv_out.bias",
    }


def test_depth_to_space_of_each_pixel() -> None:
    x = torch.arange(2 * 12 * 2 * 5).float().view(2, 12, 2, 5)
    y = depth_to_space(x)
    assert y.shape == (2, 3, 4, 10)
    for row in range(4):
        for column in range(10):
            for channel in range(3):
                offset = 2 * (row % 2) + column % 2
                expected = x[:, 3 * offset + channel, row // 2, column // 2]
                assert torch.equal(y[:, channel, row, column], expected)


def test_adaptive_norm_matches_the_formula() -> None:
    torch.manual_seed(0)
    norm, x, codes = AdaptiveGroupNorm(3, 8), torch.randn(2, 8, 4, 5), torch.randn(2, 3, 2, 3)
    groups = x.view(2, norm.gn.num_groups, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    normalized = ((groups - mean) / (variance + 1e-6).sqrt()).view_as(x)
    centered = codes - codes.mean((2, 3), keepdim=True)
    deviation = (centered.square().sum((2, 3)) / (2 * 3 - 1) + 1e-6).sqrt()
    scale = deviation @ norm.gamma.weight.T + norm.gamma.bias
    shift = codes.mean((2, 3)) @ norm.beta.weight.T + norm.beta.bias
    expected = scale.view(2, 8, 1, 1) * normalized + shift.view(2, 8, 1, 1)
    torch.testing.assert_close(norm(x, codes), expected)


def test_residual_block_matches_the_formula() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(8, 16, bias=False), torch.randn(2, 8, 5, 7)

    def activated(y: Tensor, norm: nn.Module) -> Tensor:
        normed = norm(y)
        return normed * torch.sigmoid(normed)

    first = nn.functional.conv2d(activated(x, block.norm1), block.conv1.weight, padding=1)
    second = nn.functional.conv2d(activated(first, block.norm2), block.conv2.weight, padding=1)
    shortcut = torch.einsum("oi,bihw->bohw", block.nin_shortcut.weight[:, :, 0, 0], x)
    torch.testing.assert_close(block(x), second + shortcut)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 20), (28, 8)])
def test_latents_of_any_size(height: int, width: int) -> None:
    model = make()
    with torch.no_grad():
        images, latent, _ = model(torch.randn(2, 3, height, width))
    assert latent.shape == (2, 6, height // 4, width // 4)
    assert images.shape == (2, 3, height, width)
    assert images.isfinite().all()  # also for one position, whose variance is 0


def test_every_weight_gets_a_gradient() -> None:
    model = make()
    images, _, quantized = model(torch.randn(2, 3, 16, 24))
    (images.square().mean() + sum(quantized.losses.values())).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    assert model.last_layer is model.decoder.conv_out.weight


@pytest.mark.parametrize("quantizer", [VQ, LfqConfig(code_dim=5), ResidualConfig(codebook_size=16, code_dim=7)])
def test_encoder_outputs_the_channels_of_the_quantizer(quantizer: QuantizerConfig) -> None:
    model = make(quantizer)
    assert isinstance(model.quant_conv, nn.Identity)
    assert model.encoder.conv_out.out_channels == model.quantizer.latent_dim
    full = make(quantizer, quant_conv="full", z_channels=10)
    assert (full.quant_conv.in_channels, full.quant_conv.out_channels) == (10, full.quantizer.latent_dim)
    assert full(torch.randn(1, 3, 8, 8)).images.shape == (1, 3, 8, 8)
    with pytest.raises(ConfigError, match="quant_conv"):
        make(quantizer, z_channels=10)


def test_latent_dim_of_uses_no_random_numbers() -> None:
    explicit = make(z_channels=6)
    assert torch.equal(make().encoder.conv_in.weight, explicit.encoder.conv_in.weight)
    assert torch.equal(make().quantizer.codebook(), explicit.quantizer.codebook())


@pytest.mark.parametrize("sizes", [{"base_channels": 0}, {"channel_multipliers": ()}, {"z_channels": -1}])
def test_invalid_sizes_are_rejected(sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MagvitConfig(quantizer=VQ, **sizes)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_norms_have_the_epsilon_of_the_settings(norm: str) -> None:
    blocks = make(norm=norm, norm_eps=0.25).encoder.down
    assert {module.eps for module in blocks.modules() if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d))} == {0.25}
