"""The pretrained networks an evaluation looks with: found in a folder by name, or handed in by whoever built them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from vqpipe.errors import ConfigError, WeightsError
from vqpipe.files import hash_file
from vqpipe.metrics.inception import INCEPTION_FILE, Inception
from vqpipe.weights import LPIPS_BACKBONES, find_weights, load_lpips

LPIPS_NETS: tuple[Literal["alex", "vgg"], ...] = ("alex", "vgg")
PROBE_SIDE = 64
"""Side in pixels of the black image by which an extractor's dimension is found."""


@dataclass(frozen=True)
class FeatureNetworks:
    """The pretrained networks an evaluation found, by the metric each serves, and why others are absent."""

    perceptual: dict[str, nn.Module]
    inception: nn.Module | None
    """As `inception.Inception`: (images, outputs) -> float[B, D] by output."""
    sha256: dict[str, str]
    """File name -> hash of every weights file in use."""
    absent: dict[str, str]
    """Metric -> reason."""
    extractors: dict[str, nn.Module] = field(default_factory=dict)
    """Name -> a network of the user's, uint8[B, 3, H, W] -> float[B, D], for a Frechet distance of that name."""


def find_networks(folder: Path | None, device: torch.device | str = "cpu") -> FeatureNetworks:
    """Load what lies in `folder`: LPIPS backbones as torchvision names them and torch-fidelity's Inception.

    Raises:
        WeightsError: `folder` is not a directory, or a file in it is damaged. A file that is not there is a reason in
            `absent`, not an error.
    """
    if folder is not None and not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder", "Name the folder that holds the weights with --weights DIR")
    perceptual: dict[str, nn.Module] = {}
    inception: nn.Module | None = None
    sha256: dict[str, str] = {}
    absent: dict[str, str] = {}
    for net in LPIPS_NETS:
        name, what = LPIPS_BACKBONES[net]
        try:
            file = find_weights(name, folder, f"LPIPS needs {what}")
        except WeightsError as error:
            absent[f"lpips_{net}"] = str(error)
            continue
        perceptual[f"lpips_{net}"] = load_lpips(net, file).to(device)
        sha256[file.name] = hash_file(file)
    try:
        file = find_weights(INCEPTION_FILE, folder, "rFID needs torch-fidelity's Inception")
    except WeightsError as error:
        absent["rfid"] = str(error)
    else:
        inception = Inception(file).to(device)
        sha256[file.name] = hash_file(file)
    return FeatureNetworks(perceptual, inception, sha256, absent)


class PooledMaps(nn.Module):
    """A network of feature maps as an extractor: uint8[B, 3, H, W] -> float32[B, D], the mean over positions.

    Args:
        network: images as it was trained to see them, in 8 bits, -> float[B, D, h, w].
        prepare: one RGB image -> uint8[3, S, S], the network's own resize and crop.
    """

    def __init__(self, network: nn.Module, prepare: Callable[[Image.Image], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.prepare = prepare

    def forward(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.cpu()]
        prepared = torch.stack([self.prepare(picture) for picture in pictures]).to(images.device)
        maps: Tensor = self.network(prepared)
        return maps.float().mean((2, 3))


@torch.inference_mode()
def feature_size(name: str, network: nn.Module, device: torch.device | str) -> int:
    """D of an extractor, from one black image.

    Raises:
        ConfigError: its output is not float[B, D].
    """
    features = network(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, dtype=torch.uint8, device=device))
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ConfigError(f"the extractor {name} does not give one vector an image", "Pool its features")
    return features.shape[1]
