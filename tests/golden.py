"""Golden outputs of every command on tiny inputs, for changes of the code that must not change a number.

    python tests/golden.py --out golden.json                       # before the change
    python tests/golden.py --out now.json --against golden.json    # after it: prints what differs, exit code 1

About 70 commands run as subprocesses on drawn pictures of 32 pixels, two at a time, in 4 to 8 minutes on two cores.
Nothing of the project is imported: only the command line, names of presets and settings, and the formats of artifacts
are used, so modules, classes and weights may be renamed in between. A renamed command, option, preset or setting is
entered in RENAMED.

What is recorded of an artifact, file by file:

    *.safetensors    a digest of the tensors' types, shapes and bytes, without their names
    *.npy            type, shape and bytes of the array
    *.parquet        every column but shard and index of tokens, latents and features, which were added later
    *.png, *.tar     decoded pixels; in tars also keys, labels and other files, in their order
    metrics.json     every number by its key, and so of every row of metrics.jsonl
    manifest.json    every number of its facts

Left out, because they are not the same twice: times and rates, memory, versions, paths, commands, report.html (it holds
the time). Left out, because names and words may change: config.json, texts, and digests of whole files.

Not covered: bench and demo (they measure time, or train for minutes), inspect and presets (they compute nothing), GPUs,
compiled networks, FSDP, released weights but taming's, tiny autoencoders, pretrained encoders and --extractor, ADM's
.npz, worker processes, URLs. KID needs 1,000 images, so it is never computed.

Numbers are those of one machine and one set of installed versions: another CPU rounds sums otherwise. Make the golden
file where it is compared with.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
RENAMED: dict[str, str] = {}
"""A command, option, preset or setting as it is written below -> its name in the tree that is run. Names that are not
here are taken as they are."""
PARTIAL, LOG = ".partial", "metrics.jsonl"
"""What an unfinished artifact's folder ends with, and the log of a training run in it."""
NOT_NUMBERS = ("commands", "versions", "weights")
"""Parts of metrics.json about how and with what, not about what came out."""
NOT_REPEATABLE = ("second", "wait", "mfu", "flops", "memory", "compiled")
"""What the names of numbers contain that depend on the machine's speed or memory."""
DIGEST = re.compile("[0-9a-f]{64}")
LONGEST = 300
"""Seconds that one command may take."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # sums in one order
    "MKL_NUM_THREADS": "1",
    "COLUMNS": "200",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
UNSET = ("PYTHONDONTWRITEBYTECODE", "VQPIPE_CRASH", "RANK", "WORLD_SIZE", "LOCAL_RANK")

Record = dict[str, Any]
"""What was found of one job: key -> digest or number."""


@dataclass(frozen=True)
class Job:
    """One command, and the artifact of its name that it publishes."""

    name: str
    words: tuple[str, ...] = ()
    """The command line without --out and --device. "@x" stands for the path of what job x made, or of "x.suffix"."""
    ranks: int = 1
    cut: bool = False
    """Stop it by SIGTERM after its first log row, and run it again."""
    same_as: str = ""
    """A job whose record has to be the same."""
    make: Callable[[Path], None] | None = None
    """Called with the path instead of a command; nothing is recorded of it."""

    @property
    def needs(self) -> set[str]:
        """Names of the jobs that it reads from."""
        return {word.partition("@")[2].split(".")[0].split("/")[0] for word in self.words if "@" in word}


# --------------------------------------------------------------------------------------------------------------------
# Inputs that are made here: pictures, and weights in the formats of their publishers, filled with random numbers.


def make_pictures(folder: Path) -> None:
    """24 smooth random pictures of a few sizes in three class folders, PNG and JPEG."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    for number in range(24):
        small = draws.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        size = (48 + number % 3 * 8, 40 + number % 2 * 4)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        target = folder / f"class-{number % 3}" / f"{number:02d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if number % 4 == 3:
            image.save(target.with_suffix(".jpg"), quality=90)
        else:
            image.save(target.with_suffix(".png"))


SEEDED = threading.Lock()
"""Held while networks draw from torch's global generator: two jobs run at a time."""


