"""`vqpipe demo`: the whole pipeline, small, on built-in photographs, ending with a report."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stages import console, options
from stages.compare import compare
from stages.detokenize import detokenize
from stages.evaluate import evaluate
from stages.extract_features import extract_features
from stages.kmeans import kmeans
from stages.options import Device, Seed
from stages.tokenize_images import tokenize
from stages.train import train
from vqpipe.errors import ArtifactError
from vqpipe.files import partial_path

SIZES: dict[str, dict[str, int | None]] = {"tiny": {"steps": 30, "k": 512}, "small": {"steps": None, "k": None}}
"""Changes to the preset `demo` for each size."""
TRAIN, HELD_OUT = "builtin:photos/train", "builtin:photos/heldout"


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the artifacts.", metavar="DIR", callback=options.out_path)
    ] = Path("artifacts/demo"),
    size: Annotated[
        Literal["tiny", "small"], typer.Option("--size", help="tiny: a quick check; small: minutes on a CPU.")
    ] = "small",
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Run every stage, small, on built-in photographs.

    Trains VQGAN-LC (a frozen codebook) and VQGAN-FC (a learned codebook) with
    the same budget, and compares their utilization and reconstructions. Run it
    again to resume.
    """
    check_folder(out)
    from vqpipe.device import bf16_is_faster, check_device

    steps, k = SIZES[size]["steps"], SIZES[size]["k"]
    shared: dict[str, Any] = {"device": device, "seed": seed}
    settings = [f"model.quantizer.codebook_size={k}"] if k else []
    settings += ["train.warmup_steps=0"] if steps else []
    learned_codebook = ["model.quantizer.kind=vq", "train.whiten_init=false", *settings]

    step(1, "extract features: whitened PCA of image patches")
    extract_features([TRAIN], out / "features", preset="demo", **shared)
    step(2, "cluster the features into a codebook")
    kmeans([out / "features"], out / "codebook", k=k, preset="demo", **shared)
    precision = "bf16" if bf16_is_faster(check_device(device)) else "fp32"
    training: dict[str, Any] = {"preset": "demo", "steps": steps, "precision": precision, **shared}
    step(3, "train VQGAN-LC: this codebook, frozen, with a learned projector")
    train([TRAIN], out / "lc", out / "codebook", overrides=settings, **training)
    step(4, "train VQGAN-FC: the same network and budget, with a learned codebook")
    train([TRAIN], out / "fc", overrides=learned_codebook, **training)
    step(5, "encode held-out photographs as tokens, and decode them")
    tokenize([HELD_OUT], out / "lc", out / "tokens", **shared)
    detokenize(out / "tokens", out / "lc", out / "images", **shared)
    step(6, "evaluate both tokenizers")
    for name in ("lc", "fc"):
        evaluate([HELD_OUT], out / name, out / f"report-{name}", preset="demo", **shared)
    step(7, "compare the two reports")
    compare([out / "report-lc", out / "report-fc"], out / "report", **shared)
    console.say(f"\nOpen this in a browser: {(out / 'report' / 'report.html').resolve()}")


def check_folder(out: Path) -> None:
    """Raise an ArtifactError for a folder with files, unless it has the features, which the demo writes first."""
    features = out / "features"
    begun = partial_path(features).exists() or features.exists()
    if out.exists() and not begun and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} exists and is not a folder of vqpipe demo", "Choose another --out")


def step(number: int, text: str) -> None:
    """Print the title of a step."""
    console.say(f"\n{number}/7 {text}")
