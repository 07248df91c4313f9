"""LPIPS as a training loss, its backbone read from a file that the user names.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", through the `lpips`
package: its v0.1 linear heads ship with it, the backbone is torchvision's ImageNet network and does not.
"""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vqpipe.weights import LPIPS_BACKBONES, find_weights, load_lpips


class Perceptual(nn.Module):
    """Mean LPIPS distance of a reconstruction, its network frozen and in evaluation mode for good.

    The released VQGAN-LC loop puts the network back into training mode, where the dropout before its heads makes the
    loss random; here `train()` does not reach it. Its weights come from a file, and are in no `state_dict`.
    """

    def __init__(self, net: Literal["vgg", "alex"], weights: str = "") -> None:
        """`weights`: torchvision's file, or the folder that holds it. "vgg" is what VQGAN trains with.

        Raises:
            WeightsError: the file is absent, or is not that backbone.
        """
        super().__init__()
        self.lpips = load_lpips(net, backbone_file(net, weights))
        self.register_state_dict_post_hook(without_weights)
        self.register_load_state_dict_post_hook(without_missing)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """float[B, 3, H, W] twice, in [-1, 1] -> a scalar, with gradient for the reconstruction alone.

        The images are the target: with frozen weights and nothing to differentiate, their features keep no graph.
        """
        return self.lpips(images.detach(), reconstruction).mean()


def without_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the weights out of a state that is saved."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def without_missing(module: nn.Module, keys: Any) -> None:
    """Do not miss them in one that is loaded."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if "lpips.network." not in name]


def backbone_file(net: Literal["vgg", "alex"], weights: str) -> Path:
    """The file of LPIPS's backbone: `weights` itself, or in the folder `weights`.

    Raises:
        WeightsError: it is absent; names the file and the setting.
    """
    place = Path(weights).expanduser() if weights else None
    if place is not None and place.is_file():
        return place
    name, what = LPIPS_BACKBONES[net]
    return find_weights(name, place, f"LPIPS needs {what}", "--set objective.lpips_weights=DIR")