def seeded(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """A function that draws from torch's global generator, from seed 0, while no other does."""

    def run(folder: Path) -> None:
        import torch

        with SEEDED:
            torch.manual_seed(0)
            make(folder)

    return run


def make_weights(folder: Path) -> None:
    """Stand-ins for Inception and for the backbones of LPIPS, under the names by which they are published."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library
    from torchvision.models import alexnet, vgg

    folder.mkdir()
    network_class = library.FeatureExtractorInceptionV3
    with (
        mock.patch.object(library, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network_class, "load_state_dict"),
    ):
        network = network_class("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # torch's own start shrinks with depth: all features would be 0
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "weights-inception-2015-12-05-6726825d.pth")
    backbones = {
        "alexnet-owt-7be5be79.pth": alexnet().features,
        "vgg16-397923af.pth": vgg.make_layers(vgg.cfgs["D"]),
    }
    for name, layers in backbones.items():
        torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, folder / name)


def make_vae(folder: Path) -> None:
    """An untrained AutoencoderKL in diffusers' layout, with a downsample factor of 2."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    network = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, **blocks)
    network.save_pretrained(folder)


def make_checkpoint(folder: Path) -> None:
    """A narrow VQGAN with its discriminator, as taming-transformers would have saved it."""
    import torch

    draws = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in taming_shapes():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros((), dtype=torch.int64)
        else:
            around = 1.0 if len(shape) == 1 and not name.endswith(("bias", "mean")) else 0.0
            weights[name] = around + 0.1 * torch.rand(shape, generator=draws)
            weights[name] -= 0.05 if around == 0.0 else 0.0
    folder.mkdir()
    torch.save({"state_dict": weights, "epoch": 7}, folder / "last.ckpt")


def taming_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a VQGAN of two levels, 8 and 16 channels, with attention at the lower one."""

    def convolution(name: str, into: int, out: int, side: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, into, side, side)
        yield f"{name}.bias", (out,)

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (channels,)
        yield f"{name}.bias", (channels,)

    def residual(name: str, into: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm1", into)
        yield from convolution(f"{name}.conv1", into, out)
        yield from norm(f"{name}.norm2", out)
        yield from convolution(f"{name}.conv2", out, out)
        if into != out:
            yield from convolution(f"{name}.nin_shortcut", into, out, 1)

    def attention(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            yield from convolution(f"{name}.{part}", channels, channels, 1)

    for half in ("encoder", "decoder"):
        yield from residual(f"{half}.mid.block_1", 16, 16)
        yield from attention(f"{half}.mid.attn_1", 16)
        yield from residual(f"{half}.mid.block_2", 16, 16)
    yield from convolution("encoder.conv_in", 3, 8)
    yield from residual("encoder.down.0.block.0", 8, 8)
    yield from convolution("encoder.down.0.downsample.conv", 8, 8)
    yield from residual("encoder.down.1.block.0", 8, 16)
    yield from attention("encoder.down.1.attn.0", 16)
    yield from norm("encoder.norm_out", 16)
    yield from convolution("encoder.conv_out", 16, 6)
    yield from convolution("decoder.conv_in", 6, 16)
    for block in (0, 1):
        yield from residual(f"decoder.up.1.block.{block}", 16, 16)
        yield from attention(f"decoder.up.1.attn.{block}", 16)
        yield from residual(f"decoder.up.0.block.{block}", 8 if block else 16, 8)
    yield from convolution("decoder.up.1.upsample.conv", 16, 16)
    yield from norm("decoder.norm_out", 8)
    yield from convolution("decoder.conv_out", 8, 3)
    yield "quantize.embedding.weight", (20, 5)
    yield from convolution("quant_conv", 6, 5, 1)
    yield from convolution("post_quant_conv", 5, 6, 1)
    critic = "loss.discriminator.main"
    yield from convolution(f"{critic}.0", 3, 4, 4)
    for layer, channels in ((2, 4), (5, 8), (8, 16)):
        yield f"{critic}.{layer}.weight", (2 * channels, channels, 4, 4)
        yield from norm(f"{critic}.{layer + 1}", 2 * channels)
        yield f"{critic}.{layer + 1}.running_mean", (2 * channels,)
        yield f"{critic}.{layer + 1}.running_var", (2 * channels,)
        yield f"{critic}.{layer + 1}.num_batches_tracked", ()
    yield from convolution(f"{critic}.11", 32, 1, 4)


# --------------------------------------------------------------------------------------------------------------------
# The jobs.


def sets(*assignments: str) -> tuple[str, ...]:
    """`--set` for each of them."""
    return tuple(word for each in assignments for word in ("--set", each))


FEATURES = sets("features.patch_size=4", "features.image_size=32", "features.components=16")
RUN = sets(
    *("data.image_size=32", "data.num_workers=0", "train.steps=40", "train.warmup_steps=4"),
    *("train.learning_rate=4e-3", "train.global_batch_size=4", "train.save_every=10", "train.sample_every=20"),
    *("train.log_every=5", "objective.disc_start=20", "discriminator.base_channels=4"),
)
"""Of every tokenizer."""
VQGAN = sets(
    *("model.base_channels=8", "model.z_channels=8", "model.channel_multipliers=[1, 2, 2]"),
    *("model.attention_resolutions=[64]", "train.whiten_images=16"),
)
"""Preset smoke, narrower: f = 4, 64 ids an image of 32 pixels."""
LC = ("--preset", "smoke", *RUN, *VQGAN, *sets("model.quantizer.feature_dim=16", "model.quantizer.codebook_size=40"))
OTHER = ("--preset", "smoke", *RUN, *VQGAN)
CODES = sets("model.quantizer.codebook_size=40")
MGVQ = (
    *("--preset", "mgvq-f16-g4", *RUN),
    *sets("model.widths=[8, 16, 32]", "model.encoder_depths=[0, 1, 1]", "model.decoder_depths=[0, 1, 1]"),
    *sets("model.attention_from=2", "model.latent_channels=16", "model.quantizer.group.codebook_size=32"),
    *sets("model.quantizer.group.code_dim=4", "objective.lpips=0.0", 'objective.perceptual="none"'),
)
"""Groups with codebooks of their own, nested masking, and batch norms that move; f = 4, 4 x 64 ids."""
SHORT = sets("train.steps=8", "train.sample_every=8", "objective.disc_start=4", "train.warmup_steps=2")
KINDS = {
    **dict.fromkeys(("vq", "cvq", "simvq", "ibq", "residual", "multi_scale"), "codebook_size=40"),
    "lfq": "code_dim=6",
    "fsq": "levels=[5, 5, 3]",
}
"""Quantizers that a few steps are taken with, and their size; lc, ema and multi_group have runs of their own."""
EXAMPLES = (
    *("--steps", "6", "--global-batch-size", "4"),
    *sets("train.warmup_steps=1", "train.log_every=1", "train.save_every=3", "train.validate_every=3"),
    *sets("examples.held_out=6", "train.learning_rate=1e-2"),
)
"""Of every generator and classifier; the rate is high, so that what comes out is no longer the network's start."""
GENERATOR = (*EXAMPLES, *sets("train.sample_every=6"))
TRANSFORMER = (*GENERATOR, *sets("generator.layers=2", "generator.heads=2", "generator.width=32"))
LATENT = (*GENERATOR, *sets("generate.steps=4", "train.weight_ema=0.5"))
LDM = sets("generator.base_channels=32", "generator.class_channels=16", "generator.attention_factors=[2]")
PROTOCOLS = ("--protocol", "adm", "--protocol", "cleanfid-matched", "--protocol", "cleanfid-rawval")
EVAL = ("eval", "--images", "@pictures", "--num-workers", "0")
EVERYTHING = (
    *(*EVAL, "--tokenizer", "@tokenizer-lc", *PROTOCOLS, "--weights", "@weights", "--metrics", "kid,prc,sfid,is"),
    *("--analyze", "replacement", "--analyze", "embedding", "--analyze", "patches"),
    *("--limit", "12", "--fid-min-images", "2", "--batch-size", "3"),
)
SAMPLES = (
    *("eval-generation", "--reference", "@pictures", "--image-size", "32"),
    *("--weights", "@weights", "--num-workers", "0", "--limit", "12", "--fid-min-images", "2", "--batch-size", "4"),
)
FILES = ("@pictures/class-0/00.png", "@pictures/class-1/01.png", "@pictures/class-2/02.png")


def all_jobs() -> list[Job]:
    """Every job, after those that it needs."""
    inputs = [
        Job("pictures", make=make_pictures),
        Job("weights", make=seeded(make_weights)),
        Job("checkpoint", make=make_checkpoint),
        Job("vae", make=seeded(make_vae)),
    ]
    return [*inputs, *data_jobs(), *tokenizer_jobs(), *token_jobs(), *generator_jobs(), *evaluation_jobs()]


def data_jobs() -> list[Job]:
    """Prepared data, features, codebooks."""
    extract = ("extract-features", "--images", "@pictures", "--num-workers", "0", *FEATURES)
    kmeans = ("kmeans", "--features", "@features", "--k", "40", "--iterations", "8")
    small = sets("features.images_per_shard=8")
    return [
        Job("dataset", ("prepare-data", "folder", "--source", "@pictures", "--shard-size", "10")),
        Job("crops", ("prepare-data", "folder", "--source", "@pictures", "--image-size", "32")),
        Job("features", extract),
        Job("features-shards", (*extract, *small)),
        Job("features-ranks", (*extract, *small), ranks=2, same_as="features-shards"),
        Job(
            "features-photos",
            (
                *("extract-features", "--images", "builtin:photos/heldout", "--limit", "16", "--pool", "4"),
                *("--num-workers", "0", *FEATURES, *sets("features.image_size=64")),
            ),
        ),
        Job("codebook", kmeans),
        Job("codebook-ranks", kmeans, ranks=2, same_as="codebook"),
        Job("codebook-mini-batch", (*kmeans, "--mini-batch", "256")),
        Job("codebook-mini-batch-ranks", (*kmeans, "--mini-batch", "256"), ranks=2, same_as="codebook-mini-batch"),
        Job("codebook-select-random", (*kmeans, "--select", "random")),
        Job("codebook-init-random", (*kmeans, "--init", "random")),
        Job("codebook-per-class", (*kmeans, "--k", "39", "--per-class")),
    ]


def tokenizer_jobs() -> list[Job]:
    """Training, of every quantizer and network, and what was published."""
    train = ("train", "--images", "@pictures")
    lc = (*train, "--codebook", "@codebook", *LC)
    ema = (*train, *OTHER, *CODES, *sets("model.quantizer.kind=ema", 'train.precision="fp32"'))
    adversarial = (
        *(*train, *OTHER, *CODES),
        *sets("model.quantizer.kind=vq", "model.quantizer.normalize=true", "objective.disc_start=0"),
        *sets(
            "train.weight_ema=0.9", "train.accumulate=2", "train.activation_checkpointing=true", "train.clip_norm=1.0"
        ),
        *sets("objective.r1=1.0", "objective.r1_every=4", "objective.lecam=0.1", "objective.adversarial_warmup=10"),
        *sets("objective.lpips=0.5", 'objective.perceptual="alex"', "objective.lpips_weights=@weights"),
    )
    validated = (
        *("train", "--images", "@dataset", "--codebook", "@codebook", *LC, "--publish", "best"),
        *("--validation", "@crops", *sets("train.validate_every=8", "train.validation_images=16")),
        *sets("train.whiten_init=false", "train.quantizer_rate=10.0", "train.weight_ema=0.8", "data.max_scale=1.25"),
    )
    tuned = (*lc, "--from", "@tokenizer-lc", *SHORT, *sets("train.whiten_init=false", 'train.freeze=["encoder"]'))
    magvit = (
        *(*train, "--preset", "open-magvit2-f16", *RUN, *SHORT),
        *sets("model.base_channels=8", "model.channel_multipliers=[1, 2, 2]", "model.num_res_blocks=1"),
        *sets("model.quantizer.code_dim=6", "model.z_channels=6"),
        *sets("objective.lpips=0.0", 'objective.perceptual="none"'),
    )
    return [
        Job("tokenizer-lc", lc),
        Job("tokenizer-lc-resumed", lc, cut=True, same_as="tokenizer-lc"),
        Job("tokenizer-lc-ranks", lc, ranks=2),
        Job("tokenizer-ema", ema),
        Job("tokenizer-ema-ranks", ema, ranks=2),
        Job("tokenizer-multi-group", (*train, *MGVQ)),
        Job("tokenizer-multi-group-resumed", (*train, *MGVQ), cut=True, same_as="tokenizer-multi-group"),
        Job("tokenizer-multi-group-ranks", (*train, *MGVQ), ranks=2),
        Job("tokenizer-adversarial", adversarial),
        Job("tokenizer-validated", validated),
        Job("tokenizer-tuned", tuned),
        Job("tokenizer-magvit", magvit),
        *(
            Job(
                f"tokenizer-{kind}",
                (
                    *(*train, *OTHER, *SHORT),
                    *sets(f"model.quantizer.kind={kind}", f"model.quantizer.{size}"),
                ),
            )
            for kind, size in KINDS.items()
        ),
        Job("tokenizer-imported", ("import-checkpoint", "@checkpoint/last.ckpt")),
    ]


def token_jobs() -> list[Job]:
    """Images to tokens, and back."""
    tokenize = ("tokenize", "--images", "@pictures", "--num-workers", "0", "--batch-size", "10")
    lc, groups = ("--tokenizer", "@tokenizer-lc"), ("--tokenizer", "@tokenizer-multi-group")
    imported = ("--tokenizer", "@tokenizer-imported", "--image-size", "32")
    reconstruct = ("reconstruct", *FILES)
    return [
        Job("tokens-plain", (*tokenize, *lc)),
        Job("tokens", (*tokenize, *lc, "--flip")),
        Job("tokens-ranks", (*tokenize, *lc, "--flip"), ranks=2, same_as="tokens"),
        Job("tokens-groups", (*tokenize, *groups, "--flip")),
        Job("tokens-imported", (*tokenize, *imported, "--precision", "bf16")),
        Job("images", ("detokenize", "--tokens", "@tokens", *lc)),
        Job("images-groups", ("detokenize", "--tokens", "@tokens-groups", *groups, "--groups", "2", "--limit", "9")),
        Job("reconstructed", (*reconstruct, *lc)),
        Job("reconstructed-tiles", (*reconstruct, *groups, "--tile", "32", "--overlap", "8", "--groups", "3")),
    ]


def generator_jobs() -> list[Job]:
    """Generators with four images of each, and classifiers."""
    ids = ("train-generator", "--tokens", "@tokens", "--tokenizer", "@tokenizer-lc")
    grouped = ("train-generator", "--tokens", "@tokens-groups", "--tokenizer", "@tokenizer-multi-group")
    images = ("train-generator", "--images", "@pictures", "--tokenizer", "@tokenizer-lc", "--num-workers", "0")
    latents = ("train-generator", "--latents", "@ldm.latents", "--tokenizer", "@tokenizer-lc")
    learned = (
        *sets("generator.embedding=learned", "generator.keep=0.8", "generator.label_smoothing=0.1"),
        *sets("train.activation_checkpointing=true"),
    )
    sit = ("--preset", "sit-tiny", *LATENT, "--steps", "20", *sets("generator.patch_size=4", "train.accumulate=2"))
    generators = {
        "gpt": (*ids, "--preset", "gpt-tiny", *TRANSFORMER),
        "gpt-learned": (*ids, "--preset", "gpt-tiny", *TRANSFORMER, *learned),
        "gpt-unconditional": (*ids, "--preset", "gpt-unconditional-tiny", *TRANSFORMER),
        "llamagen": (*grouped, "--preset", "llamagen-tiny", *TRANSFORMER, *sets("generator.head_layers=1")),
        "ldm": (*images, "--preset", "ldm-tiny", *LATENT, *LDM),
        "dit": (*latents, "--preset", "dit-tiny", *LATENT, *sets("generator.patch_size=4")),
        "sit": (*latents, *sit),
    }
    options: dict[str, tuple[str, ...]] = {
        "gpt": ("--top-k", "50%"),
        "gpt-unconditional": (),
        "llamagen": ("--top-p", "0.9", "--temperature", "0.8", "--set", "generate.cfg_schedule=cosine"),
        "ldm": ("--classes", "2,0-1"),
        "sit": ("--set", "generate.cfg_interval=[0.0, 0.7]"),
    }
    drawn = [
        Job(
            f"{name}-images",
            (
                *("generate", "--generator", f"@{name}", "--num-images", "4", "--seed", "1", "--batch-size", "3"),
                *("--cfg-scale", "1.0" if name == "gpt-unconditional" else "1.5", *options.get(name, ())),
            ),
        )
        for name in generators
    ]
    classify = ("train-classifier", "--tokens", "@tokens", "--tokenizer", "@tokenizer-lc", *EXAMPLES)
    vit = sets("classifier.width=32", "classifier.depth=2", "classifier.num_heads=2")
    return [
        *(Job(name, words) for name, words in generators.items()),
        *drawn,
        Job("sit-resumed", generators["sit"], cut=True, same_as="sit"),
        Job("llamagen-ranks", generators["llamagen"], ranks=2),
        Job("sit-ranks", generators["sit"], ranks=2),
        Job("classifier-vit", (*classify, "--preset", "vit-tiny", *vit)),
        Job("classifier-linear", (*classify, "--preset", "linear-probe")),
        Job("classifier-linear-ranks", (*classify, "--preset", "linear-probe"), ranks=2),
    ]


def evaluation_jobs() -> list[Job]:
    """Numbers of tokenizers and of samples."""
    groups = ("--tokenizer", "@tokenizer-multi-group")
    return [
        Job("eval", EVERYTHING),
        Job("eval-ranks", EVERYTHING, ranks=2),  # sums over ranks round otherwise than those of "eval"
        Job("eval-groups", (*EVAL, *groups, *sets("eval.num_extremes=1"))),
        Job("eval-rectangle", (*EVAL, *groups, "--image-size", "40x24", *PROTOCOLS)),
        Job("eval-tiles", (*EVAL, *groups, "--image-size", "native", "--tile", "32", "--limit", "8")),
        Job("eval-vae", (*EVAL, "--tokenizer", "@vae", "--image-size", "32", *PROTOCOLS)),
        Job("samples-adm", (*SAMPLES, "--images", "@images", "--protocol", "adm")),
        Job("samples-cleanfid-raw", (*SAMPLES, "--images", "@crops", "--protocol", "cleanfid-raw")),
        Job("samples-adm-ranks", (*SAMPLES, "--images", "@images", "--protocol", "adm"), ranks=2),
        Job("compared", ("compare", "@eval-groups", "@eval-vae")),
    ]


# --------------------------------------------------------------------------------------------------------------------
# Running them.


class Failed(Exception):
    """A command did not end as it should."""


def run(job: Job, work: Path) -> Record:
    """Run a job in the folder `work`, and record what it published."""
    out = work / job.name
    if job.make is not None:
        job.make(out)
        return {}
    if job.cut:
        cut(start(job, work), out)
    code = ended(start(job, work))
    if code:
        raise Failed(f"exit code {code}: {last_line(said_by(job, work))}")
    folders = [out, *sorted(path for path in work.glob(f"{job.name}.*") if (path / "manifest.json").is_file())]
    return {f"{folder.name}/{key}": value for folder in folders for key, value in recorded(folder)}


def command_line(job: Job, work: Path) -> list[str]:
    """The words of a job's process."""
    launch = [sys.executable, "-m"]
    if job.ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks), "-m"]
    words = [translated(word).replace("@", f"{work}{os.sep}") for word in job.words]
    return [*launch, "stages", *words, "--out", str(work / job.name), "--device", "cpu"]


