from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqpipe.errors import ConfigError
from vqpipe.models import DcaeConfig, build_autoencoder, dcae
from vqpipe.models.dcae import AverageChannels, EfficientVitBlock, LinearAttention, RepeatChannels, RmsNorm
from vqpipe.quantizers import CvqConfig, MultiGroupConfig, VqConfig

G4 = MultiGroupConfig()
G8 = MultiGroupConfig(num_groups=8, group=CvqConfig(codebook_size=2048, code_dim=4, normalize=True))
SIZES: dict[str, dict[str, Any]] = {
    "f8": {"widths": (128, 256, 512, 512), "encoder_depths": (0, 4, 8, 2), "decoder_depths": (0, 5, 10, 2)},
    "f16": {},
    "f32": {
        "widths": (128, 256, 512, 512, 1024, 1024),
        "encoder_depths": (0, 4, 8, 2, 2, 2),
        "decoder_depths": (0, 5, 10, 2, 2, 2),
    },
}


def narrow(**changes: Any) -> DcaeConfig:
    """One residual block, then one EfficientViT block: f4."""
    sizes = {"widths": (0, 16, 32), "encoder_depths": (0, 1, 1), "decoder_depths": (0, 1, 1), "attention_from": 2}
    quantizer = VqConfig(codebook_size=16, code_dim=4)
    return DcaeConfig(**{**sizes, "latent_channels": 8, "quantizer": quantizer, **changes})


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "groups", "encoder", "decoder", "total"),
    [
        ("f8", 4, 51_999_776, 75_921_164, 128_183_660),
        ("f8", 8, 51_999_776, 75_921_164, 127_986_796),
        ("f16", 4, 87_069_984, 128_688_396, 216_021_100),
        ("f16", 8, 87_069_984, 128_688_396, 215_824_236),
        ("f32", 4, 123_172_384, 200_184_076, 323_619_180),
        ("f32", 8, 123_172_384, 200_184_076, 323_422_316),
    ],
)
def test_number_of_parameters_is_as_published(size: str, groups: int, encoder: int, decoder: int, total: int) -> None:
    with torch.device("meta"):
        model = build_autoencoder(DcaeConfig(quantizer=G4 if groups == 4 else G8, **SIZES[size]))
    assert model.config.quant_conv == "grouped"
    assert (size_of(model.encoder), size_of(model.decoder), size_of(model)) == (encoder, decoder, total)
    assert f"f{model.downsample_factor}" == size


