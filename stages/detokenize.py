"""`vqpipe detokenize`: tokens and the tokenizer that made them -> images, as PNG files in tar shards or a folder."""

from pathlib import Path
from typing import Annotated

import typer

from stages import console, options
from stages.options import BatchSize, Device, Limit, Out, Seed, TokenizerPath


def detokenize(
    tokens: Annotated[Path, typer.Option("--tokens", help="A tokens artifact.", metavar="DIR")],
    tokenizer: TokenizerPath,
    out: Out,
    limit: Limit = None,
    groups: Annotated[
        int | None, typer.Option("--groups", help="Decode only the first K groups of each image.", metavar="K", min=1)
    ] = None,
    form: options.As = "tar",
    batch_size: BatchSize = 32,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Decode tokens to images."""
    options.check_artifacts(tokens, tokenizer)  # before PyTorch is loaded
    with console.ProgressBar() as progress, console.session(device, seed) as torch_device:
        from vqpipe import artifacts
        from vqpipe.data.tokens import decode_tokens
        from vqpipe.tokenizer import Tokenizer

        stored = artifacts.open_artifact(tokens, "tokens")
        opened = Tokenizer.from_pretrained(tokenizer, torch_device)
        opened.check_made(stored)
        opened.check_groups(groups)
        config = {"limit": limit, "groups": groups, **({"as": form} if form != "tar" else {})}
        draft = artifacts.start(out, "images", config, {"tokens": stored, "tokenizer": opened.source})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            facts = decode_tokens(
                draft, stored, opened, limit=limit, groups=groups, form=form, batch_size=batch_size, progress=progress
            )
            return console.finished(draft.publish(facts))
