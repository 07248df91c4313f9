"""Released tokenizers that cannot be imported, recognized so that the error names them and the reason."""

import zipfile
from collections.abc import Collection
from pathlib import Path

from vqpipe.errors import WeightsError


def refuse_program(path: Path) -> None:
    """Raise a WeightsError if a file is a TorchScript program, as Cosmos's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # another format, or damaged: who loads it says so
        return
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript program, as the Cosmos tokenizers are published; it contains code, which is not "
            "executed, and not a table of named weights",
            "Import another tokenizer; none of the families is Cosmos",
        )


def refuse_names(path: Path, names: Collection[str]) -> None:
    """Raise a WeightsError for a state dict with these tensor names of TiTok."""
    if "latent_tokens" in names and any(name.startswith("encoder.latent_token_positional") for name in names):
        raise WeightsError(
            f"{path} is a TiTok tokenizer, whose tokens are a sequence without positions in the image, from networks "
            "for images of one size; tokens here are grids of any size",
            "Import another tokenizer",
        )
