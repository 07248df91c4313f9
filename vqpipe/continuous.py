"""Autoencoders with continuous latents, beside which tokenizers are measured: images -> latents -> images, no ids.

SD-VAE (Rombach et al. 2022) and SDXL-VAE (Podell et al. 2023), read from a folder in diffusers' layout. The latent is
the mode of the encoder's Gaussian posterior, its mean; a sample of it, as latent diffusion trains on, reconstructs
somewhat worse. The latents' scaling factor, which only generators need, cancels and is left out.

Letters: B images of H x W pixels, C latent channels, h x w positions, f the downsample factor.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqpipe.data.transforms import to_uint8
from vqpipe.errors import DataError, NumericError, WeightsError
from vqpipe.files import digest_json, hash_file
from vqpipe.tokenizer import Tokenizer, diffusers_class, latent_size, load_weights, network_input
from vqpipe.weights import load_tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
RELEASED = {"SD-VAE": "stabilityai/sd-vae-ft-mse", "SDXL-VAE": "stabilityai/sdxl-vae"}
"""Who publishes them on huggingface.co."""
FETCH = (
    f"Fetch {CONFIG} and {WEIGHTS} of "
    + " or ".join(f"{repository} ({name})" for name, repository in RELEASED.items())
    + " from huggingface.co into one folder, and name that folder with --tokenizer"
)
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How the attention of sd-vae-ft-mse's file is named, and today's diffusers names it."""


class ContinuousAutoencoder:
    """A published autoencoder without a codebook, with the verbs of a Tokenizer: `encode` to latents, and `decode`.

    It never changes: evaluation mode, no gradient, float32.

    Args:
        network: diffusers' AutoencoderKL.
        name: for people.
        digest: sha256 of what it was read from.
    """

    codebook_size = None
    num_groups = 0
    image_size = None
    """Convolutional and trained at several sizes: none is its own."""
    artifact = None

    def __init__(self, network: Any, *, name: str, digest: str = "", device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.network: Any = network.eval().requires_grad_(False).to(self.device)
        self.config = self.network.config
        self.name = name
        self.digest = digest
        self.downsample_factor: int = 2 ** (len(self.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "ContinuousAutoencoder":
        """Open the folder of an AutoencoderKL as diffusers writes it: config.json and safetensors. Never downloads.

        Raises:
            WeightsError: a file is absent or damaged, only a pickle is there, or the weights do not fit the config.
        """
        folder = Path(folder)
        network = load_network(folder)
        digest = digest_json({name: hash_file(folder / name) for name in (CONFIG, WEIGHTS)})
        return cls(network, name=folder.resolve().name, digest=digest, device=device)

    @property
    def source(self) -> "ContinuousAutoencoder":
        """What a stage that reads it names as its input: itself, by name and digest."""
        return self

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels; a DataError where they do not divide."""
        return (self.config.latent_channels, *latent_size(height, width, self.downsample_factor))

    def check_size(self, height: int, width: int) -> None:
        """Raise a DataError unless images of `height` x `width` pixels can be encoded."""
        self.latent_shape(height, width)

    def check_groups(self, groups: int | None) -> None:
        """Raise a DataError for any number of groups: a continuous latent has none."""
        if groups is not None:
            raise DataError(f"groups = {groups}, but {self.name} has continuous latents", "Leave --groups out")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W], or float in [-1, 1] -> float32[B, C, h, w], the mode of the posterior.

        Raises:
            DataError: another shape, dtype or range; sides that are not multiples of the downsample factor.
        """
        images = network_input(images, self.downsample_factor, self.device)
        return self.network.encode(images).latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """float[B, C, h, w] -> uint8[B, 3, H, W], `image_size` being (H, W); `groups` stays None.

        Raises:
            DataError: latents that do not fit the size.
            NumericError: the images are not finite.
        """
        self.check_groups(groups)
        if tuple(latents.shape[1:]) != self.latent_shape(*image_size):
            raise DataError(f"latents of shape {list(latents.shape)} are not those of {image_size} pixels")
        images = self.network.decode(latents.to(self.device)).sample
        if not bool(torch.isfinite(images).all()):
            raise NumericError(f"{self.name} reconstructs NaN or infinity", "Check its weights and the images")
        return to_uint8(images)

    def describe(self, image_size: int) -> dict[str, Any]:
        """What it is, for a report on images of that side; what only a tokenizer has is None."""
        return {
            "quantizer": None,
            "codebook_size": None,
            "num_groups": None,
            "downsample_factor": self.downsample_factor,
            "latent_shape": list(self.latent_shape(image_size, image_size)),
            "num_parameters": sum(parameter.numel() for parameter in self.network.parameters()),
        }


def open_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> Tokenizer | ContinuousAutoencoder:
    """Open what reconstructs images: a tokenizer, or a continuous autoencoder in diffusers' layout.

    Raises:
        ArtifactError, WeightsError: it is absent, damaged, or its weights do not fit its config.
    """
    folder = Path(path)
    if not folder.is_dir() and str(path) in RELEASED.values():
        raise WeightsError(f"{path} is not a folder here, and is not downloaded", FETCH)
    if diffusers_class(folder) is not None or any(folder.glob("diffusion_pytorch_model*")):
        return ContinuousAutoencoder.from_pretrained(folder, device)
    return Tokenizer.from_pretrained(path, device)


def load_network(folder: Path) -> Any:
    """diffusers' AutoencoderKL with the weights of `folder`, every tensor accounted for."""
    found = diffusers_class(folder)
    if found is None:
        raise WeightsError(f"{folder} has no {CONFIG} of diffusers", FETCH)
    if found != "AutoencoderKL":
        raise WeightsError(f"{folder} holds diffusers' {found}, and only AutoencoderKL can be evaluated", FETCH)
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin"))
        raise WeightsError(f"{folder} has no {WEIGHTS}" + (", and its pickle is not opened" if pickled else ""), FETCH)
    tensors = {new_name(name): value.float() for name, value in load_tensors(folder / WEIGHTS).items()}
    network = build_network(folder)
    load_weights(network, tensors, folder)
    return network


def build_network(folder: Path) -> Any:
    """The network that config.json describes, on the meta device."""
    from diffusers import AutoencoderKL  # seconds: the package imports all of its autoencoders

    table = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        with torch.device("meta"):
            network: Any = AutoencoderKL(**{key: value for key, value in table.items() if not key.startswith("_")})
    except Exception as error:  # settings reach the library's arithmetic unchecked
        raise WeightsError(f"{folder / CONFIG} does not describe an AutoencoderKL: {error}", FETCH) from None
    if (network.config.in_channels, network.config.out_channels) != (3, 3):
        raise WeightsError(f"{folder} is not for images of three channels", FETCH)
    return network


def new_name(name: str) -> str:
    """A tensor's name in today's diffusers."""
    return re.sub(r"\.(query|key|value|proj_attn)\.(weight|bias)$", lambda old: f".{OLD_NAMES[old[1]]}.{old[2]}", name)
