import gzip
import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vqpipe.data.images import open_images
from vqpipe.errors import DataError, WeightsError
from vqpipe.file_kinds import HEAD, kind_of, kind_of_file, unpack_command
from vqpipe.weights import load_tensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 912345678\n"
LOGIN = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def write(path: Path, kind: str) -> Path:
    """Write a file of this kind."""
    file = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.table({"caption": ["a", "b"]}), path)
    elif kind in ("zip", "npz"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy" if kind == "npz" else "weights/a.pth", b"1")
    elif kind == "safetensors":
        save_file({"a": torch.zeros(2)}, path)
    elif kind in ("pytorch", "legacy"):
        torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=kind == "pytorch")
    elif kind == "torchscript":
        with pytest.warns(FutureWarning):
            torch.jit.script(Doubled()).save(str(path))
    elif kind == "npy":
        np.save(file, np.zeros(2))
    elif kind == "image":
        Image.new("RGB", (4, 4)).save(file, "WEBP")
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("BZh.jpg"))
    else:
        file.write(
            {
                "empty": b"",
                "gzip": gzip.compress(b"1"),
                "xz": lzma.compress(b"1"),
                "html": LOGIN,
                "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
                "lfs": LFS,
                "json": json.dumps({"weight_map": {}}).encode(),
                "text": "größe\n".encode(),
                "pdf": b"%PDF-1.7\n",
                "hdf5": b"\x89HDF\r\n\x1a\n\0",
                "unknown": bytes(range(200)),
            }[kind]
        )
    if not path.exists():
        path.write_bytes(file.getvalue())
    return path


WEIGHTS = ("safetensors", "pytorch", "legacy")
OTHERS = ("parquet", "zip", "npz", "torchscript", "npy", "image", "empty", "gzip", "xz", "html", "xml", "lfs")
OTHERS += ("json", "text", "pdf", "hdf5")


@pytest.mark.parametrize("kind", [*WEIGHTS, *OTHERS, "tar", "unknown"])
def test_kind_is_told_by_the_content(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "file", kind)
    expected = "pytorch" if kind == "legacy" else kind
    assert kind_of_file(path) == expected
    if kind != "torchscript":  # a zip, whose first bytes are those of any PyTorch checkpoint
        assert kind_of(path.read_bytes()[:HEAD]) == expected


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["a.pth", "a"])
def test_weights_are_read_whatever_their_name(tmp_path: Path, kind: str, name: str) -> None:
    assert load_tensors(write(tmp_path / name, kind))["a"].tolist() == [0, 0]


def test_checkpoint_named_safetensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is a PyTorch checkpoint, not a safetensors file\. Rename it"):
        load_tensors(write(tmp_path / "a.safetensors", "pytorch"))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "model.pth", kind)
    with pytest.raises(WeightsError) as caught:
        load_tensors(path)
    line = str(caught.value)
    assert line.startswith(f"{path} is ")
    assert "more than tensors" not in line
    expected = {
        "lfs": "a Git LFS pointer, not a file of weights. Run `git lfs pull`",
        "html": "an HTML page, not a file of weights: the download failed, perhaps a login page. Download it again",
        "torchscript": "contains code; no code in it was executed",
        "gzip": "compressed with gzip. Unpack it first: `gunzip <",
        "xz": "compressed with xz. Unpack it first: `unxz <",
        "empty": "is empty. Copy or download it again",
    }
    assert expected.get(kind, "not a file of weights") in line


@pytest.mark.parametrize("kind", ["html", "xml", "lfs", "text", "json", "gzip", "parquet", "zip", "pytorch", "npy"])
def test_a_file_named_tar_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.tar", kind)
    with pytest.raises(DataError) as caught:
        open_images(path)
    expected = {"html": "perhaps a login page. Download it again", "lfs": "Run `git lfs pull`"}
    assert expected.get(kind, "compressed with gzip" if kind == "gzip" else "not a tar") in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a b.tar.gz", "a b.tar"), ("a.tgz", "a.tar"), ("a.tar", "a-unpacked.tar"), ("data", "data-unpacked")],
)
def test_unpack_command_works(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"content"))
    subprocess.run(unpack_command(name, "gzip"), shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / name).exists()
    assert (tmp_path / expected).read_bytes() == b"content"
