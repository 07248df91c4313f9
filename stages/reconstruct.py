"""`vqpipe reconstruct`: image files of any size -> each beside what the tokenizer makes of it. H x W pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import Device, Out, Seed, TokenizerPath

if TYPE_CHECKING:
    from torch import Tensor

Tile = Annotated[
    int,
    typer.Option(
        "--tile",
        help="Larger images go through in tiles of this side: bounds memory, changes the result a little.",
        metavar="PIXELS",
        min=1,
    ),
]
Overlap = Annotated[
    int,
    typer.Option("--overlap", help="Neighbouring tiles share and blend over this much.", metavar="PIXELS", min=0),
]

ROWS = 512
"""Rows of pixels compared at a time: 8192 of them as floating point would be a gigabyte."""


def reconstruct(
    files: Annotated[list[Path], typer.Argument(help="Image files of any size.", metavar="FILE...")],
    tokenizer: TokenizerPath,
    out: Out,
    groups: Annotated[
        int | None, typer.Option("--groups", help="Decode the first K groups only.", metavar="K", min=1)
    ] = None,
    tile: Tile = 512,
    overlap: Overlap = 64,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Reconstruct images of any size and put each beside its original, as PNG files."""
    with console.session(device, seed) as where:
        from vqpipe import artifacts, distributed
        from vqpipe.continuous import open_autoencoder
        from vqpipe.files import hash_file
        from vqpipe.reports.pictures import side_by_side, to_png
        from vqpipe.tiling import check_tile, reconstruct_any_size

        opened = open_autoencoder(tokenizer, where)
        opened.check_groups(groups)
        check_tile(tile, overlap, opened.downsample_factor)
        names = png_names(files)
        config = {"files": names, "groups": groups, "tile": tile, "overlap": overlap}
        inputs = {name: hash_file(check_file(file)) for name, file in zip(names, files, strict=True)}
        draft = artifacts.start(out, "images", config, {"tokenizer": opened.source, **inputs})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            mine = range(distributed.rank(), len(files), distributed.world_size())
            with console.progress("reconstruct", len(mine)) as bar:
                for number in mine:
                    if draft.record(names[number]) is None:
                        original = read(files[number])
                        made = reconstruct_any_size(opened, original, groups=groups, tile=tile, overlap=overlap)
                        again = made.image
                        with draft.write(names[number], psnr=psnr_between(original, again)) as path:
                            path.write_bytes(to_png(side_by_side(original, again)))
                    bar.advance()
            distributed.barrier()
            psnr = {name: (draft.record(name) or {}).get("psnr") for name in names}
            return console.finished(draft.publish({"num_images": len(names), "psnr": psnr}))


def psnr_between(original: "Tensor", again: "Tensor") -> float | None:
    """PSNR in dB over RGB of uint8[3, H, W] twice, or None for equal images; a band of rows at a time."""
    import torch

    from vqpipe.metrics.distortion import mean_squared_error, psnr_of

    bands = zip(original.split(ROWS, dim=1), again.split(ROWS, dim=1), strict=True)
    total = sum(mean_squared_error(a[None], b[None])[0] * a.shape[1] for a, b in bands)
    value = psnr_of(torch.as_tensor(total / original.shape[1]), peak=255.0).item()
    return value if value < float("inf") else None


def read(file: Path) -> "Tensor":
    """The image as uint8[3, H, W]. An unreadable one is an error that names the file."""
    from vqpipe.data.transforms import BadImage, decode, pixels
    from vqpipe.errors import DataError

    try:
        return pixels(decode(file.read_bytes()))
    except BadImage as error:
        raise DataError(f"{file}: {error.what}", "Leave this file out") from None


def check_file(file: Path) -> Path:
    from vqpipe.errors import DataError

    if not file.is_file():
        raise DataError(f"{file} is not a file", "Name image files")
    return file


def png_names(files: Sequence[Path]) -> list[str]:
    """`<stem>.png` for each file, numbered where a stem comes again, in an artifact's safe letters."""
    names: list[str] = []
    for file in files:
        stem = file.stem.lstrip(".").replace("\\", "_") or "image"
        name, number = f"{stem}.png", 2
        while name in names:
            name, number = f"{stem}-{number}.png", number + 1
        names.append(name)
    return names