def translated(word: str) -> str:
    """A word under its name in the tree that is run."""
    name, assigned, value = word.partition("=")
    return RENAMED.get(name, name) + assigned + value


def environment(work: Path) -> dict[str, str]:
    """The environment of every process."""
    own = {name: value for name, value in os.environ.items() if name not in UNSET}
    return own | ENVIRONMENT | {"XDG_CACHE_HOME": str(work / "cache")}


def start(job: Job, work: Path) -> subprocess.Popen[bytes]:
    """A job's process, which says what it says into a file."""
    with said_by(job, work).open("ab") as said:
        return subprocess.Popen(
            command_line(job, work), cwd=ROOT, env=environment(work), stdout=said, stderr=subprocess.STDOUT
        )


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process, which is killed where it takes too long."""
    try:
        return process.wait(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def said_by(job: Job, work: Path) -> Path:
    """What its processes printed."""
    return work / f"{job.name}.txt"


def cut(process: subprocess.Popen[bytes], out: Path) -> None:
    """Stop a training run by SIGTERM once its log has a row."""
    log = out.with_name(out.name + PARTIAL) / LOG
    deadline = time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < deadline and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code = ended(process)
    if code != 143 or out.exists():
        raise Failed(f"it was to be stopped, and ended with code {code}")


def last_line(path: Path) -> str:
    """The last error in what a command said, or the last line where there is none."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["nothing was said"])[-1]