@pytest.mark.parametrize(
    ("size", "encoder", "decoder"),
    [
        (
            "f8",
            (1_792, 5_016_704, 38_350_976, 8_482_816, 147_488),
            (147_968, 10_621_696, 56_640_512, 8_482_816, 28_172),
        ),
        (
            "f32",
            (1_792, 5_016_704, 38_350_976, 9_662_720, 36_102_400, 33_742_848, 294_944),
            (295_936, 10_621_696, 56_640_512, 27_359_232, 71_495_680, 33_742_848, 28_172),
        ),
    ],
)
def test_number_of_parameters_per_stage_is_as_published(
    size: str, encoder: tuple[int, ...], decoder: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = build_autoencoder(DcaeConfig(quantizer=G4, **SIZES[size]))
    for network, counts in ((model.encoder, encoder), (model.decoder, decoder)):
        parts = [network.project_in, *list(network.stages)[1:], network.project_out]
        assert tuple(size_of(part) for part in parts) == counts
        assert size_of(network.stages[0]) == 0


def test_stages_with_attention_and_batch_norm() -> None:
    with torch.device("meta"):
        model = build_autoencoder(DcaeConfig(quantizer=G4))

    def stages_with(kind: type[nn.Module]) -> set[str]:
        names = (name.split(".") for name, module in model.named_modules() if isinstance(module, kind))
        return {".".join((network, stage)) for network, _, stage, *_ in names}

    assert stages_with(EfficientVitBlock) == {"encoder.3", "encoder.4", "decoder.3", "decoder.4"}
    assert stages_with(nn.BatchNorm2d) == {"decoder.1", "decoder.2"}
    assert stages_with(nn.ReLU) == {"decoder.1", "decoder.2", "decoder.op_list"}  # the last is project_out


def test_resolution_changes_by_the_downsample_factor() -> None:
    model = build_autoencoder(narrow())
    z = model.encoder(torch.zeros(2, 3, 8, 20))
    assert z.shape == (2, 8, 2, 5)
    assert model.decoder(z).shape == (2, 3, 8, 20)


@pytest.mark.parametrize("side", [5, 9], ids=["T < D", "T > D"])
def test_attention_matches_the_formula(side: int) -> None:
    torch.manual_seed(0)
    attention, x = LinearAttention(64), torch.randn(2, 64, side, side)
    heads = attention.qkv(x).flatten(2).view(2, 2, 3, 32, side * side).double()  # image, head, q k v, channel, position
    q, k, v = heads[:, :, 0].relu(), heads[:, :, 1].relu(), heads[:, :, 2]
    weights = torch.einsum("bhci,bhcj->bhij", q, k)
    mixed = torch.einsum("bhij,bhcj->bhci", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(attention(x), attention.proj(mixed.reshape(2, 64, side, side).float()))


def test_attention_is_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = dcae_attention(q, k, v)
        seen.extend([q.dtype, mixed.dtype, torch.is_autocast_enabled("cpu")])
        return mixed

    dcae_attention = dcae.relu_attention
    monkeypatch.setattr(dcae, "relu_attention", attend)
    with torch.autocast("cpu", torch.bfloat16):
        assert LinearAttention(32)(torch.randn(1, 32, 8, 8)).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32, False]


def test_norm_matches_the_formula() -> None:
    torch.manual_seed(0)
    norm, x = RmsNorm(6), torch.randn(2, 6, 3, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    wide, weight, bias = x.double(), norm.weight.double()[:, None, None], norm.bias.double()[:, None, None]
    want = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(norm(x), want.float())
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [1, 2])
def test_shortcuts_average_and_repeat_neighboring_channels(factor: int) -> None:
    x = torch.randn(1, 8, 4, 6)
    down = AverageChannels(4, factor)(x)
    assert down.shape == (1, 4, 4 // factor, 6 // factor)
    for channel in range(4):
        # two channels of x, with the positions of one cell
        cells = x[0, 2 * channel : 2 * channel + 2].unfold(1, factor, factor).unfold(2, factor, factor)
        torch.testing.assert_close(down[0, channel], cells.mean((0, 3, 4)))
    up = RepeatChannels(8, factor)(down)
    assert up.shape == x.shape
    torch.testing.assert_close(AverageChannels(4, factor)(up), down)


def test_every_weight_gets_a_gradient_and_last_layer_outputs_the_image() -> None:
    torch.manual_seed(0)
    model = build_autoencoder(narrow()).train()
    reconstruction = model(torch.randn(2, 3, 16, 16))
    (reconstruction.images.square().mean() + sum(reconstruction.quantized.losses.values())).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []
    with torch.no_grad():
        model.last_layer.zero_()
        flat = model(torch.randn(1, 3, 16, 16)).images
    assert len(flat[0, 0].unique()) == 4  # the bias only: one value for each of 2 x 2 pixels


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": (0,), "encoder_depths": (0,), "decoder_depths": (0,)},
        {"encoder_depths": (0, 1)},
        {"decoder_depths": (1, 1, 1)},
        {"decoder_depths": (0, 1, 0)},
        {"widths": (0, 16, 48)},  # not a multiple of a head
        {"widths": (0, 18, 32)},  # not a quarter
        {"widths": (0, 16, 128)},  # 8 times wider
        {"latent_channels": 12},
        {"latent_channels": 0},
        {"attention_from": 0},
    ],
)
def test_inconsistent_sizes_are_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        narrow(**changes)
