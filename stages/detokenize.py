"""`vqpipe detokenize`: tokens and the tokenizer that made them -> images, as tar shards of PNG files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import console
from stages.console import BatchSize, Device, Limit, Out, Seed, TokenizerPath

if TYPE_CHECKING:
    from torch import Tensor

    from vqpipe.artifacts import Artifact, Draft
    from vqpipe.tokenizer import Tokenizer


def detokenize(
    tokens: Annotated[Path, typer.Option("--tokens", help="A tokens artifact.", metavar="DIR")],
    tokenizer: TokenizerPath,
    out: Out,
    limit: Limit = None,
    groups: Annotated[int | None, typer.Option("--groups", help="Keep only the first K groups.", min=1)] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Turn tokens back into images."""
    with console.session(device, seed) as where:
        from vqpipe import artifacts
        from vqpipe.errors import ArtifactError
        from vqpipe.tokenizer import Tokenizer

        stored = artifacts.open_artifact(tokens, "tokens")
        opened = Tokenizer.from_pretrained(tokenizer, where)
        made_by = stored.inputs["tokenizer"]
        given = opened.source if isinstance(opened.source, str) else opened.source.content
        if made_by != given:
            raise ArtifactError(
                f"{tokens} was made by tokenizer {made_by[:12]}, {tokenizer} is {given[:12]}",
                "Name the tokenizer that made the tokens (vqpipe inspect shows it)",
            )
        opened.check_groups(groups)
        config = {"limit": limit, "groups": groups}
        draft = artifacts.start(out, "images", config, {"tokens": stored, "tokenizer": opened.source})
        if isinstance(draft, artifacts.Artifact):
            return console.finished(draft, again=True)
        with draft:
            count = write_shards(draft, stored, opened, limit, groups, batch_size or 32)
            return console.finished(draft.publish({"num_images": count}))


def write_shards(
    draft: "Draft", stored: "Artifact", tokenizer: "Tokenizer", limit: int | None, groups: int | None, batch_size: int
) -> int:
    """One tar per token shard; rank r of w writes every w-th. Returns the number of images over all ranks."""
    from vqpipe import distributed
    from vqpipe.data.tars import tar_keys, write_tar
    from vqpipe.data.tokens import read_tokens

    size = int(stored.facts["image_size"])
    names = stored.names("tokens-*.parquet")
    rows = 0
    left = stored.facts["num_images"] * (1 + stored.config["flip"])
    left = left if limit is None else min(left, limit)
    with console.progress("detokenize", left) as bar:
        for number, name in enumerate(names):
            part = read_tokens(stored.whole(name), stored.facts["codebook_size"])
            take = min(len(part.keys), left)
            left -= take
            rows += take
            target = f"shard-{number:06d}.tar"
            if take == 0 or number % distributed.world_size() != distributed.rank() or draft.record(target):
                continue
            keys = tar_keys(
                key + ("-flipped" if flipped else "") for key, flipped in zip(part.keys, part.flipped, strict=True)
            )
            with draft.write(target, images=take) as path, write_tar(path) as tar:
                for start in range(0, take, batch_size):
                    stop = min(start + batch_size, take)
                    images = tokenizer.decode(part.ids[start:stop], (size, size), groups=groups).cpu()
                    for index, image in zip(range(start, stop), images, strict=True):
                        tar.write(sample(keys[index], image, int(part.labels[index])))
                    bar.advance(stop - start)
    return rows


def sample(key: str, image: "Tensor", label: int) -> dict[str, str | bytes]:
    """A WebDataset sample of one image uint8[3, H, W]; without a .cls where the label is unknown."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
    content: dict[str, str | bytes] = {"__key__": key, "png": buffer.getvalue()}
    if label >= 0:
        content["cls"] = str(label).encode()
    return content
