"""UniTok's networks: sizes of the paper, the encoder against timm's ViTamin, and a file in the released layout.

The names, the shapes and the forward pass of the file's reference are those of UniTok's public code.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqpipe.config import from_table, to_table
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.models import AutoencoderConfig, VitaminConfig, build_autoencoder
from vqpipe.models.released import Released, read_released
from vqpipe.quantizers import MultiGroupConfig, VqConfig
from vqpipe.training.tokenizer_task import blocks

WIDTHS, WIDTH, DEPTH, CODE_DIM, GROUPS, CODES = (16, 24), 128, 2, 4, 4, 12
LATENT = CODE_DIM * GROUPS
IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
SMALL = {"kind": "vitamin", "widths": [16, 24], "encoder_depths": [1, 2], "decoder_depths": [2, 1]}
SMALL |= {"transformer_width": 128, "transformer_depth": 2, "mlp_width": 96}


def released_file() -> dict[str, Tensor]:
    """The tensors of trainer.unitok in a small size."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}

    def random(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> None:
        tensors[name] = shift + scale * torch.randn(shape, generator=generator)

    def linear(name: str, before: int, after: int, kernel: tuple[int, ...] = (), bias: bool = True) -> None:
        fan = before * kernel[0] * kernel[1] if kernel else before
        random(f"{name}.weight", after, before, *kernel, scale=fan**-0.5)
        if bias:
            random(f"{name}.bias", after, scale=0.2)

    def norm(name: str, channels: int) -> None:
        random(f"{name}.weight", channels, scale=0.2, shift=1.0)
        random(f"{name}.bias", channels, scale=0.2)

    def conv(name: str, before: int, after: int, kernel: int = 3) -> None:
        linear(name, before, after, (kernel, kernel))

    def conv_block(name: str, before: int, after: int, resample: str) -> None:
        norm(f"{name}.pre_norm", before)
        conv(f"{name}.conv1_1x1", before, 4 * after, 1)
        conv(f"{name}.conv2_kxk", 1, 4 * after)
        conv(f"{name}.conv3_1x1", 4 * after, after, 1)
        if resample == "down" and before != after:
            conv(f"{name}.shortcut.expand", before, after, 1)
        if resample == "up":
            conv(f"{name}.shortcut.conv", before, after)
            conv(f"{name}.up.conv", 4 * after, 4 * after)

    def mlp(name: str, channels: int, hidden: int) -> None:
        norm(f"{name}.norm", channels)
        linear(f"{name}.w0", channels, hidden)
        linear(f"{name}.w1", channels, hidden)
        linear(f"{name}.w2", hidden, channels)

    def projection(name: str, before: int, after: int) -> None:
        hidden = max(before, after)
        norm(f"{name}.norm1", before)
        linear(f"{name}.attn.qkv", before, 3 * hidden, bias=False)
        random(f"{name}.attn.q_bias", hidden)
        random(f"{name}.attn.v_bias", hidden, scale=0.2)
        tensors[f"{name}.attn.zero_k_bias"] = torch.zeros(hidden)
        linear(f"{name}.attn.proj", after, after)
        norm(f"{name}.norm3", before)
        linear(f"{name}.proj", before, after)
        norm(f"{name}.norm2", after)
        mlp(f"{name}.mlp", after, 2 * after)

    stages = "encoder.patch_embed.backbone"
    conv(f"{stages}.stem.conv1", 3, WIDTHS[0])
    norm(f"{stages}.stem.norm1", WIDTHS[0])
    conv(f"{stages}.stem.conv2", WIDTHS[0], WIDTHS[0])
    conv_block(f"{stages}.stages.0.0", WIDTHS[0], WIDTHS[0], "down")
    conv_block(f"{stages}.stages.1.0", WIDTHS[0], WIDTHS[1], "down")
    conv_block(f"{stages}.stages.1.1", WIDTHS[1], WIDTHS[1], "")
    norm(f"{stages}.pool.norm", WIDTHS[1])
    conv(f"{stages}.pool.proj", WIDTHS[1], WIDTH)
    random("encoder.pos_embed", 1, 1, WIDTH, scale=0.2)  # zero in the public file
    for network in ("encoder", "decoder"):
        for number in range(DEPTH):
            name = f"{network}.blocks.{number}"
            norm(f"{name}.norm1", WIDTH)
            linear(f"{name}.attn.qkv", WIDTH, 3 * WIDTH)
            linear(f"{name}.attn.proj", WIDTH, WIDTH)
            norm(f"{name}.norm2", WIDTH)
            mlp(f"{name}.mlp", WIDTH, 96)
        norm(f"{network}.norm", WIDTH)
    projection("quant_proj", WIDTH, LATENT)
    for number in range(GROUPS):
        random(f"quantizer.codebooks.{number}.codebook.weight", CODES, CODE_DIM)
        tensors[f"quantizer.codebooks.{number}.vocab_usage"] = torch.zeros(CODES)
    projection("post_quant_proj", LATENT, WIDTH)
    conv("decoder.up_conv1.conv", WIDTH, WIDTHS[1])
    conv_block("decoder.up_conv2.0", WIDTHS[1], WIDTHS[1], "up")
    conv_block("decoder.up_conv2.1", WIDTHS[1], WIDTHS[1], "")
    conv_block("decoder.up_conv3.0", WIDTHS[1], WIDTHS[0], "up")
    conv("decoder.up_conv4.conv1.conv", WIDTHS[0], WIDTHS[0])
    norm("decoder.up_conv4.norm1", WIDTHS[0])
    conv("decoder.up_conv4.conv2", WIDTHS[0], 3)
    random("text_encoder.positional_embedding", 7, 8)
    norm("fc_norm", WIDTH)
    linear("projection", WIDTH, 8)
    tensors["logit_scale"] = torch.tensor(2.6)
    return tensors


class Reference:
    """The forward pass of the public code on the tensors of a file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=groups)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
        centered = x - x.mean(dim, keepdim=True)
        normed = centered / (centered.square().mean(dim, keepdim=True) + eps).sqrt()
        shape = (-1, 1, 1) if dim == 1 else (-1,)
        return normed * self.tensors[f"{name}.weight"].view(shape) + self.tensors[f"{name}.bias"].view(shape)

    def conv_block(self, name: str, x: Tensor, resample: str) -> Tensor:
        y = F.gelu(self.conv(f"{name}.conv1_1x1", self.norm(f"{name}.pre_norm", x, 1)))
        if resample == "up":
            y = self.conv(f"{name}.up.conv", double(y))
            x = self.conv(f"{name}.shortcut.conv", double(x))
        if resample == "down":
            ones = F.avg_pool2d(torch.ones_like(x), 3, 2, 1)  # the padding is not counted
            x = F.avg_pool2d(x, 3, 2, 1) / ones
            if f"{name}.shortcut.expand.weight" in self.tensors:
                x = self.conv(f"{name}.shortcut.expand", x)
        y = F.gelu(self.conv(f"{name}.conv2_kxk", y, 2 if resample == "down" else 1))
        return self.conv(f"{name}.conv3_1x1", y) + x

    def mlp(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(f"{name}.norm", x)
        gate = self.linear(f"{name}.w0", x)
        gate = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        return self.linear(f"{name}.w2", gate * self.linear(f"{name}.w1", x))

    def heads(self, qkv: Tensor, channels: int) -> Tensor:
        """float[B, T, 3 heads channels] -> float[B, heads, T, channels]."""
        query, key, value = (part.unflatten(2, (-1, channels)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        return (query @ key.transpose(2, 3) / channels**0.5).softmax(-1) @ value

    def transformer(self, network: str, x: Tensor) -> Tensor:
        for number in range(DEPTH):
            name = f"{network}.blocks.{number}"
            heads = self.heads(self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x)), 64)
            x = x + self.linear(f"{name}.attn.proj", heads.transpose(1, 2).flatten(2))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))
        return self.norm(f"{network}.norm", x)

    def projection(self, name: str, x: Tensor, average: bool) -> Tensor:
        bias = torch.cat([self.tensors[f"{name}.attn.{part}_bias"] for part in ("q", "zero_k", "v")])
        qkv = self.norm(f"{name}.norm1", x, eps=1e-5) @ self.tensors[f"{name}.attn.qkv.weight"].T + bias
        heads = self.heads(qkv, LATENT)
        heads = heads.mean(1) if average else heads.transpose(1, 2).flatten(2)
        x = self.linear(f"{name}.proj", self.norm(f"{name}.norm3", x, eps=1e-5))
        x = x + self.linear(f"{name}.attn.proj", heads)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, eps=1e-5))

    def encode(self, images: Tensor) -> Tensor:
        """float[B, T, C]."""
        name = "encoder.patch_embed.backbone"
        x = self.conv(f"{name}.stem.conv1", images, 2)
        x = self.conv(f"{name}.stem.conv2", F.gelu(self.norm(f"{name}.stem.norm1", x, 1)))
        x = self.conv_block(f"{name}.stages.0.0", x, "down")
        x = self.conv_block(f"{name}.stages.1.0", x, "down")
        x = self.conv_block(f"{name}.stages.1.1", x, "")
        x = self.conv(f"{name}.pool.proj", self.norm(f"{name}.pool.norm", x, 1), 2)
        tokens = x.flatten(2).transpose(1, 2) + self.tensors["encoder.pos_embed"]
        return self.projection("quant_proj", self.transformer("encoder", tokens), average=True)

    def decode(self, codes: Tensor, height: int) -> Tensor:
        x = self.transformer("decoder", self.projection("post_quant_proj", codes, average=False))
        x = x.transpose(1, 2).unflatten(2, (height, -1))
        x = self.conv("decoder.up_conv1.conv", double(x))
        x = self.conv_block("decoder.up_conv2.0", x, "up")
        x = self.conv_block("decoder.up_conv2.1", x, "")
        x = self.conv_block("decoder.up_conv3.0", x, "up")
        x = self.norm("decoder.up_conv4.norm1", self.conv("decoder.up_conv4.conv1.conv", double(x)), 1)
        return self.conv("decoder.up_conv4.conv2", F.gelu(x))


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Released]:
    def read(tensors: dict[str, Tensor]) -> Released:
        state = {"trainer": {"config": {"dcrit": "hg"}, "unitok": tensors, "disc": {}}, "epoch": 0}
        torch.save(state | {"args": {"model": "vitamin_large", "dtype": torch.bfloat16}}, tmp_path / "unitok.pth")
        return read_released(tmp_path / "unitok.pth")

    return read


def test_unitok_gives_the_ids_and_images_of_its_code(read: Callable[..., Released]) -> None:
    tensors = released_file()
    released = read(tensors)
    assert (released.family, released.image_size) == ("unitok", 256)
    assert any("causal attention, under the same names" in note for note in released.notes)
    assert "ignored in the training state: epoch, args, config, ... (4 in all)" in released.notes
    network, reference = released.autoencoder.eval().requires_grad_(False), Reference(tensors)
    latent = reference.encode(IMAGES)
    torch.testing.assert_close(network.latent(IMAGES).flatten(2).transpose(1, 2), latent, rtol=1e-3, atol=1e-4)
    codebooks = torch.stack([tensors[f"quantizer.codebooks.{number}.codebook.weight"] for number in range(GROUPS)])
    units = F.normalize(codebooks, dim=-1)
    ids = torch.einsum("btgc,gkc->btgk", latent.unflatten(2, (GROUPS, -1)), units).argmax(-1)
    quantized = network.encode(IMAGES)
    assert torch.equal(quantized.ids, ids.flatten(1))
    codes = torch.cat([units[group][ids[..., group]] for group in range(GROUPS)], dim=2)
    torch.testing.assert_close(network.decode(quantized.codes), reference.decode(codes, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("encoder.blocks.1.mlp.w2.bias", None, r"lacks encoder\.blocks\.1\.mlp\.w2\.bias"),
        ("quant_proj.attn.v_bias", None, r"lacks quant_proj\.attn\.v_bias"),
        ("encoder.pos_embed", torch.zeros(1, 7, WIDTH), "pos_embed is not one vector of 128 channels"),
        ("encoder.reg_token", torch.zeros(1, 4, WIDTH), r"unexpected weights: encoder\.reg_token"),
        ("decoder.up_conv4.conv2.weight", torch.zeros(4, 16, 3, 3), r"has shape \[4, 16, 3, 3\]"),
        ("quantizer.codebooks.3.codebook.weight", None, r"lacks quantizer\.codebooks\.3\.codebook\.weight"),
    ],
)
def test_other_names_and_shapes_are_refused(
    name: str, change: Tensor | None, message: str, read: Callable[..., Released]
) -> None:
    tensors = released_file()
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change
    with pytest.raises(WeightsError, match=message):
        read(tensors)


def test_encoder_is_vitamin_of_timm() -> None:
    """In timm its MLPs have the exact GELU, and a head follows; UniTok has the approximation by tanh."""
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg

    torch.manual_seed(0)
    stages = MbConvStages(VitCfg(embed_dim=(16, 24, 128), depths=(1, 2, 1), stem_width=16))
    theirs = VisionTransformer(
        img_size=32,
        patch_size=1,
        embed_layer=lambda **options: HybridEmbed(stages, proj=False, **options),
        embed_dim=128,
        depth=2,
        num_heads=2,
        mlp_ratio=0.75,
        mlp_layer=GeGluMlp,
        class_token=False,
        pos_embed="none",
        global_pool="",
        num_classes=0,
    ).eval()
    for module in theirs.modules():
        if isinstance(module, GeGluMlp):
            module.act = nn.GELU(approximate="tanh")
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.2)
    quantizer = {"kind": "vq", "codebook_size": 8, "code_dim": 16}
    ours = build_autoencoder(from_table(AutoencoderConfig, {**SMALL, "quantizer": quantizer})).eval()
    state = {name.removeprefix("patch_embed.backbone."): value for name, value in theirs.state_dict().items()}
    report = ours.encoder.load_state_dict(state, strict=False)
    assert report.unexpected_keys == []
    assert all(name.startswith("project.") for name in report.missing_keys)
    ours.encoder.project = nn.Identity()
    images = IMAGES[..., :32]
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encoder(images).flatten(2).transpose(1, 2), theirs(images), rtol=1e-3, atol=1e-4
        )


def test_sizes_are_those_of_unitok() -> None:
    group = VqConfig(codebook_size=4096, code_dim=8, normalize=True)
    config = VitaminConfig(quantizer=MultiGroupConfig(num_groups=8, group=group, masking="off"))
    with torch.device("meta"):
        model = build_autoencoder(config)
    assert model.quantizer.layout(16, 16).num_tokens == 2048
    assert from_table(AutoencoderConfig, to_table(config)) == config
    for change, message in (({"transformer_width": 96}, "multiple of 64"), ({"mlp_width": 0}, "mlp_width = 0")):
        with pytest.raises(ConfigError, match=message):
            from_table(AutoencoderConfig, to_table(config) | change)
    with pytest.raises(ConfigError, match="not a multiple of the 12 channels"):
        build_autoencoder(VitaminConfig(quantizer=VqConfig(codebook_size=8, code_dim=12)))


def test_training_step_gives_every_weight_a_gradient() -> None:
    torch.manual_seed(0)
    quantizer = {"kind": "vq", "codebook_size": 8, "code_dim": 16}
    model = build_autoencoder(from_table(AutoencoderConfig, {**SMALL, "quantizer": quantizer})).train()
    output = model(IMAGES)
    assert output.images.shape == IMAGES.shape
    (output.images.abs().mean() + sum(output.quantized.losses.values())).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert any(model.last_layer is weight for weight in model.decoder.parameters())
    assert len(list(blocks(model))) == 3 + 2 + 2 + 3  # those of activation checkpointing
