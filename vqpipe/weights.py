"""Pretrained weights that users bring: found by name in a folder they name, loaded without running code from them.

Nothing here downloads. An absent file is a WeightsError that says its name, who publishes it, and where to put it.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqpipe.errors import WeightsError

LPIPS_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", "torchvision's AlexNet, ImageNet weights"),
    "vgg": ("vgg16-397923af.pth", "torchvision's VGG16, ImageNet weights"),
}
"""Backbone -> file name as torchvision publishes it, and what it is. The linear heads come with the lpips package."""


def find_weights(name: str, folder: Path | None, what: str, option: str = "--weights DIR") -> Path:
    """Path of the file `name` in `folder`.

    Raises:
        WeightsError: no folder was named, or the file is not in it.
    """
    if folder is not None and (folder / name).is_file():
        return folder / name
    where = "no folder of weights was named" if folder is None else f"{folder} has no {name}"
    raise WeightsError(f"{what}: {where}", f"Fetch {name}, put it into a folder and name that folder with {option}")


def load_tensors(path: Path, *, harmless: Mapping[str, type] | None = None, mmap: bool = False) -> dict[str, Any]:
    """Read a `.safetensors` file or a PyTorch pickle of tensors (`weights_only`, so no code of the file runs).

    Args:
        path: the file.
        harmless: full name of a class that the pickle may mention -> the class of ours that is made in its place.
        mmap: leave the tensors of a pickle on disk until they are read; changes to them stay in memory.

    Raises:
        WeightsError: the file is absent, cut short, or holds anything but tensors in plain containers.
    """
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in (harmless or {}).items()]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on an unusual protocol of the pickle, which is no matter or an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist", "Check the path") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} holds more than tensors{f' ({found[1]})' if found else ''}, and nothing in it was run",
            "Ask for a safetensors file, or, where you trust it, save its tensors alone",
        ) from None
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason[:120]}", "Fetch it again") from None


def load_lpips(net: Literal["alex", "vgg"], weights: Path) -> nn.Module:
    """LPIPS v0.1 (Zhang et al. 2018) with the backbone read from `weights`; frozen, in evaluation mode for good.

    Call it with two float[B, 3, H, W] in [-1, 1]; it returns float[B, 1, 1, 1]. `weights` is torchvision's file, or its
    folder.

    Raises:
        WeightsError: the file is absent or is not that backbone.
    """
    name, what = LPIPS_BACKBONES[net]
    file = find_weights(name, weights, f"LPIPS needs {what}") if weights.is_dir() else weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's remarks on the arguments that lpips still passes
        import lpips

        module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return freeze(fill_backbone(module, load_tensors(file), file))


def fill_backbone(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Copy torchvision's `features.N.*` into the slices lpips cut the backbone into, which keep the numbers N."""
    backbone: Any = module.net
    for name, parameter in backbone.named_parameters():
        number, leaf = name.split(".")[-2:]
        value = tensors.get(f"features.{number}.{leaf}")
        if value is None or value.shape != parameter.shape:
            raise WeightsError(
                f"{source} is not the backbone LPIPS needs: features.{number}.{leaf} is absent or differs"
            )
        parameter.data.copy_(value)
    return module


class Frozen(nn.Module):
    """Wraps a network that never trains: no gradient for its weights, and `train()` leaves it in evaluation mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)


def freeze(network: nn.Module) -> Frozen:
    """`network`, in evaluation mode for good (VQGAN-LC's loop turns LPIPS's dropout back on; ours cannot)."""
    return Frozen(network)
