"""LPIPS as a training loss, with the backbone read from a local file.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", through the `lpips`
package, which contains the v0.1 linear heads, but not the backbone, torchvision's ImageNet network.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vqpipe.weights import LPIPS_BACKBONES, LpipsNet, find_weights, load_lpips


class Perceptual(nn.Module):
    """Mean LPIPS of a batch; the network is frozen and always in evaluation mode.

    The released VQGAN-LC loop sets the network to training mode, where the dropout before its heads makes the loss
    random; here `train()` has no effect on it. Its weights are not part of the `state_dict`.
    """

    def __init__(self, net: LpipsNet, weights: str = "", *, network: nn.Module | None = None) -> None:
        """
        Args:
            net: "vgg" as in VQGAN, "alex" or "squeeze".
            weights: torchvision's file, another one in its layout, or the folder that contains torchvision's.
            network: an LPIPS network in place of the one from that file.

        Raises:
            WeightsError: the file is absent, or is not that backbone.
        """
        super().__init__()
        self.lpips = network or load_lpips(net, backbone_file(net, weights))
        self.register_state_dict_post_hook(without_weights)
        self.register_load_state_dict_post_hook(without_missing)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The mean LPIPS of float[B, 3, H, W] in [-1, 1], a scalar, with gradient for the reconstruction only."""
        return self.lpips(images.detach(), reconstruction).mean()


def without_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `state_dict` that removes the weights."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def without_missing(module: nn.Module, keys: Any) -> None:
    """A hook of `load_state_dict` that ignores the missing weights."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if "lpips.network." not in name]


def distance_name(net: LpipsNet, weights: str) -> str:
    """The key of the distance, as in `eval`: lpips_NET with torchvision's weights, by the name of their file, and
    perceptual_NET with others."""
    published = backbone_file(net, weights).name == LPIPS_BACKBONES[net][0]
    return f"{'lpips' if published else 'perceptual'}_{net}"


def backbone_file(net: LpipsNet, weights: str) -> Path:
    """The file of LPIPS's backbone: `weights` itself, or in the folder `weights`.

    Raises:
        WeightsError: it is absent.
    """
    path = Path(weights).expanduser() if weights else None
    if path is not None and path.is_file():
        return path
    name, description = LPIPS_BACKBONES[net]
    return find_weights(name, path, f"LPIPS needs {description}", "--set objective.lpips_weights=DIR")
