"""Tar shards in WebDataset's layout, written so that the same samples always give the same bytes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from webdataset import TarWriter


@contextmanager
def write_tar(path: Path) -> Iterator[TarWriter]:
    """A writer of {"__key__": ..., extension: bytes, "cls": int} samples, with no clock or user in its headers."""
    with path.open("wb") as file, TarWriter(file, user="vqpipe", group="vqpipe", mtime=0) as tar:
        yield tar


def tar_keys(keys: Iterable[str]) -> list[str]:
    """Keys fit for a tar, whose keys end at their first dot: dots replaced, and numbered where two would then meet."""
    fit = dict[str, None]()
    for number, key in enumerate(keys):
        folder, slash, stem = key.rpartition("/")
        plain = folder + slash + stem.replace(".", "_")
        while plain in fit:
            plain = f"{plain}_{number}"
        fit[plain] = None
    return list(fit)
