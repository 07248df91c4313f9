"""Local files of pretrained weights: found by name in a folder, loaded without executing code from them.

Nothing is downloaded. The WeightsError of an absent file has its name, its publisher, and where to put it.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from vqpipe.errors import WeightsError
from vqpipe.files import valid_text

LPIPS_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", "torchvision's AlexNet, ImageNet weights"),
    "vgg": ("vgg16-397923af.pth", "torchvision's VGG16, ImageNet weights"),
}
"""Backbone of LPIPS -> torchvision's file name, and a description. The linear heads are in the lpips package."""


def find_weights(name: str, folder: Path | None, need: str, option: str = "--weights DIR") -> Path:
    """The path of the file `name` in `folder`.

    Raises:
        WeightsError: there is no folder, or no such file in it. The message starts with `need`.
    """
    if folder is not None and (folder / name).is_file():
        return folder / name
    reason = "no folder of weights was given" if folder is None else f"{folder} has no {name}"
    raise WeightsError(f"{need}: {reason}", f"Download {name} into a folder and pass that folder with {option}")


def load_tensors(path: Path, *, placeholders: Mapping[str, type] | None = None, mmap: bool = False) -> dict[str, Any]:
    """Read the tensors of a `.safetensors` file or of a PyTorch pickle, the latter with `weights_only=True`.

    Args:
        path: the file.
        placeholders: full name of a class that the pickle may contain -> the class to use in its place.
        mmap: memory-map the tensors of a pickle.

    Raises:
        WeightsError: the file is absent or damaged, or contains anything but tensors in plain containers.
    """
    allowed: list[Any] = [(placeholder, name) for name, placeholder in (placeholders or {}).items()]
    try:
        if path.suffix == ".safetensors":
            if valid_text(str(path)) != str(path):  # load_file takes only paths that are UTF-8
                return load(path.read_bytes())
            return load_file(path)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist", "Check the path") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} contains more than tensors{f' ({found[1]})' if found else ''}; no code in it was executed",
            "Use a safetensors file, or, if you trust it, save its tensors alone",
        ) from None
    except Exception as error:  # readers raise many types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason[:120]}", "Download it again") from None


def load_lpips(net: Literal["alex", "vgg"], file: Path) -> nn.Module:
    """LPIPS v0.1 (Zhang et al. 2018), frozen; maps two float[B, 3, H, W] in [-1, 1] to float[B, 1, 1, 1].

    Args:
        net: the backbone.
        file: torchvision's file of the backbone.

    Raises:
        WeightsError: the file is absent or is not that backbone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated arguments that lpips passes to torchvision
        import lpips

        module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return Frozen(fill_backbone(module, load_tensors(file), file))


def fill_backbone(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Copy torchvision's `features.N.*` into the backbone of lpips, whose slices keep the numbers N."""
    backbone: Any = module.net
    for name, parameter in backbone.named_parameters():
        number, leaf = name.split(".")[-2:]
        value = tensors.get(f"features.{number}.{leaf}")
        if value is None or value.shape != parameter.shape:
            raise WeightsError(
                f"{source} is not the backbone of LPIPS: features.{number}.{leaf} is absent or has another shape"
            )
        parameter.data.copy_(value)
    return module


class Frozen(nn.Module):
    """A network without gradients for its weights and always in evaluation mode; `train()` has no effect."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        """Return the network unchanged."""
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)
