"""Autoencoders with continuous latents, beside which tokenizers are measured: images -> latents -> images, no ids.

SD-VAE (Rombach et al. 2022) and SDXL-VAE (Podell et al. 2023), read from a folder in diffusers' layout. The latent is
the mode of the encoder's Gaussian posterior, its mean; a sample of it, as latent diffusion trains on, reconstructs
somewhat worse. The latents' scaling factor, which only generators need, cancels and is left out.

And the tiny autoencoders distilled from such (Bohan 2023: TAESD, TAESDXL, TAESD3, TAEF1, TAEF2), in diffusers' layout
or as the two .pth files of their repository, NAME_encoder.pth and NAME_decoder.pth. TAEF2 has blocks that diffusers'
AutoencoderTiny lacks (PooledBlock); they are put where the weights have them.

Letters: B images of H x W pixels, C latent channels, h x w positions, f the downsample factor.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
KINDS = ("AutoencoderKL", "AutoencoderTiny")
"""The networks of diffusers that can be opened."""
ENCODER, DECODER = "_encoder.pth", "_decoder.pth"
"""Endings of the two files of a tiny autoencoder."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How the attention of sd-vae-ft-mse's file is named, and today's diffusers names it."""


class ContinuousAutoencoder:
    """A published autoencoder without a codebook, with the verbs of a Tokenizer: `encode` to latents, and `decode`.

    It never changes: evaluation mode, no gradient, float32.

    Args:
        network: diffusers' AutoencoderKL or AutoencoderTiny.
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
        """Open a folder as diffusers writes it, config.json and safetensors, or one with the two .pth files of a tiny
        autoencoder. Never downloads.

        Raises:
            WeightsError: a file is absent or damaged, only a pickle is there, or the weights do not fit the config.
        """
        folder = Path(folder)
        pair = None if diffusers_class(folder) else find_pair(folder)
        network = load_network(folder) if pair is None else load_pair(*pair)
        files = [folder / CONFIG, folder / WEIGHTS] if pair is None else list(pair)
        digest = digest_json({file.name: hash_file(file) for file in files})
        name = folder.resolve().name if pair is None else pair[0].name.removesuffix(ENCODER)
        return cls(network, name=name, digest=digest, device=device)

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
        """uint8[B, 3, H, W], or float in [-1, 1] -> float32[B, C, h, w], the mode of the posterior
        (a tiny autoencoder has but one latent).

        Raises:
            DataError: another shape, dtype or range; sides that are not multiples of the downsample factor.
        """
        images = network_input(images, self.downsample_factor, self.device)
        encoded = self.network.encode(images)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents

    @torch.no_grad()
    def decode(self, latents: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """float[B, C, h, w] -> uint8[B, 3, H, W], `image_size` being (H, W); `groups` stays None.

        Raises:
            DataError: latents that do not fit the size.
            NumericError: the images are not finite.
        """
        return to_uint8(self.decode_float(latents, image_size, groups))

    @torch.no_grad()
    def decode_float(self, latents: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """As `decode`, before rounding: float[B, 3, H, W] of about [-1, 1], not clamped."""
        self.check_groups(groups)
        if tuple(latents.shape[1:]) != self.latent_shape(*image_size):
            raise DataError(f"latents of shape {list(latents.shape)} are not those of {image_size} pixels")
        images = self.network.decode(latents.to(self.device)).sample
        if not bool(torch.isfinite(images).all()):
            raise NumericError(f"{self.name} reconstructs NaN or infinity", "Check its weights and the images")
        return images

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
    """Open what reconstructs images: a tokenizer, or a continuous autoencoder in one of the layouts above.

    Raises:
        ArtifactError, WeightsError: it is absent, damaged, or its weights do not fit its config.
    """
    folder = Path(path)
    if not folder.is_dir() and str(path) in RELEASED.values():
        raise WeightsError(f"{path} is not a folder here, and is not downloaded", FETCH)
    if diffusers_class(folder) is not None or any(folder.glob("diffusion_pytorch_model*")):
        return ContinuousAutoencoder.from_pretrained(folder, device)
    if not (folder / CONFIG).is_file() and find_pair(folder) is not None:
        return ContinuousAutoencoder.from_pretrained(folder, device)
    return Tokenizer.from_pretrained(path, device)


def load_network(folder: Path) -> Any:
    """diffusers' network with the weights of `folder`, every tensor accounted for."""
    found = diffusers_class(folder)
    if found is None:
        raise WeightsError(f"{folder} has no {CONFIG} of diffusers", FETCH)
    if found not in KINDS:
        raise WeightsError(f"{folder} holds diffusers' {found}; what can be evaluated is {' or '.join(KINDS)}", FETCH)
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin"))
        raise WeightsError(f"{folder} has no {WEIGHTS}" + (", and its pickle is not opened" if pickled else ""), FETCH)
    tensors = {new_name(name): value.float() for name, value in load_tensors(folder / WEIGHTS).items()}
    table = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    added = {"block_out_channels"} if found == "AutoencoderTiny" else set()  # diffusers writes it, and cannot read it
    settings = {key: value for key, value in table.items() if not key.startswith("_") and key not in added}
    network = build_network(found, settings, folder / CONFIG)
    add_pooled_blocks(network, tensors)
    load_weights(network, tensors, folder)
    return network


