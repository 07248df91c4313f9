"""Every script of stages/runs names commands, presets and settings that exist; nothing is trained here."""

import os
import shlex
import subprocess
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


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """The words of each command that the script would run, `vqpipe` itself left out."""
    bin_folder, record = folder / "bin", folder / "record"
    bin_folder.mkdir()
    (bin_folder / "vqpipe").write_text(RECORD)
    (bin_folder / "vqpipe").chmod(0o755)
    given = {"IMAGES": "images", "EVAL": "eval", "WEIGHTS": "weights", "FFHQ": "faces", "FFHQ_EVAL": "faces-eval"}
    environment = {**given, "SD_VAE": "sd-vae", "PATH": f"{bin_folder}:{os.environ['PATH']}", "RECORD": str(record)}
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
    assert {"vqgan-lc-tables-1-2.sh", "mgvq-table-1.sh", "mgvq-tables-5-6.sh", "mgvq-figure-7.sh"} <= set(SCRIPTS)
