"""The Inception-v3 of 2015 that defines FID, through torch-fidelity, and the two resizes to its 299 pixels: that of
TensorFlow 1, and clean-fid's (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").

Shapes: B images of H x W pixels.
"""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vqpipe.errors import WeightsError
from vqpipe.weights import PUBLISHED_FILES, load_tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SOURCE = PUBLISHED_FILES[INCEPTION_FILE]
INCEPTION_SIZE = 299
SIZES = {"pool": 2048, "logits": 1008, "spatial": 7 * 17 * 17}
"""Output -> number of features."""
SPATIAL_LAYER, SPATIAL_CHANNELS = "Mixed_6d", 7
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)
"""The library's layers, in order. They are called one by one, because its own `forward` takes uint8 only."""


class Inception(nn.Module):
    """Inception-v3 with the outputs that metrics use.

    - pool: float32[B, 2048], the last pooling; FID, KID, precision and recall.
    - logits: float32[B, 1008], without their bias; Inception Score, as torch-fidelity takes it.
    - spatial: float32[B, 2023], the first 7 channels of the 17 x 17 map mixed_6/conv, after its ReLU, one channel after
      another; sFID (Nash et al. 2021, as the ADM suite computes it). That TensorFlow's mixed_6 is Mixed_6d here follows
      from the number of blocks; it was not compared with the output of the graph.

    Raises:
        WeightsError: `weights` is not the state dict that torch-fidelity publishes.
    """

    def __init__(self, weights: Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        load_tensors(weights)  # checks that the file holds only tensors: the library unpickles anything
        try:
            self.network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except (RuntimeError, AttributeError, TypeError, pickle.UnpicklingError) as error:
            raise WeightsError(
                f"{weights} does not fit FID's Inception: {str(error).splitlines()[0]}", f"Fetch {INCEPTION_SOURCE}"
            ) from None

    @torch.inference_mode()
    def forward(self, images: Tensor, outputs: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        """uint8[B, 3, H, W], which is resized as TensorFlow 1 does, or float[B, 3, 299, 299] in [0, 255]."""
        x = (resize_tf1(images) if images.dtype == torch.uint8 else images).float()
        x = (x - 128) / 128
        found: dict[str, Tensor] = {}
        for name in LAYERS:
            layer = getattr(self.network, name)
            if name == SPATIAL_LAYER and "spatial" in outputs:
                found["spatial"] = layer.branch1x1(x)[:, :SPATIAL_CHANNELS].flatten(1)
            x = layer(x)
        found["pool"] = x.flatten(1)
        if "logits" in outputs:
            found["logits"] = found["pool"].mm(self.network.fc.weight.T)
        return {name: found[name] for name in outputs}


def resize_tf1(images: Tensor) -> Tensor:
    """uint8[B, 3, H, W] -> float32[B, 3, 299, 299]: bilinear without antialiasing, corners as in TensorFlow 1."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=size, align_corners=False)
    return resized


def clean_resize(image: Tensor) -> Tensor:
    """clean-fid's resize: uint8[3, H, W] -> float32[3, 299, 299] in [0, 255], for any aspect ratio.

    Each channel by PIL as 32-bit floats, bicubic with antialiasing, clipped, and not rounded to 8 bits again. An image
    of that size already keeps its values.
    """
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    channels = image.cpu().numpy().astype(np.float32)
    if channels.shape[1:] == size:
        return torch.from_numpy(channels)
    planes = [Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC) for channel in channels]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]).clip(0, 255))


def clean_resize_all(images: Tensor) -> Tensor:
    """uint8[B, 3, H, W] -> float32[B, 3, 299, 299] on the same device."""
    return torch.stack([clean_resize(image) for image in images.cpu()]).to(images.device)