def run_all(jobs: Sequence[Job], work: Path) -> dict[str, Record]:
    """Run the jobs, two processes at a time, in an order in which each finds what it needs."""
    records: dict[str, Record] = {}
    failed: set[str] = set()
    waiting, running = list(jobs), dict[concurrent.futures.Future[tuple[Record, float]], Job]()
    began = time.monotonic()

    def timed(job: Job) -> tuple[Record, float]:
        start = time.monotonic()
        return run(job, work), time.monotonic() - start

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        while waiting or running:
            for job in list(waiting):
                busy = sum(each.ranks for each in running.values())
                if job.needs & failed:
                    waiting.remove(job)
                    failed.add(job.name)
                    records[job.name] = {"failed": f"it needs {', '.join(sorted(job.needs & failed))}"}
                    tell(f"{job.name}: left out")
                elif job.needs <= records.keys() and busy + job.ranks <= 2:
                    waiting.remove(job)
                    running[pool.submit(timed, job)] = job
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    records[job.name], seconds = future.result()
                    tell(f"{job.name}: {seconds:.1f} s")
                except Exception as error:
                    failed.add(job.name)
                    records[job.name] = {"failed": f"{type(error).__name__}: {error}"}
                    tell(f"{job.name}: {records[job.name]['failed']}")
    return {job.name: records[job.name] for job in jobs if job.make is None or job.name in failed}


