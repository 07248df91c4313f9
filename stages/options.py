"""The options that several commands have: their types, and checks of their values before PyTorch is loaded."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from vqpipe import presets
from vqpipe.errors import ConfigError
from vqpipe.files import absent_artifact, absent_images, check_out, partial_path, with_final_name
from vqpipe.image_size import normal_size


def out_path(path: Path) -> Path:
    """The value of --out."""
    return check_out(with_final_name(path))


Out = Annotated[
    Path,
    typer.Option("--out", help="The artifact to publish; never overwritten.", metavar="DIR", callback=out_path),
]
MAX_SEED = 2**32 - 1
"""The largest that NumPy's older generators take, as scikit-learn's do."""
DEVICE_NAMES = "auto|cpu|cuda|cuda:N|mps"


def known_device(name: str) -> str:
    """The value of --device. Raises BadParameter for another form than those of DEVICE_NAMES."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?|mps", name):
        raise typer.BadParameter(f"{name!r} is not supported; use {DEVICE_NAMES.replace('|', ', ')}")
    return name


Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Device to run on; auto: a CUDA GPU if there is one.",
        metavar=DEVICE_NAMES,
        callback=known_device,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.", metavar="N", min=0, max=MAX_SEED)]
UnusedDevice = Annotated[
    str,
    typer.Option(
        "--device",
        help="Accepted for scripts; no effect in this command.",
        metavar=DEVICE_NAMES,
        callback=known_device,
    ),
]
UnusedSeed = Annotated[
    int,
    typer.Option("--seed", help="Accepted for scripts; no effect in this command.", metavar="N", min=0, max=MAX_SEED),
]


def known_preset(name: str | None) -> str | None:
    """The value of --preset."""
    if name is not None:
        presets.find(name)
    return name


Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Settings to start from: see `vqpipe presets`.",
        metavar="NAME|FILE.toml",
        callback=known_preset,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one setting of the preset; repeatable. `vqpipe settings COMMAND` lists them.",
        metavar="section.key=value",
    ),
]


def check_images(names: Sequence[str]) -> None:
    """Raise a DataError for a path that does not exist, without opening the others."""
    for name in map(str, names):
        if not any(mark in name for mark in ":*?[{") and not is_there(Path(name)):
            raise absent_images([name])


def check_artifacts(*paths: Path | None) -> None:
    """Raise an ArtifactError for a folder that does not exist; None is an option that was not given."""
    for path in filter(None, paths):
        if ":" not in str(path) and not is_there(Path(path)):
            raise absent_artifact(Path(path))


def is_there(path: Path) -> bool:
    """Whether there is a file or folder, or an unfinished artifact, which is refused with the command to finish it."""
    path = with_final_name(path)
    return path.exists() or partial_path(path).exists()


