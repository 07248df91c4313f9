"""Further feature networks, of open_clip or timm, each for a Frechet distance that is reported under its name."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from vqpipe.codebooks import features
from vqpipe.device import for_inference
from vqpipe.errors import ConfigError
from vqpipe.files import hash_file
from vqpipe.metrics.feature_networks import FeatureNetworks
from vqpipe.progress import SILENT, Progress


class PooledMaps(nn.Module):
    """A network of feature maps as an extractor: uint8[B, 3, H, W] -> float32[B, D], the mean over positions.

    Args:
        network: 8-bit images at its own input size -> float[B, D, h, w].
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


def add_extractor(
    networks: FeatureNetworks,
    spec: str | None,
    weights: Path | None,
    device: torch.device,
    *,
    download: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Build the network `spec` ("open_clip:NAME/TAG", "timm:NAME"; None: none) and add it to `networks`.

    With `download`, weights that are not in the cache are fetched from the hub.

    Raises:
        ConfigError: no such network, or one without weights or preprocessing of its own.
        WeightsError: its weights are absent.
    """
    if spec is None:
        if weights is not None:
            raise ConfigError("--extractor-weights was given without --extractor", "Name the network they belong to")
        return
    pretrained = {kind: each.usage for kind, each in features.ENCODERS.items() if each.hub_files is not None}
    if spec.partition(":")[0] not in pretrained:  # patch-pca is fitted to images, so it measures no distance
        usages = " or ".join(pretrained.values())
        raise ConfigError(f"--extractor {spec} is no pretrained network", f"Use {usages}")
    config = features.FeaturesConfig(encoder=spec, weights=weights, pool=1)
    file = features.encoder_weights(config, download=download, option="--extractor-weights FILE", progress=progress)
    encoder = features.open_encoder(config, file)
    if file is None or encoder.transform is None:
        raise ConfigError(f"{spec} has no weights or no preprocessing of its own", "Name open_clip: or timm:")
    networks.extractors[spec] = for_inference(PooledMaps(encoder, encoder.transform), device)
    networks.sha256[f"{spec}: {file.name}"] = networks.extractor_sha256[spec] = hash_file(file)
