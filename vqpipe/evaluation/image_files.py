"""Reconstruction of image files of any size, each as a PNG beside its original. Shapes: H x W pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.continuous import ContinuousAutoencoder
from vqpipe.data.decoding import BadImage, decode
from vqpipe.data.transforms import pixels
from vqpipe.errors import DataError
from vqpipe.metrics.distortion import mean_squared_error, psnr_of
from vqpipe.progress import SILENT, Progress
from vqpipe.reports.pictures import decibels, first_groups, side_by_side, to_png, with_labels
from vqpipe.tiling import reconstruct_any_size
from vqpipe.tokenizer import Tokenizer

ROWS_PER_CHUNK = 512
"""Rows of pixels compared at a time, to bound memory: 8192 rows in floating point would take a gigabyte."""


def reconstruct_files(
    draft: Draft,
    autoencoder: Tokenizer | ContinuousAutoencoder,
    files: Mapping[str, Path],
    *,
    groups: Sequence[int | None],
    tile: int,
    overlap: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write originals and reconstructions side by side, this rank's share of them; return the facts to publish.

    Args:
        files: name of each PNG -> the image file, as `png_names` returns them.
        groups: for each reconstruction of an image, the number of groups to decode; None: all of them. Several
            reconstructions are labelled, and their PSNR is a list.
        tile, overlap: as for `reconstruct_any_size`.

    Raises:
        DataError: a file cannot be read as an image.
    """
    names = list(files)[distributed.rank() :: distributed.world_size()]
    progress.start("reconstruct", len(names))
    for name in names:
        if draft.record(name) is None:
            original = read_image(files[name])
            reconstructions = [
                reconstruct_any_size(autoencoder, original, groups=k, tile=tile, overlap=overlap).image for k in groups
            ]
            psnr = [psnr_between(original, each) for each in reconstructions]
            sheet = side_by_side(original, *reconstructions)
            if len(groups) > 1:
                labels = [first_groups(k, decibels(db)) for k, db in zip(groups, psnr, strict=True)]
                sheet = with_labels(sheet, ["original", *labels])
            with draft.write(name, psnr=psnr if len(groups) > 1 else psnr[0]) as path:
                path.write_bytes(to_png(sheet))
        progress.advance()
    distributed.barrier()
    return {"num_images": len(files), "psnr": {name: (draft.record(name) or {}).get("psnr") for name in files}}


def psnr_between(original: Tensor, reconstruction: Tensor) -> float | None:
    """PSNR in dB over RGB of two images uint8[3, H, W]; None for equal images."""
    chunks = zip(original.split(ROWS_PER_CHUNK, dim=1), reconstruction.split(ROWS_PER_CHUNK, dim=1), strict=True)
    total = sum(mean_squared_error(a[None], b[None])[0] * a.shape[1] for a, b in chunks)
    value = psnr_of(torch.as_tensor(total / original.shape[1]), peak=255.0).item()
    return value if value < float("inf") else None


def read_image(file: Path) -> Tensor:
    """Read an image as uint8[3, H, W].

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        return pixels(decode(file.read_bytes()))
    except BadImage as error:
        raise DataError(f"{file}: {error.what}", "Omit this file") from None


def png_names(files: Sequence[Path]) -> dict[str, Path]:
    """Map `<stem>.png` to each file, with numbers after equal stems.

    Raises:
        DataError: a path is not a file.
    """
    named: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not a file", "Pass image files")
        stem = file.stem.lstrip(".").replace("\\", "_") or "image"
        name, number = f"{stem}.png", 2
        while name in named:
            name, number = f"{stem}-{number}.png", number + 1
        named[name] = file
    return named
