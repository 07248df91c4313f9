"""What runs in another process: a program, or a function of a test's file, alone or as one of several ranks.

Test files are no modules of a package, so a function is named by its file.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vqpipe.distributed import process_group

IMPORTED = ["torch", "torch._dynamo", "stages.train", "stages.extract_features", "stages.kmeans", __name__]
"""What the process that others are forked from imports; importing it takes each of them seconds."""
VQPIPE = "from stages.cli import main\nmain()"
"""The console script, for `program`."""


def call(file: Path, name: str, *arguments: Any) -> Any:
    """Return what the function of this name in this file returns."""
    multiprocessing.set_start_method(None, force=True)  # how loader processes start, as in any other process
    torch.set_num_threads(1)
    function: Callable[..., Any] = runpy.run_path(str(file))[name]
    return function(*arguments)


def call_as_rank(rank: int, ranks: int, port: int, *call_arguments: Any) -> Any:
    """`call` on one of several ranks, in the environment that slurm.sbatch makes: without LOCAL_WORLD_SIZE."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    with process_group(torch.device("cpu")):
        return call(*call_arguments)


def program(code: str, words: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path) -> None:
    """`python -c CODE WORDS` in a folder and an environment; what it prints goes to `output`.out and `output`.err."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(folder)
    sys.stdout, sys.stderr = (output.with_suffix(kind).open("w", encoding="utf-8") for kind in (".out", ".err"))
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
