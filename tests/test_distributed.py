"""Errors of one rank reach every rank. Under torchrun this file is the script of each rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vqpipe.distributed import process_group, rank, sharing_errors
from vqpipe.errors import DataError, VqpipeError

FAILING: list[list[int]] = [[], [0], [1], [0, 1]]
"""The ranks that fail, in each of four rounds."""


def raised(failing: list[int]) -> list[object] | None:
    """Type, text and cause of the error that this rank raises if the ranks `failing` have one."""
    try:
        with sharing_errors():
            if rank() in failing:
                error = DataError(f"rank {rank()} cannot read its images", "Check them")
                error.sysexit_code = 90 + rank()
                raise error
    except VqpipeError as error:
        return [type(error).__name__, str(error), error.sysexit_code]
    return None


def test_error_of_the_lowest_failing_rank_is_raised_on_every_rank(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, __file__, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    of_rank = [["DataError", f"rank {number} cannot read its images. Check them.", 90 + number] for number in (0, 1)]
    for number in (0, 1):
        found = json.loads((tmp_path / f"rank-{number}.json").read_text(encoding="utf-8"))
        assert found == [None, of_rank[0], of_rank[1], of_rank[0]]


if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        found = [raised(failing) for failing in FAILING]
        (Path(sys.argv[1]) / f"rank-{rank()}.json").write_text(json.dumps(found), encoding="utf-8")
