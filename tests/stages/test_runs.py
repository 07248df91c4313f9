"""The scripts in stages/runs: every command parses, every model builds, and every script finishes at toy size."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stages import cli, recipe
from vqpipe.losses.objective import QUANTIZER_TERMS
from vqpipe.models import AutoencoderConfig, build_autoencoder
from vqpipe.reports.published import read_table

RUNS = Path(__file__).resolve().parents[2] / "stages" / "runs"
SCRIPTS = sorted(path.name for path in RUNS.glob("*.sh") if path.name != "row.sh")
RECORD = '#!/usr/bin/env bash\nfor word in "$@"; do printf "%q " "$word" >> "$RECORD"; done\necho >> "$RECORD"\n'
GIVEN = {
    "IMAGES": "images",
    "EVAL": "eval",
    "WEIGHTS": "weights",
    "FFHQ": "faces",
    "FFHQ_EVAL": "faces-eval",
    "OPENIMAGES": "open-images",
    "MIXTURE": "images;faces;open-images",
    "DATA": "copies",
    "VAES": "sd=sd-vae",
    "MAE": "none",
    "GENERATOR": "generator",
    "FILES": "eval/class-0/00.png eval/class-1/01.png",
}
"""What the scripts need of their environment."""


def programs(folder: Path, **texts: str) -> Path:
    """Write shell scripts of these names into a folder, to be put on the PATH."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in texts.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    return bin_folder


def commands_of(script: str, folder: Path, **more: str) -> list[list[str]]:
    """The arguments of each `vqpipe` command that the script runs."""
    bin_folder, record = programs(folder, vqpipe=RECORD), folder / "record"
    environment = {**GIVEN, **more, "PATH": f"{bin_folder}:{os.environ['PATH']}", "RECORD": str(record)}
    subprocess.run(["bash", RUNS / script], check=True, env=environment, cwd=folder)
    return [shlex.split(line) for line in record.read_text().splitlines()]


parser = cache(cli.load)


@pytest.fixture(scope="module")
def loss_names_of(uninitialized: Callable[[], AbstractContextManager[None]]) -> Callable[[AutoencoderConfig], set[str]]:
    """`loss_names_of(model)`: build a model and return the loss names of its quantizer."""

    @cache
    def loss_names_of(model: AutoencoderConfig) -> set[str]:
        with uninitialized(), torch.device("meta"):
            return set(build_autoencoder(model).quantizer.loss_names)

    return loss_names_of


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_parses_and_every_model_builds(
    script: str, tmp_path: Path, loss_names_of: Callable[[AutoencoderConfig], set[str]]
) -> None:
    outputs: set[str] = set()
    for name, *words in commands_of(script, tmp_path):
        given = parser(name).make_context(name, list(words)).params
        reads = [given.get(role) or () for role in ("features", "codebook", "tokenizer", "source", "reports")]
        paths = {str(path) for role in reads for path in (role if isinstance(role, list | tuple) else [role])}
        paths -= {path for path in paths if path.startswith("copies/")}  # data sets, which the user provides
        assert paths - {"sd-vae", "generator"} <= outputs, f"{name} reads an artifact that no earlier command publishes"
        outputs.add(str(given["out"]))
        if name == "train":
            overrides = list(given["overrides"] or [])
            settings = recipe.load(given["preset"], overrides)
            terms = loss_names_of(settings.model)
            weights = settings.objective.weights(QUANTIZER_TERMS)
            assert {term for term in terms if not weights[term]} == set()
            quantizer = str(settings.model.quantizer)
            needs_codebook = "LcConfig(" in quantizer and "codebook_init='artifact'" in quantizer
            assert bool(given["codebook"]) == needs_codebook
            assert not (given["source"] and settings.train.whiten_init)


def test_every_table_and_figure_of_both_papers_has_a_script() -> None:
    lc = {f"vqgan-lc-table-{n}.sh" for n in (3, 4, 5, 6, 7, 8, 9, 10)}
    lc |= {"vqgan-lc-tables-1-2.sh", "vqgan-lc-table-1-ldm.sh", "vqgan-lc-figure-1b.sh", "vqgan-lc-figures-4-5.sh"}
    mgvq = {"mgvq-table-1.sh", "mgvq-tables-2-3.sh", "mgvq-table-4.sh", "mgvq-tables-5-6.sh"}
    mgvq |= {f"mgvq-figure-{n}.sh" for n in (2, 5, 7)}
    assert lc | mgvq | {"guidance.sh"} <= set(SCRIPTS)


