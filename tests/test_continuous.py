"""Continuous autoencoders match diffusers; invalid folders are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vqpipe import Tokenizer, artifacts
from vqpipe.continuous import CONFIG, WEIGHTS, ContinuousAutoencoder, open_autoencoder, write_continuous
from vqpipe.data.decoding import decode
from vqpipe.data.images import open_images
from vqpipe.data.transforms import pixels, to_float, to_uint8
from vqpipe.errors import ArtifactError, ConfigError, DataError, NumericError, WeightsError


@pytest.fixture(scope="module")
def network() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    return AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=4, **blocks).eval()


@pytest.fixture
def folder(network: Any, tmp_path: Path) -> Path:
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_latents_and_images_match_diffusers(network: Any, folder: Path, images: torch.Tensor) -> None:
    opened = open_autoencoder(folder, "auto")
    assert opened.device.type in ("cpu", "cuda")
    assert isinstance(opened, ContinuousAutoencoder)
    latents = opened.encode(images)
    with torch.no_grad():
        expected = network.encode(to_float(images)).latent_dist.mean
        reconstruction = network.decode(expected).sample
    # Weights read from a file may have another memory alignment, for which some CPUs use another convolution.
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    difference = opened.decode(latents, (32, 24)).int() - to_uint8(reconstruction).int()
    assert difference.abs().max() <= 1
    assert difference.ne(0).float().mean() < 0.01
    assert (opened.downsample_factor, opened.latent_shape(32, 24)) == (4, (4, 8, 6))
    assert opened.name == "vae"


@pytest.mark.parametrize(
    ("factor", "settings"),
    [
        (8, {"latent_channels": 4}),
        (8, {"latent_channels": 16, "shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False}),
        (16, {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}),
        (16, {"latent_channels": 32, "use_post_quant_conv": False, "mid_block_add_attention": False}),
    ],
    ids=["as-sd", "as-sd3", "f16", "f16-32-channels"],
)
def test_every_autoencoder_kl_of_diffusers_opens(factor: int, settings: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    depth = factor.bit_length()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * depth, "up_block_types": ["UpDecoderBlock2D"] * depth}
    torch.manual_seed(0)
    network = AutoencoderKL(block_out_channels=[8] * depth, norm_num_groups=4, **blocks, **settings).eval()
    network.save_pretrained(tmp_path / "some-vae")
    opened = open_autoencoder(tmp_path / "some-vae")
    assert isinstance(opened, ContinuousAutoencoder)
    assert (opened.name, opened.downsample_factor) == ("some-vae", factor)
    assert opened.describe(64)["latent_shape"] == [settings["latent_channels"], 64 // factor, 64 // factor]
    images = torch.randint(0, 256, (1, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    latents = opened.encode(images)
    with torch.no_grad():
        expected = network.encode(to_float(images)).latent_dist.mean
        reconstruction = to_uint8(network.decode(expected).sample)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert (opened.decode(latents, (64, 32)).int() - reconstruction.int()).abs().max() <= 1


def test_deep_compression_autoencoder_of_diffusers_opens(tmp_path: Path) -> None:
    from diffusers import AutoencoderDC

    kinds, widths, depths = ["ResBlock", "ResBlock", "EfficientViTBlock"], [8, 8, 16], [1, 1, 1]
    torch.manual_seed(0)
    network = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=[[], [], [5]],
        decoder_qkv_multiscales=[[], [], [5]],
        decoder_norm_types=["batch_norm", "batch_norm", "rms_norm"],
        decoder_act_fns=["relu", "relu", "silu"],
    ).eval()
    for buffer in network.buffers():
        buffer.data = torch.rand(buffer.shape) + 0.5 if buffer.is_floating_point() else buffer + 7
    network.save_pretrained(tmp_path / "dc-ae")
    opened = open_autoencoder(tmp_path / "dc-ae")
    assert isinstance(opened, ContinuousAutoencoder)
    assert (opened.downsample_factor, opened.latent_shape(64, 32)) == (4, (4, 16, 8))
    images = torch.randint(0, 256, (1, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    latents = opened.encode(images)
    with torch.no_grad():
        expected = network.encode(to_float(images)).latent
        reconstruction = network.decode(expected).sample
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(opened.decode_float(latents, (64, 32)), reconstruction, rtol=1e-3, atol=1e-3)
    with pytest.raises(DataError, match="30 pixels"):
        opened.encode(images[..., :30])


def test_old_attention_names_and_half_precision_are_read(folder: Path, images: torch.Tensor) -> None:
    before = open_autoencoder(folder).encode(images)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / WEIGHTS)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(open_autoencoder(folder).encode(images), before)
    save_file({key: value.half() for key, value in tensors.items()}, folder / WEIGHTS)
    assert torch.allclose(open_autoencoder(folder).encode(images), before, atol=1e-2)


def test_digest_depends_on_weights_and_config(folder: Path) -> None:
    first = ContinuousAutoencoder.from_pretrained(folder).digest
    tensors = load_file(folder / WEIGHTS)
    save_file({key: value * 2 for key, value in tensors.items()}, folder / WEIGHTS)
    second = ContinuousAutoencoder.from_pretrained(folder).digest
    change_config(folder, norm_num_groups=2)
    assert len({first, second, ContinuousAutoencoder.from_pretrained(folder).digest}) == 3


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def delete_a_key(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, folder / WEIGHTS)


def rename_to_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def change_config(folder: Path, **settings: Any) -> None:
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(table | settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read as weights"),
        (delete_a_key, r"do not match their config: .*decoder\.conv_in\.bias"),
        (rename_to_a_pickle, "pickles are not read. Download config.json and diffusion_pytorch_model.safetensors of"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors. Download"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json of diffusers"),
        (
            lambda folder: change_config(folder, _class_name="AutoencoderKLWan"),
            "AutoencoderKLWan of diffusers; supported are",
        ),
        (
            lambda folder: change_config(folder, _class_name="AutoencoderTiny"),
            "is not a valid config of AutoencoderTiny",
        ),
        (lambda folder: change_config(folder, norm_num_groups=3), "is not a valid config of AutoencoderKL"),
        (lambda folder: change_config(folder, depth=3), "is not a valid config of AutoencoderKL: .*'depth'"),
        (lambda folder: change_config(folder, latent_channels=5), "do not match their config"),
        (lambda folder: change_config(folder, in_channels=4), "not for images of three channels"),
    ],
)
def test_invalid_folders_are_rejected(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=message) as error:
        open_autoencoder(folder)
    assert "\n" not in str(error.value)


def test_tiny_autoencoder_in_the_layout_of_diffusers(tmp_path: Path, images: torch.Tensor) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    network = AutoencoderTiny(latent_channels=16).eval()
    network.save_pretrained(tmp_path / "taesd3")
    opened = open_autoencoder(tmp_path / "taesd3")
    assert isinstance(opened, ContinuousAutoencoder)
    assert (opened.name, opened.downsample_factor, opened.latent_shape(32, 24)) == ("taesd3", 8, (16, 4, 3))
    with torch.no_grad():
        torch.testing.assert_close(opened.encode(images), network.encode(to_float(images)).latents, rtol=0, atol=1e-5)


CLAMP, RELU, UP = "clamp", "relu", "up"
ENCODER_LAYERS = ["in", "b", *["down", "b", "b", "b"] * 2, "down", "p", "p", "p", "out"]
DECODER_LAYERS = [CLAMP, "in", RELU, "p", "p", "p", UP, "mid", *["b", "b", "b", UP, "mid"] * 2, "b", "out"]


def random_weights(layers: list[str], inputs: int, outputs: int, pooled: bool) -> dict[str, torch.Tensor]:
    """Random half-precision weights of one network of a tiny autoencoder, by their published names."""
    generator = torch.Generator().manual_seed(len(layers))
    shapes: dict[str, tuple[int, ...]] = {}
    for i, kind in enumerate(layers):
        if kind in (CLAMP, RELU, UP):
            continue
        if kind in "bp":
            for k in (0, 2, 4):
                shapes |= {f"{i}.conv.{k}.weight": (64, 64, 3, 3), f"{i}.conv.{k}.bias": (64,)}
            if kind == "p" and pooled:
                shapes |= {f"{i}.pool.0.weight": (256, 64, 1, 1), f"{i}.pool.1.weight": (256,)}
                shapes |= {f"{i}.pool.1.bias": (256,), f"{i}.pool.3.weight": (64, 256, 1, 1)}
            continue
        ends = (outputs if kind == "out" else 64, inputs if kind == "in" else 64, 3, 3)
        shapes[f"{i}.weight"] = ends
        if kind in ("in", "out"):
            shapes[f"{i}.bias"] = ends[:1]
    return {name: (torch.randn(shape, generator=generator) * 0.05).half() for name, shape in shapes.items()}


def run_layers(layers: list[str], tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run one network of a tiny autoencoder on float[B, C, H, W], from its weights."""
    weights = {name: value.float() for name, value in tensors.items()}
    for i, kind in enumerate(layers):
        if kind == CLAMP:
            x = 3 * torch.tanh(x / 3)
        elif kind == RELU:
            x = x.relu()
        elif kind == UP:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        elif kind in "bp":
            if f"{i}.pool.0.weight" in weights:
                wide = F.conv2d(x, weights[f"{i}.pool.0.weight"])
                groups = wide.unflatten(1, (4, 64))
                mean = groups.mean((2, 3, 4), keepdim=True)
                variance = groups.var((2, 3, 4), correction=0, keepdim=True)
                wide = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
                wide = wide * weights[f"{i}.pool.1.weight"][:, None, None] + weights[f"{i}.pool.1.bias"][:, None, None]
                x = x + F.conv2d(wide.relu(), weights[f"{i}.pool.3.weight"])
            y = x
            for k in (0, 2, 4):
                y = F.conv2d(y, weights[f"{i}.conv.{k}.weight"], weights[f"{i}.conv.{k}.bias"], padding=1)
                y = y if k == 4 else y.relu()
            x = (x + y).relu()
        else:
            stride = 2 if kind == "down" else 1
            x = F.conv2d(x, weights[f"{i}.weight"], weights.get(f"{i}.bias"), padding=1, stride=stride)
    return x


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with the two files of a tiny autoencoder; by default as TAEF2, with pooled blocks and 32 channels."""
    channels, pooled = getattr(request, "param", (32, True))
    folder = tmp_path / "tiny"
    folder.mkdir()
    torch.save(random_weights(ENCODER_LAYERS, 3, channels, pooled), folder / "taef9_encoder.pth")
    torch.save(random_weights(DECODER_LAYERS, channels, 3, pooled), folder / "taef9_decoder.pth")
    return folder


@pytest.mark.parametrize("pair", [(32, True), (4, False)], indirect=True, ids=["as-taef2", "as-taesd"])
def test_tiny_autoencoder_in_two_files(pair: Path, images: torch.Tensor) -> None:
    opened = open_autoencoder(pair)
    assert isinstance(opened, ContinuousAutoencoder)
    encoder, decoder = (torch.load(pair / f"taef9_{side}.pth", weights_only=True) for side in ("encoder", "decoder"))
    latents = run_layers(ENCODER_LAYERS, encoder, images.float() / 255)
    torch.testing.assert_close(opened.encode(images), latents, rtol=1e-4, atol=1e-5)
    reconstruction = run_layers(DECODER_LAYERS, decoder, latents)
    assert reconstruction.std() > 0.01
    difference = opened.decode(latents, (32, 24)).int() - to_uint8(reconstruction * 2 - 1).int()
    assert difference.abs().max() <= 1
    assert (opened.name, opened.downsample_factor) == ("taef9", 8)
    assert opened.describe(32)["latent_shape"] == [len(encoder["14.weight"]), 4, 4]


@pytest.mark.parametrize("pair", [(32, True), (4, False)], indirect=True, ids=["as-taef2", "as-taesd"])
def test_artifact_of_a_tiny_autoencoder_is_the_same_without_pickles(
    pair: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    published = ContinuousAutoencoder.from_pretrained(pair)
    draft = artifacts.start(tmp_path / "published", "autoencoder", {}, {})
    assert isinstance(draft, artifacts.Draft)
    with draft:
        write_continuous(draft, published, {"licence": "MIT"})
        artifact = draft.publish({})
    assert artifact.names() == ["README.md", CONFIG, WEIGHTS]
    opened = open_autoencoder(artifact.path)
    latents = opened.encode(images)
    assert torch.equal(latents, published.encode(images))
    size = (images.shape[2], images.shape[3])
    assert torch.equal(opened.decode(latents, size), published.decode(latents, size))
    content = bytearray((artifact.path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (artifact.path / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        open_autoencoder(artifact.path)


def change_tensors(folder: Path, side: str, **changes: torch.Tensor | None) -> None:
    tensors = torch.load(folder / f"taef9_{side}.pth", weights_only=True)
    for name, value in changes.items():
        tensors.pop(name) if value is None else tensors.update({name: value})
    torch.save(tensors, folder / f"taef9_{side}.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "taef9_decoder.pth").unlink(), r"has taef9_encoder\.pth without taef9_decoder\.pth"),
        (lambda folder: torch.save({}, folder / "other_encoder.pth"), "several tiny autoencoders: other, taef9"),
        (lambda folder: change_tensors(folder, "encoder", **{"11.pool.0.weight": None}), "do not match their config"),
        (
            lambda folder: change_tensors(folder, "decoder", **{"6.pool.0.weight": torch.zeros(1)}),
            "do not match their config",
        ),
        (lambda folder: change_tensors(folder, "decoder", extra=torch.zeros(1)), "do not match their config"),
        (lambda folder: torch.save({}, folder / "taef9_encoder.pth"), "taef9_encoder.pth is not a valid config"),
        (
            lambda folder: (folder / "taef9_encoder.pth").write_bytes(b"no weights"),
            "is a text file, not a file of weights",
        ),
        (lambda folder: torch.save({"0.weight": print}, folder / "taef9_encoder.pth"), "contains more than tensors"),
        (lambda folder: torch.save([1], folder / "taef9_encoder.pth"), "is not a state dict"),
    ],
)
def test_invalid_pairs_are_rejected(pair: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(pair)
    with pytest.raises(WeightsError, match=message) as error:
        open_autoencoder(pair)
    assert "\n" not in str(error.value)


def test_digest_depends_on_both_files(pair: Path) -> None:
    first = ContinuousAutoencoder.from_pretrained(pair).digest
    change_tensors(pair, "decoder", **{"19.bias": torch.ones(3)})
    assert ContinuousAutoencoder.from_pretrained(pair).digest != first


@pytest.mark.slow
def test_taef2_reconstructs_real_photographs(shared: Path) -> None:
    opened = open_autoencoder(shared / "weights")
    photos = open_images(shared / "data" / "zeroshot" / "zeroshot-faces-0000.tar")
    psnr = []
    for i in range(0, len(photos), 10):
        photo = pixels(decode(photos.read(i)))[None]
        reconstruction = opened.decode(opened.encode(photo), (photo.shape[2], photo.shape[3]))
        psnr.append(10 * torch.log10(255**2 / (photo.double() - reconstruction.double()).square().mean()).item())
    assert (opened.name, opened.latent_shape(256, 256)) == ("taef2", (32, 32, 32))
    assert sum(psnr) / len(psnr) > 28


@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "hf:stabilityai/sd-vae-ft-mse"])
def test_nothing_is_downloaded(name: str) -> None:
    with pytest.raises(
        WeightsError, match=r"not downloaded automatically\. Download .* of stabilityai/sd-vae-ft-mse \(SD-VAE\) or"
    ):
        open_autoencoder(name)
    with pytest.raises(ArtifactError, match="is not a vqpipe artifact"):
        open_autoencoder("/absent")


def test_opening_it_as_a_tokenizer_is_an_error(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is a continuous autoencoder \(diffusers' AutoencoderKL\), which has no tokens"
    ):
        Tokenizer.from_pretrained(folder)


def test_opening_a_tiny_one_as_a_tokenizer_is_an_error(pair: Path) -> None:
    message = r"tiny is a continuous autoencoder \(two \.pth files\), which has no tokens\. .* only vqpipe eval and"
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_pretrained(pair)


def test_invalid_images_and_latents_are_rejected(folder: Path, images: torch.Tensor) -> None:
    opened = open_autoencoder(folder)
    with pytest.raises(DataError, match="is not divisible into cells of 4"):
        opened.encode(images[:, :, :30])
    with pytest.raises(DataError, match="do not match images of"):
        opened.decode(torch.zeros(1, 4, 8, 6), (32, 32))
    with pytest.raises(DataError, match="Omit --groups"):
        opened.decode(torch.zeros(1, 4, 8, 8), (32, 32), groups=1)
    with pytest.raises(NumericError, match="NaN"):
        opened.decode(torch.full((1, 4, 8, 8), float("nan")), (32, 32))
