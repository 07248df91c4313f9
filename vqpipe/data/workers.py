"""Work done by other processes, its results in order."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vqpipe.errors import DataError, VqpipeError

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
GRACE = 60
"""Seconds a worker outlives a SIGTERM: more than a parent needs to save its state."""

BATCHES_A_WORKER = 4
"""A process is started for no less work than this: starting it takes as long as decoding a batch or two."""
BATCHES_AHEAD = 4
"""Batches of one worker that are in shared memory at a time, at most: two ahead, one in the making, one in use."""


def through_workers(dataset: Dataset, work: Iterable[Any], num_workers: int, timeout: float = 300.0) -> Iterator[Any]:
    """`dataset[piece]` for each piece of work, in order, computed by loader processes.

    `num_workers` 0 computes here, -1 takes `available_workers`. A VqpipeError that comes back as a result is raised.

    Raises:
        DataError: a worker that died, or gave no answer for `timeout` seconds.
    """
    num_workers = available_workers() if num_workers < 0 else num_workers
    with warnings.catch_warnings():  # Python 3.12+: our workers only decode, and touch no thread pool of the parent
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the number is the user's choice
        loader: DataLoader = DataLoader(
            dataset,
            sampler=work,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=unchanged,
            worker_init_fn=keep_calm,
            pin_memory=torch.cuda.is_available(),
            timeout=timeout if num_workers else 0,
        )
        results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            hint = "Out of memory, of shared memory (/dev/shm), or a stalled disk? Try fewer workers"
            raise DataError(f"the image loader stopped: {error}", hint) from error
        if isinstance(result, VqpipeError):
            raise result
        yield result


def keep_calm(worker: int) -> None:
    """Signals to the whole process group are the parent's to answer: it may yet save its state. So a worker ignores
    them, but for SIGTERM, after which it has GRACE seconds left; a second one ends it at once. Where the parent is
    killed it ends with it: it holds a copy of all the parent's open files, the lock on what is being written too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it was killed before we could ask for that signal
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, wind_down)


def wind_down(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(GRACE)


def unchanged(loaded: Any) -> Any:
    return loaded


def available_workers() -> int:
    """One loader process per core that this rank may count as its own, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def worth_starting(num_workers: int, batches: int, batch_bytes: int) -> int:
    """How many processes to start for so many batches: `num_workers`; for -1 one per core, as far as there is work for
    them, and room in shared memory for what they decode ahead (a container may have as little as 64 MB)."""
    if num_workers >= 0:
        return num_workers
    room = shared_memory() // (BATCHES_AHEAD * max(batch_bytes, 1))
    return min(available_workers(), batches // BATCHES_A_WORKER, room)


def shared_memory() -> int:
    """Bytes that the processes of this rank may still pass to each other."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return sys.maxsize
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