def test_rows_of_the_published_tables_are_trained_by_their_script(tmp_path: Path) -> None:
    """A row with a name that no script makes would never show our number."""
    for script in SCRIPTS:
        folder = tmp_path / script
        folder.mkdir()
        commands = commands_of(script, folder, SIZE="xxl")
        made = {Path(words[words.index("--out") + 1]).name for words in commands}
        given = [words for words in commands if "--published" in words]
        for words in given:
            for path in (words[i + 1] for i, word in enumerate(words) if word == "--published"):
                names = {row.name for row in read_table(Path(path)).rows if row.name}
                assert {name for name in names if name not in made | {"sdxl-vae", "sd-vae"}} == set(), path


def test_validation_images_are_passed_on_if_set(tmp_path: Path) -> None:
    for given in ({}, {"VALIDATION": "held out/*.tar"}, {"VALIDATION": ""}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        commands = [words for words in commands_of("vqgan-lc-table-10.sh", folder, **given) if words[0] == "train"]
        passed = [words[words.index("--validation") + 1] for words in commands if "--validation" in words]
        assert passed == ["held out/*.tar"] * (len(commands) if given.get("VALIDATION") else 0)


@pytest.mark.parametrize("script", sorted(path.name for path in (RUNS / "study").glob("?-*.sh")))
def test_every_command_of_the_study_parses_and_every_model_builds(
    script: str, tmp_path: Path, loss_names_of: Callable[[AutoencoderConfig], set[str]]
) -> None:
    """`python networks.py vqpipe ...` is recorded, and publishes an empty directory."""
    lines = ("#!/usr/bin/env bash", "shift", '[ "$1" = vqpipe ] || exit 0', "shift")
    record_alone = f'(flock 9\n{RECORD.partition(chr(10))[2]}) 9>"$RECORD.lock"'  # two runs write at the same time
    publish = 'while [ $# -gt 0 ]; do [ "$1" != --out ] || mkdir -p "$2"; shift; done'
    python = "\n".join([*lines, record_alone, publish, ""])
    bin_folder, record = programs(tmp_path, python=python), tmp_path / "record"
    paths = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "RECORD": str(record)}
    given = {"TRAIN": "a;b", "EVAL": "c", "MOBILENET": "mobilenet.pth", "SIZES": "1024 100000"}
    subprocess.run(["bash", RUNS / "study" / script], check=True, env={**given, **paths}, cwd=tmp_path, timeout=250)
    commands = [shlex.split(line) for line in record.read_text().splitlines()]
    trained, compared = set(), set()
    for name, *words in commands:
        given_options = parser(name).make_context(name, list(words)).params
        if name == "train":
            overrides = list(given_options["overrides"] or [])
            settings = recipe.load(given_options["preset"], overrides)
            terms = loss_names_of(settings.model)
            weights = settings.objective.weights(QUANTIZER_TERMS)
            assert {term for term in terms if not weights[term]} == set()
            quantizer = str(settings.model.quantizer)
            needs_codebook = "codebook_init='artifact'" in quantizer or re.search(r"frozen_dim=[1-9]", quantizer)
            assert bool(given_options["codebook"]) == bool(needs_codebook)
            assert not (given_options["source"] and settings.train.whiten_init)
            trained.add(given_options["out"].name)
        if name == "compare":
            compared |= {
                report.name.removeprefix("report-").removesuffix("-eval") for report in given_options["reports"]
            }
    assert trained
    assert trained == compared


# At toy size.

TOY_CODES, TOY_SIDE = "64", "64"
TOY = {
    "vqgan": ("model.base_channels=32", "model.num_res_blocks=1", "model.attention_resolutions=[]"),
    "magvit": ("model.base_channels=32", "model.num_res_blocks=1"),
    "dcae": (),
    "gpt": ("generator.layers=1", "generator.heads=2", "generator.width=32"),
    "llamagen": ("generator.layers=1", "generator.heads=2", "generator.width=32"),
    "dit": ("generator.size=tiny",),
    "sit": ("generator.size=tiny",),
    "ldm": ("generator.base_channels=32", "generator.num_res_blocks=1", "generator.class_channels=32"),
    "vit": ("classifier.depth=1", "classifier.num_heads=2", "classifier.width=32"),
}
"""Kind of network -> settings that make it small."""


