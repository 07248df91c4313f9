"""Files of weights: found by name in a folder, loaded without executing code from them, saved.

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
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from vqpipe.errors import WeightsError
from vqpipe.file_kinds import explain, kind_of_file
from vqpipe.files import nearest_path, valid_text

LpipsNet = Literal["alex", "vgg", "squeeze"]
LPIPS_BACKBONES: dict[LpipsNet, tuple[str, str]] = {
    "alex": ("alexnet-owt-7be5be79.pth", "torchvision's AlexNet, ImageNet weights"),
    "vgg": ("vgg16-397923af.pth", "torchvision's VGG16, ImageNet weights"),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", "torchvision's SqueezeNet 1.1, ImageNet weights"),
}
"""Backbone of LPIPS -> torchvision's file name, and a description. The linear heads are in the lpips package."""

PUBLISHED_FILES = {
    **{name: f"https://download.pytorch.org/models/{name}" for name, _ in LPIPS_BACKBONES.values()},
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
}
"""File of weights -> where it is published."""
CHECK_FILE = "Name the file of weights, or download it again"


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
    """Read the tensors of a safetensors file or of a PyTorch pickle, the latter with `weights_only=True`.

    Which of the two it is, is told by the content, and by the name only where the content is unknown.

    Args:
        path: the file.
        placeholders: full name of a class that the pickle may contain -> the class to use in its place.
        mmap: memory-map the tensors of a pickle.

    Raises:
        WeightsError: the file is absent, damaged or of another kind, or contains anything but tensors in plain
            containers.
    """
    kind = kind_of_weights(path)
    allowed: list[Any] = [(placeholder, name) for name, placeholder in (placeholders or {}).items()]
    try:
        if kind == "safetensors" or (kind == "unknown" and path.suffix == ".safetensors"):
            if valid_text(str(path)) != str(path):  # load_file takes only paths that are UTF-8
                return load(path.read_bytes())
            return load_file(path)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} contains more than tensors{f' ({found[1]})' if found else ''}; no code in it was executed",
            "Use a safetensors file, or, if you trust it, save its tensors alone",
        ) from None
    except Exception as error:  # readers raise many types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason[:120]}", "Download it again") from None


def save_weights(network: torch.nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save the state dict of a network as safetensors, with `metadata` in the header of the file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, metadata)


def load_weights(network: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Load exactly these tensors into a network, which may be on the meta device.

    Raises:
        WeightsError: a name is missing or unexpected, or a shape differs. The message names `source`.
    """
    try:
        network.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise WeightsError(f"the weights in {source} do not match their config: {first[:160]}") from None


def kind_of_weights(path: Path) -> str:
    """Whether a file is a safetensors file, a PyTorch checkpoint, or of an unknown kind.

    Raises:
        WeightsError: it is absent, or certainly no weights; the message says what it is.
    """
    try:
        kind = kind_of_file(path)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist", nearest_path(path)) from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}", "Name a file of weights") from None
    if kind in ("safetensors", "unknown"):
        return kind
    if kind in ("pytorch", "pickle", "tar"):  # a tar: the oldest format of PyTorch
        if path.suffix == ".safetensors":  # torch.load takes the suffix for the format
            raise WeightsError(*explain(str(path), kind, "a safetensors file", "Rename it: its name must end in .pth"))
        return "pytorch"
    if kind == "torchscript":
        raise WeightsError(
            f"{path} is a TorchScript archive, which contains code; no code in it was executed",
            "Use the state dict of this model, or, if you trust the file, save that of torch.jit.load(FILE)",
        )
    hints = {
        "zip": "Unpack it, and name the file of weights in it",
        "npy": "A codebook may be one: its name must end in .npy",
        "npz": "Save its arrays as safetensors",
        "json": "Name the file of weights, which is beside it",
    }
    raise WeightsError(*explain(str(path), kind, "a file of weights", hints.get(kind, CHECK_FILE)))


def load_lpips(net: LpipsNet, file: Path) -> nn.Module:
    """LPIPS v0.1 (Zhang et al. 2018), frozen; maps two float[B, 3, H, W] in [-1, 1] to float[B, 1, 1, 1].

    Args:
        net: the backbone.
        file: torchvision's file of the backbone, or another one in its layout: a distance with other weights is not
            the published LPIPS.

    Raises:
        WeightsError: the file is absent or is not that backbone.
    """
    return Frozen(fill_backbone(build_lpips(net), load_tensors(file), file))


def build_lpips(net: LpipsNet) -> nn.Module:
    """LPIPS with the published heads and a backbone of random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated arguments that lpips passes to torchvision
        import lpips

        network: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return network


def fill_backbone(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Copy torchvision's `features.N...` into the backbone of lpips, `sliceM.N...`, which keeps the numbers N."""
    backbone: Any = module.net
    for name, parameter in backbone.named_parameters():
        source_name = f"features.{name.partition('.')[2]}"
        value = tensors.get(source_name)
        if value is None or value.shape != parameter.shape:
            raise WeightsError(f"{source} is not the backbone of LPIPS: {source_name} is absent or has another shape")
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
