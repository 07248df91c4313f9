"""Autoencoders with continuous latents, as baselines for tokenizers: images -> latents -> images.

SD-VAE (Rombach et al. 2022) and SDXL-VAE (Podell et al. 2023) are read from a folder in the layout of diffusers. The
latent is the mean of the encoder's Gaussian posterior; a sample of it, as used to train latent diffusion, reconstructs
slightly worse. The scaling factor of the latents, which only generators need, is omitted. DC-AE (Chen et al. 2024) has
a deterministic encoder.

The tiny autoencoders distilled from them (Bohan 2023: TAESD, TAESDXL, TAESD3, TAEF1, TAEF2) are read in the layout of
diffusers or as the two .pth files of their repository, NAME_encoder.pth and NAME_decoder.pth. TAEF2 has blocks that
AutoencoderTiny of diffusers lacks (PooledBlock).

Shapes: B images of H x W pixels, C latent channels, h x w positions, f the downsample factor.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqpipe import artifacts
from vqpipe.data.transforms import to_uint8
from vqpipe.device import check_device, reduced_precision
from vqpipe.errors import DataError, NumericError, WeightsError, printable
from vqpipe.files import digest_json, hash_file
from vqpipe.model_card import table_of
from vqpipe.model_input import latent_size, network_input
from vqpipe.tokenizer import Tokenizer
from vqpipe.tokenizer_files import ENCODER, diffusers_class, find_pair
from vqpipe.weights import load_tensors, load_weights, save_weights

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
RELEASED = {"SD-VAE": "stabilityai/sd-vae-ft-mse", "SDXL-VAE": "stabilityai/sdxl-vae"}
"""Their repositories on huggingface.co."""
DOWNLOAD = (
    f"Download {CONFIG} and {WEIGHTS} of "
    + " or ".join(f"{repository} ({name})" for name, repository in RELEASED.items())
    + " from huggingface.co into one folder, and pass that folder with --tokenizer; or run vqpipe import-checkpoint "
    "with sd-vae or sdxl-vae"
)
KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
"""The supported classes of diffusers."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention in the file of sd-vae-ft-mse -> names in current diffusers."""


