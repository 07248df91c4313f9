"""Every quantizer works with every backbone; what holds for every backbone."""

import pytest
import torch
from torch import Tensor

from vqpipe.config import from_table, to_table
from vqpipe.models import AutoencoderConfig, build_autoencoder

QUANTIZERS = {
    "vq": {"kind": "vq", "codebook_size": 32, "code_dim": 8, "normalize": True},
    "ema": {"kind": "ema", "codebook_size": 32, "code_dim": 8},
    "lc": {"kind": "lc", "codebook_size": 32, "code_dim": 8, "feature_dim": 12},
    "cvq": {"kind": "cvq", "codebook_size": 32, "code_dim": 8},
    "simvq": {"kind": "simvq", "codebook_size": 32, "code_dim": 8},
    "ibq": {"kind": "ibq", "codebook_size": 32, "code_dim": 8},
    "lfq": {"kind": "lfq", "code_dim": 6},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3]},
    "residual": {"kind": "residual", "codebook_size": 32, "code_dim": 8, "depth": 3},
    "multi_scale": {"kind": "multi_scale", "codebook_size": 32, "code_dim": 8, "scales": [1, 2, 4]},
    "groups of cvq": {
        "kind": "multi_group",
        "group": {"kind": "cvq", "codebook_size": 32, "code_dim": 4, "normalize": True},
    },
    "groups of lc": {
        "kind": "multi_group",
        "group": {"kind": "lc", "codebook_size": 32, "code_dim": 4, "feature_dim": 12},
    },
    "groups of lfq": {"kind": "multi_group", "group": {"kind": "lfq", "code_dim": 4}},
}
BACKBONES = {
    "vqgan": {"kind": "vqgan", "base_channels": 8, "channel_multipliers": [1, 2, 2], "z_channels": 16},
    "dcae": {"kind": "dcae", "widths": [8, 16, 32], "encoder_depths": [0, 1, 1], "decoder_depths": [0, 1, 1]}
    | {"attention_from": 2, "latent_channels": 16},
    "magvit": {"kind": "magvit", "base_channels": 8, "channel_multipliers": [1, 2, 2], "num_res_blocks": 1},
    "magvit with a quant_conv": {"kind": "magvit", "base_channels": 8, "channel_multipliers": [1, 2, 2]}
    | {"num_res_blocks": 1, "quant_conv": "full", "z_channels": 16},
}


@pytest.fixture
def images() -> Tensor:
    coarse = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_step_gives_every_weight_a_gradient(backbone: str, quantizer: str, images: Tensor) -> None:
    torch.manual_seed(0)
    table = {**BACKBONES[backbone], "quantizer": QUANTIZERS[quantizer]}
    model = build_autoencoder(from_table(AutoencoderConfig, table))
    assert model.downsample_factor == 4
    if "lc" in quantizer:
        model.quantizer.load_codebook(torch.randn(32, 12))
    if backbone != "magvit":
        model.whiten_init(images)
    output = model.train()(images)
    (output.images.abs().mean() + sum(output.quantized.losses.values())).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert any(model.last_layer is weight for weight in model.decoder.parameters())
    model.quantizer.update(output.latent.detach(), output.quantized.ids)
    model.eval()
    with torch.no_grad():
        quantized = model.encode(images)
        layout = model.quantizer.layout(8, 8)
        reconstruction = model.decode(model.quantizer.lookup(quantized.ids, layout))
    assert quantized.ids.shape == (3, layout.num_tokens)
    assert reconstruction.shape == images.shape
    assert reconstruction.isfinite().all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_last_gives_the_same_output(backbone: str, images: Tensor) -> None:
    torch.manual_seed(0)
    table = {**BACKBONES[backbone], "quantizer": QUANTIZERS["vq"]}
    config = from_table(AutoencoderConfig, table)
    assert from_table(AutoencoderConfig, to_table(config)) == config
    model = build_autoencoder(config).eval()
    plain = model(images)
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.images, plain.images, rtol=1e-3, atol=2e-4)
