"""The pretrained networks of the metrics, found in a folder by file name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vqpipe.device import for_inference
from vqpipe.errors import ConfigError, WeightsError
from vqpipe.files import hash_file
from vqpipe.metrics.inception import INCEPTION_FILE, Inception
from vqpipe.weights import LPIPS_BACKBONES, LpipsNet, find_weights, load_lpips

LPIPS_NETS: tuple[LpipsNet, ...] = ("alex", "vgg")
"""The backbones whose LPIPS is reported where their published weights are found."""
PROBE_SIDE = 64
"""Side in pixels of the black image that shows an extractor's number of features."""


@dataclass(frozen=True)
class FeatureNetworks:
    """The pretrained networks that were found, by metric, and the reasons of those that were not."""

    perceptual: dict[str, nn.Module]
    """LPIPS networks by key."""
    inception: nn.Module | None
    """As `inception.Inception`: (images, outputs) -> float[B, D] by output."""
    sha256: dict[str, str]
    """File name -> hash of each weights file in use."""
    absent: dict[str, str]
    """Metric -> reason."""
    extractors: dict[str, nn.Module] = field(default_factory=dict)
    """Name -> a further network, uint8[B, 3, H, W] -> float[B, D], for a Frechet distance of that name."""
    extractor_sha256: dict[str, str] = field(default_factory=dict)
    """Name of an extractor -> hash of its weights file."""


def find_networks(
    folder: Path | None, device: torch.device | str = "cpu", perceptual_weights: Mapping[LpipsNet, Path] | None = None
) -> FeatureNetworks:
    """Load the LPIPS backbones (as torchvision names them) and torch-fidelity's Inception that are in `folder`.

    A missing file is a reason in `absent`, not an error.

    Args:
        folder: where the published weights are.
        device: where the networks go.
        perceptual_weights: backbone -> a file in torchvision's layout, for a perceptual distance of its own name.

    Raises:
        WeightsError: `folder` is not a directory, or a file in it is damaged.
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
        perceptual[f"lpips_{net}"] = for_inference(load_lpips(net, file), device)
        sha256[file.name] = hash_file(file)
    for net, file in (perceptual_weights or {}).items():
        perceptual[f"perceptual_{net}"] = for_inference(load_lpips(net, file), device)
        sha256[f"perceptual_{net}: {file.name}"] = hash_file(file)
    try:
        file = find_weights(INCEPTION_FILE, folder, "rFID needs torch-fidelity's Inception")
    except WeightsError as error:
        absent["rfid"] = str(error)
    else:
        inception = for_inference(Inception(file), device)
        sha256[file.name] = hash_file(file)
    return FeatureNetworks(perceptual, inception, sha256, absent)


@torch.inference_mode()
def feature_size(name: str, network: nn.Module, device: torch.device | str) -> int:
    """The number of features of an extractor, from one black image.

    Raises:
        ConfigError: its output is not float[B, D].
    """
    features = network(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, dtype=torch.uint8, device=device))
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ConfigError(f"the extractor {name} does not return one vector per image", "Pool its features")
    return features.shape[1]