class ContinuousAutoencoder:
    """A published autoencoder without a codebook, with methods as of Tokenizer: `encode` to latents, and `decode`.

    Always in evaluation mode, without gradients, with float32 weights.

    Args:
        network: a model of diffusers of one of `KINDS`.
        name: for display.
        digest: sha256 of its files.
    """

    codebook_size = None
    num_groups = 0
    image_size: int | None = None
    """None: trained at several sizes."""
    artifact = None

    def __init__(self, network: Any, *, name: str, digest: str = "", device: str | torch.device = "cpu") -> None:
        self.device = check_device(device)
        self.autoencoder: Any = network.eval().requires_grad_(False).to(self.device)
        self.config = self.autoencoder.config
        self.range_checked = False
        self.name = printable(name)
        self.digest = digest
        widths = getattr(self.config, "encoder_block_out_channels", None) or self.config.block_out_channels
        self.downsample_factor: int = 2 ** (len(widths) - 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "ContinuousAutoencoder":
        """Open a folder in the layout of diffusers, or with the two .pth files of a tiny autoencoder.

        Raises:
            WeightsError: a file is absent or damaged or a pickle, or the weights do not match the config.
            ArtifactError: the folder is a damaged artifact, or one of another kind.
        """
        folder = Path(folder)
        if (folder / "manifest.json").is_file():
            artifacts.open_artifact(folder, "autoencoder").verified_file(WEIGHTS)
        pair = None if diffusers_class(folder) else find_pair(folder)
        if pair is None:
            network, files, name = load_diffusers(folder), (folder / CONFIG, folder / WEIGHTS), folder.resolve().name
        else:
            network, files, name = load_pair(*pair), pair, pair[0].name.removesuffix(ENCODER)
        digest = digest_json({file.name: hash_file(file) for file in files})
        return cls(network, name=name, digest=digest, device=device)

    @property
    def source(self) -> "ContinuousAutoencoder":
        """The input of a stage that reads it: itself, by name and digest."""
        return self

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of `height` x `width` pixels; a DataError if they do not divide."""
        return (self.config.latent_channels, *latent_size(height, width, self.downsample_factor))

    def check_groups(self, groups: int | None) -> None:
        """Raise a DataError unless `groups` is None: a continuous latent has no groups."""
        if groups is not None:
            raise DataError(f"groups = {groups}, but {self.name} has continuous latents", "Omit --groups")

    @torch.no_grad()
    def encode(self, images: Tensor, precision: str = "fp32") -> Tensor:
        """Encode images to latents float[B, C, h, w], the mean of the posterior if there is one.

        Args:
            images: uint8[B, 3, H, W], or float[B, 3, H, W] in [-1, 1].
            precision: "fp32", or "bf16" for convolutions and matrix products.

        Raises:
            DataError: a wrong shape, dtype or range; sides that are not multiples of the downsample factor.
        """
        images = network_input(images, self)
        with reduced_precision(self.autoencoder, self.device, precision):
            encoded = self.autoencoder.encode(images)
            if hasattr(encoded, "latent_dist"):
                return encoded.latent_dist.mode()
            return encoded.latent if hasattr(encoded, "latent") else encoded.latents

    @torch.no_grad()
    def decode(self, latents: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """Decode latents float[B, C, h, w] to images uint8[B, 3, H, W], with `image_size` (H, W) and `groups` None.

        Raises:
            DataError: the shape of the latents does not match the size.
            NumericError: the images are not finite.
        """
        return to_uint8(self.decode_float(latents, image_size, groups))

    @torch.no_grad()
    def decode_float(self, latents: Tensor, image_size: tuple[int, int], groups: int | None = None) -> Tensor:
        """As `decode`, without rounding and clamping: float[B, 3, H, W], about [-1, 1]."""
        self.check_groups(groups)
        if tuple(latents.shape[1:]) != self.latent_shape(*image_size):
            raise DataError(f"latents of shape {list(latents.shape)} do not match images of {image_size} pixels")
        images = self.autoencoder.decode(latents.to(self.device)).sample
        if not bool(torch.isfinite(images).all()):
            raise NumericError(f"{self.name} reconstructs NaN or infinity", "Check its weights and the images")
        return images

    def describe(self, image_size: int) -> dict[str, Any]:
        """Facts for a report on images of side `image_size`, as `Tokenizer.describe`."""
        return {
            "quantizer": None,
            "codebook_size": None,
            "num_groups": None,
            "downsample_factor": self.downsample_factor,
            "latent_shape": list(self.latent_shape(image_size, image_size)),
            "num_parameters": sum(parameter.numel() for parameter in self.autoencoder.parameters()),
        }


ImageAutoencoder = Tokenizer | ContinuousAutoencoder
"""An autoencoder of images, with ids or with continuous latents."""


def open_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> ImageAutoencoder:
    """Open a tokenizer, or a continuous autoencoder in one of the layouts above.

    Raises:
        ArtifactError, WeightsError: it is absent, damaged, or its weights do not match its config.
    """
    folder = Path(path)
    if not folder.is_dir() and str(path).removeprefix("hf:") in RELEASED.values():
        raise WeightsError(f"{path} is not a folder, and is not downloaded automatically", DOWNLOAD)
    in_diffusers_layout = diffusers_class(folder) is not None or any(folder.glob("diffusion_pytorch_model*"))
    if in_diffusers_layout or (not (folder / CONFIG).is_file() and find_pair(folder) is not None):
        return ContinuousAutoencoder.from_pretrained(folder, device)
    return Tokenizer.from_pretrained(path, device)


def write_continuous(draft: artifacts.Draft, autoencoder: ContinuousAutoencoder, rows: dict[str, Any]) -> None:
    """Write the files of an autoencoder artifact: weights and config in the layout of diffusers, and a card."""
    network = autoencoder.autoencoder
    settings = {key: value for key, value in network.config.items() if not key.startswith("_")}
    draft.write_json(CONFIG, {"_class_name": type(network).__name__, **settings})
    with draft.write(WEIGHTS) as path:
        save_weights(network, path)
    draft.write_text("README.md", f"# Autoencoder with continuous latents\n\n{table_of(rows)}\n")


def load_diffusers(folder: Path) -> Any:
    """The diffusers model in `folder`; every tensor must match."""
    kind = diffusers_class(folder)
    if kind is None:
        raise WeightsError(f"{folder} has no {CONFIG} of diffusers", DOWNLOAD)
    if kind not in KINDS:
        raise WeightsError(f"{folder} is a {kind} of diffusers; supported are {', '.join(KINDS)}", DOWNLOAD)
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin"))
        raise WeightsError(f"{folder} has no {WEIGHTS}" + (", and pickles are not read" if pickled else ""), DOWNLOAD)
    tensors = {new_name(name): value.float() for name, value in load_tensors(folder / WEIGHTS).items()}
    table = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    derived = {"block_out_channels"} if kind == "AutoencoderTiny" else set()  # saved, but not an argument
    settings = {key: value for key, value in table.items() if not key.startswith("_") and key not in derived}
    network = build_network(kind, settings, folder / CONFIG)
    add_pooled_blocks(network, tensors)
    load_weights(network, tensors, folder)
    return network


def build_network(kind: str, settings: dict[str, Any], source: Path) -> Any:
    """A diffusers model of these settings, from the file `source`, on the meta device."""
    import diffusers  # takes seconds

    try:
        with torch.device("meta"):
            network: Any = getattr(diffusers, kind)(**settings)
    except Exception as error:  # diffusers does not check the settings
        raise WeightsError(f"{source} is not a valid config of {kind}: {error}", DOWNLOAD) from None
    channels = network.config.in_channels
    if (channels, network.config.get("out_channels", channels)) != (3, 3):
        raise WeightsError(f"{source} is not for images of three channels", DOWNLOAD)
    return network


def load_pair(encoder: Path, decoder: Path) -> Any:
    """An AutoencoderTiny with the weights of the two files of a tiny autoencoder; every tensor must match."""
    states = [load_tensors(file) for file in (encoder, decoder)]
    for file, state in zip((encoder, decoder), states, strict=True):
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(f"{file} is not a state dict", "Download it again")
    tensors = {f"encoder.layers.{name}": value.float() for name, value in states[0].items()}
    for name, value in states[1].items():  # layer 0 clamps; in diffusers that is not a layer
        number, _, parameter = name.partition(".")
        tensors[f"decoder.layers.{int(number) - 1 if number.isdigit() else number}.{parameter}"] = value.float()
    last = [value for name, value in tensors.items() if name.startswith("encoder.")][-1:]
    network = build_network("AutoencoderTiny", {"latent_channels": len(last[0]) if last else 0}, encoder)
    add_pooled_blocks(network, tensors)
    load_weights(network, tensors, encoder)
    return network


def add_pooled_blocks(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the blocks of an AutoencoderTiny for which `tensors` has pooled parts by PooledBlocks."""
    names = sorted({name.partition(".pool.")[0] for name in tensors if ".pool." in name})
    known = dict(network.named_modules())
    for name in names:
        if isinstance(convolutions := getattr(known.get(name), "conv", None), nn.Sequential):
            parent, _, number = name.rpartition(".")
            channels = next(convolutions.parameters()).shape[1]
            setattr(known[parent], number, PooledBlock(known[name], channels))


class PooledBlock(nn.Module):
    """A block of an AutoencoderTiny after a residual branch with a global norm, for float[B, C, h, w].

    x + conv(relu(norm(conv(x)))) with 1x1 convolutions to 4 C channels and back and a group norm of 4 groups; then the
    block. TAEF2 has three at the lowest resolution of encoder and decoder (`use_midblock_gn` in its code).
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
    """The name of a tensor in current diffusers."""
    return re.sub(r"\.(query|key|value|proj_attn)\.(weight|bias)$", lambda old: f".{OLD_NAMES[old[1]]}.{old[2]}", name)