Images = Annotated[
    list[str],
    typer.Option(
        "--images",
        help="A dataset artifact, a folder, image files (path, 'photos/*.jpg'), WebDataset tars, Parquet files with "
        "image bytes or zips (path, glob, {000..099}, URL), a list of paths (.txt, .csv, .tsv, .jsonl), "
        "builtin:photos; repeatable.",
        metavar="WHERE",
    ),
]
TokenizerPath = Annotated[
    Path,
    typer.Option(
        "--tokenizer",
        help="A tokenizer artifact, hf:USER/NAME or hf:USER/NAME@REVISION on the model hub, or builtin:photos-f8.",
        metavar="DIR",
    ),
]
AutoencoderPath = Annotated[
    Path,
    typer.Option(
        "--tokenizer",
        help="A tokenizer artifact, hf:USER/NAME or hf:USER/NAME@REVISION on the model hub, builtin:photos-f8, or a "
        "folder with a VAE: AutoencoderKL of diffusers (SD-VAE, SDXL-VAE, SD3, FLUX), AutoencoderDC (DC-AE), TAESD to "
        "TAEF2.",
        metavar="DIR",
    ),
]
Plan = Annotated[bool, typer.Option("--plan", help="Print the estimate for this device (see `vqpipe plan`), and end.")]
BATCH_SIZE = "Images per batch, on each rank"
BatchSize = Annotated[int, typer.Option("--batch-size", help=f"{BATCH_SIZE}.", metavar="IMAGES", min=1)]
OptionalBatchSize = Annotated[
    int | None, typer.Option("--batch-size", help=f"{BATCH_SIZE}; default: the preset's.", metavar="IMAGES", min=1)
]
KeyPrefix = Literal["shard"]
KeyPrefixOption = Annotated[
    KeyPrefix | None,
    typer.Option(
        "--key-prefix",
        help="Begin every key with the name of its shard (or folder), for shards that have keys in common.",
    ),
]
Color = Literal["ignore", "srgb"]
ColorOption = Annotated[
    Color,
    typer.Option(
        "--color",
        help="ICC profiles embedded in images: ignore them, or convert from them to sRGB (wide-gamut photographs).",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Use only the first N images.", metavar="N", min=1)]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Side of the center crop.", metavar="PIXELS", min=1)
]
NumWorkers = Annotated[
    int,
    typer.Option(
        "--num-workers",
        help="Processes per rank that decode images; 0: the rank itself; -1: one per core.",
        metavar="N",
        min=-1,
    ),
]
PrecisionName = Literal["fp32", "bf16"]
Precision = Annotated[
    PrecisionName, typer.Option("--precision", help="Precision of the network: bf16 is mixed precision (autocast).")
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Number of optimizer steps; default: the preset's.", metavar="N", min=1)
]
GlobalBatchSize = Annotated[
    int | None,
    typer.Option(
        "--global-batch-size", help="Images per step, over all ranks; default: the preset's.", metavar="N", min=1
    ),
]
TrainPrecision = Annotated[
    PrecisionName | None,
    typer.Option("--precision", help="Precision of convolutions and matrix products; default: the preset's."),
]


def known_size(text: str | None) -> str | None:
    """The value of --image-size of tokenize and eval. Raises BadParameter for anything but a size."""
    try:
        return None if text is None else str(normal_size(text))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def known_loggers(names: list[str] | None) -> list[str] | None:
    """The values of --log. Raises BadParameter for a name that is not in LOGGERS."""
    if names:
        from vqpipe.training.loggers import LOGGERS

        for name in names:
            if name not in LOGGERS:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(LOGGERS)}")
    return names


Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        help="Also log to this service, under OUT.logs; repeatable.",
        metavar="tensorboard|wandb",
        callback=known_loggers,
    ),
]
ExamplesTokenizer = Annotated[
    Path,
    typer.Option("--tokenizer", help="The tokenizer that made the tokens, or that encodes the images.", metavar="DIR"),
]
ValidationExamples = Annotated[
    Path | None, typer.Option("--validation", help="Tokens or latents of held-out images; see above.", metavar="DIR")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Pretrained weights; see above.", metavar="DIR")]
Extractor = Annotated[
    str | None,
    typer.Option(
        "--extractor",
        help="Also compute the Frechet distance on features of this network, such as CLIP or DINOv2.",
        metavar="open_clip:NAME/TAG|timm:NAME",
    ),
]
ExtractorWeights = Annotated[
    Path | None,
    typer.Option(
        "--extractor-weights", help="Checkpoint of --extractor; default: the Hugging Face cache.", metavar="FILE"
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Download pretrained weights that are not in the Hugging Face cache; else nothing is."
    ),
]
As = Annotated[
    Literal["tar", "png"],
    typer.Option("--as", help="Tars of PNG files, or one PNG file per image, in the folder DIR/images."),
]
MaxSkipped = Annotated[
    float,
    typer.Option(
        "--max-skipped", help="Largest share of unreadable images; more are an error.", metavar="0..1", min=0, max=1
    ),
]
