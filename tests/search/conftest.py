"""Triton's kernels without a GPU."""

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in another process, in which Triton's interpreter runs the kernels on CPU tensors.

    Triton reads the setting when it is imported, and cannot be imported twice.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: torch brings it on Linux alone")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
