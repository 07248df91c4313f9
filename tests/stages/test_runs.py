"""Every script of stages/runs names commands, presets and settings that exist; nothing is trained here."""

import os
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import typer.main

from stages import recipe
from stages.cli import app
from vqpipe.losses.objective import QUANTIZER_TERMS
from vqpipe.models import build_autoencoder

RUNS = Path(__file__).resolve().parents[2] / "stages" / "runs"
SCRIPTS = sorted(path.name for path in RUNS.glob("*.sh") if path.name != "row.sh")
RECORD = '#!/usr/bin/env bash\nfor word in "$@"; do printf "%q " "$word" >> "$RECORD"; done\necho >> "$RECORD"\n'


def programs(folder: Path, **texts: str) -> Path:
    """A folder of shell scripts under these names, to stand first on the PATH."""
    place = folder / "bin"
    place.mkdir()
    for name, text in texts.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return place


def commands_of(script: str, folder: Path, **more: str) -> list[list[str]]:
    """The words of each command that the script would run, `vqpipe` itself left out."""
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
def model_of(table: str) -> set[str]:
    """Builds a model; what terms its quantizer makes."""
    preset, *overrides = shlex.split(table)
    with torch.device("meta"):
        return set(build_autoencoder(recipe.load(preset, overrides).model).quantizer.loss_names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_parses_and_every_model_builds(script: str, tmp_path: Path) -> None:
    group = typer.main.get_command(app)
    made: set[str] = set()
    for name, *words in commands_of(script, tmp_path):
        given = group.commands[name].make_context(name, list(words)).params  # type: ignore[attr-defined]
        reads = [given.get(role) or () for role in ("features", "codebook", "tokenizer", "source", "reports")]
        paths = {str(path) for role in reads for path in (role if isinstance(role, list | tuple) else [role])}
        paths -= {path for path in paths if path.startswith("copies/")}  # of data sets: what users bring
        assert paths - {"sd-vae"} <= made, f"{name} reads what no command before it makes"
        made.add(str(given["out"]))
        if name == "train":
            overrides = list(given["overrides"] or [])
            settings = recipe.load(given["preset"], overrides)
            terms = model_of(shlex.join([given["preset"], *[o for o in overrides if o.startswith("model.")]]))
            weights = settings.objective.weights(*QUANTIZER_TERMS)
            assert {term for term in terms if not weights[term]} == set()
            quantizer = str(settings.model.quantizer)
            needs_codebook = "LcConfig(" in quantizer and "codebook_init='artifact'" in quantizer
            assert bool(given["codebook"]) == needs_codebook


def test_there_is_a_script_for_every_table_of_tokenizers() -> None:
    assert {f"vqgan-lc-table-{n}.sh" for n in (3, 6, 7, 8, 9, 10)} <= set(SCRIPTS)
    assert {
        "vqgan-lc-tables-1-2.sh",
        "mgvq-table-1.sh",
        "mgvq-tables-2-3.sh",
        "mgvq-tables-5-6.sh",
        "mgvq-figure-7.sh",
    } <= set(SCRIPTS)


def test_held_out_images_are_measured_where_they_are_named(tmp_path: Path) -> None:
    for given in ({}, {"VALIDATION": "held out/*.tar"}, {"VALIDATION": ""}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        trained = [words for words in commands_of("vqgan-lc-table-10.sh", folder, **given) if words[0] == "train"]
        named = [words[words.index("--validation") + 1] for words in trained if "--validation" in words]
        assert named == ["held out/*.tar"] * (len(trained) if given.get("VALIDATION") else 0)


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
    """`slurm(code)`: the batch file on a script of a training, which leaves with `code`, and an evaluation. Returns its
    exit code and what was run."""

    def run(code: int, rank: str = RANK, **more: str) -> tuple[int, list[str]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        place, record = programs(folder, srun=SRUN, scontrol=SCONTROL, vqpipe=rank), folder / "record"
        (folder / "script.sh").write_text('set -euo pipefail\n$RUN train --out "a b"\n$RUN eval\n')
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}
        environment = {**job, "PATH": f"{place}:{os.environ['PATH']}", "RECORD": str(record), "CODE": str(code), **more}
        done = subprocess.run(["bash", RUNS / "slurm.sbatch", folder / "script.sh"], env=environment, cwd=folder)
        return done.returncode, record.read_text().splitlines()

    return run


TRAINED = "0/16 on first-of-node[1-2]:22345: train --out a b"


def test_a_job_whose_time_is_up_goes_back_into_the_queue(slurm: Callable[..., tuple[int, list[str]]]) -> None:
    assert slurm(143) == (143, [TRAINED, "scontrol requeue 12345"])
    assert slurm(143, SLURM_RESTART_COUNT="100") == (143, [TRAINED])


def test_a_job_that_is_done_or_fails_does_not(slurm: Callable[..., tuple[int, list[str]]]) -> None:
    assert slurm(0) == (0, [TRAINED, "0/16 on first-of-node[1-2]:22345: eval"])
    assert slurm(1) == (1, [TRAINED])


def test_the_scripts_parse_and_the_batch_file_asks_for_a_signal_and_a_requeue() -> None:
    for script in sorted(RUNS.iterdir()):
        subprocess.run(["bash", "-n", script], check=True)
    asked = [line for line in (RUNS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=USR1@600", "#SBATCH --requeue"} <= set(asked)
