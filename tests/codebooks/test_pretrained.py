"""Pretrained encoders against an independent forward pass, with small networks of random weights."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip import factory
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vqpipe import downloads
from vqpipe.codebooks import pretrained
from vqpipe.codebooks.encoders import check_pool, pool_features
from vqpipe.codebooks.features import FeaturesConfig, encoder_weights, open_encoder
from vqpipe.errors import ConfigError, WeightsError

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights of a CLIP of two layers, registered in open_clip as `tiny` with OpenAI's tag."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    open_clip.add_model_config(tmp_path / "tiny.json")
    tag = open_clip.get_pretrained_cfg("ViT-L-14", "openai")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"openai": tag})
    torch.manual_seed(0)
    model = open_clip.create_model("tiny", force_quick_gelu=True)
    for parameter in model.parameters():  # far from the initial values, so that every norm and bias matters
        nn.init.normal_(parameter, std=0.2)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "tiny.safetensors")
    yield tmp_path / "tiny.safetensors"
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)


def clip_patches(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Projected patch tokens of a CLIP ViT with QuickGELU, step by step: float[B, 3, 32, 32] -> float[B, 64, 24]."""
    w = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    patches = F.conv2d(images, w["conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(images), 1, -1), patches], dim=1) + w["positional_embedding"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm("ln_pre", x)
    for layer in ("transformer.resblocks.0", "transformer.resblocks.1"):
        qkv = norm(f"{layer}.ln_1", x) @ w[f"{layer}.attn.in_proj_weight"].T + w[f"{layer}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(2, (2, 32)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        mixed = ((q @ k.transpose(2, 3) / 32**0.5).softmax(dim=3) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ w[f"{layer}.attn.out_proj.weight"].T + w[f"{layer}.attn.out_proj.bias"]
        hidden = norm(f"{layer}.ln_2", x) @ w[f"{layer}.mlp.c_fc.weight"].T + w[f"{layer}.mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ w[f"{layer}.mlp.c_proj.weight"].T + w[f"{layer}.mlp.c_proj.bias"]
    return norm("ln_post", x)[:, 1:] @ w["proj"]


def test_clip_features_are_projected_patch_tokens(tiny_clip: Path) -> None:
    encoder = open_encoder(FeaturesConfig(encoder="open_clip:tiny/openai"), tiny_clip)
    assert (encoder.image_size, encoder.grid_size, encoder.dim, check_pool(encoder, None)) == (32, 8, 24, 4)
    torch.manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    weights = pretrained.load_tensors(tiny_clip)
    expected = clip_patches(weights, (images / 255 - mean) / std)
    with torch.inference_mode():
        found = encoder(images)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=1e-4)
    pooled = expected.view(3, 4, 2, 4, 2, 24).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(pool_features(found, 4), pooled, atol=1e-4, rtol=1e-4)


def test_clip_preprocessing_is_that_of_open_clip(tiny_clip: Path) -> None:
    encoder = open_encoder(FeaturesConfig(encoder="open_clip:tiny/openai"), tiny_clip)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    assert encoder.transform is not None
    expected = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture)
    assert torch.equal(encoder.transform(picture) / 255, expected)


@pytest.mark.parametrize("name", ["resnet50_clip.openai", "vit_base_patch16_clip_224.openai"])
def test_clip_weights_in_timm_are_cropped_as_clip_does(name: str) -> None:
    assert timm.get_pretrained_cfg(name).crop_pct < 1
    assert pretrained.check_timm(name)["crop_pct"] == 1.0
    assert pretrained.check_timm("resnet50.a1_in1k")["crop_pct"] == timm.get_pretrained_cfg("resnet50.a1_in1k").crop_pct


def test_timm_features_are_normalized_patch_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = open_encoder(FeaturesConfig(encoder="timm:test_vit", pool=5), tmp_path / "model.safetensors")
    assert (encoder.image_size, encoder.grid_size, encoder.dim) == (160, 10, 64)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.forward_features((images / 255 - 0.5) / 0.5)[:, 1:]
        found = encoder(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_features_of_convolutional_backbones_are_their_last_stage() -> None:
    encoder = open_encoder(FeaturesConfig(encoder="timm:test_resnet", allow_random_weights=True, pool=5), None)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    assert encoder(images).shape == (2, encoder.dim, 5, 5)


def test_image_smaller_than_a_patch_is_an_error() -> None:
    small = FeaturesConfig(encoder="timm:test_vit", allow_random_weights=True, image_size=8)
    with pytest.raises(ConfigError, match=r"test_vit does not take images of 8 pixels .*features\.image_size = 160"):
        open_encoder(small, None)


def test_weights_of_another_model_are_an_error(tiny_clip: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for encoder in ("open_clip:tiny/openai", "timm:test_vit"):
        with pytest.raises(WeightsError, match=r"other.safetensors does not fit"):
            open_encoder(FeaturesConfig(encoder=encoder), tmp_path / "other.safetensors")
        with pytest.raises(WeightsError, match=r"absent.pt"):
            open_encoder(FeaturesConfig(encoder=encoder), tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("encoder", "file", "repository"),
    [
        ("open_clip:ViT-L-14/openai", "open_clip_model.safetensors", "timm/vit_large_patch14_clip_224.openai"),
        ("timm:vit_small_patch14_dinov2", "model.safetensors", "timm/vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_weights_are_downloaded_only_on_request(encoder: str, file: str, repository: str, hub: Any) -> None:
    hub.files[file] = Path("/downloaded")
    config = FeaturesConfig(encoder=encoder)
    with pytest.raises(WeightsError) as error:
        encoder_weights(config)
    assert hub.requests == []
    assert error.value.what == f"the weights of {encoder} are not in the cache"
    assert f"Add --download to fetch {file} from https://huggingface.co/{repository}" in error.value.hint
    assert "--set features.weights=FILE" in error.value.hint
    assert encoder_weights(config, download=True) == Path("/downloaded")
    assert hub.requests == [f"{repository}/{file}"]

    hub.online = False
    message = f"{file} is not in the cache .* no connection .* Download {file} from https://.*/{repository} .*weights="
    with pytest.raises(WeightsError, match=message):
        encoder_weights(config, download=True)
    assert len(hub.requests) == 1


def test_weights_in_a_file_or_in_the_cache_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    encoder = "open_clip:ViT-L-14/openai"
    cache = {"open_clip_pytorch_model.bin": "/cache/file"}
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, name, **options: cache.get(name))
        assert encoder_weights(FeaturesConfig(encoder=encoder), download=True) == Path("/cache/file")
    assert encoder_weights(FeaturesConfig(encoder=encoder, weights=Path("w.pt")), download=True) == Path("w.pt")
    assert encoder_weights(FeaturesConfig(encoder=encoder, allow_random_weights=True), download=True) is None
    assert hub.requests == []


def test_unreachable_hub_is_detected_without_delay() -> None:
    began = time.monotonic()
    assert not downloads.hub.reachable("http://127.0.0.1:9")
    assert time.monotonic() - began < 1


def test_libraries_download_nothing_in_place_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(3)}, "openai")  # also the name of a tag
    save_file({}, "empty.safetensors")
    with pytest.raises(WeightsError, match="openai does not fit open_clip:ViT-B-32"):
        open_encoder(FeaturesConfig(encoder="open_clip:ViT-B-32/openai"), Path("openai"))
    with pytest.raises(WeightsError, match=r"empty\.safetensors has no tensors by name"):
        open_encoder(FeaturesConfig(encoder="timm:test_vit"), Path("empty.safetensors"))
    with pytest.raises(ConfigError, match="has a text encoder of transformers"):
        encoder_weights(FeaturesConfig(encoder="open_clip:roberta-ViT-B-32/laion2b_s12b_b32k"), download=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("open_clip:ViT-L14/openai", "Did you mean ViT-L-14"),
        ("open_clip:ViT-L-14/opnai", "Did you mean openai"),
        ("open_clip:ViT-L-14", "does not name its weights"),
        ("timm:resnet5", "Did you mean resnet50"),
    ],
)
def test_mistyped_model_names_are_corrected(encoder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_weights(FeaturesConfig(encoder=encoder))
