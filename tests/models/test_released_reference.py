"""Released layouts against references: files written from tables of published names, forwards written without our code.

Names, shapes, paddings, epsilons and the order of channels are those of the public code of each family.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vqpipe.errors import WeightsError
from vqpipe.models.released import Released, read_released

Tensors = dict[str, Tensor]

IMAGES = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
BASE = 32
"""Channels of the first level; the published group norms have 32 groups."""


class File:
    """A file under construction, with random tensors."""

    def __init__(self) -> None:
        self.weights: Tensors = {}
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def conv(self, name: str, before: int, after: int, kernel: int = 3, bias: bool = True) -> None:
        self.weights[f"{name}.weight"] = self.random(after, before, kernel, kernel) / (before * kernel**2) ** 0.5
        if bias:
            self.weights[f"{name}.bias"] = 0.2 * self.random(after)

    def linear(self, name: str, before: int, after: int) -> None:
        self.weights[f"{name}.weight"] = self.random(after, before) / before**0.5
        self.weights[f"{name}.bias"] = 0.2 * self.random(after)

    def norm(self, name: str, channels: int, batch: bool = False) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.2 * self.random(channels)
        self.weights[f"{name}.bias"] = 0.2 * self.random(channels)
        if batch:
            self.weights[f"{name}.running_mean"] = 0.2 * self.random(channels)
            scale = 1e-5 if "down.0.block.0.norm1" in name else 1.0  # after `weaken_input`
            self.weights[f"{name}.running_var"] = scale * (0.5 + self.random(channels).abs())
            self.weights[f"{name}.num_batches_tracked"] = torch.tensor(9)

    def weaken_input(self) -> None:
        """Scale the first convolution so that the epsilon of the first norm matters."""
        for part in ("weight", "bias"):
            if f"encoder.conv_in.{part}" in self.weights:
                self.weights[f"encoder.conv_in.{part}"] *= 0.005

    def average(self) -> None:
        """Move the trained weights to averages, in the layout of LitEma, and replace them by others."""
        for name in [name for name in self.weights if name.startswith(("encoder.", "decoder.", "quant"))]:
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")) and "embedding.w" not in name:
                self.weights[f"model_ema.{name.replace('.', '')}"] = self.weights[name]
                self.weights[name] = self.random(*self.weights[name].shape)
        self.weights["model_ema.decay"] = torch.tensor(0.999)
        self.weights["model_ema.num_updates"] = torch.tensor(-1, dtype=torch.int32)


def magvit_file(widths: list[int], depth: int, bits: int, adaptive: bool = True, batch: bool = False) -> File:
    """The names of improved_model.py, which Open-MAGVIT2, WeTok, BitDance, SimVQ and DimVQ share."""
    file = File()

    def block(name: str, before: int, after: int) -> None:
        file.norm(f"{name}.norm1", before, batch)
        file.norm(f"{name}.norm2", after, batch)
        file.conv(f"{name}.conv1", before, after, bias=False)
        file.conv(f"{name}.conv2", after, after, bias=False)
        if before != after:
            file.conv(f"{name}.nin_shortcut", before, after, 1, bias=False)

    channels, last = widths[0], len(widths) - 1
    file.conv("encoder.conv_in", 3, channels, bias=False)
    for level, width in enumerate(widths):
        for number in range(depth):
            block(f"encoder.down.{level}.block.{number}", channels, width)
            channels = width
        if level < last:
            file.conv(f"encoder.down.{level}.downsample", width, width)
    for network in ("encoder", "decoder"):
        for number in range(depth):
            block(f"{network}.mid_block.{number}", channels, channels)
    file.norm("encoder.norm_out", channels, batch)
    file.conv("encoder.conv_out", channels, bits, 1)
    file.conv("decoder.conv_in", bits, channels)
    for level in range(last, -1, -1):
        if adaptive:
            file.linear(f"decoder.adaptive.{level}.gamma", bits, channels)
            file.linear(f"decoder.adaptive.{level}.beta", bits, channels)
        for number in range(depth):
            block(f"decoder.up.{level}.block.{number}", channels, widths[level])
            channels = widths[level]
        if level > 0:
            file.conv(f"decoder.up.{level}.upsample.conv1", channels, 4 * channels)
    file.norm("decoder.norm_out", channels, batch)
    file.conv("decoder.conv_out", channels, 3)
    file.weaken_input()
    return file


def gsq_file(widths: list[int], depth: int, channels: int, codes: tuple[int, int]) -> File:
    """The names of flexTokenizer: a numbered list of modules in each network."""
    file = File()
    counts = {"encoder": 0, "decoder": 0}

    def next_name(network: str) -> str:
        counts[network] += 1
        return f"{network}.blocks.{counts[network] - 1}"

    def block(network: str, before: int, after: int) -> None:
        name = next_name(network)
        file.norm(f"{name}.net.0", before)
        file.conv(f"{name}.net.2", before, after)
        file.norm(f"{name}.net.3", after)
        file.conv(f"{name}.net.6", after, after)
        if before != after:
            file.conv(f"{name}.skip", before, after, 1)

    def adaptive(width: int) -> None:
        name = next_name("decoder")
        file.linear(f"{name}.gamma", channels, width)
        file.linear(f"{name}.beta", channels, width)

    def level(network: str, before: int, after: int) -> None:
        if before != after:
            block(network, before, after)
        for _ in range(depth):
            block(network, after, after)

    file.conv("encoder.conv_in", 3, widths[0])
    for number, width in enumerate(widths):
        level("encoder", widths[max(number - 1, 0)], width)
        if number < len(widths) - 1:
            file.conv(f"{next_name('encoder')}.conv", width, width)
    level("encoder", widths[-1], widths[-1])
    file.norm("encoder.fianl_layers.0", widths[-1])
    file.conv("encoder.fianl_layers.2", widths[-1], channels, 1)
    file.conv("decoder.conv_in", channels, widths[-1])
    level("decoder", widths[-1], widths[-1])
    adaptive(widths[-1])
    for number in range(len(widths) - 1, -1, -1):
        level("decoder", widths[min(number + 1, len(widths) - 1)], widths[number])
        if number > 0:
            file.conv(f"{next_name('decoder')}.conv", widths[number], 4 * widths[number])
            adaptive(widths[number])
    file.norm("decoder.final_layers.0", widths[0])
    file.conv("decoder.final_layers.2", widths[0], 3)
    file.weaken_input()
    file.weights["quantizers.codebook.weight"] = F.normalize(file.random(*codes)) * (1 + 0.3 * file.random(codes[0], 1))
    return file


class Reference:
    """The published forward on the tensors of a file."""

    def __init__(self, weights: Tensors, norm_eps: float = 1e-6) -> None:
        self.weights = weights
        self.norm_eps = norm_eps

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm_silu(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if f"{name}.running_mean" in self.weights:
            mean, variance = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
            normed = (x - mean[:, None, None]) / (variance[:, None, None] + self.norm_eps).sqrt()
        else:
            groups = x.reshape(len(x), 32, -1)
            variance = groups.var(-1, correction=0, keepdim=True)
            normed = ((groups - groups.mean(-1, keepdim=True)) / (variance + self.norm_eps).sqrt()).reshape(x.shape)
        y = normed * weight[:, None, None] + bias[:, None, None]
        return y * torch.sigmoid(y)

    def adaptive(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        flat = codes.flatten(2)
        mean, deviation = flat.mean(-1), (flat.var(-1) + 1e-6).sqrt()
        gamma = F.linear(deviation, self.weights[f"{name}.gamma.weight"], self.weights[f"{name}.gamma.bias"])
        beta = F.linear(mean, self.weights[f"{name}.beta.weight"], self.weights[f"{name}.beta.bias"])
        return gamma[..., None, None] * F.group_norm(x, 32, eps=1e-6) + beta[..., None, None]

    def block(self, name: str, x: Tensor, layers: tuple[str, ...]) -> Tensor:
        norm1, conv1, norm2, conv2, skip = (f"{name}.{layer}" for layer in layers)
        y = self.conv(conv2, self.norm_silu(norm2, self.conv(conv1, self.norm_silu(norm1, x))))
        return y + (self.conv(skip, x) if f"{skip}.weight" in self.weights else x)

    def blocks(self, prefix: str, x: Tensor) -> Tensor:
        number = 0
        while f"{prefix}.{number}.conv1.weight" in self.weights:
            x = self.block(f"{prefix}.{number}", x, ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"))
            number += 1
        assert number > 0
        return x

    def levels(self) -> int:
        return 1 + max(int(name.split(".")[2]) for name in self.weights if name.startswith("encoder.down."))

    def magvit_encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(self.levels()):
            x = self.blocks(f"encoder.down.{level}.block", x)
            if level < self.levels() - 1:
                x = self.conv(f"encoder.down.{level}.downsample", x, stride=2)
        x = self.blocks("encoder.mid_block", x)
        return self.conv("encoder.conv_out", self.norm_silu("encoder.norm_out", x))

    def magvit_decode(self, codes: Tensor) -> Tensor:
        x = self.blocks("decoder.mid_block", self.conv("decoder.conv_in", codes))
        for level in range(self.levels() - 1, -1, -1):
            if f"decoder.adaptive.{level}.gamma.weight" in self.weights:
                x = self.adaptive(f"decoder.adaptive.{level}", x, codes)
            x = self.blocks(f"decoder.up.{level}.block", x)
            if level > 0:
                x = depth_to_space(self.conv(f"decoder.up.{level}.upsample.conv1", x))
        return self.conv("decoder.conv_out", self.norm_silu("decoder.norm_out", x))

    def gsq(self, network: str, x: Tensor) -> Tensor:
        codes, number, last = x, 0, {"encoder": "fianl_layers", "decoder": "final_layers"}[network]
        x = self.conv(f"{network}.conv_in", x)
        while parts := [name for name in self.weights if name.startswith(f"{network}.blocks.{number}.")]:
            name = f"{network}.blocks.{number}"
            if f"{name}.net.0.weight" in parts:
                x = self.block(name, x, ("net.0", "net.2", "net.3", "net.6", "skip"))
            elif f"{name}.gamma.weight" in parts:
                x = self.adaptive(name, x, codes)
            elif network == "encoder":
                x = self.conv(f"{name}.conv", x, stride=2)
            else:
                x = depth_to_space(self.conv(f"{name}.conv", x))
            number += 1
        return self.conv(f"{network}.{last}.2", self.norm_silu(f"{network}.{last}.0", x))


def depth_to_space(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    cells = x.view(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
    return cells.reshape(batch, channels // 4, 2 * height, 2 * width)


def sign_ids(latent: Tensor, bits: int) -> Tensor:
    """The ids of groups of consecutive channels, int64[B, h * w, G]; the first channel of a group is the lowest bit."""
    positive = (latent > 0).long().unflatten(1, (-1, bits))
    powers = 2 ** torch.arange(bits)
    return (positive * powers[:, None, None]).sum(2).flatten(2).transpose(1, 2)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Released]:
    def read(weights: Tensors, family: str | None = None) -> Released:
        torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "released.ckpt")
        return read_released(tmp_path / "released.ckpt", family)

    return read


def assert_equal_forward(released: Released, latent: Tensor, ids: Tensor, codes: Tensor, image: Tensor) -> None:
    """Compare latents, ids in the order of positions and groups, codes and images; the image is of these codes."""
    network = released.autoencoder.eval().requires_grad_(False)
    torch.testing.assert_close(network.latent(IMAGES), latent, rtol=1e-3, atol=1e-4)
    quantized = network.encode(IMAGES)
    assert torch.equal(quantized.ids, ids.flatten(1))
    torch.testing.assert_close(quantized.codes, codes, rtol=1e-5, atol=1e-6)
    found = network.quantizer.lookup(quantized.ids, network.quantizer.layout(*latent.shape[2:]))
    torch.testing.assert_close(found, codes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.decode(codes), image, rtol=1e-3, atol=1e-4)


def test_pretrained_open_magvit2_of_14_bits(read: Callable[..., Released]) -> None:
    """Its discriminator is another one than that of the class-conditional models, and it has averages."""
    file = magvit_file([BASE, BASE, 2 * BASE], depth=2, bits=14)
    reference = Reference(dict(file.weights))
    file.average()
    discriminator = {
        "block_in.0.weight": file.random(8, 3, 5, 5),
        "block_in.0.bias": file.random(8),
        "blocks.0.0.weight": file.random(8, 8, 3, 3),
        "blocks.0.1.kernel": file.random(1, 1, 4, 4),
        "blocks.0.2.weight": file.random(8),
        "to_logits.2.weight": file.random(1, 8, 5, 5),
    }
    for name, value in discriminator.items():
        file.weights[f"loss.discriminator.{name}"] = value
        if "kernel" not in name:
            file.weights[f"model_ema.lossdiscriminator{name.replace('.', '')}"] = value
    file.weights["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    released = read(file.weights)
    assert (released.family, released.image_size, released.discriminator) == ("open-magvit2", 256, None)
    assert any("moving averages" in note for note in released.notes)
    assert any("not a patch discriminator" in note for note in released.notes)
    latent = reference.magvit_encode(IMAGES)
    codes = torch.where(latent > 0, 1.0, -1.0)
    assert_equal_forward(released, latent, sign_ids(latent, 14), codes, reference.magvit_decode(codes))


@pytest.mark.parametrize(("bits", "averages"), [(32, True), (64, True), (32, False), (128, False)])
def test_sign_bits_of_wetok_and_bitdance_are_ids_of_eight_bits(
    bits: int, averages: bool, read: Callable[..., Released]
) -> None:
    file = magvit_file([BASE, 2 * BASE], depth=1, bits=bits)
    reference = Reference(dict(file.weights))
    if averages:
        file.average()
    released = read(file.weights)
    assert (released.family, released.image_size) == ("wetok" if averages else "bitdance", 256)
    assert (released.autoencoder.quantizer.num_groups, released.autoencoder.quantizer.codebook_size) == (bits // 8, 256)
    assert f"read as {bits // 8} ids of 8 bits per position" in released.notes
    latent = reference.magvit_encode(IMAGES)
    codes = torch.where(latent > 0, 1.0, -1.0)
    assert_equal_forward(released, latent, sign_ids(latent, 8), codes, reference.magvit_decode(codes))


def test_wetok_can_be_read_as_one_id_of_32_bits_with_the_same_images(read: Callable[..., Released]) -> None:
    file = magvit_file([BASE], depth=1, bits=32)
    whole, groups = (read(file.weights, family).autoencoder.eval() for family in ("open-magvit2", "wetok"))
    with torch.no_grad():
        assert torch.equal(whole(IMAGES).images, groups(IMAGES).images)
        bytes_of_ids = whole.encode(IMAGES).ids.unsqueeze(-1) >> torch.tensor([0, 8, 16, 24]) & 255
        assert torch.equal(bytes_of_ids.flatten(1), groups.encode(IMAGES).ids)


def test_gan_decoder_of_wetok_is_refused(read: Callable[..., Released]) -> None:
    file = magvit_file([BASE], depth=1, bits=32)
    file.conv("decoder.conv_in", 64, BASE)
    file.average()
    with pytest.raises(WeightsError, match=r"has a GAN decoder, .*\. Use a file with a plain decoder"):
        read(file.weights)
    del file.weights["model_ema.decay"]
    with pytest.raises(WeightsError, match="has a GAN decoder"):
        read(file.weights, "bitdance")


@pytest.mark.parametrize("batch", [False, True], ids=["simvq", "dimvq with batch norms"])
def test_simvq_and_dimvq(batch: bool, read: Callable[..., Released]) -> None:
    file = magvit_file([BASE, BASE, 2 * BASE, 2 * BASE], depth=1, bits=6, adaptive=False, batch=batch)
    file.weights["quantize.embedding.weight"] = file.random(40, 6)
    file.linear("quantize.embedding_proj", 6, 6)
    weights = dict(file.weights)
    reference = Reference(weights)
    file.average()
    assert "model_ema.quantizeembedding_projweight" in file.weights
    released = read(file.weights)
    assert (released.family, released.image_size) == ("simvq", 128)
    codebook = weights["quantize.embedding.weight"] @ weights["quantize.embedding_proj.weight"].T
    codebook = codebook + weights["quantize.embedding_proj.bias"]
    latent = reference.magvit_encode(IMAGES)
    ids = torch.cdist(latent.flatten(2).transpose(1, 2), codebook).argmin(-1)
    codes = codebook[ids].transpose(1, 2).reshape(latent.shape)
    assert_equal_forward(released, latent, ids, codes, reference.magvit_decode(codes))


@pytest.mark.parametrize("channels", [4, 12])
def test_gsq_searches_by_cosine_and_decodes_the_stored_codes(channels: int, read: Callable[..., Released]) -> None:
    file = gsq_file([BASE, 2 * BASE, 2 * BASE], depth=2, channels=channels, codes=(30, 4))
    reference = Reference(file.weights, norm_eps=1e-5)
    released = read(file.weights)
    assert (released.family, released.autoencoder.quantizer.num_groups) == ("gsq", channels // 4)
    latent = reference.gsq("encoder", IMAGES)
    codebook = file.weights["quantizers.codebook.weight"]
    vectors = latent.permute(0, 2, 3, 1).unflatten(-1, (-1, 4)).flatten(1, 2)
    ids = (F.normalize(vectors, dim=-1) @ F.normalize(codebook, dim=-1).T).argmax(-1)
    codes = codebook[ids].flatten(2).transpose(1, 2).reshape(latent.shape)
    assert_equal_forward(released, latent, ids, codes, reference.gsq("decoder", codes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("attention", "encoder.blocks.2 is neither a residual block nor a resampling"),
        ("another depth", "its levels differ in the number of residual blocks"),
        ("codes of one channel", "its codes have one channel"),
        ("nearest upsampling", r"decoder.blocks.\d+.conv.weight has shape"),
    ],
)
def test_variants_of_gsq_are_refused(change: str, message: str, read: Callable[..., Released]) -> None:
    file = gsq_file([BASE, BASE, BASE], depth=2, channels=4, codes=(30, 2))
    if change == "attention":
        file.weights = {name: value for name, value in file.weights.items() if "encoder.blocks.2." not in name}
        file.conv("encoder.blocks.2.qkv_conv", BASE, 3 * BASE, 1)
    elif change == "another depth":
        for name in [name for name in file.weights if name.startswith("decoder.blocks.4.")]:
            file.weights[name.replace(".4.", ".99.")] = file.weights.pop(name)
        renamed = {name: value for name, value in file.weights.items() if ".99." not in name}
        last = max(int(name.split(".")[2]) for name in renamed if name.startswith("decoder.blocks."))
        file.weights = {
            name.replace(f"decoder.blocks.{last}.", "decoder.blocks.4."): value for name, value in renamed.items()
        }
    elif change == "codes of one channel":
        file.weights["quantizers.codebook.weight"] = file.random(30, 1)
    else:
        name = next(name for name in file.weights if name.startswith("decoder.") and name.endswith("conv.weight"))
        file.weights[name] = file.random(BASE, BASE, 3, 3)
    with pytest.raises(WeightsError, match=message):
        read(file.weights)


def test_fvq_searches_without_normalization(read: Callable[..., Released]) -> None:
    """Its networks are LlamaGen's, whose layout the parity tests cover."""
    file = File()

    def block(name: str) -> None:
        for part in ("1", "2"):
            file.norm(f"{name}.norm{part}", BASE)
            file.conv(f"{name}.conv{part}", BASE, BASE)

    for network in ("encoder", "decoder"):
        file.conv(f"{network}.conv_in", 3 if network == "encoder" else 8, BASE)
        for number in range(2 if network == "encoder" else 3):
            block(f"{network}.conv_blocks.0.res.{number}")
        block(f"{network}.mid.0")
        block(f"{network}.mid.2")
        file.norm(f"{network}.mid.1.norm", BASE)
        for part in ("q", "k", "v", "proj_out"):
            file.conv(f"{network}.mid.1.{part}", BASE, BASE, 1)
        file.norm(f"{network}.norm_out", BASE)
        file.conv(f"{network}.conv_out", BASE, 8 if network == "encoder" else 3)
    file.conv("quant_conv", 8, 64, 1)
    file.conv("post_quant_conv", 64, 8, 1)
    file.weights["quantize.embedding.weight"] = file.random(50, 64) * file.random(50, 1).abs()
    file.weights["quantize.codebook_used"] = torch.zeros(65536)
    released = read(file.weights)
    assert released.family == "fvq"
    assert any("--family llamagen" in note for note in released.notes)
    as_llamagen = read(file.weights, "llamagen").autoencoder.eval()
    network = released.autoencoder.eval()
    with torch.no_grad():
        latent = network.latent(IMAGES)
        codebook = file.weights["quantize.embedding.weight"]
        nearest = torch.cdist(latent.flatten(2).transpose(1, 2), codebook).argmin(-1)
        assert torch.equal(network.encode(IMAGES).ids, nearest)
        assert not torch.equal(as_llamagen.encode(IMAGES).ids, nearest)


def test_titok_is_refused_by_name(tmp_path: Path) -> None:
    titok = {"latent_tokens": torch.zeros(32, 8), "encoder.latent_token_positional_embedding": torch.zeros(32, 8)}
    save_file(titok | {"quantize.embedding.weight": torch.zeros(4096, 12)}, tmp_path / "titok.safetensors")
    with pytest.raises(WeightsError, match="is a TiTok tokenizer, whose tokens are a sequence"):
        read_released(tmp_path / "titok.safetensors")


def test_damaged_zip_is_an_error_of_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save({"quantize.embedding.weight": torch.zeros(8, 4)}, file)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x00"))  # its table of files
    assert zipfile.is_zipfile(file)
    with pytest.raises(WeightsError):
        read_released(file)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_of_cosmos_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Conv2d(3, 4, 1)), tmp_path / "autoencoder.jit")
    assert zipfile.is_zipfile(tmp_path / "autoencoder.jit")
    with pytest.raises(WeightsError, match=r"is a TorchScript program, as the Cosmos tokenizers are published"):
        read_released(tmp_path / "autoencoder.jit")
