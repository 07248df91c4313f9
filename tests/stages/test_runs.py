"""The commands, presets and settings of the scripts in stages/runs exist. Nothing is trained."""

import os
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from stages import cli, recipe
from vqpipe.losses.objective import QUANTIZER_TERMS
from vqpipe.models import build_autoencoder

RUNS = Path(__file__).resolve().parents[2] / "stages" / "runs"
SCRIPTS = sorted(path.name for path in RUNS.glob("*.sh") if path.name != "row.sh")
RECORD = '#!/usr/bin/env bash\nfor word in "$@"; do printf "%q " "$word" >> "$RECORD"; done\necho >> "$RECORD"\n'


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
    given = {"IMAGES": "images", "EVAL": "eval", "WEIGHTS": "weights", "FFHQ": "faces", "FFHQ_EVAL": "faces-eval"}
    environment = {
        **given,
        **more,
        "SD_VAE": "sd-vae",
        "DATA": "copies",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "RECORD": str(record),
    }
    subprocess.run(["bash", RUNS / script], check=True, env=environment, cwd=folder)
    return [shlex.split(line) for line in record.read_text().splitlines()]


@cache
def loss_names_of(table: str) -> set[str]:
    """Build a model and return the loss names of its quantizer."""
    preset, *overrides = shlex.split(table)
    with torch.device("meta"):
        return set(build_autoencoder(recipe.load(preset, overrides).model).quantizer.loss_names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_parses_and_every_model_builds(script: str, tmp_path: Path) -> None:
    outputs: set[str] = set()
    for name, *words in commands_of(script, tmp_path):
        given = cli.load(name).make_context(name, list(words)).params
        reads = [given.get(role) or () for role in ("features", "codebook", "tokenizer", "source", "reports")]
        paths = {str(path) for role in reads for path in (role if isinstance(role, list | tuple) else [role])}
        paths -= {path for path in paths if path.startswith("copies/")}  # data sets, which the user provides
        assert paths - {"sd-vae"} <= outputs, f"{name} reads an artifact that no earlier command publishes"
        outputs.add(str(given["out"]))
        if name == "train":
            overrides = list(given["overrides"] or [])
            settings = recipe.load(given["preset"], overrides)
            terms = loss_names_of(shlex.join([given["preset"], *[o for o in overrides if o.startswith("model.")]]))
            weights = settings.objective.weights(QUANTIZER_TERMS)
            assert {term for term in terms if not weights[term]} == set()
            quantizer = str(settings.model.quantizer)
            needs_codebook = "LcConfig(" in quantizer and "codebook_init='artifact'" in quantizer
            assert bool(given["codebook"]) == needs_codebook


def test_every_table_of_tokenizers_has_a_script() -> None:
    assert {f"vqgan-lc-table-{n}.sh" for n in (3, 6, 7, 8, 9, 10)} <= set(SCRIPTS)
    assert {
        "vqgan-lc-tables-1-2.sh",
        "mgvq-table-1.sh",
        "mgvq-tables-2-3.sh",
        "mgvq-tables-5-6.sh",
        "mgvq-figure-7.sh",
    } <= set(SCRIPTS)


def test_validation_images_are_passed_on_if_set(tmp_path: Path) -> None:
    for given in ({}, {"VALIDATION": "held out/*.tar"}, {"VALIDATION": ""}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        commands = [words for words in commands_of("vqgan-lc-table-10.sh", folder, **given) if words[0] == "train"]
        passed = [words[words.index("--validation") + 1] for words in commands if "--validation" in words]
        assert passed == ["held out/*.tar"] * (len(commands) if given.get("VALIDATION") else 0)


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
    for script in sorted(RUNS.iterdir()):
        subprocess.run(["bash", "-n", script], check=True)
    directives = [line for line in (RUNS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=USR1@600", "#SBATCH --requeue"} <= set(directives)