class Options:
    """The options of a command, to be replaced by smaller ones."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def get(self, option: str) -> str | None:
        return self.words[self.words.index(option) + 1] if option in self.words else None

    def put(self, option: str, value: str) -> None:
        """Replace the value of an option, or append it."""
        if option in self.words:
            self.words[self.words.index(option) + 1] = value
        else:
            self.words += [option, value]

    def set(self, *settings: str) -> None:
        self.words += [word for setting in settings for word in ("--set", setting)]

    @property
    def overrides(self) -> list[str]:
        return [self.words[i + 1] for i, word in enumerate(self.words) if word == "--set"]

    def remove_setting(self, key: str) -> None:
        for i in range(len(self.words) - 2, -1, -1):
            if self.words[i] == "--set" and self.words[i + 1].startswith(f"{key}="):
                del self.words[i : i + 2]


def toy_command(name: str, words: Sequence[str], encoders: bool, weights: bool) -> list[str]:
    """The same command with small networks and one step.

    Args:
        encoders: with the real encoders of features, of random weights.
        weights: with LPIPS and Inception, of random weights.
    """
    options = Options(words)
    if not weights and "--weights" in words:
        options.put("--weights", ".")
    match name:
        case "extract-features" if encoders:
            options.set("features.allow_random_weights=true", "features.batch_size=4")
        case "extract-features":
            options.put("--encoder", "patch-pca")
            options.put("--pool", "4")
            options.set("features.image_size=64")
        case "kmeans":
            options.put("--k", TOY_CODES)
        case "train":
            toy_training(options, encoders)
            if not weights:
                options.remove_setting("objective.lpips_weights")
                options.set("objective.perceptual=none", "objective.lpips=0")
        case "eval":
            _, x, height = (options.get("--image-size") or TOY_SIDE).partition("x")
            options.put("--image-size", f"128{x}{TOY_SIDE}" if height else TOY_SIDE)
            options.put("--fid-min-images", "2")
            options.put("--batch-size", "4")
            options.put("--num-workers", "0")
        case "tokenize":
            options.put("--image-size", TOY_SIDE)
        case "train-generator" | "train-classifier":
            toy_examples(name, options)
        case "generate":
            options.put("--num-images", "6")
        case "eval-generation":
            options.put("--image-size", TOY_SIDE)
            options.put("--fid-min-images", "2")
            options.put("--num-workers", "0")
        case "prepare-data":
            options.words[0] = "folder"
    return options.words


def toy_training(options: Options, encoders: bool) -> None:
    """One step of two images of 64 px."""
    options.remove_setting("train.warmup_steps")
    recipe_given = recipe.load(options.get("--preset"), options.overrides)
    quantizer, kind = recipe_given.model.quantizer, recipe_given.model.kind
    options.put("--steps", "1")
    options.put("--global-batch-size", "2")
    options.put("--precision", "fp32")
    options.set(
        "train.warmup_steps=0", "data.image_size=64", "data.num_workers=0", "objective.disc_start=0", *TOY[kind]
    )
    if kind == "dcae":
        levels = len(recipe_given.model.widths)
        depths = [0, *[1] * (levels - 1)]
        options.set(f"model.widths={[32] * levels}")
        options.set(f"model.encoder_depths={depths}", f"model.decoder_depths={depths}")
    if quantizer.kind == "multi_scale":
        options.set("model.quantizer.scales=[1, 2, 4]")
    if quantizer.kind == "lfq":
        options.set("model.quantizer.code_dim=6", "model.quantizer.entropy_bits=6")
    elif quantizer.kind == "multi_group":
        options.remove_setting("model.quantizer.group.codebook_size")
        options.set(f"model.quantizer.group.codebook_size={TOY_CODES}")
    elif quantizer.kind != "fsq":
        options.remove_setting("model.quantizer.codebook_size")
        options.set(f"model.quantizer.codebook_size={TOY_CODES}")
    if options.get("--codebook") and not encoders:
        group = ".group" if quantizer.kind == "multi_group" else ""
        options.remove_setting(f"model.quantizer{group}.feature_dim")
        options.set(f"model.quantizer{group}.feature_dim=64")
        if getattr(quantizer, "projector", "") == "none":
            options.set("model.quantizer.code_dim=64")


def toy_examples(name: str, options: Options) -> None:
    """One step of four images."""
    load = recipe.load_generator if name == "train-generator" else recipe.load_classifier
    given = load(options.get("--preset"), options.overrides)
    network = given.generator if name == "train-generator" else given.classifier
    options.put("--steps", "1")
    options.put("--global-batch-size", "4")
    options.put("--precision", "fp32")
    options.set("train.warmup_steps=0", "train.compile=false", "train.parallel=ddp", *TOY[network.kind])
    if options.get("--images"):
        options.set("generate.steps=2")
        options.put("--image-size", TOY_SIDE)


@pytest.fixture(scope="session")
def toy_inputs(tmp_path_factory: pytest.TempPathFactory, golden: ModuleType) -> Path:
    """Images in classes, random weights of LPIPS and Inception, and an AutoencoderKL."""
    folder = tmp_path_factory.mktemp("toy")
    golden.make_pictures(folder / "images")
    golden.seeded(golden.make_weights)(folder / "weights")
    golden.seeded(golden.make_vae)(folder / "sd-vae")
    for name in ("eval", "faces", "faces-eval", "open-images"):
        (folder / name).symlink_to("images")
    for name in ("celeba", "davis-2017", "uhdbench"):
        (folder / "copies" / name).parent.mkdir(exist_ok=True)
        (folder / "copies" / name).symlink_to(folder / "images")
    return folder


QUICK = ("mgvq-figure-5.sh",)
FEWER = {"SETS": "celeba davis-2017", "SETS_2K": "uhdbench", "GROUPS_OF": "1 4", "TOTALS": "4096", "SIZE": "b"}


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SCRIPTS]
)
def test_every_script_finishes_at_toy_size(
    script: str, tmp_path: Path, toy_inputs: Path, vqpipe: Callable[..., Any]
) -> None:
    """The commands of the script, with small networks and one step of training, on 24 images.

    The slow ones have random weights of LPIPS and Inception, and Table 6 the encoders of CLIP.
    """
    for path in toy_inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    commands = commands_of(script, tmp_path, **FEWER)
    if script == "guidance.sh":  # which samples from a generator of another script
        folder = tmp_path / "before"
        folder.mkdir()
        before = commands_of("vqgan-lc-table-1-ldm.sh", folder)
        first = next(i for i, (name, *_) in enumerate(before) if name == "train-generator")
        (tmp_path / "generator").symlink_to(Path("artifacts", "ldm-f16-fc-1024"))
        commands = [*before[: first + 1], *commands]
    for name, *words in commands:
        encoders, weights = script == "vqgan-lc-table-6.sh", script not in QUICK
        done = vqpipe(tmp_path, name, *toy_command(name, words, encoders=encoders, weights=weights))
        assert done.returncode == 0, (name, words, done.stderr[-2000:])


# Under SLURM.

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo "first-of-$3"; echo second; else echo "scontrol $*" >> "$RECORD"; fi
"""
RANK = """#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE on $MASTER_ADDR:$MASTER_PORT: $*" >> "$RECORD"
[ "$1" != train ] || exit "$CODE"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """slurm(code): run the batch file on a script of a training, which exits with `code`, and an evaluation.

    Returns the exit code of the batch file and the commands that were run.
    """

    def run(code: int, rank: str = RANK, **more: str) -> tuple[int, list[str]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        bin_folder, record = programs(folder, srun=SRUN, scontrol=SCONTROL, vqpipe=rank), folder / "record"
        (folder / "script.sh").write_text('set -euo pipefail\n$RUN train --out "a b"\n$RUN eval\n')
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}
        environment = {
            **job,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "RECORD": str(record),
            "CODE": str(code),
            **more,
        }
        done = subprocess.run(["bash", RUNS / "slurm.sbatch", folder / "script.sh"], env=environment, cwd=folder)
        return done.returncode, record.read_text().splitlines()

    return run


TRAINED = "0/16 on first-of-node[1-2]:22345: train --out a b"


def test_job_that_reaches_its_time_limit_is_requeued(slurm: Callable[..., tuple[int, list[str]]]) -> None:
    assert slurm(143) == (143, [TRAINED, "scontrol requeue 12345"])
    assert slurm(143, SLURM_RESTART_COUNT="100") == (143, [TRAINED])


def test_job_that_finishes_or_fails_is_not_requeued(slurm: Callable[..., tuple[int, list[str]]]) -> None:
    assert slurm(0) == (0, [TRAINED, "0/16 on first-of-node[1-2]:22345: eval"])
    assert slurm(1) == (1, [TRAINED])


def test_scripts_parse_and_the_batch_file_requests_a_signal_and_a_requeue() -> None:
    for script in sorted(path for path in RUNS.iterdir() if path.is_file()):
        subprocess.run(["bash", "-n", script], check=True)
    directives = [line for line in (RUNS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=USR1@600", "#SBATCH --requeue"} <= set(directives)
