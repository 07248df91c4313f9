"""`vqpipe reconstruct`: image files of any size -> originals and reconstructions side by side."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console
from stages.options import AutoencoderPath, Device, Limit, Out, Seed
from vqpipe.words import counted

MOST_ROWS = 20
"""Files whose numbers are printed."""

Groups = Annotated[
    str | None,
    typer.Option(
        "--groups",
        help="Decode only the first K groups of each image; of several K, a labeled column for each.",
        metavar="K[,K,...]",
    ),
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
    int, typer.Option("--overlap", help="Overlap in which neighboring tiles are blended.", metavar="PIXELS", min=0)
]
SharedNorms = Annotated[
    bool,
    typer.Option(
        "--shared-norms",
        help="Normalize all tiles by the statistics of the whole image, scaled down: fainter seams, one tile more.",
    ),
]


def reconstruct(
    files: Annotated[
        list[Path],
        typer.Argument(help="Image files of any size, folders of them, or patterns in quotes.", metavar="FILE"),
    ],
    tokenizer: AutoencoderPath,
    out: Out,
    groups: Groups = None,
    tile: Tile = 512,
    overlap: Overlap = 64,
    shared_norms: SharedNorms = False,
    limit: Limit = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Reconstruct image files of any size.

    Each reconstruction is written beside its original, as one PNG file, and
    alone, in reconstructions/. report.html shows all of them. With several
    numbers, as in --groups 1,2,3,4, the file is a contact sheet: the original
    and the reconstruction from the first K groups for each K.
    """
    prefixes = parse_groups(groups)
    with console.session(device, seed) as torch_device:
        from vqpipe import artifacts
        from vqpipe.continuous import open_autoencoder
        from vqpipe.evaluation.image_files import find_files, image_sizes, png_names, reconstruct_files, result_files
        from vqpipe.files import hash_file
        from vqpipe.planning.tiles import check_memory
        from vqpipe.reports.reconstructions import numbers_table
        from vqpipe.tiling import check_norms, check_tile, num_tiles

        autoencoder = open_autoencoder(tokenizer, torch_device)
        for k in prefixes:
            autoencoder.check_groups(k)
        factor = autoencoder.downsample_factor
        side = check_tile(tile, overlap, factor)
        if shared_norms:
            check_norms(autoencoder)
        named = png_names(find_files(files)[:limit])
        sizes = image_sizes(list(named.values()))
        check_memory(autoencoder, sizes, tile, overlap, len(prefixes))
        recorded = prefixes if len(prefixes) > 1 else prefixes[0]
        config = {"files": list(named), "groups": recorded, "tile": tile, "overlap": overlap}
        config |= {"shared_norms": True} if shared_norms else {}
        inputs = {name: hash_file(file) for name, file in named.items()}
        draft = artifacts.start(out, "images", config, {"tokenizer": autoencoder.source, **inputs})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        if tiles := [number for size in sizes if (number := num_tiles(*size, tile, overlap, factor)) > 1]:
            console.say(
                f"in tiles: {len(tiles):,} of {counted(len(named), 'images')}, {sum(tiles):,} tiles of up to {side} x "
                f"{side} pixels, blended where they overlap by {overlap}"
            )
        with draft, console.ProgressBar() as progress:
            facts = reconstruct_files(
                draft,
                autoencoder,
                named,
                sizes,
                groups=prefixes,
                tile=tile,
                overlap=overlap,
                shared_norms=shared_norms,
                progress=progress,
            )
            published = draft.publish(facts)
        console.show_table(numbers_table(result_files(published.path, facts, prefixes), MOST_ROWS))
        return console.finished(published)


def parse_groups(groups: str | None) -> list[int] | list[None]:
    """`--groups` as numbers, each once; [None], for all groups, without it."""
    if groups is None:
        return [None]
    words = [word.strip() for word in str(groups).split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{groups!r} is not a number of groups, or several separated by commas")
    return list(dict.fromkeys(map(int, words)))