# --------------------------------------------------------------------------------------------------------------------
# What is recorded.


def recorded(folder: Path) -> Iterator[tuple[str, Any]]:
    """Key and value of everything in an artifact's folder that has to stay the same."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for key, value in of_file(path):
                yield f"{path.relative_to(folder)}" + (f": {key}" if key else ""), value


def of_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The same of one file; the keys are empty where there is one value."""
    if path.suffix == ".safetensors":
        yield "", digest_of_tensors(path)
    elif path.suffix == ".npy":
        yield "", digest_of_array(path)
    elif path.suffix == ".parquet":
        yield from digests_of_columns(path)
    elif path.suffix == ".png":
        yield "", sha256(pixels(path.read_bytes()))
    elif path.suffix == ".tar":
        yield "", digest_of_tar(path)
    elif path.name == "metrics.json":
        yield from numbers(json.loads(path.read_text(encoding="utf-8")))
    elif path.name == LOG:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        yield "rows", len(rows)
        for number, row in enumerate(rows):
            yield from ((f"{number}.{key}", value) for key, value in numbers(row))
    elif path.name == "manifest.json":
        yield from numbers(json.loads(path.read_text(encoding="utf-8"))["facts"])


def numbers(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of every number, truth value, null and digest in a JSON tree that is the same in every run."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            if name not in NOT_NUMBERS and not any(word in name for word in NOT_REPEATABLE):
                yield from numbers(branch, f"{place}.{name}" if place else name)
    elif isinstance(tree, list):
        for number, branch in enumerate(tree):
            yield from numbers(branch, f"{place}[{number}]")
    elif not isinstance(tree, str) or DIGEST.fullmatch(tree):
        yield place, tree


def sha256(*parts: bytes) -> str:
    """Of the parts with their lengths, so that none runs into the next."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part)
    return digest.hexdigest()


def digest_of_tensors(path: Path) -> str:
    """Of all tensors in a file of weights, whatever their names: the format is a length, a JSON header, and bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    digests = []
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            digests.append(sha256(entry["dtype"].encode(), str(entry["shape"]).encode(), data[start:stop]))
    return sha256(*(digest.encode() for digest in sorted(digests)))


def digest_of_array(path: Path) -> str:
    """Of type, shape and bytes."""
    import numpy as np

    array = np.load(path, allow_pickle=False)
    return sha256(str(array.dtype).encode(), str(array.shape).encode(), array.tobytes())


def digests_of_columns(path: Path) -> Iterator[tuple[str, str]]:
    """Of each column of a table: its type and values."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    for name in table.column_names:
        column = table[name]
        if name == "index" or (name == "shard" and str(column.type).startswith("dictionary")):
            continue
        yield name, sha256(str(column.type).encode(), json.dumps(column.to_pylist()).encode())


def digest_of_tar(path: Path) -> str:
    """Of names and contents in their order, images as pixels."""
    parts: list[bytes] = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                content = file.read()
                parts += [member.name.encode(), pixels(content) if member.name.endswith(".png") else content]
    return sha256(*parts)


def pixels(data: bytes) -> bytes:
    """Mode, size and pixels of an image file."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    return f"{image.mode} {image.size} ".encode() + image.tobytes()


# --------------------------------------------------------------------------------------------------------------------
# Comparing.

ABSENT = "(absent)"


def differences(golden: Record, now: Record) -> Iterator[tuple[str, str, str]]:
    """(key, golden, now) of all that is not the same to the last digit."""
    for key in dict.fromkeys([*golden, *now]):
        before, after = (repr(record[key]) if key in record else ABSENT for record in (golden, now))
        if before != after:
            yield key, before, after


def unlike(jobs: Iterable[Job], records: dict[str, Record]) -> Iterator[tuple[str, str, str]]:
    """The same of jobs that have to give what another one gives."""
    for job in jobs:
        if job.same_as and not any("failed" in records[name] for name in (job.name, job.same_as)):
            pair = [
                {key.partition("/")[2]: value for key, value in records[name].items()}
                for name in (job.same_as, job.name)
            ]
            for key, before, after in differences(*pair):
                yield f"{job.name} beside {job.same_as}: {key}", before, after


def chosen(jobs: Sequence[Job], names: Sequence[str] | None) -> list[Job]:
    """The jobs of these names, with all that they need and are compared with; all jobs where none is named."""
    known = {job.name: job for job in jobs}
    wanted: set[str] = set()
    left = list(names or known)
    while left:
        name = left.pop()
        if name not in known:
            raise SystemExit(f"there is no job {name}; jobs: {', '.join(known)}")
        if name not in wanted:
            wanted.add(name)
            left += known[name].needs | ({known[name].same_as} - {""})
    return [job for job in jobs if job.name in wanted]


def main() -> int:
    """The exit code: 0, or 1 where something failed or differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write", metavar="FILE")
    parser.add_argument("--work", type=Path, help="new folder to work in, which is kept; else a temporary one")
    parser.add_argument("--only", nargs="+", help="jobs to run, with what they need; else all", metavar="NAME")
    parser.add_argument("--against", type=Path, help="compare with this file of an earlier run", metavar="FILE")
    options = parser.parse_args()
    golden = json.loads(options.against.read_text(encoding="utf-8")) if options.against else None
    jobs = chosen(all_jobs(), options.only)
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            raise SystemExit(f"{work} is not empty: what is published there already would not be made again")
        records = run_all(jobs, work)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    found = [(name, "it works", record["failed"]) for name, record in records.items() if "failed" in record]
    found += unlike(jobs, records)
    if golden is not None:
        for name in records if options.only else dict.fromkeys([*golden, *records]):
            pair = (each.get(name, {}) for each in (golden, records))
            found += ((f"{name}: {key}", before, after) for key, before, after in differences(*pair))
    for key, before, after in found:
        print(f"{key}\n    golden  {before}\n    now     {after}")
    entries = sum(map(len, records.values()))
    print(f"{len(records)} jobs, {entries:,} values in {options.out}; {len(found)} differ or failed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
