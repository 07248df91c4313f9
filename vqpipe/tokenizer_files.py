"""The files of a tokenizer, where they are found, and its facts.

| file | content |
|---|---|
| config.json | `model`, section [model] of its preset, and `image_size`, the side of its training images or null |
| model.safetensors | the weights |
| README.md | the model card |
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqpipe.artifacts import Artifact, Draft, is_artifact
from vqpipe.config import from_table, to_table
from vqpipe.downloads import fetch_repository, split_repository
from vqpipe.errors import ArtifactError, ConfigError, WeightsError
from vqpipe.files import BUILTIN_TOKENIZERS, atomic_write, partial_path, with_final_name, write_json
from vqpipe.model_card import local_card
from vqpipe.models import Autoencoder, AutoencoderConfig, build_autoencoder
from vqpipe.weights import load_tensors, load_weights, save_weights

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
DISCRIMINATOR = "discriminator.safetensors"
"""Its weights, in artifacts of training with a GAN."""
ENCODER, DECODER = "_encoder.pth", "_decoder.pth"
"""Suffixes of the two files of a tiny autoencoder."""
PRETRAINED = Path(__file__).parent / "pretrained"
"""The tokenizers inside the package, with weights in float16."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a tokenizer without a manifest, as the input of a stage."""

    name: str
    digest: str
    """sha256 of the file."""
    folder: Path

    @property
    def lineage(self) -> dict[str, Any]:
        """As that of an artifact."""
        return {"kind": "tokenizer", "name": self.name, "content": self.digest, "inputs": {}}


