"""Errors of one rank reach every rank, and the ranks of a machine read every image file once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vqpipe import artifacts
from vqpipe.data.folders import Folder
from vqpipe.data.images import open_images
from vqpipe.data.stored import StoredFile
from vqpipe.data.tars import write_tar
from vqpipe.distributed import machine_share, process_group, rank, sharing_errors
from vqpipe.errors import ConfigError, DataError, VqpipeError

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


def all_raised() -> list[list[object] | None]:
    return [raised(failing) for failing in FAILING]


def test_number_of_processes_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is set .*unset WORLD_SIZE"), process_group(torch.device("cpu")):
        pass


def test_error_of_the_lowest_failing_rank_is_raised_on_every_rank(on_two_ranks: Callable[..., list[Any]]) -> None:
    of_rank = [["DataError", f"rank {number} cannot read its images. Check them.", 90 + number] for number in (0, 1)]
    assert on_two_ranks(all_raised) == [[None, of_rank[0], of_rank[1], of_rank[0]]] * 2


def opened(root: str, images: str) -> tuple[list[str], str, str]:
    """The files that this rank reads to open `images` and to start an artifact of them, the digest, and the error."""
    os.environ["XDG_CACHE_HOME"] = f"{root}/cache"
    read, real = list[str](), (StoredFile.open_binary, Folder.hash_file)
    StoredFile.open_binary = lambda self: (read.append(self.name), real[0](self))[1]  # type: ignore[method-assign]
    Folder.hash_file = lambda self, i: (read.append(self.key(i)), real[1](self, i))[1]  # type: ignore[method-assign]
    try:
        found = open_images(images)
        with artifacts.start(f"{root}/out", "tokens", {}, {"images": found}):  # type: ignore[union-attr]
            return read, found.digest, ""
    except DataError as error:
        return read, "", str(error)


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_ranks_of_a_machine_read_every_file_once(
    kind: str, tmp_path: Path, on_two_ranks: Callable[..., list[Any]]
) -> None:
    for number in range(3):
        with write_tar(tmp_path / f"{number}.tar") as tar:
            tar.write("a", b"1", "png")
        (tmp_path / f"{number}.png").write_bytes(b"1")
    for file in tmp_path.iterdir():
        os.utime(file, (1e9, 1e9))  # an older file is cached
    (read, digest, error), (others, *same) = on_two_ranks(
        opened, str(tmp_path), f"{tmp_path}/*.tar" if kind == "tars" else str(tmp_path)
    )
    assert sorted(read + others) == [f"{number}{'.tar' * (kind == 'tars')}" for number in range(3)]
    assert digest
    assert same == [digest, error] == [digest, ""]


def test_no_rank_reads_a_shard_twice_where_nothing_can_be_cached(
    tmp_path: Path, on_two_ranks: Callable[..., list[Any]]
) -> None:
    for number in range(3):
        with write_tar(tmp_path / f"{number}.tar") as tar:
            tar.write("a", b"1", "png")
    (tmp_path / "cache").touch()
    (read, *found), (others, *same) = on_two_ranks(opened, str(tmp_path), f"{tmp_path}/*.tar")
    assert sorted(read) == sorted(others) == ["0.tar", "1.tar", "2.tar"]
    assert found == same


def shares() -> slice | None:
    return machine_share()


def test_ranks_share_the_work_of_their_machine_under_any_launcher(on_two_ranks: Callable[..., list[Any]]) -> None:
    assert shares() is None
    assert on_two_ranks(shares) == [slice(0, None, 2), slice(1, None, 2)]


def test_damaged_shard_is_named_by_every_rank(tmp_path: Path, on_two_ranks: Callable[..., list[Any]]) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(bytes(10240 if number != 1 else 700))
    results = on_two_ranks(opened, str(tmp_path), f"{tmp_path}/*.tar")
    assert all("1.tar is truncated" in error for _, _, error in results)
