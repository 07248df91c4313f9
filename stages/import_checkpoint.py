"""`vqpipe import-checkpoint`: released weights -> tokenizer."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console
from stages.console import Device, Out, Seed
from vqpipe import artifacts, distributed
from vqpipe.codebooks.codebook import codebook_input, load_codebook
from vqpipe.errors import WeightsError
from vqpipe.files import hash_file
from vqpipe.models.released import read_released
from vqpipe.tokenizer import Tokenizer, model_facts, write_tokenizer

File = Annotated[Path, typer.Argument(help="Released weights, PyTorch or safetensors.", metavar="FILE")]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="vqgan-lc, mgvq, llamagen, var, taming, ibq or open-magvit2, instead of detecting it (ibq is never"
        " detected: its files look like taming's).",
        metavar="NAME",
    ),
]
Codebook = Annotated[
    Path | None,
    typer.Option("--codebook", help="The codebook, if the file does not contain it.", metavar="DIR|FILE"),
]


def import_checkpoint(
    file: File,
    out: Out,
    family: FamilyName = None,
    codebook: Codebook = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Convert released weights to a tokenizer.

    No code in the file is executed. Every weight in it must have a place in the model. The conversion runs on the CPU
    without random numbers: --device and --seed have no effect on its result.
    """
    with console.session(device, seed):
        if not file.is_file():
            raise WeightsError(f"{file} is not a file", "Pass the released file of weights")
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
                rows = {"family": released.family, "imported from": file.name, "sha256": digest}
                if released.notes:
                    rows["notes"] = "; ".join(released.notes)
                tokenizer = Tokenizer(released.autoencoder, image_size=released.image_size)
                write_tokenizer(draft, tokenizer, released.discriminator, **rows)
            published = draft.publish({"family": released.family, **model_facts(released.autoencoder)})
        return console.finished(published)