def find_tokenizer(path: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The folder of a tokenizer, which may be absent, and its name; arguments and errors as
    `Tokenizer.from_pretrained`."""
    folder = Path(path)
    if str(path).startswith("builtin:"):
        folder = builtin_folder(str(path))
    named = str(path).startswith("hf:") or (isinstance(path, str) and "/" in path and not folder.is_absolute())
    unfinished = revision is None and partial_path(with_final_name(folder)).is_dir()
    if named and not folder.is_dir() and not unfinished:
        return download(str(path), revision)
    if revision is not None:
        raise ConfigError(f"revision = {revision!r}, but {path} is a directory", "Omit it, or name hf:user/name")
    return folder, folder.name


def builtin_folder(name: str) -> Path:
    """The folder of a tokenizer inside the package, "builtin:NAME".

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in BUILTIN_TOKENIZERS:
        raise ConfigError(f"there is no tokenizer {name}", f"Use {' or '.join(BUILTIN_TOKENIZERS)}")
    return PRETRAINED / name.removeprefix("builtin:")


def download(path: str, revision: str | None) -> tuple[Path, str]:
    """Download a tokenizer from the hub, or find it in the cache of the hub; return its folder and name."""
    repository, own_revision = split_repository(path)
    if revision is not None and own_revision not in (None, revision):
        raise ConfigError(f"{path} names another revision than {revision!r}", "Name one revision")
    hint = f"Check the path, or download {WEIGHTS} and {CONFIG} into a folder and pass that folder"
    try:
        folder = fetch_repository(repository, revision or own_revision, ["*.json", "*.safetensors"], hint)
    except WeightsError as error:
        if path.startswith("hf:"):
            raise
        raise WeightsError(f"{path!r} is not a directory, and {error.what}", error.hint) from None
    return folder, repository.rpartition("/")[2]


def read_tokenizer(folder: Path, artifact: Artifact | None) -> tuple[Autoencoder, int | None]:
    """The autoencoder in a folder, with weights in float32, and the side of its training images, None if unknown.

    The files of an artifact are checked against its manifest.

    Raises:
        ArtifactError, ConfigError: as `read_config`; a file is not the one that was published.
        WeightsError: the weights are absent or damaged, or do not match the config.
    """
    table = read_config(folder / CONFIG)
    if artifact is not None:
        artifact.verified_file(CONFIG)
    with torch.device("meta"):
        autoencoder = build_autoencoder(from_table(AutoencoderConfig, table["model"], "model"))
    tensors = load_tensors(artifact.verified_file(WEIGHTS) if artifact else folder / WEIGHTS)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    load_weights(autoencoder, tensors, folder)
    return autoencoder, table.get("image_size")


def read_config(path: Path) -> dict[str, Any]:
    """Read the config.json of a tokenizer.

    Raises:
        ArtifactError: it is absent or not that of a tokenizer, or its image size is no number of pixels.
        ConfigError: its folder contains an autoencoder with continuous latents.
        WeightsError: its folder contains a part of such an autoencoder.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(table["model"], dict):
            return checked_size(table, path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    name = diffusers_class(path.parent)
    if name is not None or find_pair(path.parent) is not None:
        layout = "two .pth files" if name is None else f"diffusers' {name}"
        raise ConfigError(
            f"{path.parent} is a continuous autoencoder ({layout}), which has no tokens",
            "Pass a tokenizer; only vqpipe eval and vqpipe reconstruct accept this folder",
        )
    raise ArtifactError(f"{path} is absent or is not the config of a tokenizer", "Pass the directory of a tokenizer")


def checked_size(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a config.json; an ArtifactError if its image size is no number of pixels."""
    side = table.get("image_size")
    if side is not None and (type(side) is not int or side < 1):
        raise ArtifactError(f"image_size = {side!r} in {path} is no number of pixels", "Correct it, or set it to null")
    return table


def diffusers_class(folder: Path) -> str | None:
    """The diffusers class of the model in `folder`; None if it is not in the layout of diffusers."""
    try:
        table = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return str(table["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def find_pair(folder: Path) -> tuple[Path, Path] | None:
    """Find NAME_encoder.pth and NAME_decoder.pth in a folder; None if there is no encoder.

    Raises:
        WeightsError: there are several encoders, or no decoder.
    """
    encoders = sorted(folder.glob(f"*{ENCODER}"))
    if not encoders:
        return None
    if len(encoders) > 1:
        names = ", ".join(file.name.removesuffix(ENCODER) for file in encoders)
        raise WeightsError(f"{folder} contains several tiny autoencoders: {names}", "Move one into a folder of its own")
    decoder = encoders[0].with_name(encoders[0].name.removesuffix(ENCODER) + DECODER)
    if not decoder.is_file():
        raise WeightsError(f"{folder} has {encoders[0].name} without {decoder.name}", "Download both")
    return encoders[0], decoder


def save_tokenizer(folder: Path, autoencoder: Autoencoder, image_size: int | None) -> None:
    """Write the files of a tokenizer into `folder`, which is created if absent.

    Raises:
        ArtifactError: it is an artifact, which is never overwritten.
    """
    if is_artifact(folder):
        raise ArtifactError(f"{folder} is an artifact, which is never overwritten", "Choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS) as temporary:
        save_weights(autoencoder, temporary)
    write_json(folder / CONFIG, config_table(autoencoder, image_size))
    (folder / CARD).write_text(local_card(properties(autoencoder, image_size)), encoding="utf-8")


def write_tokenizer(
    draft: Draft,
    autoencoder: Autoencoder,
    image_size: int | None,
    discriminator: torch.nn.Module | None = None,
    **rows: Any,
) -> None:
    """Write the files of a tokenizer artifact, with more `rows` in its model card, and discriminator weights."""
    with draft.write(WEIGHTS) as path:
        save_weights(autoencoder, path)
    draft.write_json(CONFIG, config_table(autoencoder, image_size))
    draft.write_text(CARD, local_card({**properties(autoencoder, image_size), **rows}))
    if discriminator is not None:
        with draft.write(DISCRIMINATOR) as path:
            save_weights(discriminator, path)


def config_table(autoencoder: Autoencoder, image_size: int | None) -> dict[str, Any]:
    """The content of config.json."""
    return {"model": to_table(autoencoder.config), "image_size": image_size}


def model_facts(autoencoder: Autoencoder) -> dict[str, Any]:
    """The facts of a tokenizer artifact that describe its model."""
    return {
        "quantizer": autoencoder.quantizer.config.kind,
        "codebook_size": autoencoder.quantizer.codebook_size,
        "num_groups": autoencoder.quantizer.num_groups,
        "downsample_factor": autoencoder.downsample_factor,
    }


def properties(autoencoder: Autoencoder, image_size: int | None) -> dict[str, Any]:
    """The rows of a model card that describe the model."""
    quantizer = autoencoder.quantizer
    groups = f"{quantizer.num_groups} x " if quantizer.num_groups > 1 else ""
    return {
        "quantizer": f"{quantizer.config.kind}, {groups}{quantizer.codebook_size:,} codes",
        "latent channels": quantizer.latent_dim,
        "downsample factor": autoencoder.downsample_factor,
        "trained at": f"{image_size} px" if image_size else "unknown size",
    }