def build_network(kind: str, settings: dict[str, Any], source: Path) -> Any:
    """diffusers' network of these settings, which `source` gave, on the meta device."""
    import diffusers  # seconds: the package imports all of its autoencoders

    try:
        with torch.device("meta"):
            network: Any = getattr(diffusers, kind)(**settings)
    except Exception as error:  # settings reach the library's arithmetic unchecked
        raise WeightsError(f"{source} does not describe an {kind}: {error}", FETCH) from None
    if (network.config.in_channels, network.config.out_channels) != (3, 3):
        raise WeightsError(f"{source} is not for images of three channels", FETCH)
    return network


def find_pair(folder: Path) -> tuple[Path, Path] | None:
    """NAME_encoder.pth and NAME_decoder.pth of a folder; None where it has no encoder.

    Raises:
        WeightsError: several, or an encoder without its decoder.
    """
    encoders = sorted(folder.glob(f"*{ENCODER}"))
    if not encoders:
        return None
    if len(encoders) > 1:
        names = ", ".join(file.name.removesuffix(ENCODER) for file in encoders)
        raise WeightsError(f"{folder} holds several tiny autoencoders: {names}", "Put the one you mean into a folder")
    decoder = encoders[0].with_name(encoders[0].name.removesuffix(ENCODER) + DECODER)
    if not decoder.is_file():
        raise WeightsError(f"{folder} has {encoders[0].name} without {decoder.name}", "Fetch both")
    return encoders[0], decoder


def load_pair(encoder: Path, decoder: Path) -> Any:
    """diffusers' AutoencoderTiny with the weights of a tiny autoencoder's two files, every tensor accounted for."""
    tables = [load_tensors(file) for file in (encoder, decoder)]
    for file, table in zip((encoder, decoder), tables, strict=True):
        if not isinstance(table, dict) or not all(isinstance(value, Tensor) for value in table.values()):
            raise WeightsError(f"{file} is not a table of tensors", "Fetch it again")
    tensors = {f"encoder.layers.{name}": value.float() for name, value in tables[0].items()}
    for name, value in tables[1].items():  # its layer 0 clamps, which diffusers does outside the layers
        number, _, rest = name.partition(".")
        tensors[f"decoder.layers.{int(number) - 1 if number.isdigit() else number}.{rest}"] = value.float()
    last = [value for name, value in tensors.items() if name.startswith("encoder.")][-1:]
    network = build_network("AutoencoderTiny", {"latent_channels": len(last[0]) if last else 0}, encoder)
    add_pooled_blocks(network, tensors)
    load_weights(network, tensors, encoder)
    return network


def add_pooled_blocks(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the blocks of an AutoencoderTiny that have a pooled part in `tensors`, on the meta device."""
    names = sorted({name.partition(".pool.")[0] for name in tensors if ".pool." in name})
    known = dict(network.named_modules())
    for name in names:
        if isinstance(convolutions := getattr(known.get(name), "conv", None), nn.Sequential):
            parent, _, number = name.rpartition(".")
            channels = next(convolutions.parameters()).shape[1]
            setattr(known[parent], number, PooledBlock(known[name], channels))


class PooledBlock(nn.Module):
    """A block of an AutoencoderTiny after a part that sees the whole latent: float[B, C, h, w] -> the same shape.

    x + conv(relu(norm(conv(x)))), the convolutions 1x1 to 4 C channels and back, the norm over 4 groups of them and all
    positions; then the block. TAEF2 has three at the lowest resolution of either side (its code: `use_midblock_gn`).
    """

    def __init__(self, block: Any, channels: int) -> None:
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        with torch.device("meta"):
            self.pool = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
                nn.GroupNorm(4, 4 * channels),
                nn.ReLU(),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent + self.pool(latent)
        return self.fuse(self.conv(latent) + self.skip(latent))


def new_name(name: str) -> str:
    """A tensor's name in today's diffusers."""
    return re.sub(r"\.(query|key|value|proj_attn)\.(weight|bias)$", lambda old: f".{OLD_NAMES[old[1]]}.{old[2]}", name)
