"""`vqpipe demo`: every stage once, small, on photographs that need no download; ends with a page worth a look."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stages import console
from stages.console import Device, Seed

SIZES: dict[str, dict[str, int | None]] = {"tiny": {"steps": 30, "k": 512}, "small": {"steps": None, "k": None}}
"""What each size changes of the preset `demo`."""
TRAIN, HELD_OUT = "builtin:photos/train", "builtin:photos/heldout"


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the artifacts.", metavar="DIR")] = Path(
        "artifacts/demo"
    ),
    size: Annotated[str, typer.Option("--size", help="tiny: does it run? small: look at it.")] = "small",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Photographs -> codebook -> two tokenizers -> tokens -> a report that compares them.

    At the same budget it trains VQGAN-LC (a frozen codebook) and VQGAN-FC (a learned one), and shows how many codes
    each keeps in use. Run it again to go on where it was stopped.
    """
    from stages.compare import compare
    from stages.detokenize import detokenize
    from stages.evaluate import evaluate
    from stages.extract_features import extract_features
    from stages.kmeans import kmeans
    from stages.tokenize_images import tokenize
    from stages.train import train
    from vqpipe.config import nearest_name
    from vqpipe.errors import ConfigError

    if size not in SIZES:
        raise ConfigError(f"--size {size} is unknown", nearest_name(size, SIZES))
    steps, k = SIZES[size]["steps"], SIZES[size]["k"]
    same: dict[str, Any] = {"device": device, "seed": seed}
    codes = [f"model.quantizer.codebook_size={k}"] if k else []
    codes += ["train.warmup_steps=0"] if steps else []
    learned = ["model.quantizer.kind=vq", "train.whiten_init=false", *codes]

    step(1, "describe patches of the photographs by whitened PCA")
    extract_features([TRAIN], out / "features", preset="demo", **same)
    step(2, "cluster them into a codebook")
    kmeans([out / "features"], out / "codebook", k=k, preset="demo", **same)
    step(3, "train VQGAN-LC: that codebook, frozen, behind a learned projector")
    train([TRAIN], out / "lc", out / "codebook", preset="demo", steps=steps, overrides=codes, **same)
    step(4, "train VQGAN-FC: the same network and budget, its codebook learned")
    train([TRAIN], out / "fc", preset="demo", steps=steps, overrides=learned, **same)
    step(5, "turn photographs that neither has seen into tokens, and back")
    tokenize([HELD_OUT], out / "lc", out / "tokens", **same)
    detokenize(out / "tokens", out / "lc", out / "images", **same)
    step(6, "measure both")
    for name in ("lc", "fc"):
        evaluate([HELD_OUT], out / name, out / f"report-{name}", preset="demo", **same)
    step(7, "set them side by side")
    compare([out / "report-lc", out / "report-fc"], out / "report", **same)
    console.say(f"\nOpen this in a browser: {(out / 'report' / 'report.html').resolve()}")


def step(number: int, text: str) -> None:
    """Say what comes next."""
    console.say(f"\n{number}/7 {text}")
