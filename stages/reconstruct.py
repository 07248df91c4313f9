"""`vqpipe reconstruct`: image files of any size -> originals and reconstructions side by side."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console
from stages.console import AutoencoderPath, Device, Out, Seed
from vqpipe import artifacts
from vqpipe.continuous import open_autoencoder
from vqpipe.evaluation.image_files import png_names, reconstruct_files
from vqpipe.files import hash_file
from vqpipe.tiling import check_tile

Groups = Annotated[
    int | None, typer.Option("--groups", help="Decode only the first K groups of each image.", metavar="K", min=1)
]
Tile = Annotated[
    int,
    typer.Option(
        "--tile",
        help="Reconstruct larger images in tiles of this side: less memory, slightly different pixels.",
        metavar="PIXELS",
        min=1,
    ),
]
Overlap = Annotated[
    int, typer.Option("--overlap", help="Overlap in which neighbouring tiles are blended.", metavar="PIXELS", min=0)
]


def reconstruct(
    files: Annotated[list[Path], typer.Argument(help="Image files of any size.", metavar="FILE")],
    tokenizer: AutoencoderPath,
    out: Out,
    groups: Groups = None,
    tile: Tile = 512,
    overlap: Overlap = 64,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Reconstruct image files of any size.

    Each reconstruction is written beside its original, as one PNG file.
    """
    with console.session(device, seed) as torch_device:
        autoencoder = open_autoencoder(tokenizer, torch_device)
        autoencoder.check_groups(groups)
        check_tile(tile, overlap, autoencoder.downsample_factor)
        named = png_names(files)
        config = {"files": list(named), "groups": groups, "tile": tile, "overlap": overlap}
        inputs = {name: hash_file(file) for name, file in named.items()}
        draft = artifacts.start(out, "images", config, {"tokenizer": autoencoder.source, **inputs})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft, console.ProgressBar() as progress:
            facts = reconstruct_files(
                draft, autoencoder, named, groups=groups, tile=tile, overlap=overlap, progress=progress
            )
            published = draft.publish(facts)
        return console.finished(published)
