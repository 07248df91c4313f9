"""clean-fid's resize (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation")."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

INCEPTION_SIZE = 299


def clean_resize(image: Tensor, size: int = INCEPTION_SIZE) -> Tensor:
    """uint8[3, H, W] -> float32[3, size, size] in [0, 255], whatever the aspect ratio.

    Each channel by PIL as 32-bit floats, bicubic with antialiasing, clipped, and not rounded to 8 bits again. At `size`
    already, the values stay as they are.
    """
    channels = image.cpu().numpy().astype(np.float32)
    if channels.shape[1:] == (size, size):
        return torch.from_numpy(channels)
    planes = [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC) for channel in channels]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]).clip(0, 255))


def clean_resize_all(images: Tensor) -> Tensor:
    """uint8[B, 3, H, W] -> float32[B, 3, 299, 299] on the same device."""
    return torch.stack([clean_resize(image) for image in images.cpu()]).to(images.device)
