"""What runs in another process: a command, or a function of a test's file, alone or as one of several ranks.

Test files are no modules of a package, so a function is named by its file.
"""

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


def call(file: Path, name: str, *arguments: Any) -> Any:
    """Return what the function of this name in this file returns."""
    torch.set_num_threads(1)
    function: Callable[..., Any] = runpy.run_path(str(file))[name]
    return function(*arguments)


def call_as_rank(rank: int, ranks: int, port: int, *call_arguments: Any) -> Any:
    """`call` on one of several ranks, in an environment as torchrun makes it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    with process_group(torch.device("cpu")):
        return call(*call_arguments)


def command(folder: Path, words: Sequence[str], environment: Mapping[str, str], errors: Path) -> None:
    """`vqpipe WORDS` in a folder and an environment; its stderr goes to a file."""
    from stages import cli

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stderr = errors.open("w", encoding="utf-8")
    sys.argv = ["vqpipe", *words]
    cli.main()
