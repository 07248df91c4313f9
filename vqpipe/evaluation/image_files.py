"""Reconstruction of image files of any size: PNG files, and a page of them. Shapes: H x W pixels."""

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vqpipe import distributed
from vqpipe.artifacts import Draft
from vqpipe.continuous import ImageAutoencoder
from vqpipe.data.decoding import BadImage, decode
from vqpipe.data.folders import walk
from vqpipe.data.made_images import NAME_BYTES
from vqpipe.data.transforms import pixels
from vqpipe.errors import DataError, printable
from vqpipe.files import nearest_path
from vqpipe.metrics.distortion import mean_squared_error, psnr_of, ssim_gaussian
from vqpipe.progress import SILENT, Progress
from vqpipe.reports import page
from vqpipe.reports.pictures import decibels, first_groups, side_by_side, to_png, with_labels
from vqpipe.reports.reconstructions import ReconstructedFile, Version, reconstructions_page
from vqpipe.tiling import num_tiles, reconstruct_any_size

ROWS_PER_CHUNK = 512
"""Rows of pixels compared at a time, to bound memory: 8192 rows in floating point would take a gigabyte."""
SSIM_WINDOW = 11
"""Rows and columns of a window of SSIM; smaller images have none."""


def reconstruct_files(
    draft: Draft,
    autoencoder: ImageAutoencoder,
    files: Mapping[str, Path],
    sizes: Sequence[tuple[int, int]],
    *,
    groups: Sequence[int | None],
    tile: int,
    overlap: int,
    shared_norms: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the reconstructions of this rank's share of the files; return the facts to publish.

    NAME.png holds the original and its reconstructions side by side; originals/NAME.png and reconstructions/NAME.png
    hold one each. report.html shows them all.

    Args:
        files: name of each PNG -> the image file, as `png_names` returns them.
        sizes: (H, W) of each file, as `image_sizes` returns them, for the progress.
        groups: for each reconstruction of an image, the number of groups to decode; None: all of them. Several
            reconstructions are labeled, their files are reconstructions/NAME-groups-K.png, and their PSNR and SSIM
            are lists.
        tile, overlap, shared_norms: as for `reconstruct_any_size`.

    Raises:
        DataError: a file cannot be read as an image.
    """
    names, several = list(files)[distributed.rank() :: distributed.world_size()], len(groups) > 1
    options: dict[str, Any] = {"tile": tile, "overlap": overlap, "shared_norms": shared_norms}
    options["on_tile"] = progress.advance
    own = sizes[distributed.rank() :: distributed.world_size()]
    tiles = [len(groups) * num_tiles(*size, tile, overlap, autoencoder.downsample_factor) for size in own]
    progress.start("reconstruct", sum(tiles), "images" if sum(tiles) == len(names) else "tiles")
    for name, count in zip(names, tiles, strict=True):
        if draft.record(name) is not None:
            progress.advance(count)
        else:
            original = read_image(files[name])
            reconstructions = [reconstruct_any_size(autoencoder, original, groups=k, **options).image for k in groups]
            psnr = [psnr_between(original, each) for each in reconstructions]
            ssim = [ssim_between(original, each) for each in reconstructions]
            sheet = side_by_side(original, *reconstructions)
            if several:
                labels = [first_groups(k, decibels(db)) for k, db in zip(groups, psnr, strict=True)]
                sheet = with_labels(sheet, ["original", *labels])
            write_png(draft, f"originals/{name}", original)
            for k, each in zip(groups, reconstructions, strict=True):
                write_png(draft, separate_name(name, k, several), each)
            write_png(draft, name, sheet, psnr=psnr if several else psnr[0], ssim=ssim if several else ssim[0])
    distributed.barrier()
    records = {name: draft.record(name) or {} for name in files}
    facts: dict[str, Any] = {"num_images": len(files)}
    facts |= {key: {name: record.get(key) for name, record in records.items()} for key in ("psnr", "ssim")}
    if distributed.is_main():
        shown = reconstructions_page(result_files(draft.path, facts, groups), autoencoder.name)
        draft.write_text("report.html", page.render(shown))
    distributed.barrier()
    return facts


def result_files(folder: Path, facts: Mapping[str, Any], groups: Sequence[int | None]) -> list[ReconstructedFile]:
    """The files that `reconstruct_files` wrote into `folder`, with their numbers."""
    several = len(groups) > 1
    return [
        ReconstructedFile(
            printable(name.removesuffix(".png")),
            folder / "originals" / name,
            [
                Version(first_groups(k), folder / separate_name(name, k, several), *numbers)
                for k, *numbers in zip(groups, *(as_list(facts[key][name]) for key in ("psnr", "ssim")), strict=True)
            ],
        )
        for name in facts["psnr"]
    ]


def as_list(value: Any) -> list[Any]:
    """A number alone as a list."""
    return value if isinstance(value, list) else [value]


def separate_name(name: str, k: int | None, several: bool) -> str:
    """The file of a reconstruction alone."""
    return f"reconstructions/{name.removesuffix('.png')}-groups-{k}.png" if several else f"reconstructions/{name}"


def write_png(draft: Draft, name: str, image: Tensor, **record: Any) -> None:
    """Write uint8[3, H, W], with what a resumed run needs of it."""
    draft.write_bytes(name, to_png(image), **record)


def psnr_between(original: Tensor, reconstruction: Tensor) -> float | None:
    """PSNR in dB over RGB of two images uint8[3, H, W]; None for equal images."""
    chunks = zip(original.split(ROWS_PER_CHUNK, dim=1), reconstruction.split(ROWS_PER_CHUNK, dim=1), strict=True)
    total = sum(mean_squared_error(a[None], b[None])[0] * a.shape[1] for a, b in chunks)
    value = psnr_of(torch.as_tensor(total / original.shape[1]), peak=255.0).item()
    return value if value < float("inf") else None


def ssim_between(original: Tensor, reconstruction: Tensor) -> float | None:
    """SSIM (Gaussian window) over RGB of two images uint8[3, H, W]; None for images smaller than its window."""
    margin = SSIM_WINDOW - 1
    rows, total = original.shape[1] - margin, 0.0
    if min(rows, original.shape[2] - margin) < 1:
        return None
    for start in range(0, rows, ROWS_PER_CHUNK):
        stop = min(start + ROWS_PER_CHUNK, rows)
        pair = (image[None, :, start : stop + margin] for image in (original, reconstruction))
        total += float(ssim_gaussian(*pair)) * (stop - start)
    return total / rows


def read_image(file: Path) -> Tensor:
    """Read an image as uint8[3, H, W].

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        return pixels(decode(file.read_bytes()))
    except BadImage as error:
        raise DataError(f"{file}: {error.what}", "Pass image files only") from None


def image_sizes(files: Sequence[Path]) -> list[tuple[int, int]]:
    """(H, W) of each file by its header, before a rotation; (1, 1) of those that are no images, which
    `read_image` reports."""
    sizes = []
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(file) as image:
                    sizes.append((image.height, image.width))
            except Exception:  # Pillow raises nearly anything on invalid bytes
                sizes.append((1, 1))
    return sizes


def find_files(names: Sequence[Path]) -> list[Path]:
    """Replace each folder by the image files in it and below it, and each glob by what it matches, sorted.

    Raises:
        DataError: a name is neither a file nor a folder nor a glob with a match, or a folder has no images.
    """
    found: list[Path] = []
    for name in names:
        if name.is_file():
            found.append(name)
            continue
        matches = [name] if name.is_dir() else [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
        if not matches:
            kind = "matches no file" if glob.has_magic(str(name)) else "is not a file"
            hint = nearest_path(name, "Pass image files, a folder, or a pattern such as 'photos/*.jpg'")
            raise DataError(f"{name} {kind}", hint)
        for match in matches:
            found += images_below(match) if match.is_dir() else [match]
    return found


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and below it, the same as of `open_folder`, sorted by folder and name.

    Raises:
        DataError: there are none, or a folder cannot be read.
    """
    files = sorted(folder / file for file in walk(folder))
    if not files:
        raise DataError(f"{folder} has no image files", "Pass a folder with images, or image files")
    return files


def png_names(files: Sequence[Path]) -> dict[str, Path]:
    """Map `<stem>.png` to each file, with numbers after equal stems; long stems are cut.

    Raises:
        DataError: a path is not a file.
    """
    named: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not a file", "Pass image files")
        stem = file.stem.lstrip(".").replace("\\", "_") or "image"
        while len(os.fsencode(stem)) > NAME_BYTES:
            stem = stem[:-1]
        name, number = f"{stem}.png", 2
        while name in named:
            name, number = f"{stem}-{number}.png", number + 1
        named[name] = file
    return named
