"""`vqpipe import-checkpoint`: released weights -> tokenizer."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console
from stages.console import Device, Out, Seed


def import_checkpoint(
    file: Annotated[
        Path, typer.Argument(help="Weights as their authors publish them: PyTorch or safetensors.", metavar="FILE")
    ],
    out: Out,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            help="Insist on vqgan-lc, mgvq, llamagen, var, taming, ibq or open-magvit2 instead of finding it out (ibq"
            " cannot be found out: its names are taming's).",
            metavar="NAME",
        ),
    ] = None,
    codebook: Annotated[
        Path | None,
        typer.Option("--codebook", help="The codebook, where the file comes without it.", metavar="DIR|FILE"),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Turn released weights into a tokenizer. Nothing in the file is run; every weight in it is accounted for."""
    with console.session(device, seed):
        from vqpipe import artifacts, distributed
        from vqpipe.codebooks.codebook import codebook_input, load_codebook
        from vqpipe.errors import WeightsError
        from vqpipe.files import hash_file
        from vqpipe.models.released import read_released
        from vqpipe.tokenizer import Tokenizer, write_files

        if not file.is_file():
            raise WeightsError(f"{file} is not a file", "Name the released file of weights")
        digest = hash_file(file)
        inputs: dict[str, artifacts.Input | str] = {"checkpoint": digest}
        if codebook is not None:
            inputs["codebook"] = codebook_input(codebook)
        draft = artifacts.start(out, "tokenizer", {"family": family}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            released = read_released(file, family, None if codebook is None else load_codebook(codebook))
            for note in released.notes:
                console.say(note)
            if distributed.is_main():
                card = {"family": released.family, "imported from": file.name, "sha256": digest}
                if released.notes:
                    card["notes"] = "; ".join(released.notes)
                tokenizer = Tokenizer(released.autoencoder, image_size=released.image_size)
                write_files(draft, tokenizer, released.discriminator, **card)
            quantizer = released.autoencoder.quantizer
            facts = {
                "family": released.family,
                "quantizer": quantizer.config.kind,
                "codebook_size": quantizer.codebook_size,
                "num_groups": quantizer.num_groups,
                "downsample_factor": released.autoencoder.downsample_factor,
            }
            return console.finished(draft.publish(facts))
