"""`vqpipe reconstruct`: image files of any size -> each beside what the tokenizer makes of it.

Letters: H x W pixels, f the downsample factor, T the side of a tile.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import Device, Out, Seed, TokenizerPath

if TYPE_CHECKING:
    from torch import Tensor

    from vqpipe.continuous import ContinuousAutoencoder
    from vqpipe.tokenizer import Tokenizer

TILE = 512
"""Largest side, pixels, that goes through the network at once."""
OVERLAP = 64
"""Pixels that neighbouring tiles share and blend over."""


def reconstruct(
    files: Annotated[list[Path], typer.Argument(help="Image files of any size.", metavar="FILE...")],
    tokenizer: TokenizerPath,
    out: Out,
    groups: Annotated[
        int | None, typer.Option("--groups", help="Decode the first K groups only.", metavar="K", min=1)
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Reconstruct images of any size and put each beside its original, as PNG files."""
    with console.session(device, seed) as where:
        from vqpipe import artifacts, distributed
        from vqpipe.continuous import open_autoencoder
        from vqpipe.files import hash_file
        from vqpipe.reports.pictures import side_by_side, to_png

        opened = open_autoencoder(tokenizer, where)
        opened.check_groups(groups)
        names = png_names(files)
        config = {"files": names, "groups": groups, "tile": TILE, "overlap": OVERLAP}
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
                        again = any_size(opened, original, groups)
                        with draft.write(names[number], psnr=psnr_between(original, again)) as path:
                            path.write_bytes(to_png(side_by_side(original, again)))
                    bar.advance()
            distributed.barrier()
            psnr = {name: (draft.record(name) or {}).get("psnr") for name in names}
            return console.finished(draft.publish({"num_images": len(names), "psnr": psnr}))


def any_size(
    autoencoder: "Tokenizer | ContinuousAutoencoder",
    image: "Tensor",
    groups: int | None = None,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> "Tensor":
    """uint8[3, H, W] -> its reconstruction, uint8[3, H, W], on the CPU.

    The image is padded to multiples of f by mirroring (by repeating the edge where it is too small to mirror) and cut
    back. Beyond T pixels a side it goes through in overlapping tiles, blended linearly. A network with attention or
    normalisation over the whole latent then sees each tile alone: that is another reconstruction than in one piece.
    """
    import torch

    height, width = image.shape[1:]
    factor = autoencoder.downsample_factor
    tile = max(tile // factor, 1) * factor
    overlap = min(overlap, tile - 1)
    padded = pad_to_multiple(image, factor)
    total = torch.zeros(padded.shape, dtype=torch.float32)
    weight = torch.zeros(padded.shape[1:], dtype=torch.float32)
    for top, bottom in spans(padded.shape[1], tile, overlap):
        for left, right in spans(padded.shape[2], tile, overlap):
            piece = padded[None, :, top:bottom, left:right]
            code = autoencoder.encode(piece)
            again = autoencoder.decode(code, (bottom - top, right - left), groups=groups)[0].cpu()
            share = torch.outer(ramp(bottom - top, overlap), ramp(right - left, overlap))
            total[:, top:bottom, left:right] += again * share
            weight[top:bottom, left:right] += share
    return (total / weight).round().clamp(0, 255).to(torch.uint8)[:, :height, :width]


def pad_to_multiple(image: "Tensor", factor: int) -> "Tensor":
    """Extend the right and lower edges of uint8[3, H, W] to multiples of `factor`."""
    from torch.nn import functional as F

    height, width = image.shape[1:]
    lower, right = -height % factor, -width % factor
    mode = "reflect" if lower < height and right < width else "replicate"
    return F.pad(image.float()[None], (0, right, 0, lower), mode=mode)[0].to(image.dtype)


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Pieces [start, stop) of at most `tile` that cover `length`, neighbours sharing at least `overlap`."""
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += tile - overlap
    yield max(0, length - tile), length


def ramp(length: int, overlap: int) -> "Tensor":
    """Weight of each row of a tile: 1 inside, falling towards both ends over `overlap` pixels, never 0."""
    import torch

    distance = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)


def psnr_between(original: "Tensor", again: "Tensor") -> float | None:
    """PSNR in dB over RGB, or None for equal images."""
    from vqpipe.metrics.distortion import mean_squared_error, psnr_of

    value = psnr_of(mean_squared_error(original[None], again[None]), peak=255.0).item()
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
