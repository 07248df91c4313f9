"""Pretrained encoders: CLIP from open_clip, other backbones from timm.

Weights are loaded from the user's file or from the Hugging Face cache. Only `--download` fetches them from the hub.
Otherwise an error names the missing file; random weights are used only with `allow_random_weights`.
"""

import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision import transforms

from vqpipe.codebooks.encoders import PatchEncoder
from vqpipe.config import nearest_name
from vqpipe.data.transforms import pixels
from vqpipe.downloads import HubFile, cached, fetch
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.progress import Progress
from vqpipe.weights import load_tensors

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
LOADING_ERRORS = (RuntimeError, KeyError, ValueError, OSError, EOFError, SafetensorError, pickle.UnpicklingError)


class Normalized(PatchEncoder):
    """An encoder with its own preprocessing: a resize and center crop by PIL, then mean and standard deviation."""

    def __init__(self, image_size: int, preprocessing: dict[str, Any], default_pool: int = 4) -> None:
        super().__init__()
        self.image_size, self.default_pool = image_size, default_pool
        self.transform = crop_transform(image_size, preprocessing)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(preprocessing["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing["std"]).view(3, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8[B, 3, S, S] -> float32 with the network's mean and standard deviation."""
        return (images / 255 - self.mean) / self.std

    @torch.inference_mode()
    def measure(self) -> None:
        """Find `dim` and `grid_size` by encoding one black image."""
        self.eval().requires_grad_(False)
        features = self(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8))
        self.dim, self.grid_size = features.shape[1], features.shape[2]


class OpenClipPatches(Normalized):
    """Patch tokens of a CLIP vision transformer, as in VQGAN-LC's released code (clip_encoder/model.py).

    The last block's output passes the final norm and the visual projection; the class token is dropped, and features
    are not normalized. (CLIP itself projects only the class token.)
    """

    def __init__(self, visual: VisionTransformer, preprocessing: dict[str, Any]) -> None:
        size = preprocessing["size"]
        super().__init__(size if isinstance(size, int) else size[0], preprocessing)
        self.visual = visual
        self.measure()

    def forward(self, images: Tensor) -> Tensor:
        """uint8[B, 3, S, S] -> float32[B, D, g, g]: the patch tokens after the visual projection."""
        result = self.visual.forward_intermediates(
            self.normalize(images), indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        tokens = result["image_intermediates"][0]
        if self.visual.proj is not None:
            tokens = tokens @ self.visual.proj
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (side, side)).float()


class TimmPatches(Normalized):
    """The last feature map of a timm backbone after its final norm: the patch tokens of a transformer, without class
    and register tokens, or the last stage of a convolutional network."""

    def __init__(self, backbone: nn.Module, image_size: int, preprocessing: dict[str, Any]) -> None:
        super().__init__(image_size, preprocessing)
        self.backbone = backbone
        self.measure()

    def forward(self, images: Tensor) -> Tensor:
        """uint8[B, 3, S, S] -> float32[B, D, g, g]: the last feature map."""
        backbone: Any = self.backbone
        maps = backbone.forward_intermediates(
            self.normalize(images), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps[0].float()


def open_clip_files(spec: str) -> tuple[str, Sequence[str]]:
    """The hub repository of `NAME/TAG`, "" if there is none, and the names that its weight file may have.

    Raises:
        ConfigError: no such model or tag.
    """
    name, tag = check_open_clip(spec)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"open_clip:{name} does not name its weights", f"Write open_clip:{name}/TAG: {', '.join(tags)}"
        )
    repository, _, file = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rpartition("/")
    return repository, [file] if file else OPEN_CLIP_FILES


def open_clip_encoder(spec: str, weights: Path | None, image_size: int | None) -> OpenClipPatches:
    """Build `NAME/TAG` (or `NAME`) with `weights`; None: random.

    The tag also sets preprocessing and activation: OpenAI's weights were trained with QuickGELU, which the architecture
    of the same name lacks.

    Raises:
        ConfigError: no such model or tag, or one without projected patch tokens.
        WeightsError: the weights do not fit.
    """
    name, tag = check_open_clip(spec)
    trained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    kept = {key: trained[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in trained}
    build = partial(
        open_clip.create_model,
        name,
        pretrained=None if weights is None else str(weights.absolute()),  # "openai" would be a tag, which is fetched
        pretrained_text=False,
        device=torch.get_default_device(),  # else it is moved to the CPU, which a network on the meta device cannot be
        force_quick_gelu=bool(trained.get("quick_gelu")),
        force_image_size=image_size,
        force_preprocess_cfg=kept,
    )
    model = load_into(f"open_clip:{name}", build, weights)
    visual = model.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise ConfigError(
            f"open_clip:{name} has no patch tokens after a projection", "Take its backbone from timm:NAME"
        )
    return OpenClipPatches(visual, visual.preprocess_cfg)


def check_open_clip(spec: str) -> tuple[str, str]:
    """Split `NAME/TAG` (or `NAME`, whose tag is ""), and raise a ConfigError for an unknown or unsupported one."""
    name, _, tag = spec.partition("/")
    if name not in open_clip.list_models():
        raise ConfigError(f"open_clip has no model {name!r}", nearest_name(name, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise ConfigError(f"open_clip:{name} has no weights {tag!r}", nearest_name(tag, tags) if tags else "")
    if "hf_model_name" in (open_clip.get_model_config(name) or {}).get("text_cfg", {}):
        raise ConfigError(
            f"open_clip:{name} has a text encoder of transformers, which is fetched from the hub",
            "Choose another model",
        )
    return name, tag


def timm_files(name: str) -> tuple[str, Sequence[str]]:
    """The hub repository of timm's model `name` and its weight file, as `open_clip_files`."""
    config = check_timm(name)
    repository = (config.get("hf_hub_id") or "").partition("@")[0]
    file = config.get("hf_hub_filename")
    return repository, [file] if file else TIMM_FILES


def timm_encoder(name: str, weights: Path | None, image_size: int | None) -> TimmPatches:
    """Build timm's model `name` with `weights`; None: random. Raises as `open_clip_encoder`."""
    preprocessing = check_timm(name)
    overlay = None if weights is None else {"state_dict": state_dict(weights)}
    # With the classifier, which is unused: without it timm ignores missing and unexpected keys.
    build = partial(timm.create_model, name, pretrained=weights is not None, pretrained_cfg_overlay=overlay)
    backbone = load_into(f"timm:{name}", build, weights)
    if not hasattr(backbone, "forward_intermediates"):
        raise ConfigError(f"timm:{name} has no feature maps", "Choose another backbone")
    if image_size is not None and hasattr(backbone, "set_input_size"):
        try:
            backbone.set_input_size(img_size=image_size)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"timm:{name} does not take images of {image_size} pixels ({error})",
                f"Set features.image_size = {preprocessing['input_size'][-1]}, the size of its training",
            ) from None
    return TimmPatches(backbone, image_size or preprocessing["input_size"][-1], preprocessing)


def check_timm(name: str) -> dict[str, Any]:
    """timm's pretrained configuration of `name`, which may carry a tag (`resnet50.a1_in1k`).

    OpenAI's CLIP crops the whole short side; timm's configurations of its weights say 0.9 of it.
    """
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}", nearest_name(name, timm.list_models()))
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        raise ConfigError(f"timm:{name} has no pretrained configuration", "Choose a backbone with weights")
    own_crop = {"crop_pct": 1.0} if "_clip" in name and name.endswith(".openai") else {}
    return config.to_dict() | own_crop


def state_dict(file: Path) -> dict[str, Any]:
    """The tensors of a file by name; a WeightsError where there are none: timm would download the published ones."""
    tensors: Any = load_tensors(file)
    if not isinstance(tensors, dict) or not tensors:
        raise WeightsError(f"{file} has no tensors by name", "Use the weights of this model")
    return tensors


def load_into(spec: str, build: Callable[[], nn.Module], weights: Path | None) -> Any:
    """Return `build()`, which loads `weights`; a failure to load them is a WeightsError."""
    try:
        return build()
    except LOADING_ERRORS as error:
        if weights is None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{weights} does not fit {spec}: {reason}", "Use the weights of this model") from None


def crop_transform(size: int, preprocessing: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """The network's own preprocessing to uint8[3, size, size]: PIL's antialiased resize, then a center crop."""
    interpolation = transforms.InterpolationMode(preprocessing.get("interpolation", "bicubic"))
    short_side = math.floor(size / (preprocessing.get("crop_pct") or 1.0))
    squash = "squash" in (preprocessing.get("resize_mode"), preprocessing.get("crop_mode"))
    target: Any = (size, size) if squash else short_side
    return transforms.Compose([transforms.Resize(target, interpolation), transforms.CenterCrop(size), pixels])


def find_file(
    spec: str, repository: str, names: Sequence[str], *, download: bool, option: str, progress: Progress
) -> Path:
    """The first of the files `names` of a hub repository that is in the cache, or, with `download`, on the hub.

    Args:
        spec: the encoder, for messages.
        repository: USER/NAME.
        names: the names that the file may have.
        download: fetch it from the hub if it is not in the cache.
        option: the option that takes a file in its place, for messages.

    Raises:
        WeightsError: there is no such file; the message names it, and how to download it.
    """
    if not repository:
        raise WeightsError(f"no weights of {spec} are published", "Choose another model")
    files = [HubFile(repository, name) for name in names]
    if (found := next(filter(None, map(cached, files)), None)) is not None:
        return found
    where = f"{names[0]} from {files[0].page}"
    if not download:
        hint = f"Add --download to fetch {where}, or name a file with {option}"
        raise WeightsError(f"the weights of {spec} are not in the cache", hint)
    run = f"run `hf download {repository} {names[0]}` where there is a network"
    problems = list[WeightsError]()
    for file in files:
        try:
            return fetch(file, f"Download {where} (or {run}) and add {option}", progress=progress)
        except WeightsError as error:
            problems.append(error)
    raise problems[0]
