"""`vqpipe import-checkpoint`: released weights -> tokenizer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import Device, Out, Seed

if TYPE_CHECKING:
    from vqpipe.artifacts import Draft
    from vqpipe.models.released import Released


def import_checkpoint(
    file: Annotated[
        Path, typer.Argument(help="Weights as their authors publish them: PyTorch or safetensors.", metavar="FILE")
    ],
    out: Out,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            help="Insist on vqgan-lc, mgvq, llamagen, taming or open-magvit2 instead of finding it out.",
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
        from vqpipe.codebooks.kmeans import load_codebook
        from vqpipe.errors import WeightsError
        from vqpipe.files import hash_file
        from vqpipe.models.released import read_released

        if not file.is_file():
            raise WeightsError(f"{file} is not a file", "Name the released file of weights")
        digest = hash_file(file)
        inputs: dict[str, artifacts.Input | str] = {"checkpoint": digest}
        if codebook is not None:
            inputs["codebook"] = (
                artifacts.open_artifact(codebook, "codebook") if codebook.is_dir() else hash_file(codebook)
            )
        draft = artifacts.start(out, "tokenizer", {"family": family}, inputs)
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            released = read_released(file, family, None if codebook is None else load_codebook(codebook))
            for note in released.notes:
                console.say(note)
            if distributed.is_main():
                save(draft, released, {"imported from": file.name, "sha256": digest})
            quantizer = released.autoencoder.quantizer
            facts = {
                "family": released.family,
                "quantizer": quantizer.config.kind,
                "codebook_size": quantizer.codebook_size,
                "num_groups": quantizer.num_groups,
                "downsample_factor": released.autoencoder.downsample_factor,
            }
            return console.finished(draft.publish(facts))


def save(draft: "Draft", released: "Released", origin: dict[str, str]) -> None:
    """Write the tokenizer's files into the draft, and the discriminator's where it has one."""
    from vqpipe.tokenizer import Tokenizer, model_card, save_weights

    tokenizer = Tokenizer(released.autoencoder, image_size=released.image_size)
    with draft.write("model.safetensors") as path:
        save_weights(tokenizer.autoencoder, path)
    with draft.write("config.json") as path:
        path.write_text(json.dumps(tokenizer.to_table(), indent=2) + "\n", encoding="utf-8")
    with draft.write("README.md") as path:
        notes = {"notes": "; ".join(released.notes)} if released.notes else {}
        path.write_text(
            model_card(tokenizer, family=released.family, **origin, **notes),
            encoding="utf-8",
        )
    if released.discriminator is not None:
        with draft.write("discriminator.safetensors") as path:
            save_weights(released.discriminator, path)
